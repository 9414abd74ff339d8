//! `/livez`, `/readyz`, `/metrics`, and what KEDA asks for.
//!
//! Alive means that the process answers; ready means that it can do its work, and says what it waits for otherwise.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::lock::lock;
use crate::metrics::Metrics;

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

/// Serves until told to stop, with these routes for KEDA where it is served.
pub async fn serve(
    listener: TcpListener,
    readiness: Readiness,
    metrics: Arc<Metrics>,
    queues: Option<Router>,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let routes = Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(readyz).with_state(readiness))
        .route("/metrics", get(series).with_state(metrics))
        .merge(queues.unwrap_or_default());
    axum::serve(listener, routes).with_graceful_shutdown(stop.cancelled_owned()).await
}

async fn readyz(State(readiness): State<Readiness>) -> (StatusCode, String) {
    match readiness.report() {
        Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
        Err(waiting) => (StatusCode::SERVICE_UNAVAILABLE, waiting),
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
}
