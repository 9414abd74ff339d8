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
use serde_path_to_error::Segment;

use crate::fault::{Details, Invalid};

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

/// The deepest JSON that is read: `serde_json`'s own limit.
pub const MAX_DEPTH: usize = 128;

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

/// How much of a key stands in a message: the key may be as long as the assignment, and a verdict says it twice.
const SHOWN_KEY_BYTES: usize = 256;

/// A key as one step of a JSON pointer; a long one is cut.
pub fn pointer_step(key: &str) -> String {
    let shown = key.get(..key.floor_char_boundary(SHOWN_KEY_BYTES)).unwrap_or_default();
    shown.replace('~', "~0").replace('/', "~1")
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

/// Reads a wire struct; `base` is the JSON pointer of `json` within the assignment.
///
/// # Errors
/// 1001 when it is not JSON or not an object, 1003 with the pointer of the field that has the wrong type. The reason
/// says what was expected and never quotes the value, which may be a secret.
pub fn read<'a, T: Deserialize<'a>>(json: &'a str, base: &str) -> Result<T, Invalid> {
    serde_json::from_str(json).map_err(|error| diagnose::<T>(json, base, &error))
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

/// Finds out which field was wrong. Only bad input pays for the second reading.
fn diagnose<'a, T: Deserialize<'a>>(json: &'a str, base: &str, first: &serde_json::Error) -> Invalid {
    // A number that no type holds is JSON all the same; half of a surrogate pair is no text.
    if !first.is_data() && !first.to_string().starts_with("number out of range") {
        return Invalid::input(base, "is not JSON");
    }
    if !json.trim_start().starts_with('{') {
        let reason = "is not a JSON object";
        return if base.is_empty() { Invalid::input(base, reason) } else { Invalid::format(base, reason) };
    }
    let mut reader = serde_json::Deserializer::from_str(json);
    match serde_path_to_error::deserialize::<_, T>(&mut reader) {
        Ok(_) => Invalid::input(base, "is not JSON"),
        Err(error) => {
            let field = twice(error.inner()).map(|field| format!("/{field}")).unwrap_or_default();
            Invalid::format(format!("{base}{}{field}", pointer(error.path())), expectation(error.inner()))
        }
    }
}

/// The field of ours that stands twice in an object, which is all that serde's path leads to.
fn twice(error: &serde_json::Error) -> Option<String> {
    error.to_string().strip_prefix("duplicate field `")?.split('`').next().map(str::to_owned)
}

fn pointer(path: &serde_path_to_error::Path) -> String {
    let mut pointer = String::new();
    for segment in path {
        match segment {
            Segment::Seq { index } => pointer.push_str(&format!("/{index}")),
            Segment::Map { key } => pointer.push_str(&format!("/{}", pointer_step(key))),
            Segment::Enum { variant } => pointer.push_str(&format!("/{variant}")),
            Segment::Unknown => {}
        }
    }
    pointer
}

/// `serde_json` says `invalid type: string "…", expected u64 at line 1 column 9`: only the expectation may be repeated.
fn expectation(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let expected = message.rsplit_once(", expected ").map(|(_, rest)| rest.split(" at line").next().unwrap_or(rest));
    match expected {
        Some("i64" | "u64" | "u32") => "has the wrong type or range: expected a whole number".to_owned(),
        Some("f64") => "has the wrong type or range: expected a number".to_owned(),
        Some(expected) => format!("has the wrong type or range: expected {expected}"),
        None if twice(error).is_some() => "is given twice".to_owned(),
        None => "has the wrong type or range".to_owned(),
    }
}

/// A message of ours as JSON.
#[expect(clippy::expect_used, reason = "structs with string keys always encode; an empty message must not get out")]
pub fn encode(message: &impl Serialize) -> Bytes {
    serde_json::to_vec(message).expect("a struct with string keys").into()
}

/// Reads a whole message: UTF-8, not nested too deep, an object with these fields.
///
/// # Errors
/// The first field that breaks a rule.
pub fn read_message<'a, T: Deserialize<'a>>(payload: &'a [u8]) -> Result<T, Invalid> {
    let json = std::str::from_utf8(payload).map_err(|_| Invalid::input("", "is not JSON: it is not UTF-8"))?;
    if is_too_deep(json) {
        return Err(Invalid::input("", format!("nests deeper than {MAX_DEPTH} levels")));
    }
    read(json, "")
}

/// Whether any part of the document nests deeper than [`MAX_DEPTH`], ignored parts included.
pub fn is_too_deep(json: &str) -> bool {
    // Hardly any document opens so much that it could be.
    memchr::memchr2_iter(b'{', b'[', json.as_bytes()).nth(MAX_DEPTH).is_some() && nests_too_deep(json)
}

fn nests_too_deep(json: &str) -> bool {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => {
                depth += 1;
                if depth > MAX_DEPTH {
                    return true;
                }
            }
            b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
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
    pub slots: ByPool,
    pub busy: ByPool,
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

/// A number for each pool of slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ByPool {
    pub cpu: usize,
    pub gpu: usize,
    pub io: usize,
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

    #[test]
    fn a_key_in_a_pointer_is_escaped_and_cut_between_characters() {
        assert_eq!(pointer_step("a/b~c"), "a~1b~0c");
        assert_eq!(pointer_step(&format!("x{}", "é".repeat(500_000))), format!("x{}", "é".repeat(127)));
    }

    #[test]
    fn depth_is_counted_outside_strings_only() {
        assert!(!is_too_deep(&format!("{}{}", "[".repeat(128), "]".repeat(128))));
        assert!(is_too_deep(&"[".repeat(129)));
        assert!(!is_too_deep(&format!("{{\"text\":\"\\\"{}\"}}", "[".repeat(500))));
    }

    #[test]
    fn a_message_that_cannot_be_read_says_why() {
        let deep = format!("{{\"pull\":true,\"x\":{}{}}}", "[".repeat(128), "]".repeat(128));
        for (payload, reason) in [
            (b"\xff".as_slice(), "the assignment is not JSON: it is not UTF-8"),
            (deep.as_bytes(), "the assignment nests deeper than 128 levels"),
            (b"[]", "the assignment is not a JSON object"),
        ] {
            assert_eq!(read_message::<WorkerControl>(payload).unwrap_err().to_string(), reason);
        }
    }

    #[test]
    fn a_wrong_type_is_named_by_its_pointer_and_its_value_is_not_repeated() {
        let invalid = read::<ExecAssignment>(r#"{"executor":{"provider_id":5}}"#, "").unwrap_err();
        assert_eq!((invalid.cause.code(), invalid.pointer.as_str()), (1003, "/executor/provider_id"));
        let invalid = read::<Job>(r#"{"timeout_ms":"hunter2"}"#, "/job").unwrap_err();
        assert_eq!(invalid.pointer, "/job/timeout_ms");
        assert!(!invalid.reason.contains("hunter2"), "{}", invalid.reason);
    }

    #[test]
    fn an_array_is_no_object() {
        for (json, pointer) in [
            (r#"{"executor":["p"]}"#, "/executor"),
            (r#"{"resources":["io",1]}"#, "/resources"),
            (r#"{"retry_config":[3,100,2.0,10000,0.1]}"#, "/retry_config"),
        ] {
            let invalid = read::<ExecAssignment>(json, "").unwrap_err();
            assert_eq!((invalid.cause.code(), invalid.pointer.as_str()), (1003, pointer), "{json}");
        }
        assert!(read::<ExecAssignment>(r#"{"executor":null,"retry_config":{}}"#, "").is_ok());
    }

    #[test]
    fn a_field_that_stands_twice_is_named_by_its_pointer() {
        for (json, pointer) in [
            (r#"{"version":"1","version":"1"}"#, "/version"),
            (r#"{"executor":{"provider_id":"p","provider_id":"q"}}"#, "/executor/provider_id"),
            (r#"{"retry_config":{"jitter":0,"max_attempts":1,"jitter":0}}"#, "/retry_config/jitter"),
        ] {
            let invalid = read::<ExecAssignment>(json, "").unwrap_err();
            assert_eq!((invalid.pointer.as_str(), invalid.reason.as_ref()), (pointer, "is given twice"), "{json}");
        }
        let invalid = read::<Job>(r#"{"type":"fs.get","type":"fs.put"}"#, "/job").unwrap_err();
        assert_eq!(invalid.pointer, "/job/type");
    }

    #[test]
    fn a_number_that_no_type_holds_is_named_by_its_pointer() {
        let invalid = read::<ExecAssignment>(r#"{"priority":1e400}"#, "").unwrap_err();
        assert_eq!((invalid.cause.code(), invalid.pointer.as_str()), (1003, "/priority"));
    }

    #[test]
    fn what_is_no_object_is_invalid_input() {
        for json in ["", "nonsense", "[]", "5", "{\"version\":\"1\"", "\"\\ud800\""] {
            assert_eq!(read::<ExecAssignment>(json, "").unwrap_err().cause.code(), 1001, "{json}");
        }
    }
}
