//! Whose word counts for a stream that several pools use: that of the first pool that manages it. Its name is in the
//! stream's metadata. The others say what they would have otherwise.
//!
//! Only what a pool says outright is governed: what its spec leaves out is the administrator's once a stream exists. So
//! is a stream that a worker or a person made.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use async_nats::jetstream::context::Context;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::Config;
use serde_json::{Value, json};

use super::neighbours::{Governor, Neighbours};
use super::wanted::{DEAD_LETTERS, RESULTS};
use super::{Demand, Remark};
use crate::error::chain;
use crate::failpoint;
use crate::pool::Explicit;

/// A setting that can be altered while a stream is in use, as the broker names and writes it.
#[derive(Clone, Debug, PartialEq)]
struct Setting {
    field: &'static str,
    found: Value,
    wanted: Value,
}

/// How long a stream that the broker refuses to alter is left as it is, unless it or the wish changes.
const REFUSED: Duration = Duration::from_secs(300);

/// What the broker refused to alter for a pool, by stream.
#[derive(Debug, Default)]
pub struct Refusals(HashMap<String, Refusal>);

#[derive(Debug)]
struct Refusal {
    settings: Vec<Setting>,
    why: String,
    at: Instant,
}

impl Refusals {
    fn of(&self, stream: &str, settings: &[Setting]) -> Option<String> {
        let refusal = self.0.get(stream)?;
        (refusal.settings == settings && refusal.at.elapsed() < REFUSED).then(|| refusal.why.clone())
    }

    /// Notes it, and says so once.
    fn note(&mut self, stream: &str, pool: &str, settings: &[Setting], why: &str) {
        let refusal = Refusal { settings: settings.to_vec(), why: why.to_owned(), at: Instant::now() };
        let last = self.0.insert(stream.to_owned(), refusal);
        if last.is_none_or(|last| (last.settings.as_slice(), last.why.as_str()) != (settings, why)) {
            tracing::warn!(%stream, %pool, %why, "cannot alter the stream that this pool governs");
        }
    }
}

/// Makes a stream as its governing pool says, and tells what is not as this pool says.
pub(super) async fn settle(
    jetstream: &Context,
    found: &Config,
    demand: &Demand,
    neighbours: &Neighbours,
    refusals: &mut Refusals,
) -> Vec<Remark> {
    let differing = differing(&demand.nats.streams.explicit, found);
    let pool = demand.pool();
    let is_due = match neighbours.governor(&found.name, &found.metadata) {
        _ if !demand.nats.streams.manage => Err("nats.streams.manage is false".to_owned()),
        Governor::Pool(governor) if governor == pool => Ok(!differing.is_empty()),
        // Also when nothing differs: somebody must have the say.
        Governor::Gone(_) => Ok(true),
        Governor::Pool(governor) => Err(format!("pool {governor} governs it")),
        Governor::Unseen(governor) => Err(format!("pool {governor} governs it, which this operator does not see")),
        Governor::Nobody => Err("it was not made for a pool; alter it by hand".to_owned()),
    };
    let outcome = match is_due {
        Ok(true) => match refusals.of(&found.name, &differing) {
            Some(why) => Err(why),
            None => alter(jetstream, &found.name, &differing, &pool, neighbours)
                .await
                .inspect_err(|why| refusals.note(&found.name, &pool, &differing, why)),
        },
        Ok(false) => {
            refusals.0.remove(&found.name);
            Ok(())
        }
        Err(why) => Err(why),
    };
    match outcome {
        Ok(()) => Vec::new(),
        Err(why) => differing.into_iter().map(|setting| remark(&found.name, setting, &why)).collect(),
    }
}

fn remark(stream: &str, Setting { field, found, wanted }: Setting, why: &str) -> Remark {
    let shown = |value: &Value| match (field, value.as_u64()) {
        ("max_age", Some(nanos)) => humantime::format_duration(Duration::from_nanos(nanos)).to_string(),
        _ => value.to_string(),
    };
    Remark::Differs {
        stream: stream.to_owned(),
        field,
        found: shown(&found),
        wanted: shown(&wanted),
        why: why.to_owned(),
    }
}

/// What a pool says outright about this stream, and the stream is not.
fn differing(explicit: &Explicit, found: &Config) -> Vec<Setting> {
    let age = |wanted: Option<Duration>| (wanted.map(nanos), "max_age", nanos(found.max_age));
    let (kept, number) = match found.name.as_str() {
        RESULTS => (explicit.result_retention, explicit.result_max_messages),
        DEAD_LETTERS => (explicit.dead_letter_retention, None),
        _ => (None, None),
    };
    let settings = [
        age(kept),
        (number.map(Value::from), "max_msgs", found.max_messages.into()),
        (explicit.replicas.map(Value::from), "num_replicas", found.num_replicas.into()),
    ];
    settings
        .into_iter()
        .filter_map(|(wanted, field, found)| Some(Setting { field, wanted: wanted?, found }))
        .filter(|setting| setting.wanted != setting.found)
        .collect()
}

fn nanos(duration: Duration) -> Value {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX).into()
}

