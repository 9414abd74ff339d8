//! Wiring only: which watches lead to which reconcile.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{FutureExt, StreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::Resource;
use kube::runtime::WatchStreamExt;
use kube::runtime::controller::{Action, Config as ControllerConfig, Controller};
use kube::runtime::reflector::{Lookup, ObjectRef};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::admin::{Liveness, Readiness, Topic};
use crate::broker::{Brokers, Gate};
use crate::clients::Clients;
use crate::config::Config;
use crate::context::{Caches, Context};
use crate::error::Error;
use crate::events::Events;
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::names;
use crate::reconcile::reconcile;
use crate::signals::Signals;
use crate::slim::fingerprint;
use crate::streams::{Neighbours, this_cluster};
use crate::surroundings::Lookout;
use crate::telemetry::spans;
use crate::tenure::Tenure;
use crate::watched::Watched;
use crate::watches::Watching;

/// Events of one change come in bursts; they lead to one reconcile.
const DEBOUNCE: Duration = Duration::from_millis(100);

/// Reconciles until told to stop.
pub async fn run(
    clients: Clients,
    config: &Config,
    tenure: Tenure,
    (liveness, readiness): (Liveness, Readiness),
    metrics: Arc<Metrics>,
    stop: CancellationToken,
) {
    let Clients { calls: client, watches } = clients;
    let (namespace, relist_after) = (config.watch_namespace.clone(), config.relist_after);
    let watching = Watching { client: watches, namespace, relist_after, readiness };
    if stop.run_until_cancelled(watching.crd(&client)).await.is_none() {
        return;
    }
    let (pools, pool_changes) = watching.all::<Watched>(Topic::WorkerPools);
    metrics.show(pools.clone());
    let (service_accounts, account_changes) = watching.ours(Topic::ServiceAccounts);
    let (config_maps, config_changes) = watching.ours(Topic::ConfigMaps);
    let (services, service_changes) = watching.ours(Topic::Services);
    let (network_policies, policy_changes) = watching.ours(Topic::NetworkPolicies);
    let (budgets, budget_changes) = watching.ours(Topic::PodDisruptionBudgets);
    let (autoscalers, autoscaler_changes) = watching.ours(Topic::HorizontalPodAutoscalers);
    let (deployments, deployment_changes) = watching.ours(Topic::Deployments);
    let (pods, pod_changes) = watching.ours::<Pod>(Topic::Pods);
    let memory = Arc::new(Memory::of(pools.clone()));
    let cluster = Box::pin(this_cluster()).await;
    let neighbours = Neighbours::new(pools.clone(), cluster, config.watch_namespace.clone());
    let lookout =
        Arc::new(Lookout::new(client.clone(), config.kubernetes_service_host.clone(), config.keda_url.clone()));
    let gate = Gate::new(Arc::clone(&lookout), config.nats_allow.clone());
    let brokers = Brokers::new(client.clone(), gate, pods.clone());
    let (signals, readings) = Signals::new(brokers, pools.clone(), neighbours, Arc::clone(&memory));
    let caches =
        Caches { service_accounts, config_maps, services, network_policies, budgets, autoscalers, deployments, pods };
    let events = Events::new(client.clone());
    let context = Arc::new(Context {
        client,
        tenure,
        caches,
        lookout,
        signals,
        memory,
        events,
        metrics,
        liveness,
        worker_image: config.worker_image.clone(),
    });
    let pool_changes = pool_changes.predicate_filter(what_is_asked_for, Default::default());
    Controller::for_stream(pool_changes, pools)
        .with_config(ControllerConfig::default().concurrency(config.concurrency).debounce(DEBOUNCE))
        .owns_stream(account_changes)
        .owns_stream(config_changes)
        .owns_stream(service_changes)
        .owns_stream(policy_changes)
        .owns_stream(budget_changes)
        .owns_stream(autoscaler_changes)
        .owns_stream(deployment_changes)
        .watches_stream(pod_changes, |pod| pool_of(&pod))
        .reconcile_on(readings)
        .graceful_shutdown_on(stop.cancelled_owned())
        .run(guarded, on_error, context)
        .for_each(async |_| {})
        .await;
}

/// Our own writes of the status are no reason to look again. A spec of the same generation may be: a watch that is older
/// than its type shows what that one knew, until all is listed anew.
fn what_is_asked_for(watched: &Watched) -> Option<u64> {
    let spec = watched.pool.as_ref().ok().map(|pool| &pool.spec);
    Some(fingerprint(&(watched.meta().generation, spec, &watched.unknown)))
}

fn pool_of(pod: &Pod) -> Option<ObjectRef<Watched>> {
    let pool = pod.metadata.labels.as_ref()?.get(names::POOL_LABEL)?;
    Some(ObjectRef::new(pool).within(pod.metadata.namespace.as_deref()?))
}

/// Counts, and keeps a bug in one reconcile from ending all.
async fn guarded(pool: Arc<Watched>, ctx: Arc<Context>) -> Result<Action, Error> {
    let started = Instant::now();
    let reference = pool.to_object_ref(());
    let (_look, _running) = (ctx.liveness.looks_at(&reference), ctx.metrics.runs());
    let span = spans::reconcile(reference.namespace.as_deref().unwrap_or_default(), &reference.name);
    let unwound =
        AssertUnwindSafe(reconcile(Arc::clone(&pool), Arc::clone(&ctx))).catch_unwind().instrument(span.clone()).await;
    let result = unwound.unwrap_or_else(|_: Box<dyn Any + Send>| Err(Error::Panicked));
    match &result {
        Ok(_) => ctx.memory.succeeded(&reference),
        // It is looked at whenever its queue moves, too.
        Err(error @ Error::Unreadable(why)) if ctx.memory.is_news(&reference, why) => {
            ctx.events.unreadable(&pool, error).await;
        }
        Err(_) => {}
    }
    spans::ended(&span, result.as_ref().err().map(Error::reason));
    ctx.metrics.reconciled(result.as_ref().map_or_else(Error::reason, |_| "ok"), started);
    result
}

fn on_error(pool: Arc<Watched>, error: &Error, ctx: Arc<Context>) -> Action {
    let reference = pool.to_object_ref(());
    tracing::warn!(pool = %reference, reason = error.reason(), "{error}");
    if error.waits_for_a_change() {
        return Action::await_change();
    }
    Action::requeue(ctx.memory.backoff(&reference))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn asked_for(spec: serde_json::Value, depth: i64) -> Option<u64> {
        let nats = json!({"url": "nats://nats:4222"});
        let mut spec = spec;
        spec["nats"] = nats;
        let queue = json!({"depth": depth, "pending": depth, "inFlight": 0, "deadLetters": 0});
        let pool = json!({"apiVersion": "beamline.dev/v1alpha1", "kind": "WorkerPool",
            "metadata": {"name": "orders", "generation": 2}, "spec": spec, "status": {"queue": queue}});
        what_is_asked_for(&serde_json::from_value(pool).expect("a WorkerPool"))
    }

    #[test]
    fn a_spec_that_looks_different_is_a_reason_to_look_again_and_a_status_is_none() {
        assert_eq!(asked_for(json!({}), 1), asked_for(json!({}), 2));
        // The same generation, before and after its type was upgraded.
        assert_ne!(asked_for(json!({}), 1), asked_for(json!({"paused": true}), 1));
    }
}
