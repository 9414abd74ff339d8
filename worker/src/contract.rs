//! The JSON that we share with the Router, and the subjects that it travels on. Serde only: nothing here judges.

#![expect(missing_docs, reason = "the fields are the wire format, which docs/contract.md explains")]

use std::borrow::Cow;
use std::marker::PhantomData;
use std::time::Duration;

use bytes::Bytes;
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

use crate::pool::ByPool;

/// Where assignments come in, unless `--nats-subject` says else.
pub const ASSIGN: &str = "caf.exec.assign.v1";
/// Where work waits for workers with GPU slots, unless `--nats-subject` says else.
pub const ROUTE_GPU: &str = "caf.exec.route.gpu.v1";
/// Where results go out.
pub const RESULT: &str = "caf.exec.result.v1";
/// Where dead letters go.
pub const DLQ: &str = "caf.exec.dlq.v1";
/// Where the original of a dead letter goes when the envelope would be too large for the broker.
pub const DLQ_RAW: &str = "caf.exec.dlq.raw.v1";
/// The body of a streamed answer goes out below it, at `caf.exec.stream.v1.<tenant>.<assignment_id>`.
pub const STREAM: &str = "caf.exec.stream.v1";
/// One record per assignment lives at `caf.exec.ledger.<tenant>.<assignment_id>`.
pub const LEDGER: &str = "caf.exec.ledger";
/// A stored refusal lives at `caf.exec.refused.<tenant>.<assignment_id>`.
pub const REFUSED: &str = "caf.exec.refused";
/// Where cancels come in.
pub const CANCEL: &str = "caf.exec.cancel.v1";
/// Where answers to requests for approval come in.
pub const APPROVAL_ANSWER: &str = "caf.human.response.v1";

/// Where requests for approval are announced.
pub const APPROVAL_REQUEST: &str = "caf.human.request.v1";

/// A worker says what it does on `caf.worker.report.v1.<worker>`.
pub const WORKER_REPORT: &str = "caf.worker.report.v1";
/// A worker is told whether to pull on `caf.worker.control.v1.<worker>`.
pub const WORKER_CONTROL: &str = "caf.worker.control.v1";

/// The version of every message here.
pub const VERSION: &str = "1";

/// Names the publication that a record answers: `<stream>,<stream's creation, RFC 3339>,<sequence>`.
pub const HEADER_ANSWERS: &str = "Beamline-Answers";
/// Keeps the first identity of a publication that was passed on to another subject.
pub const HEADER_PUBLICATION: &str = "Beamline-Publication";
/// `true` asks for a new execution of an id that has a record.
pub const HEADER_REPLAY: &str = "Beamline-Replay";
/// Ties an original on [`DLQ_RAW`] to its dead letter.
pub const HEADER_DLQ_ID: &str = "Beamline-Dlq-Id";

/// Writes any text as one token of a subject, key, file name or header: every byte outside `A–Z a–z 0–9 _ -` becomes
/// `=` and two upper-case hex digits.
pub fn escape(text: &str) -> Cow<'_, str> {
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
    if text.as_bytes().iter().all(is_plain) {
        return Cow::Borrowed(text);
    }
    let mut token = String::with_capacity(text.len() * 3);
    for byte in text.bytes() {
        if is_plain(&byte) {
            token.push(char::from(byte));
        } else {
            token.push_str(&format!("={byte:02X}"));
        }
    }
    Cow::Owned(token)
}

/// A duration as every message states it: in whole milliseconds.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// What the Router publishes on [`ASSIGN`]. Unknown fields are ignored here and kept in a dead letter.
#[derive(Debug, Deserialize)]
pub struct ExecAssignment<'a> {
    /// Must be [`VERSION`].
    #[serde(borrow)]
    pub version: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub assignment_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub request_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub tenant_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub trace_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub run_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub flow_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub step_id: Option<Cow<'a, str>>,
    #[serde(borrow, default, deserialize_with = "object")]
    pub executor: Option<Executor<'a>>,
    /// 0 to 9, higher first.
    pub priority: Option<i64>,
    #[serde(default, deserialize_with = "object")]
    pub retry_config: Option<RetryConfig>,
    #[serde(borrow, default, deserialize_with = "object")]
    pub resources: Option<Resources<'a>>,
    /// Read again by the block that it names.
    #[serde(borrow)]
    pub job: Option<&'a RawValue>,
}

/// Who the Router decided should do it; informative but for its presence.
#[derive(Debug, Deserialize)]
pub struct Executor<'a> {
    #[serde(borrow)]
    pub provider_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub endpoint: Option<Cow<'a, str>>,
}

/// What every `job` may say, whatever its type.
#[derive(Debug, Deserialize)]
pub struct Job<'a> {
    #[serde(borrow)]
    pub r#type: Option<Cow<'a, str>>,
    /// Milliseconds for the whole block over all attempts.
    pub timeout_ms: Option<i64>,
    #[serde(default, deserialize_with = "object")]
    pub retry_config: Option<RetryConfig>,
    #[serde(default, deserialize_with = "object")]
    pub sandbox: Option<SandboxJob>,
}

