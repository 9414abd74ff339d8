//! Wiring only: which watches lead to which reconcile.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::ready;
use futures::{FutureExt, Stream, StreamExt, stream};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::runtime::controller::{Action, Config as ControllerConfig, Controller};
use kube::runtime::reflector::{self, Lookup, ObjectRef, Store};
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::DefaultBackoff;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::admin::{Liveness, Readiness, Topic};
use crate::apply::{self, Slim};
use crate::broker::{Brokers, Gate};
use crate::config::Config;
use crate::desired::names;
use crate::error::{Error, explain, explain_watch};
use crate::events::Events;
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::neighbours::{self, Neighbours};
use crate::observe::{Caches, Lookout};
use crate::reconcile::reconcile;
use crate::run::Clients;
use crate::signals::Signals;
use crate::telemetry::spans;
use crate::watched::Watched;

/// Every pool is looked at this often even if nothing seems to happen.
pub const RESYNC: Duration = Duration::from_secs(300);
/// Events of one change come in bursts; they lead to one reconcile.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// A watch that failed is tried again this soon at least: so much later may be seen what an outage has hidden.
const WATCH_RETRY: Duration = Duration::from_secs(10);
/// For how long an error of a watch counts that has worked before: longer than its pause between two tries.
pub(crate) const WATCH_ERROR: Duration = Duration::from_secs(90);
/// How often a missing CustomResourceDefinition is looked for.
const CRD_RETRY: Duration = Duration::from_secs(5);

/// What every reconcile shares.
pub struct Context {
    /// Connection to the API server.
    pub client: Client,
    /// What the watches know.
    pub caches: Caches,
    /// What pools refer to.
    pub lookout: Arc<Lookout>,
    /// What the brokers say.
    pub signals: Arc<Signals>,
    /// What earlier reconciles left.
    pub memory: Arc<Memory>,
    /// Kubernetes events.
    pub events: Events,
    /// The operator's own series.
    pub metrics: Arc<Metrics>,
    /// Looks at pools that are under way.
    pub liveness: Liveness,
    /// Image of the workers of a pool that names none.
    pub worker_image: String,
}

/// Reconciles until told to stop.
pub async fn run(
    clients: Clients,
    config: &Config,
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
    let cluster = Box::pin(neighbours::this_cluster()).await;
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

/// Where the operator looks, and who is told when it cannot.
struct Watching {
    client: Client,
    namespace: Option<String>,
    relist_after: Duration,
    readiness: Readiness,
}

impl Watching {
    fn ours<K>(&self, topic: Topic) -> (Store<K>, impl Stream<Item = watcher::Result<K>> + use<K>)
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Lookup<DynamicType = ()>,
        K: Slim + Clone + std::fmt::Debug + DeserializeOwned + Send + Sync + 'static,
    {
        let ours = format!("{}={}", names::MANAGED_BY_LABEL, names::OPERATOR);
        self.watch(topic, watcher::Config::default().labels(&ours))
    }

    fn all<K>(&self, topic: Topic) -> (Store<K>, impl Stream<Item = watcher::Result<K>> + use<K>)
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Lookup<DynamicType = ()>,
        K: Slim + Clone + std::fmt::Debug + DeserializeOwned + Send + Sync + 'static,
    {
        self.watch(topic, watcher::Config::default())
    }

    fn watch<K>(
        &self,
        topic: Topic,
        config: watcher::Config,
    ) -> (Store<K>, impl Stream<Item = watcher::Result<K>> + use<K>)
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Lookup<DynamicType = ()>,
        K: Slim + Clone + std::fmt::Debug + DeserializeOwned + Send + Sync + 'static,
    {
        let (cache, writer) = reflector::store();
        let readiness = self.readiness.clone();
        let mut is_listed = false;
        let events = changes(self.by::<K>(&self.client), config, self.relist_after).modify(apply::slim);
        let events = events.inspect(move |event| match event {
            Ok(event) => {
                is_listed |= matches!(event, watcher::Event::InitDone);
                readiness.has(topic);
            }
            Err(error) => {
                let why = explain_watch(error);
                tracing::warn!("{topic} failed: {why}");
                // A watch that goes on where it was cut says so by its next event only, which may be days away.
                let holds = if is_listed { WATCH_ERROR } else { Duration::MAX };
                readiness.waits_for(holds, topic, why);
            }
        });
        // The controller would stop listening to all watches for a while after an error of any: each waits by itself.
        let objects = events.reflect(writer).touched_objects().filter(|object| ready(object.is_ok()));
        (cache, objects)
    }

    /// Waits for the API to exist, instead of exiting and being restarted until it does.
    async fn crd(&self, calls: &Client) {
        while let Err(error) = self.by::<Watched>(calls).list(&ListParams::default().limit(1)).await {
            let why = match &error {
                kube::Error::Api(status) if status.code == 404 => {
                    "the CustomResourceDefinition workerpools.beamline.dev is not installed".to_owned()
                }
                other => format!("WorkerPools cannot be listed: {}", explain(other)),
            };
            tracing::warn!("waiting: {why}");
            self.readiness.waits(Topic::Crd, why);
            tokio::time::sleep(CRD_RETRY).await;
        }
        self.readiness.has(Topic::Crd);
    }

    fn by<K: Resource<DynamicType = (), Scope = NamespaceResourceScope>>(&self, client: &Client) -> Api<K> {
        match &self.namespace {
            Some(namespace) => Api::namespaced(client.clone(), namespace),
            None => Api::all(client.clone()),
        }
    }
}

/// What there is, and what becomes of it. What a watch that goes well has not told would never be found: so all is listed
/// anew now and then.
pub(crate) fn changes<K>(
    api: Api<K>,
    config: watcher::Config,
    relist_after: Duration,
) -> impl Stream<Item = watcher::Result<watcher::Event<K>>>
where
    K: Resource + Clone + std::fmt::Debug + DeserializeOwned + Send + 'static,
{
    let anew = move || {
        let events = watcher(api.clone(), config.clone()).backoff(Pauses::default());
        events.take_until(tokio::time::sleep(relist_after))
    };
    stream::repeat_with(anew).flatten()
}

/// Those of client-go, which grow with each failure, and none that is too long.
#[derive(Default)]
struct Pauses(DefaultBackoff);

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.0.next().map(|pause| pause.min(WATCH_RETRY))
    }
}

impl Backoff for Pauses {
    fn reset(&mut self) {
        self.0.reset();
    }
}

/// Our own writes of the status are no reason to look again. A spec of the same generation may be: a watch that is older
/// than its type shows what that one knew, until all is listed anew.
fn what_is_asked_for(pool: &Watched) -> Option<u64> {
    let spec = pool.pool.as_ref().ok().map(|pool| &pool.spec);
    Some(apply::fingerprint(&(pool.meta().generation, spec, &pool.unknown)))
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
        Err(error @ Error::Unreadable(_)) => ctx.events.unreadable(&pool, error).await,
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
