//! Which number is asked for, and what it is; or why there is none. Pure: time is an argument.

use std::sync::Arc;

use beamline_crds::{Mode, Queue, WorkerPool};
use jiff::{Timestamp, Unit};
use kube::Resource;
use serde_json::{Value, json};

use crate::names::metrics::{DEPTH, GROUP, GROUP_VERSION, IN_FLIGHT, OLDEST_AGE, PENDING, POOL_LABEL, VERSION};
use crate::watched::Watched;

const METRICS: [&str; 4] = [DEPTH, PENDING, IN_FLIGHT, OLDEST_AGE];

/// Why there is no number, as the API server says such things.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) code: u16,
    reason: &'static str,
    message: String,
}

impl Refusal {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into() }
    }

    pub(super) fn not_found(message: &str) -> Self {
        Self::new(404, "NotFound", message)
    }

    pub(super) fn unavailable(message: &str) -> Self {
        Self::new(503, "ServiceUnavailable", message)
    }

    pub(super) fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "ask the API server: only its aggregator's client certificate is let in here")
    }

    pub(super) fn forbidden(name: &str) -> Self {
        let message = format!("the client certificate of `{name}` is none of the API server's aggregator");
        Self::new(403, "Forbidden", message)
    }

    pub(super) fn status(&self) -> Value {
        let Self { code, reason, message } = self;
        json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": message, "reason": reason, "code": code,
        })
    }
}

pub(super) fn groups() -> Value {
    let mut group = group();
    if let Some(group) = group.as_object_mut() {
        group.retain(|key, _| !matches!(key.as_str(), "kind" | "apiVersion"));
    }
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": [group]})
}

pub(super) fn group() -> Value {
    let version = json!({"groupVersion": GROUP_VERSION, "version": VERSION});
    json!({"kind": "APIGroup", "apiVersion": "v1", "name": GROUP, "versions": [version], "preferredVersion": version})
}

pub(super) fn resources() -> Value {
    let resource = |name: &str| {
        json!({
            "name": name, "singularName": "", "namespaced": true, "kind": "ExternalMetricValueList", "verbs": ["get"],
        })
    };
    let resources: Vec<_> = METRICS.into_iter().map(resource).collect();
    json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": GROUP_VERSION, "resources": resources})
}

/// A number for each of these pools, all of one namespace, that the selector fits; one that cannot be had is not left out,
/// since whoever asked for several adds them.
pub(super) fn values(metric: &str, selector: &str, pools: &[Arc<Watched>], now: Timestamp) -> Result<Value, Refusal> {
    let number = number_of(metric).ok_or_else(|| {
        Refusal::not_found(&format!("there is no metric `{metric}`; there are {}", METRICS.join(", ")))
    })?;
    let selects = Selector::parse(selector)?;
    let timestamp = now.round(Unit::Second).unwrap_or(now).to_string();
    let mut items = Vec::new();
    for pool in pools {
        let name = name(pool);
        if !selects.fits(name) {
            continue;
        }
        let queue = readable(pool).map_err(|why| Refusal::unavailable(&format!("WorkerPool `{name}`: {why}")))?;
        items.push(json!({
            "metricName": metric,
            "metricLabels": {POOL_LABEL: name},
            "timestamp": timestamp,
            "value": number(queue, now).to_string(),
        }));
    }
    if items.is_empty() {
        return Err(Refusal::not_found(&format!("no WorkerPool of this namespace fits the selector `{selector}`")));
    }
    Ok(json!({"kind": "ExternalMetricValueList", "apiVersion": GROUP_VERSION, "metadata": {}, "items": items}))
}

/// All numbers of this pool's queue; in mode KEDA also what KEDA scales by.
pub(super) fn queue(pool: Option<&Watched>, now: Timestamp) -> Result<Value, Refusal> {
    let pool = pool.ok_or_else(|| Refusal::not_found("there is no such WorkerPool"))?;
    let queue = readable(pool).map_err(|why| Refusal::unavailable(&why))?;
    if is_keda(pool) && queue.demand.is_none() {
        return Err(Refusal::unavailable("it is not known how much there is to do"));
    }
    Ok(json!({
        "depth": queue.depth,
        "pending": queue.pending,
        "inFlight": queue.in_flight,
        "oldestAgeSeconds": oldest_age(queue, now),
        "demand": queue.demand,
    }))
}

