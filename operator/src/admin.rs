//! `/livez`, `/readyz`, `/metrics`, and what KEDA asks for.
//!
//! Alive means that the process answers and that every look at a pool ends; ready means that it can do its work, and says
//! what it waits for otherwise.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use kube::runtime::reflector::ObjectRef;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::lock::lock;
use crate::metrics::Metrics;
use crate::watched::Watched;

/// What the operator needs to do its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Topic {
    /// The right to use the Lease, and an API server that answers.
    Lease,
    /// The type itself, and the right to list it.
    Crd,
    /// A watch.
    WorkerPools,
    /// A watch.
    ServiceAccounts,
    /// A watch.
    ConfigMaps,
    /// A watch.
    Services,
    /// A watch.
    NetworkPolicies,
    /// A watch.
    PodDisruptionBudgets,
    /// A watch.
    Deployments,
    /// A watch.
    HorizontalPodAutoscalers,
    /// A watch.
    Pods,
    /// What is needed to serve external.metrics.k8s.io.
    ExternalMetrics,
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lease => "lease",
            Self::Crd => "crd",
            Self::WorkerPools => "watch of workerpools",
            Self::ServiceAccounts => "watch of serviceaccounts",
            Self::ConfigMaps => "watch of configmaps",
            Self::Services => "watch of services",
            Self::NetworkPolicies => "watch of networkpolicies",
            Self::PodDisruptionBudgets => "watch of poddisruptionbudgets",
            Self::Deployments => "watch of deployments",
            Self::HorizontalPodAutoscalers => "watch of horizontalpodautoscalers",
            Self::Pods => "watch of pods",
            Self::ExternalMetrics => "external metrics",
        })
    }
}

/// What the operator waits for. Ready when there is nothing.
#[derive(Clone, Default)]
pub struct Readiness {
    waiting: Arc<Mutex<BTreeMap<Topic, Wait>>>,
}

struct Wait {
    why: String,
    since: Instant,
    holds: Duration,
}

impl Readiness {
    /// Something is missing, until it is there.
    pub fn waits(&self, topic: Topic, why: impl Into<String>) {
        self.waits_for(Duration::MAX, topic, why);
    }

    /// Something is missing, until it is there or nobody has said so for that long.
    pub fn waits_for(&self, holds: Duration, topic: Topic, why: impl Into<String>) {
        let wait = Wait { why: why.into(), since: Instant::now(), holds };
        lock(&self.waiting).insert(topic, wait);
    }

    /// It is there.
    pub fn has(&self, topic: Topic) {
        lock(&self.waiting).remove(&topic);
    }

    fn report(&self) -> Result<(), String> {
        let mut waiting = lock(&self.waiting);
        waiting.retain(|_, wait| wait.since.elapsed() < wait.holds);
        if waiting.is_empty() {
            return Ok(());
        }
        Err(waiting.iter().map(|(topic, wait)| format!("{topic}: {}\n", wait.why)).collect())
    }
}

/// The looks at pools that are under way. Alive while none of them takes too long: each call has a limit, so that only a
/// bug does, and what helps against that is a restart.
#[derive(Clone)]
pub struct Liveness {
    limit: Duration,
    under_way: Arc<Mutex<HashMap<ObjectRef<Watched>, Instant>>>,
}

impl Liveness {
    /// A look takes this long at most.
    pub fn within(limit: Duration) -> Self {
        Self { limit, under_way: Arc::default() }
    }

    /// A look at this pool is under way until this is dropped. There is one at a time for each pool.
    #[must_use]
    pub fn looks_at(&self, pool: &ObjectRef<Watched>) -> Look {
        lock(&self.under_way).insert(pool.clone(), Instant::now());
        Look { pool: pool.clone(), under_way: Arc::clone(&self.under_way) }
    }

    fn report(&self) -> Result<(), String> {
        let under_way = lock(&self.under_way);
        let Some((pool, since)) = under_way.iter().min_by_key(|(_, since)| **since) else { return Ok(()) };
        let age = since.elapsed();
        if age < self.limit {
            return Ok(());
        }
        let namespace = pool.namespace.as_deref().unwrap_or_default();
        Err(format!("stalled: a look at pool {namespace}/{} has not ended for {} s\n", pool.name, age.as_secs()))
    }
}

/// A look at a pool.
pub struct Look {
    pool: ObjectRef<Watched>,
    under_way: Arc<Mutex<HashMap<ObjectRef<Watched>, Instant>>>,
}

impl Drop for Look {
    fn drop(&mut self) {
        lock(&self.under_way).remove(&self.pool);
    }
}

/// Serves until told to stop, with these routes for KEDA where it is served.
pub async fn serve(
    listener: TcpListener,
    (liveness, readiness): (Liveness, Readiness),
    metrics: Arc<Metrics>,
    queues: Option<Router>,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let routes = Router::new()
        .route("/livez", get(livez).with_state(liveness))
        .route("/readyz", get(readyz).with_state(readiness))
        .route("/metrics", get(series).with_state(metrics))
        .merge(queues.unwrap_or_default());
    axum::serve(listener, routes).with_graceful_shutdown(stop.cancelled_owned()).await
}

async fn livez(State(liveness): State<Liveness>) -> (StatusCode, String) {
    answer(liveness.report())
}

async fn readyz(State(readiness): State<Readiness>) -> (StatusCode, String) {
    answer(readiness.report())
}

fn answer(report: Result<(), String>) -> (StatusCode, String) {
    match report {
        Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, why),
    }
}

async fn series(State(metrics): State<Arc<Metrics>>) -> (StatusCode, String) {
    match metrics.text() {
        Ok(text) => (StatusCode::OK, text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_says_what_it_waits_for() {
        let readiness = Readiness::default();
        readiness.waits(Topic::Crd, "workerpools.beamline.dev is not installed");
        assert_eq!(readiness.report(), Err("crd: workerpools.beamline.dev is not installed\n".to_owned()));
        readiness.has(Topic::Crd);
        assert_eq!(readiness.report(), Ok(()));
    }

    #[test]
    fn what_may_have_mended_itself_unseen_is_waited_for_as_long_as_it_is_said_again() {
        let readiness = Readiness::default();
        readiness.waits_for(Duration::from_hours(1), Topic::Pods, "connection refused");
        assert_eq!(readiness.report(), Err("watch of pods: connection refused\n".to_owned()));
        readiness.waits_for(Duration::ZERO, Topic::Pods, "connection refused");
        assert_eq!(readiness.report(), Ok(()));
    }

    #[test]
    fn a_look_that_does_not_end_is_named() {
        let pool = ObjectRef::new("orders").within("shop");
        let patient = Liveness::within(Duration::from_hours(1));
        let _look = patient.looks_at(&pool);
        assert_eq!(patient.report(), Ok(()));
        let impatient = Liveness::within(Duration::ZERO);
        assert_eq!(impatient.report(), Ok(()), "nothing is under way");
        let look = impatient.looks_at(&pool);
        let stalled = "stalled: a look at pool shop/orders has not ended for 0 s\n";
        assert_eq!(impatient.report(), Err(stalled.to_owned()));
        drop(look);
        assert_eq!(impatient.report(), Ok(()));
    }
}
