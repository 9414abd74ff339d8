//! What each tenant of a pool gets.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What tenants get. A pool that says nothing about tenants treats all alike, and one of them may hold every slot.
/// Changes reach running workers within seconds, without a restart.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.named) || self.named.all(t, bytes(t.id).size() <= 256)")
        .message("tenants.named.id: must have at most 256 bytes, as the tenant_id of an assignment"),
    validation = Rule::new("!has(self.defaults) || !has(self.defaults.quotas) || !has(self.defaults.quotas.window) || has(self.defaults.quotas.executions) || has(self.defaults.quotas.cpuTimeMs) || (has(self.named) && self.named.exists(t, has(t.quotas) && (has(t.quotas.executions) || has(t.quotas.cpuTimeMs))))")
        .message("tenants.defaults.quotas.window: bounds nothing; set executions or cpuTimeMs beside it, or in an entry of tenants.named"),
    validation = Rule::new("!has(self.named) || (has(self.defaults) && has(self.defaults.quotas) && (has(self.defaults.quotas.executions) || has(self.defaults.quotas.cpuTimeMs))) || self.named.all(t, !has(t.quotas) || !has(t.quotas.window) || has(t.quotas.executions) || has(t.quotas.cpuTimeMs))")
        .message("tenants.named.quotas.window: bounds nothing; set executions or cpuTimeMs beside it, or in tenants.defaults.quotas")
)]
pub struct Tenants {
    /// What a tenant gets that is not named below: each of them by itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub defaults: Option<TenantTerms>,

    /// Tenants that get something else. What an entry leaves out is as in defaults.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 1000),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["id"])
    )]
    pub named: Vec<NamedTenant>,
}

/// What one tenant gets.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct TenantTerms {
    /// How much of the slots' time it gets beside other tenants that want some: twice the weight, twice the time.
    /// Default: 1; of a named tenant, that of defaults.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub weight: Option<i32>,

    /// Priority of its assignments that name none, 0 to 9, higher first. Default: 4; of a named
    /// tenant, that of defaults.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 9))]
    pub priority: Option<i32>,

    /// Per cent of a worker's slots, pool by pool, that it may hold at once (one slot at least). Default: 75; of a
    /// named tenant, that of defaults.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub max_slot_share: Option<i32>,

    /// What becomes of work that comes when executions or cpuTimeMs of its window are used up. Default: Reject; of a named
    /// tenant, that of defaults.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_exceeded: Option<OnExceeded>,

    /// What it may use: budgets of a window, executions and cpuTimeMs, and ceilings, concurrent and memoryMb, above which work
    /// waits. What is left out is not bounded; of a named tenant, it is as in defaults. With nats.delivery Core on servers
    /// without JetStream, each worker has all of it for itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quotas: Option<Quotas>,
}

/// What becomes of work over a budget.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnExceeded {
    /// It is refused with 2004, and may be sent again when the window has ended: the verdict says when that is.
    Reject,
    /// It is accepted and waits, in order, until there is a budget again. It keeps nobody else waiting, and no worker.
    Defer,
}

/// What a tenant may use.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.window) || (duration(self.window) >= duration('1s') && duration(self.window) <= duration('744h'))")
        .message("quotas.window: must be between 1s and 744h (31 days), such as 1m")
)]
pub struct Quotas {
    /// Executions that begin in a window, over all workers of the pool. Never more do; an assignment that is delivered again
    /// counts once.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000_000_000_i64))]
    pub executions: Option<i64>,

    /// Milliseconds of CPU time in a window, over all workers of the pool. It is known when a block has ended: as long as some
    /// is left, work begins, and what was used beyond it is taken from the next window.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000_000_000_i64))]
    pub cpu_time_ms: Option<i64>,

    /// How long a window is, such as 1m or 24h. Windows follow each other from 1970-01-01T00:00:00Z on, so that one of 1h
    /// begins with each hour. Default: 1m.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = "^([0-9]{1,9}(h|m|s|ms))+$"))]
    pub window: Option<String>,

    /// Blocks at once, over all workers of the pool.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000_000_000_i64))]
    pub concurrent: Option<i64>,

    /// Megabytes of payloads and results that one worker holds of it at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000_000_000_i64))]
    pub memory_mb: Option<i64>,
}

/// What one tenant gets.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct NamedTenant {
    /// The tenant_id of its assignments.
    #[schemars(length(min = 1, max = 256), regex(pattern = "^\\P{Cc}+$"))]
    pub id: String,

    /// What it gets; what is left out is as in defaults.
    #[serde(flatten)]
    pub terms: TenantTerms,
}
