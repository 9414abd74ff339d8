//! How many workers there are, and who decides it.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How many workers there are.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.minReplicas) || self.minReplicas <= (has(self.maxReplicas) ? self.maxReplicas : 20)")
        .message("scaling.minReplicas: is more than scaling.maxReplicas (20 where it is left out); lower it, or raise scaling.maxReplicas"),
    validation = Rule::new("!has(self.maxReplicas) || self.maxReplicas > 0")
        .message("scaling.maxReplicas: must be at least 1; to take no work set paused, to run no worker set mode Manual and replicas 0")
)]
pub struct Scaling {
    /// Who decides. Default: Operator.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,

    /// Workers that stay when there is nothing to do, without those that have GPUs. Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 10_000))]
    pub min_replicas: Option<i32>,

    /// Workers at most, without those that have GPUs. Default: 20.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 10_000))]
    pub max_replicas: Option<i32>,

    /// How fast work shall be done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,

    /// When workers go.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale_down: Option<ScaleDown>,
}

/// Who decides the number of replicas.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The operator, from what waits and how fast it is done.
    Operator,
    /// spec.replicas and gpu.replicas, the former written by a person or through /scale.
    Manual,
    /// A HorizontalPodAutoscaler, through /scale, from what waits and runs; the operator makes it, wakes the pool from zero
    /// and puts it to rest there, and decides how many pods with GPUs there are.
    #[serde(rename = "HPA")]
    Hpa,
    /// KEDA, through /scale, from the same and from zero; the operator makes a ScaledObject, and decides how many pods with
    /// GPUs there are.
    #[serde(rename = "KEDA")]
    Keda,
}

/// How fast work shall be done.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Target {
    /// A backlog is finished within this many seconds, as far as maxReplicas lets it. Default: 10.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 86_400))]
    pub backlog_seconds: Option<i32>,

    /// Assignments waiting and running for each worker, until it is known how many a worker finishes in a second.
    /// Default: 100.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub queue_depth_per_replica: Option<i32>,
}

/// When workers go.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ScaleDown {
    /// As many workers stay as were needed at any time within the last so many seconds. Default: 60.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 3600))]
    pub stabilization_seconds: Option<i32>,

    /// The last worker goes when there was nothing at all to do for so many seconds. Default: 120.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 86_400))]
    pub idle_seconds_to_zero: Option<i32>,
}
