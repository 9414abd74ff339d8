//! What children are called and labelled. Selectors are immutable: a change here orphans running pods.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};

use crate::pool::ValidPool;

/// Says which pool a child belongs to.
pub const POOL_LABEL: &str = "beamline.dev/pool";
/// Says which class of pods a pod belongs to.
pub const CLASS_LABEL: &str = "beamline.dev/class";
/// Carried by everything that the operator makes; its watches select on it.
pub const MANAGED_BY_LABEL: &str = "app.kubernetes.io/managed-by";
/// The value of [`MANAGED_BY_LABEL`], and the one field manager of every write.
pub const OPERATOR: &str = "beamline-operator";
/// Name of the container, its port and the port of the Service.
pub const CONTAINER: &str = "worker";
/// Name of the port that serves metrics and probes.
pub const METRICS_PORT: &str = "metrics";
/// Changes with the configuration, so that pods are replaced when it does.
pub const CONFIG_HASH: &str = "beamline.dev/config-hash";

/// Name of the ServiceAccount.
pub fn service_account(pool: &str) -> String {
    format!("{pool}-worker")
}

/// Labels that tell the pods of a pool from all others.
pub fn selector_labels(pool: &str) -> BTreeMap<String, String> {
    labels([(POOL_LABEL, pool), (CLASS_LABEL, "general")])
}

/// The selector as autoscalers read it.
pub fn selector_text(pool: &str) -> String {
    format!("{POOL_LABEL}={pool},{CLASS_LABEL}=general")
}

/// The selector as Deployments, budgets and spread constraints read it.
pub fn selector(pool: &str) -> LabelSelector {
    LabelSelector { match_labels: Some(selector_labels(pool)), ..LabelSelector::default() }
}

/// Labels of everything that belongs to a pool.
pub fn all_labels(pool: &str) -> BTreeMap<String, String> {
    let mut all = selector_labels(pool);
    all.extend(labels([
        (MANAGED_BY_LABEL, OPERATOR),
        ("app.kubernetes.io/name", "beamline-worker"),
        ("app.kubernetes.io/instance", pool),
        ("app.kubernetes.io/component", "worker"),
        ("app.kubernetes.io/part-of", "beamline"),
    ]));
    all
}

/// Metadata of a child: it goes when its pool goes.
pub fn metadata(pool: &ValidPool, name: String) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: Some(pool.namespace.clone()),
        labels: Some(all_labels(&pool.name)),
        owner_references: Some(vec![pool.owner.clone()]),
        ..ObjectMeta::default()
    }
}

fn labels<const N: usize>(pairs: [(&str, &str); N]) -> BTreeMap<String, String> {
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}