/// How often and how patiently a block is tried.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct RetryConfig {
    /// Counts the first attempt.
    pub max_attempts: Option<i64>,
    pub base_delay_ms: Option<i64>,
    pub multiplier: Option<f64>,
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
    pub memory_mb: Option<i64>,
    /// Informative.
    pub gpu: Option<i64>,
}

/// What a job asks of the sandbox.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct SandboxJob {
    /// `success`, `error`, `timeout` or `cancelled`.
    pub status: Option<String>,
    pub code: Option<i64>,
    pub delay_ms: Option<i64>,
    pub fail_attempts: Option<i64>,
}

/// A struct or nothing. Serde's own reading of a struct takes an array as well; the contract knows objects only.
fn object<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    struct Object<T>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for Object<T> {
        type Value = Option<T>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("an object")
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
            T::deserialize(MapAccessDeserializer::new(map)).map(Some)
        }
    }
    deserializer.deserialize_any(Object(PhantomData))
}

/// A message of ours as JSON.
#[expect(clippy::expect_used, reason = "structs with string keys always encode; an empty message must not get out")]
pub fn encode(message: &impl Serialize) -> Bytes {
    serde_json::to_vec(message).expect("a struct with string keys").into()
}

/// What the Router is told before anything runs.
#[derive(Debug, Serialize)]
pub struct Verdict<'a> {
    pub assignment_id: &'a str,
    /// `accepted` or `rejected`.
    pub status: &'static str,
    pub message: &'a str,
    pub request_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<&'a str>,
    pub tenant_id: &'a str,
    pub worker_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<VerdictError<'a>>,
    /// Unix time in milliseconds.
    pub acknowledged_at: i64,
}

/// Why a verdict is `rejected`.
#[derive(Debug, Serialize)]
pub struct VerdictError<'a> {
    pub code: u16,
    pub message: &'a str,
    pub retryable: bool,
}

/// What a worker says of itself on [`WORKER_REPORT`], and when it is told something.
#[derive(Debug, Serialize)]
pub struct WorkerReport<'a> {
    pub version: &'static str,
    pub worker: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool: Option<&'a str>,
    /// `general`, or `gpu` where it has only GPU slots.
    pub class: &'static str,
    pub slots: ByPool<usize>,
    pub busy: ByPool<usize>,
    /// Blocks that run.
    pub running: usize,
    /// Deliveries here that have not begun.
    pub waiting: usize,
    /// Whether it takes work.
    pub pulling: bool,
    /// Whether its policy says that it must not.
    pub paused: bool,
    /// Blocks that have ended since it started.
    pub finished: u64,
    /// Milliseconds that these held their slots.
    pub work_ms: u64,
    /// Unix time in milliseconds.
    pub started_at: i64,
    /// Unix time in milliseconds.
    pub reported_at: i64,
    /// The version of the program.
    pub build: &'static str,
}

/// What a worker is told on [`WORKER_CONTROL`].
#[derive(Debug, Deserialize)]
pub struct WorkerControl {
    /// Whether to take work.
    pub pull: Option<bool>,
}

/// The answer to what cannot be read as a [`WorkerControl`].
#[derive(Debug, Serialize)]
pub struct ControlRefused<'a> {
    pub worker: &'a str,
    pub error: VerdictError<'a>,
}

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

/// What the Router is told when the execution has ended: also the record, byte for byte.
#[derive(Debug, Serialize)]
pub struct ExecResult<'a> {
    pub assignment_id: &'a str,
    pub status: Status,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<PublicError<'a>>,
    pub latency_ms: u64,
    pub metadata: Metadata<'a>,
    pub request_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<&'a str>,
    pub tenant_id: &'a str,
    /// Unix time in milliseconds.
    pub completed_at: i64,
}

/// The error object of the public contract.
#[derive(Debug, Serialize)]
pub struct PublicError<'a> {
    pub code: u16,
    pub message: &'a str,
    pub retryable: bool,
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

/// What ties a result to its flow, and what it cost.
#[derive(Debug, Serialize)]
pub struct Metadata<'a> {
    pub block_type: &'static str,
    pub provider_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flow_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_id: Option<&'a str>,
    pub worker_id: &'a str,
    pub attempts: u32,
    pub retries_used: u32,
    pub cpu_time_ms: u64,
    pub queue_ms: u64,
}

/// A piece of a streamed body.
#[derive(Debug, Serialize)]
pub struct Chunk<'a> {
    pub assignment_id: &'a str,
    pub tenant_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<&'a str>,
    pub attempt: u32,
    pub seq: u64,
    #[serde(flatten)]
    pub data: ChunkData<'a>,
    pub last: bool,
}

