//! The pods that have GPUs: a second Deployment, `<name>-gpu`.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Toleration};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Resources, embedded};

/// Pods with GPUs: a second Deployment, <name>-gpu, whose workers execute the blocks that ask for the gpu pool and
/// nothing else. What is not said here is as in worker. They are replaced one by one.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!(has(self.resourceName) && has(self.resourceClaimTemplateName))")
        .message("gpu: set resourceName (device plugin) or resourceClaimTemplateName (dynamic resource allocation), not both"),
    validation = Rule::new("!has(self.maxTotal) || self.maxTotal >= (has(self.count) ? self.count : 1)")
        .message("gpu.maxTotal: is less than gpu.count, so that no pod could start; it counts devices of the whole pool"),
    validation = Rule::new("!has(self.minReplicas) || self.minReplicas <= (has(self.maxReplicas) ? self.maxReplicas : 4)")
        .message("gpu.minReplicas: is more than gpu.maxReplicas (4 where it is left out); lower it, or raise gpu.maxReplicas"),
    validation = Rule::new("!has(self.minReplicas) || !has(self.maxTotal) || self.minReplicas * (has(self.count) ? self.count : 1) <= self.maxTotal")
        .message("gpu.minReplicas: times gpu.count is more than gpu.maxTotal; lower it, or raise gpu.maxTotal"),
    validation = Rule::new("!has(self.resources) || !has(self.resources.limits) || !has(self.resourceName) || !(self.resourceName in self.resources.limits)")
        .message("gpu.resources.limits: must not name the GPU resource; set gpu.count")
)]
pub struct Gpu {
    /// GPUs of one pod. Default: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 64))]
    pub count: Option<i32>,

    /// Resource that a device plugin offers, such as nvidia.com/gpu, amd.com/gpu or nvidia.com/mig-1g.10gb.
    /// Default: nvidia.com/gpu.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(max = 128),
        regex(pattern = "^[a-z0-9]([a-z0-9.-]*[a-z0-9])?/[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")
    )]
    pub resource_name: Option<String>,

    /// ResourceClaimTemplate of the pool's namespace, for dynamic resource allocation: every pod gets a claim made from
    /// it. It says how many devices a claim holds; count says the same here.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub resource_claim_template_name: Option<String>,

    /// Container that gets the devices: worker, or the name of a sidecar that does the work, such as an inference
    /// server that blocks call. Default: worker.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub container: Option<String>,

    /// Sidecars of these pods only, beside those in worker.sidecars.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "embedded::sidecars")]
    pub sidecars: Vec<Container>,

    /// Blocks of the gpu pool that one pod executes at once. Default: 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub pool_size: Option<i32>,

    /// How many pods with GPUs to run, in mode Manual. Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 10_000))]
    pub replicas: Option<i32>,

    /// Pods with GPUs that stay when there is nothing to do, in mode Operator. Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 10_000))]
    pub min_replicas: Option<i32>,

    /// Pods with GPUs at most, in mode Operator. Default: 4.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000))]
    pub max_replicas: Option<i32>,

    /// How much may wait for these pods, in mode Operator.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<GpuTarget>,

    /// GPUs that this pool may have altogether: no more pods are made than fit (pods times count), so that none of them
    /// waits for a device that it may never get. Default: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 640_000))]
    pub max_total: Option<i32>,

    /// CPU and memory of the worker's container, instead of worker.resources.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,

    /// RuntimeClass of these pods, such as nvidia.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub runtime_class_name: Option<String>,

    /// Labels that a node must have, beside those in worker.nodeSelector; for the same key this one counts.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "embedded::strings")]
    pub node_selector: BTreeMap<String, String>,

    /// Node taints that these pods tolerate, beside those in worker.tolerations.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "embedded::tolerations")]
    pub tolerations: Vec<Toleration>,
}

/// How much may wait for pods with GPUs.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct GpuTarget {
    /// Assignments waiting and running for each pod, until it is known how many a pod finishes in a second. Default:
    /// twice poolSize.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub queue_depth_per_replica: Option<i32>,
}
