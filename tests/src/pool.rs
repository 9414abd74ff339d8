//! WorkerPools at an API server.

use std::time::Duration;

use serde_json::{Value, json};

use crate::api::Api;
use crate::nats::NatsServer;
use crate::wait::within;

/// A pool, and how it is reached.
#[derive(Clone, Debug)]
pub struct Pool {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    nats: String,
}

impl Pool {
    /// At this broker, which is to be made.
    pub fn new(namespace: &str, name: &str, nats: &NatsServer) -> Self {
        Self { namespace: namespace.to_owned(), name: name.to_owned(), nats: nats.url() }
    }

    /// Its path at the API server.
    pub fn path(&self) -> String {
        format!("{}/{}", pools(&self.namespace), self.name)
    }

    /// Creates it with this spec, and a queue of its own.
    pub async fn create(&self, api: &Api, spec: Value) {
        let mut pool = json!({
            "apiVersion": "beamline.dev/v1alpha1",
            "kind": "WorkerPool",
            "metadata": {"name": self.name},
            "spec": {"replicas": 1, "scaling": {"mode": "Manual"}, "nats": {"url": self.nats, "subject": format!("work.{}", self.name)}},
        });
        merge(&mut pool["spec"], spec);
        api.apply(&self.path(), &pool).await;
    }

    /// Merges this into its spec.
    pub async fn change(&self, api: &Api, spec: Value) {
        api.merge(&self.path(), &json!({ "spec": spec })).await;
    }

    /// Waits until all that is asked for is there.
    pub async fn converged(&self, api: &Api, limit: Duration) {
        let what = format!("{} has converged", self.path());
        within(limit, &what, async || api.get(&self.path()).await.filter(has_converged).map(drop)).await;
    }
}

/// The path of the pools of a namespace.
pub fn pools(namespace: &str) -> String {
    format!("/apis/beamline.dev/v1alpha1/namespaces/{namespace}/workerpools")
}

/// Ready, nothing under way, and all of it said of the spec as it is now.
pub fn has_converged(pool: &Value) -> bool {
    let generation = &pool["metadata"]["generation"];
    let says = |kind: &str, status: &str| {
        let conditions = pool["status"]["conditions"].as_array();
        conditions.is_some_and(|all| {
            let is_so = |one: &Value| one["status"] == status && one["observedGeneration"] == *generation;
            all.iter().any(|one| one["type"] == kind && is_so(one))
        })
    };
    let has_all = |class: &Value| class["readyReplicas"] == class["desiredReplicas"];
    let is_whole = has_all(&pool["status"]) && has_all(&pool["status"]["gpu"]);
    is_whole && says("Ready", "True") && says("Progressing", "False") && says("StreamsReady", "True")
}

/// Takes over what the latter says, field by field.
pub fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            from.into_iter().for_each(|(key, value)| merge(into.entry(key).or_insert(Value::Null), value));
        }
        (into, from) => *into = from,
    }
}
