//! A kubelet brings a changed ConfigMap into running pods after a minute or so, or at once when a pod's annotations
//! change. So every pod that is older than the change gets an annotation.
//!
//! A kubelet hears of pods and of ConfigMaps apart. Where the pod's news comes first, it finds the old ConfigMap and looks
//! no more for a minute: so every pod is told once more when the ConfigMap's news must have come, too.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use crate::apply::annotate::{AT_ONCE, annotate};
use crate::context::Context;
use crate::error::Error;
use crate::names;
use crate::notice::Notice;

/// After so long a kubelet has heard of the change.
pub(super) const HEARD: Duration = Duration::from_secs(2);

/// What there is to say of it afterwards.
pub(super) struct Nudged {
    /// Why pods cannot be told.
    pub(super) refused: Option<Notice>,
    /// Whether some are to be told once more.
    pub(super) again: bool,
}

/// Makes the kubelets look at the ConfigMap again, for each pod that may have an older one. `hash` is of what it is to
/// say: what it says is not kept here. `age` is of our last write of it.
pub(super) async fn nudge(
    ctx: &Context,
    hash: &str,
    (config_map, age): (&ConfigMap, Duration),
    pods: &[Arc<Pod>],
) -> Result<Nudged, Error> {
    let changed = last_change(config_map);
    let word = Word { hash, is_last: age >= HEARD };
    let outdated: Vec<_> = pods.iter().filter(|pod| is_older(pod, changed) && !word.is_known(pod)).collect();
    let again = !word.is_last && pods.iter().any(|pod| is_older(pod, changed) && !word.is_known_for_good(pod));
    let (text, refused) = (word.text(), OnceLock::new());
    let all = stream::iter(outdated).map(Ok);
    all.try_for_each_concurrent(AT_ONCE, |pod| tell(ctx, pod, &text, &refused)).await?;
    Ok(Nudged { refused: refused.into_inner(), again })
}

/// What pods are told: the first time, or for the last time.
struct Word<'a> {
    hash: &'a str,
    is_last: bool,
}

impl Word<'_> {
    fn text(&self) -> String {
        if self.is_last { self.last() } else { self.hash.to_owned() }
    }

    fn last(&self) -> String {
        format!("{}.2", self.hash)
    }

    fn is_known(&self, pod: &Pod) -> bool {
        let known = pod.annotations().get(names::POLICY_HASH);
        self.is_known_for_good(pod) || (!self.is_last && known.is_some_and(|known| known == self.hash))
    }

    fn is_known_for_good(&self, pod: &Pod) -> bool {
        pod.annotations().get(names::POLICY_HASH).is_some_and(|known| *known == self.last())
    }
}

fn last_change(config_map: &ConfigMap) -> Option<Timestamp> {
    let ours = config_map.managed_fields().iter().filter(|entry| entry.manager.as_deref() == Some(names::OPERATOR));
    ours.filter_map(|entry| entry.time.as_ref()).map(|time| time.0).max()
}

fn is_older(pod: &Pod, changed: Option<Timestamp>) -> bool {
    let created = pod.creation_timestamp().map(|time| time.0);
    pod.metadata.deletion_timestamp.is_none() && created <= changed
}

async fn tell(ctx: &Context, pod: &Pod, word: &str, refused: &OnceLock<Notice>) -> Result<(), Error> {
    let (name, namespace) = (pod.name_any(), pod.namespace().unwrap_or_default());
    let pod = (namespace.as_str(), name.as_str(), pod.metadata.uid.as_deref());
    annotate(ctx, "nudge", pod, (names::POLICY_HASH, Some(word)), refused).await
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(created: &str, told: Option<&str>) -> Pod {
        let annotations = told.map(|word| json!({ names::POLICY_HASH: word }));
        serde_json::from_value(json!({"metadata": {"creationTimestamp": created, "annotations": annotations}}))
            .expect("a Pod")
    }

    #[test]
    fn only_pods_that_are_older_than_the_change_are_told() {
        let config_map: ConfigMap = serde_json::from_value(json!({"metadata": {"managedFields": [
            {"manager": "somebody", "operation": "Update", "time": "2026-11-26T12:00:00Z"},
            {"manager": names::OPERATOR, "operation": "Apply", "time": "2026-11-26T10:00:00Z"},
        ]}}))
        .expect("a ConfigMap");
        let changed = last_change(&config_map);
        assert!(is_older(&pod("2026-11-26T09:00:00Z", None), changed));
        assert!(!is_older(&pod("2026-11-26T11:00:00Z", None), changed), "it starts with the new one");
    }

    #[test]
    fn a_pod_is_told_at_once_and_once_more_when_its_kubelet_must_have_heard_of_the_change() {
        let says = |is_last: bool, known: Option<&str>| {
            let word = Word { hash: "new", is_last };
            (!word.is_known(&pod("2026-11-26T09:00:00Z", known))).then(|| word.text())
        };
        for known in [None, Some("old"), Some("old.2")] {
            assert_eq!(says(false, known).as_deref(), Some("new"), "{known:?}");
            // An operator that is new tells it once.
            assert_eq!(says(true, known).as_deref(), Some("new.2"), "{known:?}");
        }
        assert_eq!(says(false, Some("new")), None, "it is early");
        assert_eq!(says(true, Some("new")).as_deref(), Some("new.2"));
        for is_last in [false, true] {
            assert_eq!(says(is_last, Some("new.2")), None, "nothing is left to say");
        }
    }
}
