//! The object itself: its name, its columns, its `/scale`.

use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use crate::{
    Disruption, Gpu, Nats, NetworkPolicy, Observability, Rollout, Scaling, Tenants, Worker, WorkerPoolStatus, prose,
};

/// A pool of identical workers that execute flow blocks assigned over NATS.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = prose::unwrap_lines)]
#[kube(
    group = "beamline.dev",
    version = "v1alpha1",
    kind = "WorkerPool",
    plural = "workerpools",
    shortname = "wp",
    category = "all",
    category = "beamline",
    namespaced,
    status = "WorkerPoolStatus",
    derive = "PartialEq",
    doc = "A WorkerPool runs identical workers that execute flow blocks assigned over NATS.",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "Ready", type_ = "integer", json_path = ".status.readyReplicas"),
    printcolumn(name = "Desired", type_ = "integer", json_path = ".status.desiredReplicas"),
    printcolumn(
        name = "Depth",
        type_ = "integer",
        json_path = ".status.queue.depth",
        description = "Assignments waiting and running"
    ),
    printcolumn(
        name = "In-Flight",
        type_ = "integer",
        json_path = ".status.queue.inFlight",
        description = "Assignments that workers hold"
    ),
    printcolumn(
        name = "Oldest",
        type_ = "date",
        json_path = ".status.queue.oldestSince",
        description = "Age of the oldest unfinished assignment"
    ),
    printcolumn(
        name = "DLQ",
        type_ = "integer",
        json_path = ".status.queue.deadLetters",
        description = "Dead letters kept"
    ),
    printcolumn(name = "Mode", type_ = "string", json_path = ".status.scaling.mode"),
    printcolumn(
        name = "Status",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].reason"#
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "Parked",
        type_ = "integer",
        json_path = ".status.queue.parked",
        priority = 1,
        description = "Assignments that wait for their tenant's budget or ceiling"
    ),
    printcolumn(
        name = "Scaling",
        type_ = "string",
        json_path = ".status.scaling.reason",
        priority = 1,
        description = "Why there are as many workers as there are"
    ),
    validation = Rule::new("self.metadata.name.matches('^[a-z]([a-z0-9-]{0,54}[a-z0-9])?$')")
        .message("metadata.name: use at most 56 of a-z, 0-9 and '-', starting with a letter and ending with a letter or digit (it also names a Service, and <name>-worker a ServiceAccount)"),
    validation = Rule::new("!self.metadata.name.endsWith('-gpu')")
        .message("metadata.name: must not end in '-gpu': <name>-gpu is the GPU Deployment of the pool <name>"),
    validation = Rule::new("!has(self.spec.gpu) || !has(self.spec.worker) || !has(self.spec.worker.pools) || !has(self.spec.worker.pools.gpu) || self.spec.worker.pools.gpu == 0")
        .message("worker.pools.gpu: is for pools without spec.gpu, whose pods find GPUs themselves; set gpu.poolSize instead"),
    validation = Rule::new("!has(self.spec.gpu) || !has(self.spec.nats.delivery) || self.spec.nats.delivery != 'Core'")
        .message("gpu: needs nats.delivery JetStream: what workers with GPUs execute waits in a stream"),
    validation = Rule::new("!has(self.spec.nats.delivery) || self.spec.nats.delivery != 'Core' || (has(self.spec.scaling) && has(self.spec.scaling.mode) && self.spec.scaling.mode == 'Manual')")
        .message("scaling.mode: must be Manual with nats.delivery Core: nothing waits in a stream, so that there is no depth to scale on"),
    validation = Rule::new("!has(self.spec.gpu) || !has(self.spec.gpu.container) || self.spec.gpu.container == 'worker' || (has(self.spec.gpu.sidecars) && self.spec.gpu.sidecars.exists(c, c.name == self.spec.gpu.container)) || (has(self.spec.worker) && has(self.spec.worker.sidecars) && self.spec.worker.sidecars.exists(c, c.name == self.spec.gpu.container))")
        .message("gpu.container: must be 'worker' or the name of an entry in gpu.sidecars or worker.sidecars"),
    validation = Rule::new("!has(self.spec.gpu) || !has(self.spec.gpu.sidecars) || !has(self.spec.worker) || !has(self.spec.worker.sidecars) || self.spec.gpu.sidecars.all(c, !self.spec.worker.sidecars.exists(o, o.name == c.name))")
        .message("gpu.sidecars: must not have a name of worker.sidecars: pods with GPUs run both"),
    validation = Rule::new("!has(self.spec.gpu) || !has(self.spec.gpu.sidecars) || self.spec.gpu.sidecars.all(c, !has(c.volumeMounts) || c.volumeMounts.all(m, has(self.spec.worker) && has(self.spec.worker.volumes) && self.spec.worker.volumes.exists(v, v.name == m.name)))")
        .message("gpu.sidecars.volumeMounts: every name must be that of an entry in worker.volumes")
)]
pub struct WorkerPoolSpec {
    /// How many workers to run, in all modes but Operator. Also what `kubectl scale` and the `/scale` subresource write.
    /// Leave it out in the modes Operator, where it has no effect, HPA and KEDA, or every apply takes back what was written
    /// there. The API server fills in 1.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 10000))]
    pub replicas: i32,

    /// Whether workers take no work. The pods stay, running blocks end, and cancels and answers are still served. In
    /// force within seconds, without a restart. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paused: Option<bool>,

    /// Who decides how many workers there are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scaling: Option<Scaling>,

    /// The NATS system that hands out the work and keeps the results.
    pub nats: Nats,

    /// What one worker pod looks like and may do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker: Option<Worker>,

    /// Pods with GPUs, beside the others: a second Deployment, <name>-gpu, whose workers execute the blocks that ask for
    /// the gpu pool and nothing else. When gpu is removed, they first finish what waits for them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu: Option<Gpu>,

    /// How pods are replaced when the pool changes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rollout: Option<Rollout>,

    /// What each tenant gets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenants: Option<Tenants>,

    /// How many workers a node drain may take away at once. Default: one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disruption: Option<Disruption>,

    /// Whether the pods get a NetworkPolicy, an outer wall around the exact guard inside the workers. It lets out what
    /// worker.egress allows and in what scrapes metrics. Default: Auto.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_policy: Option<NetworkPolicy>,

    /// Where traces are sent, and who collects metrics.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observability: Option<Observability>,
}

const fn one() -> i32 {
    1
}
