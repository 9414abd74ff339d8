//! What is kept of an assignment that failed for good.

use serde::Serialize;
use serde_json::value::RawValue;

use super::result::{PublicError, StoredError};

/// Where an assignment failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// It could not be read or broke a rule.
    Decode,
    /// It would never fit here.
    Admit,
    /// Its block failed for good.
    Execute,
    /// It killed its workers.
    Crash,
}

impl Stage {
    /// Every stage.
    pub const ALL: [Self; 4] = [Self::Decode, Self::Admit, Self::Execute, Self::Crash];

    /// Where an assignment failed that has a result: the only final 4001 is that of a poison.
    pub const fn of_result(code: u16, retryable: bool) -> Self {
        match (code, retryable) {
            (4001, false) => Self::Crash,
            _ => Self::Execute,
        }
    }

    /// The public word, also the metric label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Decode => "decode",
            Self::Admit => "admit",
            Self::Execute => "execute",
            Self::Crash => "crash",
        }
    }
}

/// What is kept of an assignment that failed for good.
#[derive(Debug, Serialize)]
pub struct DeadLetter<'a> {
    /// [`VERSION`](super::VERSION).
    pub version: &'static str,
    /// The same for the same publication and stage, so that writing it again is harmless.
    pub dlq_id: &'a str,
    /// `decode`, `admit`, `execute` or `crash`.
    pub stage: &'static str,
    /// Why.
    pub error: LetterError<'a>,
    /// The original object whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub assignment: Option<&'a RawValue>,
    /// The original bytes where they are no JSON object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub raw_base64: Option<String>,
    /// What is neither here nor beside it, and why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub omitted: Option<String>,
    /// True where credentials were replaced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub redacted: Option<bool>,
    /// Those that failed, in order.
    pub attempts: Vec<AttemptRecord<'a>>,
    /// How many of the earlier ones were left out, where not all fit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempts_omitted: Option<usize>,
    /// How often the broker has delivered it.
    pub deliveries: i64,
    /// As the assignment says, where that can be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub assignment_id: Option<&'a str>,
    /// As the assignment says, where that can be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<&'a str>,
    /// As the assignment says, where that can be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant_id: Option<&'a str>,
    /// As the assignment says, where that can be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<&'a str>,
    /// As the assignment says, where that can be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_id: Option<&'a str>,
    /// Who gave it up.
    pub worker_id: &'a str,
    /// `<namespace>/<name>` of that worker's WorkerPool.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool: Option<&'a str>,
    /// Unix time in milliseconds.
    pub failed_at: i64,
}

/// Why, as it happened here or as it was recorded.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum LetterError<'a> {
    /// It happened here.
    New(PublicError<'a>),
    /// It is recorded.
    Stored(&'a StoredError),
}

/// One attempt, as a dead letter shows it.
#[derive(Debug, Serialize)]
pub struct AttemptRecord<'a> {
    /// Unix time in milliseconds.
    pub started_at: i64,
    /// Milliseconds that it took.
    pub latency_ms: u64,
    /// Why it failed.
    pub error: PublicError<'a>,
}
