//! Who writes `/scale` in mode HPA: a HorizontalPodAutoscaler on the pool itself.

use std::collections::BTreeMap;

use k8s_openapi::api::autoscaling::v2::{
    CrossVersionObjectReference, ExternalMetricSource, HPAScalingRules, HorizontalPodAutoscaler,
    HorizontalPodAutoscalerBehavior, HorizontalPodAutoscalerSpec, MetricIdentifier, MetricSpec, MetricTarget,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::names::{self, metrics};
use crate::pool::{Bounds, ValidPool};

pub(super) fn autoscaler(pool: &ValidPool) -> HorizontalPodAutoscaler {
    let Bounds { min, max, queue_depth_per_replica } = pool.general.bounds;
    let owner = &pool.owner;
    HorizontalPodAutoscaler {
        metadata: names::metadata(pool, pool.name.clone()),
        spec: Some(HorizontalPodAutoscalerSpec {
            scale_target_ref: CrossVersionObjectReference {
                api_version: Some(owner.api_version.clone()),
                kind: owner.kind.clone(),
                name: pool.name.clone(),
            },
            // The step between none and one is the operator's.
            min_replicas: Some(min.max(1)),
            max_replicas: max,
            metrics: Some(vec![depth(pool, queue_depth_per_replica)]),
            behavior: Some(HorizontalPodAutoscalerBehavior {
                scale_down: Some(HPAScalingRules {
                    stabilization_window_seconds: i32::try_from(pool.scaling.stabilization.as_secs()).ok(),
                    ..HPAScalingRules::default()
                }),
                scale_up: None,
            }),
        }),
        status: None,
    }
}

/// As many as there are for so many assignments each.
fn depth(pool: &ValidPool, per_replica: i32) -> MetricSpec {
    MetricSpec {
        type_: "External".to_owned(),
        external: Some(ExternalMetricSource {
            metric: MetricIdentifier {
                name: metrics::DEPTH.to_owned(),
                selector: Some(LabelSelector {
                    match_labels: Some(BTreeMap::from([(metrics::POOL_LABEL.to_owned(), pool.name.clone())])),
                    ..LabelSelector::default()
                }),
            },
            target: MetricTarget {
                type_: "AverageValue".to_owned(),
                average_value: Some(Quantity(per_replica.to_string())),
                ..MetricTarget::default()
            },
        }),
        ..MetricSpec::default()
    }
}
