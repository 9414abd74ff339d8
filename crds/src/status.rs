//! What the operator reports. Every field is filled by it; nothing here is a wish.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Mode, embedded, prose};

/// What the operator last saw and did.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", default)]
#[schemars(transform = prose::unwrap_lines)]
pub struct WorkerPoolStatus {
    /// The metadata.generation that this status answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// Pods that exist, without those that have GPUs.
    pub replicas: i32,

    /// Of them, pods that take work.
    pub ready_replicas: i32,

    /// Pods that the operator asks for, without those that have GPUs.
    pub desired_replicas: i32,

    /// Label selector of these pods, for autoscalers and kubectl.
    #[schemars(length(max = 256))]
    pub selector: String,

    /// The queue when it was last readable. Absent until it was read once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue: Option<Queue>,

    /// Why there are as many replicas as there are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scaling: Option<Decision>,

    /// What tenants do and use: the busiest 20, by what runs and waits in workers, then by executionsUsed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 20),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["id"])
    )]
    pub tenants: Vec<TenantStatus>,

    /// The pods with GPUs. Absent without spec.gpu, when none has work left.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuStatus>,

    /// Ready, Progressing, QueueReadable, StreamsReady, ScalingActive, Degraded.
    #[schemars(schema_with = "embedded::conditions")]
    pub conditions: Vec<Condition>,
}

impl WorkerPoolStatus {
    /// What it says under this type, such as `Ready`.
    pub fn condition(&self, type_: &str) -> Option<&Condition> {
        self.conditions.iter().find(|condition| condition.type_ == type_)
    }
}

/// The queue of assignments.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Queue {
    /// Assignments waiting and running: pending plus inFlight.
    pub depth: i64,

    /// Assignments that no worker has taken yet.
    pub pending: i64,

    /// Assignments that workers hold.
    pub in_flight: i64,

    /// Assignments that wait for their tenant's next window, or for room under its ceiling. Absent where no tenant is bounded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parked: Option<i64>,

    /// When the oldest unfinished assignment arrived. Absent while there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oldest_since: Option<Time>,

    /// Assignments that arrive in a second, over the last minute; 0.0 when nothing has moved for 20 seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub arrivals_per_second: Option<String>,

    /// Assignments that end in a second, over the last minute; 0.0 when nothing has moved for 20 seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub completions_per_second: Option<String>,

    /// Seconds that what waits and runs now takes at this rate of completions. Absent while nothing ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain_eta_seconds: Option<i64>,

    /// What KEDA is told in its mode: assignments waiting and running that are this pool's part, and cancels, answers and
    /// deadlines that are due. Absent while that is not known, and in other modes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub demand: Option<i64>,

    /// Dead letters kept, of all pools that share the broker.
    pub dead_letters: i64,
}

/// What a tenant does in the pool, and what it uses of what it may.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct TenantStatus {
    /// The tenant_id of its assignments.
    #[schemars(length(max = 256))]
    pub id: String,

    /// Executions of this window that workers have taken from the budget, some of them for work to come. Absent where they
    /// are not bounded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub executions_used: Option<i64>,

    /// Executions that a window has. Absent where they are not bounded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub executions_limit: Option<i64>,

    /// Milliseconds of CPU time used in this window, and owed from windows before. Absent where no budget is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_time_ms_used: Option<i64>,

    /// Milliseconds of CPU time that a window has. Absent where they are not bounded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_time_ms_limit: Option<i64>,

    /// Its blocks that run.
    pub running: i64,

    /// Its blocks that wait for a slot in a worker.
    pub queued: i64,

    /// Its assignments that wait for its next window, or for room under its ceiling.
    pub parked: i64,

    /// Its assignments that the workers of now have refused with 2004 since they started.
    pub refused: i64,

    /// The budget that was used up last. It stays for an hour after that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exceeded: Option<Exceeded>,
}

/// A budget that is used up, or was.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Exceeded {
    /// Which one: executions, cpuTimeMs, or both.
    #[schemars(length(max = 64))]
    pub budget: String,

    /// When its window ends, or has ended: what came before was refused, or waits.
    pub until: Time,
}

/// Why there are as many replicas as there are.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Decision {
    /// Who decides the number of replicas.
    pub mode: Mode,

    /// The number decided.
    pub desired: i32,

    /// The decision in words.
    #[schemars(length(max = 512))]
    pub reason: String,

    /// What keeps the number below what the work asks for.
    #[serde(default)]
    pub limited_by: LimitedBy,

    /// When the number last changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_scale_time: Option<Time>,

    /// What the work taught about these workers.
    #[serde(default)]
    pub learned: Learned,

    /// The spec.replicas that was last seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec_replicas: Option<i32>,
}

/// What the work taught about workers: kept, so that another operator decides the same.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Learned {
    /// Assignments that one worker ends in a second when it is busy. Absent until some ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub rate_per_replica: Option<String>,

    /// Seconds from a pod's creation until it takes work. Absent until one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub pod_start_seconds: Option<String>,
}

/// The pods with GPUs, and the work that waits for them.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct GpuStatus {
    /// Pods that exist.
    pub replicas: i32,

    /// Pods that take work.
    pub ready_replicas: i32,

    /// Pods that the operator asks for.
    pub desired_replicas: i32,

    /// What keeps desiredReplicas below what is asked for.
    pub limited_by: LimitedBy,

    /// Why there are as many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub reason: Option<String>,

    /// When the number last changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_scale_time: Option<Time>,

    /// The gpu.replicas that was last seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec_replicas: Option<i32>,

    /// What the work taught about these pods.
    #[serde(default)]
    pub learned: Learned,

    /// Assignments on the GPU route that no worker has taken yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending: Option<i64>,

    /// Assignments from the GPU route that workers hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_flight: Option<i64>,
}

/// What keeps the number of pods below what is asked for.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LimitedBy {
    /// Nothing.
    #[default]
    None,
    /// scaling.maxReplicas or gpu.maxReplicas.
    MaxReplicas,
    /// gpu.maxTotal.
    MaxTotal,
    /// Pods that do not start: no more are asked for until they do.
    UnreadyPods,
}