/// With the broker's own words for all else: a setting that this client does not know stays.
async fn alter(
    jetstream: &Context,
    stream: &str,
    settings: &[Setting],
    pool: &str,
    neighbours: &Neighbours,
) -> Result<(), String> {
    let info: Value = ask(jetstream, format!("STREAM.INFO.{stream}"), &json!(null)).await?;
    let config = with(info.get("config").cloned().unwrap_or_default(), settings, neighbours.mark(pool));
    let update = ask(jetstream, format!("STREAM.UPDATE.{stream}"), &config);
    let _: Value = failpoint::around("update", "stream", stream, update).await?;
    let fields: Vec<_> = settings.iter().map(|setting| setting.field).collect();
    tracing::info!(%stream, %pool, ?fields, "the stream is as this pool says");
    Ok(())
}

fn with(mut config: Value, settings: &[Setting], mark: impl IntoIterator<Item = (String, String)>) -> Value {
    let Some(fields) = config.as_object_mut() else { return config };
    for setting in settings {
        fields.insert(setting.field.to_owned(), setting.wanted.clone());
    }
    // The broker refuses to know messages for longer than it keeps them.
    let number = |field: &str| fields.get(field).and_then(Value::as_u64).unwrap_or(0);
    let (age, window) = (number("max_age"), number("duplicate_window"));
    if age > 0 && window > age {
        fields.insert("duplicate_window".to_owned(), age.into());
    }
    let metadata = fields.entry("metadata").or_insert_with(|| json!({}));
    if let Some(metadata) = metadata.as_object_mut() {
        metadata.extend(mark.into_iter().map(|(key, value)| (key, value.into())));
    }
    config
}

async fn ask(jetstream: &Context, subject: String, payload: &Value) -> Result<Value, String> {
    match jetstream.request(subject, payload).await {
        Ok(Response::Ok(answer)) => Ok(answer),
        Ok(Response::Err { error }) => Err(format!("the broker refuses: {error}")),
        Err(error) => Err(chain(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::tests::valid;
    use crate::streams::streams;

    fn asked(streams: &str) -> (Explicit, Vec<Config>) {
        let nats = valid(&format!(r#"{{"nats": {{"streams": {streams}}}}}"#)).nats;
        (nats.streams.explicit.clone(), self::streams(&nats))
    }

    #[test]
    fn what_a_pool_leaves_out_is_the_administrators() {
        let (explicit, streams) = asked("{}");
        for mut stream in streams {
            (stream.num_replicas, stream.max_age, stream.max_messages) = (3, Duration::from_secs(7), 9);
            assert_eq!(differing(&explicit, &stream), []);
        }
    }

    #[test]
    fn what_a_pool_says_is_compared_where_it_applies() {
        let (_, before) = asked("{}");
        let (explicit, _) = asked(r#"{"replicas": 3, "resultRetention": "2h", "resultMaxMessages": 5000}"#);
        for stream in before {
            let fields: Vec<_> = differing(&explicit, &stream).into_iter().map(|setting| setting.field).collect();
            match stream.name.as_str() {
                RESULTS => assert_eq!(fields, ["max_age", "max_msgs", "num_replicas"]),
                _ => assert_eq!(fields, ["num_replicas"]),
            }
        }
    }

    #[test]
    fn a_difference_is_told_in_the_users_units() {
        let (explicit, _) = asked(r#"{"resultRetention": "90m"}"#);
        let found = asked("{}").1.into_iter().find(|stream| stream.name == RESULTS).expect("results");
        let setting = differing(&explicit, &found).remove(0);
        assert_eq!(
            remark(RESULTS, setting, "pool flows/first governs it").to_string(),
            "stream CAF_EXEC_RESULT: max_age stays 1h, this pool says 1h 30m: pool flows/first governs it"
        );
    }

    #[test]
    fn a_refusal_holds_for_what_was_refused() {
        let three = [Setting { field: "num_replicas", found: json!(1), wanted: json!(3) }];
        let five = [Setting { field: "num_replicas", found: json!(1), wanted: json!(5) }];
        let mut refusals = Refusals::default();
        refusals.note(RESULTS, "flows/first", &three, "too many");
        assert_eq!(refusals.of(RESULTS, &three).as_deref(), Some("too many"));
        assert_eq!((refusals.of(RESULTS, &five), refusals.of(DEAD_LETTERS, &three)), (None, None));
        let Some(refusal) = refusals.0.get_mut(RESULTS) else { panic!("it is noted") };
        refusal.at = Instant::now().checked_sub(REFUSED).expect("the clock is older");
        assert_eq!(refusals.of(RESULTS, &three), None, "it is tried again");
    }

    #[test]
    fn altering_keeps_what_this_client_does_not_know() {
        let config =
            json!({"name": "S", "max_age": 9, "duplicate_window": 8, "from_the_future": [1], "metadata": {"a": "b"}});
        let shorter = Setting { field: "max_age", found: json!(9), wanted: json!(5) };
        let mark = [("by".to_owned(), "x".to_owned())];
        assert_eq!(
            with(config, &[shorter], mark),
            json!({"name": "S", "max_age": 5, "duplicate_window": 5, "from_the_future": [1], "metadata": {"a": "b", "by": "x"}})
        );
    }
}
