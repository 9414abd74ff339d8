//! Pods are their ReplicaSet's: all that is ours in them is an annotation.

use std::sync::OnceLock;

use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::Patch;
use serde_json::json;

use crate::clients::in_our_name;
use crate::context::Context;
use crate::error::Error;
use crate::failpoint;
use crate::notice::Notice;

/// Pods annotated at once.
pub(super) const AT_ONCE: usize = 8;

/// Gives the pod of this name, and of this uid where that matters, an annotation; `None` takes it away. A pod that is gone
/// needs none. One that a rule of the cluster protects from it is noted in `refused`, and
/// is no reason to leave the rest of the pool undone.
pub(super) async fn annotate(
    ctx: &Context,
    verb: &str,
    (namespace, name, uid): (&str, &str, Option<&str>),
    (key, value): (&str, Option<&str>),
    refused: &OnceLock<Notice>,
) -> Result<(), Error> {
    let annotations = json!({key: value});
    let metadata = match uid {
        Some(uid) => json!({"uid": uid, "annotations": annotations}),
        None => json!({"annotations": annotations}),
    };
    ctx.metrics.applied("Pod");
    let api = Api::<Pod>::namespaced(ctx.client.clone(), namespace);
    let (params, patch) = (in_our_name(), Patch::Merge(json!({"metadata": metadata})));
    match failpoint::around(verb, "Pod", "any", api.patch_metadata(name, &params, &patch)).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        // Another pod by now.
        Err(kube::Error::Api(status)) if status.code == 409 && uid.is_some() => Ok(()),
        Err(kube::Error::Api(status)) if is_refused(status.code, &status.message) => {
            tracing::warn!(name, namespace, "the pod cannot be annotated: {}", status.message);
            refused.get_or_init(|| Notice::pods_not_annotated(&status.message));
            Ok(())
        }
        Err(source) => Err(Error::Apply { kind: "Pod".to_owned(), name: name.to_owned(), source }),
    }
}

/// By an admission, not for want of a right.
fn is_refused(code: u16, message: &str) -> bool {
    matches!(code, 400 | 403 | 422) && !message.contains("cannot patch resource")
}