fn is_keda(watched: &Watched) -> bool {
    let scaling = watched.pool.as_ref().ok().and_then(|pool| pool.spec.scaling.as_ref());
    scaling.is_some_and(|scaling| scaling.mode == Some(Mode::Keda))
}

fn oldest_age(queue: &Queue, now: Timestamp) -> i64 {
    queue.oldest_since.as_ref().map_or(0, |since| now.duration_since(since.0).as_secs().max(0))
}

fn number_of(metric: &str) -> Option<fn(&Queue, Timestamp) -> i64> {
    match metric {
        DEPTH => Some(|queue, _| queue.depth),
        PENDING => Some(|queue, _| queue.pending),
        IN_FLIGHT => Some(|queue, _| queue.in_flight),
        OLDEST_AGE => Some(oldest_age),
        _ => None,
    }
}

fn name(watched: &Watched) -> &str {
    watched.meta().name.as_deref().unwrap_or_default()
}

/// The queue, if it is readable now.
fn readable(watched: &Watched) -> Result<&Queue, String> {
    let pool: &WorkerPool = watched.pool.as_ref().map_err(|invalid| invalid.error.clone())?;
    let status = pool.status.as_ref().ok_or("the operator has not looked at it yet")?;
    match status.condition("QueueReadable") {
        Some(condition) if condition.status == "True" => {
            status.queue.as_ref().ok_or_else(|| "nats.delivery is Core: there is no queue".to_owned())
        }
        Some(condition) => Err(format!("the queue cannot be read: {}", condition.message)),
        None => Err("the queue has not been read yet".to_owned()),
    }
}

/// Which pools: by name, in the terms of label selectors.
struct Selector<'a> {
    terms: Vec<Term<'a>>,
}

