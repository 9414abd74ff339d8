//! A kubelet brings a changed ConfigMap into running pods after a minute or so, or at once when a pod's annotations
//! change. So every pod that is older than the change gets an annotation.

use std::sync::{Arc, OnceLock};

use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use crate::apply::annotate::{AT_ONCE, annotate};
use crate::controller::Context;
use crate::desired::names;
use crate::error::Error;
use crate::notice::Notice;

/// Makes the kubelets look at the ConfigMap again, for each pod that may have an older one. `hash` is of what it is to
/// say: what it says is not kept here.
pub(super) async fn nudge(
    ctx: &Context,
    hash: &str,
    config_map: &ConfigMap,
    pods: &[Arc<Pod>],
) -> Result<Option<Notice>, Error> {
    let changed = last_change(config_map);
    let outdated = pods.iter().filter(|pod| is_outdated(pod, changed, hash));
    let refused = OnceLock::new();
    let all = stream::iter(outdated).map(Ok);
    all.try_for_each_concurrent(AT_ONCE, |pod| tell(ctx, pod, hash, &refused)).await?;
    Ok(refused.into_inner())
}

fn last_change(config_map: &ConfigMap) -> Option<Timestamp> {
    let ours = config_map.managed_fields().iter().filter(|entry| entry.manager.as_deref() == Some(names::OPERATOR));
    ours.filter_map(|entry| entry.time.as_ref()).map(|time| time.0).max()
}

fn is_outdated(pod: &Pod, changed: Option<Timestamp>, hash: &str) -> bool {
    let created = pod.creation_timestamp().map(|time| time.0);
    pod.metadata.deletion_timestamp.is_none()
        && created <= changed
        && pod.annotations().get(names::POLICY_HASH).is_none_or(|known| known != hash)
}

async fn tell(ctx: &Context, pod: &Pod, hash: &str, refused: &OnceLock<Notice>) -> Result<(), Error> {
    let (name, namespace) = (pod.name_any(), pod.namespace().unwrap_or_default());
    let pod = (namespace.as_str(), name.as_str(), pod.metadata.uid.as_deref());
    annotate(ctx, "nudge", pod, (names::POLICY_HASH, Some(hash)), refused).await
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(created: &str, told: Option<&str>) -> Pod {
        let annotations = told.map(|hash| json!({ names::POLICY_HASH: hash }));
        serde_json::from_value(json!({"metadata": {"creationTimestamp": created, "annotations": annotations}}))
            .expect("a Pod")
    }

    #[test]
    fn only_pods_that_are_older_than_the_change_are_told_and_only_once() {
        let config_map: ConfigMap = serde_json::from_value(json!({"metadata": {"managedFields": [
            {"manager": "somebody", "operation": "Update", "time": "2026-11-26T12:00:00Z"},
            {"manager": names::OPERATOR, "operation": "Apply", "time": "2026-11-26T10:00:00Z"},
        ]}}))
        .expect("a ConfigMap");
        let changed = last_change(&config_map);
        assert!(is_outdated(&pod("2026-11-26T09:00:00Z", None), changed, "new"));
        assert!(is_outdated(&pod("2026-11-26T09:00:00Z", Some("old")), changed, "new"));
        assert!(!is_outdated(&pod("2026-11-26T09:00:00Z", Some("new")), changed, "new"));
        assert!(!is_outdated(&pod("2026-11-26T11:00:00Z", None), changed, "new"), "it starts with the new one");
    }
}
