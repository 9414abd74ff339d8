//! Where the operator looks: what there is, kept in caches, and what becomes of it.

use std::time::Duration;

use futures::future::ready;
use futures::{Stream, StreamExt, stream};
use k8s_openapi::NamespaceResourceScope;
use kube::api::ListParams;
use kube::runtime::reflector::{self, Lookup, Store};
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::DefaultBackoff;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;

use crate::admin::{Readiness, Topic};
use crate::error::{explain, explain_watch};
use crate::names;
use crate::slim::{Slim, slim};
use crate::watched::Watched;

/// A watch that failed is tried again this soon at least: so much later may be seen what an outage has hidden.
const WATCH_RETRY: Duration = Duration::from_secs(10);
/// For how long an error of a watch counts that has worked before: longer than its pause between two tries.
pub const WATCH_ERROR: Duration = Duration::from_secs(90);
/// How often a missing CustomResourceDefinition is looked for.
const CRD_RETRY: Duration = Duration::from_secs(5);

/// Where the operator looks, and who is told when it cannot.
pub struct Watching {
    /// Connection to the API server, on which calls need not end.
    pub client: Client,
    /// The only namespace that is watched; all of them where there is none.
    pub namespace: Option<String>,
    /// How often all is listed anew.
    pub relist_after: Duration,
    /// Whoever is told.
    pub readiness: Readiness,
}

impl Watching {
    /// Objects that the operator makes.
    pub fn ours<K>(&self, topic: Topic) -> (Store<K>, impl Stream<Item = watcher::Result<K>> + use<K>)
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Lookup<DynamicType = ()>,
        K: Slim + Clone + std::fmt::Debug + DeserializeOwned + Send + Sync + 'static,
    {
        let ours = format!("{}={}", names::MANAGED_BY_LABEL, names::OPERATOR);
        self.watch(topic, watcher::Config::default().labels(&ours))
    }

    /// All objects.
    pub fn all<K>(&self, topic: Topic) -> (Store<K>, impl Stream<Item = watcher::Result<K>> + use<K>)
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
        let events = changes(self.by::<K>(&self.client), config, self.relist_after).modify(slim);
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
    pub async fn crd(&self, calls: &Client) {
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
pub fn changes<K>(
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