enum Term<'a> {
    Is(&'a str),
    IsNot(&'a str),
}

impl<'a> Selector<'a> {
    /// `workerpool=name`, also with `==` and `!=`, several separated by commas.
    fn parse(text: &'a str) -> Result<Self, Refusal> {
        let terms = text.split(',').map(str::trim).filter(|term| !term.is_empty()).map(Self::term);
        Ok(Self { terms: terms.collect::<Result<_, _>>()? })
    }

    fn term(term: &'a str) -> Result<Term<'a>, Refusal> {
        let (key, value) = match term.split_once("!=") {
            Some((key, name)) => (key, Term::IsNot(name.trim())),
            None => match term.split_once("==").or_else(|| term.split_once('=')) {
                Some((key, name)) => (key, Term::Is(name.trim())),
                None => ("", Term::Is("")),
            },
        };
        if key.trim() == POOL_LABEL {
            return Ok(value);
        }
        let message = format!("labelSelector: `{term}` is not understood; write {POOL_LABEL}=<name of a WorkerPool>");
        Err(Refusal::new(400, "BadRequest", message))
    }

    fn fits(&self, name: &str) -> bool {
        self.terms.iter().all(|term| match term {
            Term::Is(wanted) => *wanted == name,
            Term::IsNot(unwanted) => *unwanted != name,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: &str = "2026-11-26T12:00:30Z";

    fn pool(name: &str, status: Value) -> Arc<Watched> {
        let pool = json!({
            "apiVersion": "beamline.dev/v1alpha1", "kind": "WorkerPool",
            "metadata": {"name": name, "namespace": "flows"},
            "spec": {"nats": {"url": "nats://nats.test"}},
            "status": status,
        });
        Arc::new(serde_json::from_value(pool).expect("a WorkerPool"))
    }

    fn status(readable: &str, queue: Value) -> Value {
        let condition = json!({"type": "QueueReadable", "status": readable, "reason": "", "message": "no answer",
            "lastTransitionTime": NOW});
        json!({"replicas": 0, "queue": queue, "conditions": [condition]})
    }

    fn busy() -> Value {
        let queue = json!({"depth": 484, "pending": 420, "inFlight": 64, "oldestSince": "2026-11-26T12:00:18Z",
            "deadLetters": 0});
        status("True", queue)
    }

    fn ask(metric: &str, selector: &str, pools: &[Arc<Watched>]) -> Result<Vec<String>, (u16, String)> {
        let answer = values(metric, selector, pools, NOW.parse().expect("a time"));
        let answer = answer.map_err(|refusal| (refusal.code, refusal.message))?;
        let items = answer["items"].as_array().expect("items");
        Ok(items.iter().map(|item| format!("{}={}", item["metricLabels"][POOL_LABEL], item["value"])).collect())
    }

    #[test]
    fn each_metric_is_a_number_of_the_status() {
        let pools = [pool("orders", busy()), pool("mail", busy())];
        for (metric, number) in [(DEPTH, 484), (PENDING, 420), (IN_FLIGHT, 64), (OLDEST_AGE, 12)] {
            assert_eq!(ask(metric, "workerpool=orders", &pools), Ok(vec![format!("\"orders\"=\"{number}\"")]));
        }
        assert_eq!(ask(DEPTH, "", &pools).map(|values| values.len()), Ok(2));
        assert_eq!(ask(DEPTH, "workerpool!=orders", &pools), Ok(vec!["\"mail\"=\"484\"".to_owned()]));
    }

    #[test]
    fn what_cannot_be_read_has_no_number_and_is_not_left_out_of_a_sum() {
        let unreadable =
            pool("mail", status("False", json!({"depth": 3, "pending": 3, "inFlight": 0, "deadLetters": 0})));
        let refused = ask(DEPTH, "", &[pool("orders", busy()), unreadable]);
        assert_eq!(refused, Err((503, "WorkerPool `mail`: the queue cannot be read: no answer".to_owned())));
        let code = |status: Value| ask(DEPTH, "", &[pool("mail", status)]).map_err(|(code, _)| code);
        assert_eq!(code(status("Unknown", Value::Null)), Err(503));
        assert_eq!(code(status("True", Value::Null)), Err(503), "core mode has no queue");
        assert_eq!(code(Value::Null), Err(503), "nobody has looked yet");
    }

    #[test]
    fn keda_is_told_what_there_is_to_do_zero_included_and_no_number_where_that_is_not_known() {
        let pool = |mode: &str, status: Value| -> Watched {
            let pool = json!({
                "apiVersion": "beamline.dev/v1alpha1", "kind": "WorkerPool", "metadata": {"name": "orders"},
                "spec": {"nats": {"url": "nats://nats.test"}, "scaling": {"mode": mode}}, "status": status,
            });
            serde_json::from_value(pool).expect("a WorkerPool")
        };
        let numbers = |depth: i64, demand: Value| {
            status("True", json!({"depth": depth, "pending": depth, "inFlight": 0, "deadLetters": 0, "demand": demand}))
        };
        let asked = |pool: &Watched| queue(Some(pool), NOW.parse().expect("a time")).map_err(|refusal| refusal.code);
        let demand = |pool: &Watched| asked(pool).map(|queue| queue["demand"].clone());
        assert_eq!(demand(&pool("KEDA", numbers(0, json!(0)))), Ok(json!(0)));
        assert_eq!(demand(&pool("KEDA", numbers(0, json!(1)))), Ok(json!(1)), "a deadline is due");
        assert_eq!(demand(&pool("KEDA", numbers(0, Value::Null))), Err(503), "something may be due");
        assert_eq!(
            demand(&pool(
                "KEDA",
                status(
                    "False",
                    json!({"depth": 3, "pending": 3, "inFlight": 0,
            "deadLetters": 0, "demand": 3})
                )
            )),
            Err(503),
            "it was so once"
        );
        let all = json!({"depth": 484, "pending": 420, "inFlight": 64, "oldestAgeSeconds": 12, "demand": null});
        assert_eq!(asked(&pool("Manual", busy())), Ok(all), "a ScaledObject of somebody's own");
        assert_eq!(queue(None, NOW.parse().expect("a time")).map_err(|refusal| refusal.code), Err(404));
    }

    #[test]
    fn what_is_not_there_or_not_understood_is_said() {
        let pools = [pool("orders", busy())];
        let code = |metric, selector| ask(metric, selector, &pools).map_err(|(code, _)| code);
        assert_eq!(code("beamline_queue", "workerpool=orders"), Err(404));
        assert_eq!(code(DEPTH, "workerpool=other"), Err(404));
        for unclear in ["pool=orders", "workerpool", "workerpool in (orders)"] {
            assert_eq!(code(DEPTH, unclear), Err(400), "{unclear}");
        }
    }
}
