//! The JSON that we share with the Router, and the subjects that it travels on. Serde only: nothing here judges.

mod approval; // what people are asked, and what they answer
mod assignment; // what the Router wants done
mod cancel; // that it is wanted no more
mod dead_letter; // what is kept of what failed for good
mod object; // a struct within a message
mod result; // what an execution came to
mod verdict; // whether it will run
mod worker; // what a worker says of itself, and what it is told

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;

pub use approval::{HumanRequest, HumanResponse, StoredAnswer, StoredRequest};
pub use assignment::{ExecAssignment, Executor, Job, Resources, RetryConfig, SandboxJob};
pub use cancel::{Cancel, CancelAnswer, CancelError, CancelOutcome};
pub use dead_letter::{AttemptRecord, DeadLetter, LetterError, Stage};
pub use result::{Chunk, ChunkData, Details, ExecResult, Metadata, PublicError, Status, StoredError, StoredResult};
pub use verdict::{Refused, Verdict};
pub use worker::{ControlRefused, TenantReport, WorkerControl, WorkerReport};

/// Where assignments come in, unless `--nats-subject` says else.
pub const ASSIGN: &str = "caf.exec.assign.v1";
/// Where work waits for workers with GPU slots, unless `--nats-subject` says else.
pub const ROUTE_GPU: &str = "caf.exec.route.gpu.v1";
/// Work that may not run yet waits below it, at `caf.exec.parked.v1.<tenant>`, unless `--nats-subject` says else.
pub const PARKED: &str = "caf.exec.parked.v1";
/// The same for work that needs GPU slots.
pub const PARKED_GPU: &str = "caf.exec.parked.gpu.v1";
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
/// Keeps the first identity of a publication that a worker has passed on to another subject.
pub const HEADER_PUBLICATION: &str = "Beamline-Publication";
/// Beside it: when the broker got it, RFC 3339.
pub const HEADER_PUBLISHED: &str = "Beamline-Published";
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

/// What [`escape`] has written as this token; `None` where it writes nothing so.
pub fn unescape(token: &str) -> Option<String> {
    let mut parts = token.split('=');
    let mut text = parts.next()?.as_bytes().to_vec();
    for part in parts {
        let (digits, rest) = part.split_at_checked(2)?;
        text.push(u8::from_str_radix(digits, 16).ok()?);
        text.extend_from_slice(rest.as_bytes());
    }
    String::from_utf8(text).ok().filter(|text| escape(text) == token)
}

/// A duration as every message states it: in whole milliseconds.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A message of ours as JSON.
#[expect(clippy::expect_used, reason = "structs with string keys always encode; an empty message must not get out")]
pub fn encode(message: &impl Serialize) -> Bytes {
    // Without room to grow: verdicts are kept until their results are published.
    serde_json::to_vec(message).expect("a struct with string keys").into_boxed_slice().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_keeps_plain_names_and_escapes_the_rest() {
        assert_eq!(escape("acme-1_B"), "acme-1_B");
        assert_eq!(escape("a.b*>= é"), "a=2Eb=2A=3E=3D=20=C3=A9");
        for text in ["acme-1_B", "a.b*>= é", "", "="] {
            assert_eq!(unescape(&escape(text)).as_deref(), Some(text));
        }
        for token in ["a=gpu", "a=2", "a=", "a.b", "=2e", "=41", "=FF", "a=+1"] {
            assert_eq!(unescape(token), None, "{token}");
        }
    }
}
