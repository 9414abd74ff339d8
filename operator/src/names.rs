//! What children are called and labelled. Selectors are immutable: a change here orphans running pods.

pub mod metrics; // what the numbers of a queue are called

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use kube::ResourceExt;

use crate::pool::{Kind, ValidPool};

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
/// On a pod: which policy it was last told to look for.
pub const POLICY_HASH: &str = "beamline.dev/policy-hash";

/// Name of the ServiceAccount.
pub fn service_account(pool: &str) -> String {
    format!("{pool}-worker")
}

/// Name of the Deployment of a class, and of its budget.
pub fn workload(pool: &str, class: Kind) -> String {
    match class {
        Kind::General => pool.to_owned(),
        Kind::Gpu => format!("{pool}-gpu"),
    }
}

/// The value of [`CLASS_LABEL`].
pub const fn class_name(class: Kind) -> &'static str {
    match class {
        Kind::General => "general",
        Kind::Gpu => "gpu",
    }
}

/// Labels that tell the pods of a class from all others.
pub fn selector_labels(pool: &str, class: Kind) -> BTreeMap<String, String> {
    labels([(POOL_LABEL, pool), (CLASS_LABEL, class_name(class))])
}

/// The selector of the general class, as autoscalers read it.
pub fn selector_text(pool: &str) -> String {
    format!("{POOL_LABEL}={pool},{CLASS_LABEL}={}", class_name(Kind::General))
}

/// The selector as Deployments, budgets and spread constraints read it.
pub fn selector(pool: &str, class: Kind) -> LabelSelector {
    LabelSelector { match_labels: Some(selector_labels(pool, class)), ..LabelSelector::default() }
}

/// What selects the pods of all classes.
pub fn pool_labels(pool: &str) -> BTreeMap<String, String> {
    labels([(POOL_LABEL, pool)])
}

/// Labels of everything that belongs to a pool as a whole.
pub fn all_labels(pool: &str) -> BTreeMap<String, String> {
    labels([
        (POOL_LABEL, pool),
        (MANAGED_BY_LABEL, OPERATOR),
        ("app.kubernetes.io/name", "beamline-worker"),
        ("app.kubernetes.io/instance", pool),
        ("app.kubernetes.io/component", "worker"),
        ("app.kubernetes.io/part-of", "beamline"),
    ])
}

/// Labels of what belongs to one class.
pub fn class_labels(pool: &str, class: Kind) -> BTreeMap<String, String> {
    let mut all = all_labels(pool);
    all.extend(selector_labels(pool, class));
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

/// Metadata of a child that belongs to one class.
pub fn class_metadata(pool: &ValidPool, class: Kind) -> ObjectMeta {
    ObjectMeta { labels: Some(class_labels(&pool.name, class)), ..metadata(pool, workload(&pool.name, class)) }
}

/// The class of a worker of this pool; `None` of any other pod. Anybody may give a pod our labels: it is ours if a
/// ReplicaSet of one of the pool's Deployments controls it.
pub fn worker_class(pod: &Pod, pool: &str) -> Option<Kind> {
    let label = |name: &str| pod.labels().get(name).map(String::as_str);
    let controller = pod.owner_references().iter().find(|owner| owner.controller == Some(true))?;
    let class = [Kind::General, Kind::Gpu].into_iter().find(|class| label(CLASS_LABEL) == Some(class_name(*class)))?;
    let set = controller.name.strip_prefix(&workload(pool, class)).and_then(|rest| rest.strip_prefix('-'))?;
    let is_of_ours = controller.kind == "ReplicaSet" && label("pod-template-hash") == Some(set);
    (is_of_ours && label(POOL_LABEL) == Some(pool)).then_some(class)
}

fn labels<const N: usize>(pairs: [(&str, &str); N]) -> BTreeMap<String, String> {
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_is_a_worker_if_it_is_of_a_replica_set_of_the_pool() {
        let pod = |class: &str, generation: &str, owner: &str, set: &str| {
            let labels = json!({POOL_LABEL: "orders", CLASS_LABEL: class, "pod-template-hash": generation});
            let owner = json!([{"apiVersion": "apps/v1", "kind": owner, "name": set, "uid": "1", "controller": true}]);
            let pod = json!({"metadata": {"labels": labels, "ownerReferences": owner}});
            worker_class(&serde_json::from_value(pod).expect("a Pod"), "orders").is_some()
        };
        assert!(pod("general", "5c9", "ReplicaSet", "orders-5c9") && pod("gpu", "5c9", "ReplicaSet", "orders-gpu-5c9"));
        for (class, generation, owner, set) in [
            ("general", "5c9", "ReplicaSet", "mine-5c9"),
            ("general", "5c9", "ReplicaSet", "orders-gpu-5c9"),
            ("general", "5c9", "Job", "orders-5c9"),
            ("mine", "5c9", "ReplicaSet", "orders-5c9"),
        ] {
            assert!(!pod(class, generation, owner, set), "{class} {generation} {owner} {set}");
        }
        let labels = class_labels("orders", Kind::General);
        let bare = Pod { metadata: ObjectMeta { labels: Some(labels), ..ObjectMeta::default() }, ..Pod::default() };
        assert_eq!(worker_class(&bare, "orders"), None);
    }
}