/// What a chunk carries.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ChunkData<'a> {
    Data(&'a str),
    DataBase64(String),
}

/// What a requester publishes on [`CANCEL`], and what is kept of it.
#[derive(Debug, Deserialize, Serialize)]
pub struct Cancel<'a> {
    /// Must be [`VERSION`].
    #[serde(borrow)]
    pub version: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub assignment_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub tenant_id: Option<Cow<'a, str>>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Cow<'a, str>>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    pub requested_by: Option<Cow<'a, str>>,
    /// RFC 3339; only as it is kept, where it had to wait for a worker.
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    pub sent_at: Option<Cow<'a, str>>,
}

/// What a requester is told who gave a reply subject.
#[derive(Debug, Serialize)]
pub struct CancelAnswer<'a> {
    pub assignment_id: &'a str,
    pub outcome: Outcome,
}

/// What has come of a cancel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// A cancelled result is recorded.
    Cancelled,
    /// The cancel is kept; nothing is recorded.
    Recorded,
    /// Another result is recorded.
    Finished,
}

/// What a requester is told whose message cannot be read.
#[derive(Debug, Serialize)]
pub struct CancelError {
    pub error: RequestError,
}

/// Why a request was refused.
#[derive(Debug, Serialize)]
pub struct RequestError {
    pub code: u16,
    pub message: String,
    pub retryable: bool,
}

/// What is kept of an assignment that failed for good.
#[derive(Debug, Serialize)]
pub struct DeadLetter<'a> {
    pub version: &'static str,
    /// The same for the same publication and stage, so that writing it again is harmless.
    pub dlq_id: &'a str,
    /// `decode`, `admit`, `execute` or `crash`.
    pub stage: &'static str,
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
    pub attempts: Vec<AttemptRecord<'a>>,
    /// How often the broker has delivered it.
    pub deliveries: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub assignment_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_id: Option<&'a str>,
    pub worker_id: &'a str,
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
    pub latency_ms: u64,
    pub error: PublicError<'a>,
}

/// What approvers are told on [`APPROVAL_REQUEST`].
#[derive(Debug, Serialize)]
pub struct HumanRequest<'a> {
    pub version: &'static str,
    pub assignment_id: &'a str,
    pub request_id: &'a str,
    pub tenant_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_id: Option<&'a str>,
    pub prompt: &'a str,
    pub approvers: &'a [String],
    /// Unix time in milliseconds.
    pub requested_at: i64,
    /// Unix time in milliseconds.
    pub expires_at: i64,
}

/// What an approver publishes on [`APPROVAL_ANSWER`].
#[derive(Debug, Deserialize)]
pub struct HumanResponse<'a> {
    #[serde(borrow)]
    pub version: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub assignment_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub tenant_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub approver: Option<Cow<'a, str>>,
    pub approved: Option<bool>,
    #[serde(borrow)]
    pub comment: Option<Cow<'a, str>>,
}

/// A request for approval as it is kept: with its assignment while it is open, with its result from then on.
#[derive(Debug, Deserialize, Serialize)]
pub struct StoredRequest {
    pub version: String,
    pub tenant_id: String,
    pub assignment_id: String,
    /// The newest publication that waits for it, as in [`HEADER_ANSWERS`].
    pub publication: String,
    /// `<namespace>/<name>` of the WorkerPool whose workers end it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Unix time in milliseconds.
    pub requested_at: i64,
    /// Unix time in milliseconds.
    pub expires_at: i64,
    pub queue_ms: u64,
    /// The sequence of the record that its result replaces; 0 for none.
    pub replaces: u64,
    /// Unix time in milliseconds: what was said about the assignment before is not about this request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<i64>,
    /// W3C trace context of the publication.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tracestate: Option<String>,
    /// As the Router published it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assignment: Option<Box<RawValue>>,
    /// Tells apart whoever came to the same result at the same time; unique.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_by: Option<String>,
    /// As it is recorded and published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Box<RawValue>>,
}

/// An answer as it is kept.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct StoredAnswer {
    pub approver: String,
    pub approved: bool,
    pub comment: String,
    /// When the broker got it, Unix time in milliseconds.
    pub answered_at: i64,
    /// Its sequence there.
    pub sequence: u64,
}

/// What a look-up needs to know of a stored record: it may have been written by another version of this program.
#[derive(Debug, Deserialize)]
pub struct StoredResult {
    pub error: Option<StoredError>,
}

/// A recorded error: whether it may be replaced, and what its dead letter repeats.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct StoredError {
    pub code: u16,
    pub message: String,
    pub retryable: bool,
    #[serde(default)]
    pub details: serde_json::Value,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_keeps_plain_names_and_escapes_the_rest() {
        assert_eq!(escape("acme-1_B"), "acme-1_B");
        assert_eq!(escape("a.b*>= é"), "a=2Eb=2A=3E=3D=20=C3=A9");
    }
}
