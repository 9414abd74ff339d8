//! Who writes `/scale` in mode KEDA: a ScaledObject on the pool itself. Its type is another project's, and may not be
//! installed.

use kube::api::{ApiResource, DynamicObject, GroupVersionKind, TypeMeta};
use serde_json::json;
use url::Url;

use crate::names;
use crate::pool::{Bounds, ValidPool};

/// How often KEDA asks for the number while there is no worker, in seconds. It is in the operator's memory.
const POLLING: u32 = 5;
/// Where it is in the answer.
const NUMBER: &str = "demand";

/// The type, as the API server knows it.
pub fn scaled_objects() -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk("keda.sh", "v1alpha1", "ScaledObject"))
}

/// `url` leads to the operator's admin endpoint.
pub(super) fn scaled_object(pool: &ValidPool, url: &Url) -> DynamicObject {
    let ApiResource { api_version, kind, .. } = scaled_objects();
    let Bounds { min, max, queue_depth_per_replica } = pool.general.bounds;
    let idle = pool.scaling.idle_to_zero.as_secs();
    let (owner, name, namespace) = (&pool.owner, &pool.name, &pool.namespace);
    let url = format!("{}/queues/{namespace}/{name}", url.as_str().trim_end_matches('/'));
    DynamicObject {
        types: Some(TypeMeta { api_version, kind }),
        metadata: names::metadata(pool, name.clone()),
        data: json!({"spec": {
            "scaleTargetRef": {"apiVersion": owner.api_version, "kind": owner.kind, "name": name},
            "minReplicaCount": min,
            "maxReplicaCount": max,
            "pollingInterval": POLLING,
            "cooldownPeriod": idle,
            // Until it has seen work itself: what it finds running is no less busy.
            "initialCooldownPeriod": idle,
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": {"scaleDown": {
                "stabilizationWindowSeconds": pool.scaling.stabilization.as_secs(),
            }}}},
            "triggers": [{
                "type": "metrics-api",
                "metricType": "AverageValue",
                "metadata": {
                    "url": url,
                    "valueLocation": NUMBER,
                    "targetValue": queue_depth_per_replica.to_string(),
                },
            }],
        }}),
    }
}
