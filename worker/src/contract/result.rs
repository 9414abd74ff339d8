//! What an execution came to, and what its block said while it ran.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// How an execution ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// The block did what was asked.
    Success,
    /// It failed.
    Error,
    /// Its deadline passed.
    Timeout,
    /// Somebody wanted it stopped.
    Cancelled,
}

impl Status {
    /// Every status.
    pub const ALL: [Self; 4] = [Self::Success, Self::Error, Self::Timeout, Self::Cancelled];

    /// The public word, also the metric label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Error => "error",
            Self::Timeout => "timeout",
            Self::Cancelled => "cancelled",
        }
    }
}

/// What the Router is told when the execution has ended: also the record, byte for byte.
#[derive(Debug, Serialize)]
pub struct ExecResult<'a> {
    /// As the assignment says.
    pub assignment_id: &'a str,
    /// How it ended.
    pub status: Status,
    /// What the block produced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result: Option<&'a RawValue>,
    /// Why it did not succeed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<PublicError<'a>>,
    /// Milliseconds from the first attempt's start to the end.
    pub latency_ms: u64,
    /// What ties it to its flow, and what it cost.
    pub metadata: Metadata<'a>,
    /// As the assignment says.
    pub request_id: &'a str,
    /// As the assignment says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<&'a str>,
    /// As the assignment says.
    pub tenant_id: &'a str,
    /// Unix time in milliseconds.
    pub completed_at: i64,
}

/// The error object of the public contract.
#[derive(Debug, Serialize)]
pub struct PublicError<'a> {
    /// The public number.
    pub code: u16,
    /// For a person; never holds a credential.
    pub message: &'a str,
    /// Whether the same assignment may succeed later.
    pub retryable: bool,
    /// For a program.
    pub details: &'a Details,
}

/// The `details` of a public error. Never holds a credential.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Details {
    /// The block that failed; the pipeline fills it in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub block_type: Option<&'static str>,
    /// Without query and fragment; cut where it is very long.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// As the assignment wrote it; cut where it is very long.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// The peer's answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http_status: Option<u16>,
    /// The first 2 KiB of the peer's answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
    /// True where nothing outside was touched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<bool>,
}

impl Details {
    /// No details.
    pub const NONE: Self =
        Self { block_type: None, url: None, path: None, http_status: None, body: None, sandbox: None };
}

/// What ties a result to its flow, and what it cost.
#[derive(Debug, Serialize)]
pub struct Metadata<'a> {
    /// `job.type`.
    pub block_type: &'static str,
    /// As the assignment says.
    pub provider_id: &'a str,
    /// As the assignment says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_id: Option<&'a str>,
    /// As the assignment says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flow_id: Option<&'a str>,
    /// As the assignment says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_id: Option<&'a str>,
    /// Who did it.
    pub worker_id: &'a str,
    /// All attempts.
    pub attempts: u32,
    /// Attempts after the first.
    pub retries_used: u32,
    /// Milliseconds of CPU time over all attempts.
    pub cpu_time_ms: u64,
    /// Milliseconds from its arrival at the worker to its first attempt.
    pub queue_ms: u64,
}

/// A piece of a streamed body.
#[derive(Debug, Serialize)]
pub struct Chunk<'a> {
    /// As the assignment says.
    pub assignment_id: &'a str,
    /// As the assignment says.
    pub tenant_id: &'a str,
    /// As the assignment says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<&'a str>,
    /// The attempt that it belongs to, from 1.
    pub attempt: u32,
    /// Its place among the chunks of the attempt, from 0.
    pub seq: u64,
    /// The piece itself.
    #[serde(flatten)]
    pub data: ChunkData<'a>,
    /// Whether it is the last one, which is empty.
    pub last: bool,
}

/// What a chunk carries.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ChunkData<'a> {
    /// A text.
    Data(&'a str),
    /// Bytes that are none.
    DataBase64(String),
}

/// What a look-up needs to know of a stored record: it may have been written by another version of this program.
#[derive(Debug, Deserialize)]
pub struct StoredResult {
    /// Why it did not succeed.
    pub error: Option<StoredError>,
}

/// A recorded error: whether it may be replaced, and what its dead letter repeats.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct StoredError {
    /// The public number.
    pub code: u16,
    /// For a person.
    pub message: String,
    /// Whether the same assignment may succeed later.
    pub retryable: bool,
    /// For a program.
    #[serde(default)]
    pub details: serde_json::Value,
}
