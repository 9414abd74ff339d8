//! What the Router wants done.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::object::object;

/// What the Router publishes on [`ASSIGN`](super::ASSIGN). Unknown fields are ignored here and kept in a dead letter.
#[derive(Debug, Deserialize)]
pub struct ExecAssignment<'a> {
    /// Must be [`VERSION`](super::VERSION).
    #[serde(borrow)]
    pub version: Option<Cow<'a, str>>,
    /// The Router's id, unique within the tenant.
    #[serde(borrow)]
    pub assignment_id: Option<Cow<'a, str>>,
    /// The request that it belongs to.
    #[serde(borrow)]
    pub request_id: Option<Cow<'a, str>>,
    /// Whose work it is.
    #[serde(borrow)]
    pub tenant_id: Option<Cow<'a, str>>,
    /// The trace that it belongs to.
    #[serde(borrow)]
    pub trace_id: Option<Cow<'a, str>>,
    /// The run of the flow that it belongs to.
    #[serde(borrow)]
    pub run_id: Option<Cow<'a, str>>,
    /// The flow that it belongs to.
    #[serde(borrow)]
    pub flow_id: Option<Cow<'a, str>>,
    /// The step of the flow that it is.
    #[serde(borrow)]
    pub step_id: Option<Cow<'a, str>>,
    /// Who the Router decided should do it.
    #[serde(borrow, default, deserialize_with = "object")]
    pub executor: Option<Executor<'a>>,
    /// 0 to 9, higher first.
    pub priority: Option<i64>,
    /// How often and how patiently it is tried, where `job` does not say so.
    #[serde(default, deserialize_with = "object")]
    pub retry_config: Option<RetryConfig>,
    /// What it needs.
    #[serde(borrow, default, deserialize_with = "object")]
    pub resources: Option<Resources<'a>>,
    /// Read again by the block that it names.
    #[serde(borrow)]
    pub job: Option<&'a RawValue>,
}

/// Who the Router decided should do it; informative but for its presence.
#[derive(Debug, Deserialize)]
pub struct Executor<'a> {
    /// The Router's name for them.
    #[serde(borrow)]
    pub provider_id: Option<Cow<'a, str>>,
    /// Where they are.
    #[serde(borrow)]
    pub endpoint: Option<Cow<'a, str>>,
}

/// What every `job` may say, whatever its type.
#[derive(Debug, Deserialize)]
pub struct Job<'a> {
    /// The block that does it, such as `http.request`.
    #[serde(borrow)]
    pub r#type: Option<Cow<'a, str>>,
    /// Milliseconds for the whole block over all attempts.
    pub timeout_ms: Option<i64>,
    /// How often and how patiently it is tried.
    #[serde(default, deserialize_with = "object")]
    pub retry_config: Option<RetryConfig>,
    /// What the sandbox makes of it.
    #[serde(default, deserialize_with = "object")]
    pub sandbox: Option<SandboxJob>,
}

/// How often and how patiently a block is tried.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct RetryConfig {
    /// Counts the first attempt.
    pub max_attempts: Option<i64>,
    /// Milliseconds before the second attempt.
    pub base_delay_ms: Option<i64>,
    /// From one delay to the next.
    pub multiplier: Option<f64>,
    /// Milliseconds that no delay passes, before jitter.
    pub max_delay_ms: Option<i64>,
    /// Each delay varies by this share of itself.
    pub jitter: Option<f64>,
}

/// What the work needs.
#[derive(Debug, Deserialize)]
pub struct Resources<'a> {
    /// `cpu`, `gpu` or `io`.
    #[serde(borrow)]
    pub pool: Option<Cow<'a, str>>,
    /// Megabytes of memory.
    pub memory_mb: Option<i64>,
    /// How many accelerators; informative.
    pub gpu: Option<i64>,
}

/// What a job asks of the sandbox.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct SandboxJob {
    /// `success`, `error`, `timeout` or `cancelled`.
    pub status: Option<String>,
    /// The public number of the error.
    pub code: Option<i64>,
    /// Milliseconds that each attempt takes.
    pub delay_ms: Option<i64>,
    /// Attempts that fail before one does not.
    pub fail_attempts: Option<i64>,
}
