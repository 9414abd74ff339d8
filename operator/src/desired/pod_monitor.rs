//! How a Prometheus Operator finds the metrics of the workers. Its type is another project's, and may not be installed.

use kube::api::{ApiResource, DynamicObject, GroupVersionKind, TypeMeta};
use serde_json::json;

use crate::names;
use crate::pool::ValidPool;

/// The type, as the API server knows it.
pub fn pod_monitors() -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk("monitoring.coreos.com", "v1", "PodMonitor"))
}

pub(super) fn pod_monitor(pool: &ValidPool) -> DynamicObject {
    let ApiResource { api_version, kind, .. } = pod_monitors();
    DynamicObject {
        types: Some(TypeMeta { api_version, kind }),
        metadata: names::metadata(pool, pool.name.clone()),
        data: json!({"spec": {
            "selector": {"matchLabels": names::pool_labels(&pool.name)},
            "podMetricsEndpoints": [{"port": names::METRICS_PORT}],
        }}),
    }
}
