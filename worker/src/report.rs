//! What the Router is told: verdicts, results, dead letters.

pub mod dead_letter; // what is kept of an assignment that failed for good
pub mod ledger; // one record per assignment
pub mod outbox; // results on their way to the Router
pub mod spool; // outcomes on a disk while the broker is away
pub mod stream; // bodies on their way to the Router while their block still runs

use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::assignment::{Addressee, Assignment};
use crate::blocks::BlockKind;
use crate::contract::{self, Details, ExecResult, Metadata, PublicError, Refused, Status, StoredError, Verdict};
use crate::execute::Execution;
use crate::fault::{Cause, Fault, short};

/// How a step of a flow ended: what every execution comes to, whatever its block.
#[derive(Debug)]
pub struct StepResult {
    /// How it ended.
    pub status: Status,
    /// The fault where it did not succeed: its number, its words and what follows from it.
    pub error: Option<Fault>,
    /// What the block produced.
    pub outputs: Option<Box<RawValue>>,
    /// From the first attempt's start to the end.
    pub latency: Duration,
    /// All attempts.
    pub attempts: u32,
    /// Of all threads that worked for it.
    pub cpu_time: Duration,
    /// From its arrival here to its first attempt.
    pub queued: Duration,
}

impl StepResult {
    /// The step that an execution amounts to.
    pub fn of(execution: Execution, kind: BlockKind, queued: Duration) -> Self {
        let Execution { outcome, failed: _, attempts, latency, cpu_time } = execution;
        let (status, outputs, error) = match outcome {
            Ok(output) => (Status::Success, Some(output.0), None),
            Err(mut fault) => {
                fault.details.block_type = Some(kind.as_str());
                (fault.cause.status(), None, Some(fault))
            }
        };
        Self { status, error, outputs, latency, attempts, cpu_time, queued }
    }

    /// The public number of the error.
    pub fn error_code(&self) -> Option<u16> {
        self.error.as_ref().map(|fault| fault.cause.code())
    }

    /// Attempts after the first.
    pub const fn retries_used(&self) -> u32 {
        self.attempts.saturating_sub(1)
    }

    /// The ExecResult that is recorded and published, shortened as far as `max_payload` needs it and it can be.
    pub fn encode(&mut self, assignment: &Assignment, worker_id: &str, max_payload: usize) -> Bytes {
        let mut encoded = self.to_json(assignment, worker_id);
        while encoded.len() > max_payload && self.shorten(assignment, encoded.len()) {
            encoded = self.to_json(assignment, worker_id);
        }
        encoded
    }

    /// No result of so many bytes is taken. Outputs are never cut: they become an error that says so. An error says less.
    /// False where nothing is left to leave out.
    pub fn shorten(&mut self, assignment: &Assignment, bytes: usize) -> bool {
        if self.outputs.is_some() {
            let fault = too_large(bytes, Some(assignment.block.kind()));
            (self.status, self.outputs, self.error) = (fault.cause.status(), None, Some(fault));
            return true;
        }
        self.error.as_mut().is_some_and(Fault::shorten)
    }

    fn to_json(&self, assignment: &Assignment, worker_id: &str) -> Bytes {
        let correlation = &assignment.correlation;
        contract::encode(&ExecResult {
            assignment_id: &assignment.key.assignment_id,
            status: self.status,
            result: self.outputs.as_deref(),
            error: self.error.as_ref().map(public_error),
            latency_ms: contract::millis(self.latency),
            metadata: Metadata {
                block_type: assignment.block.kind().as_str(),
                provider_id: &correlation.provider_id,
                run_id: correlation.run_id.as_deref(),
                flow_id: correlation.flow_id.as_deref(),
                step_id: correlation.step_id.as_deref(),
                worker_id,
                attempts: self.attempts,
                retries_used: self.retries_used(),
                cpu_time_ms: contract::millis(self.cpu_time),
                queue_ms: contract::millis(self.queued),
            },
            request_id: &correlation.request_id,
            trace_id: correlation.trace_id.as_deref(),
            tenant_id: assignment.key.tenant.as_str(),
            completed_at: Timestamp::now().as_millisecond(),
        })
    }
}

/// The same for a result that is encoded already, where its step is not known any more; `None` where nothing is left to
/// leave out. Of an error its number and the beginning of its message stay.
pub fn shorter(result: &Bytes) -> Option<Bytes> {
    let mut kept: Map<String, Value> = serde_json::from_slice(result).ok()?;
    let (status, error) = if kept.remove("result").is_some() {
        let kind = kept.get("metadata").and_then(|metadata| BlockKind::parse(metadata.get("block_type")?.as_str()?));
        let fault = too_large(result.len(), kind);
        (serde_json::to_value(fault.cause.status()), serde_json::to_value(public_error(&fault)))
    } else {
        let error: StoredError = serde_json::from_value(kept.remove("error")?).ok()?;
        let bare =
            StoredError { message: short(&error.message).to_owned(), details: Value::Object(Map::new()), ..error };
        (Ok(kept.remove("status")?), serde_json::to_value(bare))
    };
    kept.extend([("status".to_owned(), status.ok()?), ("error".to_owned(), error.ok()?)]);
    let encoded = contract::encode(&kept);
    (encoded != *result).then_some(encoded)
}

/// Whom an encoded result is about.
pub fn addressee_of(result: &Bytes) -> Addressee {
    let result: Value = serde_json::from_slice(result).unwrap_or_default();
    let id = |pointer| result.pointer(pointer).and_then(Value::as_str).map(Box::from);
    Addressee {
        assignment_id: id("/assignment_id"),
        request_id: id("/request_id"),
        tenant_id: id("/tenant_id"),
        trace_id: id("/trace_id"),
        run_id: id("/metadata/run_id"),
    }
}

/// Outputs are never cut: they become this.
fn too_large(bytes: usize, kind: Option<BlockKind>) -> Fault {
    let message = format!("the result has {bytes} bytes, more than the broker takes");
    let block_type = kind.map(BlockKind::as_str);
    Fault::new(Cause::OverCap, message).with(Details { block_type, ..Details::NONE })
}

/// The verdict on an assignment that will run, or whose record answers it; `at` is Unix time in milliseconds.
pub fn accepted(assignment: &Assignment, worker_id: &str, at: i64) -> Bytes {
    contract::encode(&Verdict {
        assignment_id: &assignment.key.assignment_id,
        status: "accepted",
        message: "Assignment accepted for execution",
        request_id: &assignment.correlation.request_id,
        trace_id: assignment.correlation.trace_id.as_deref(),
        tenant_id: assignment.key.tenant.as_str(),
        worker_id,
        error: None,
        acknowledged_at: at,
    })
}

/// The verdict on an assignment that will not run; `None` where there is nobody to address it to.
pub fn rejected(addressee: &Addressee, cause: Cause, message: &str, worker_id: &str) -> Option<Bytes> {
    if addressee.assignment_id.is_none() && addressee.request_id.is_none() {
        return None;
    }
    Some(contract::encode(&Verdict {
        assignment_id: addressee.assignment_id.as_deref().unwrap_or_default(),
        status: "rejected",
        message,
        request_id: addressee.request_id.as_deref().unwrap_or_default(),
        trace_id: addressee.trace_id.as_deref(),
        tenant_id: addressee.tenant_id.as_deref().unwrap_or_default(),
        worker_id,
        error: Some(Refused { code: cause.code(), message, retryable: cause.is_retryable() }),
        acknowledged_at: Timestamp::now().as_millisecond(),
    }))
}

/// A fault as the Router sees it.
pub fn public_error(fault: &Fault) -> PublicError<'_> {
    PublicError {
        code: fault.cause.code(),
        message: &fault.message,
        retryable: fault.cause.is_retryable(),
        details: &fault.details,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shortened(result: Value) -> Option<Value> {
        let shorter = shorter(&contract::encode(&result))?;
        Some(serde_json::from_slice(&shorter).expect("JSON"))
    }

    #[test]
    fn an_encoded_result_says_less_step_by_step() {
        let metadata = serde_json::json!({"block_type": "fs.get", "attempts": 1});
        let success = serde_json::json!({"status": "success", "result": {"x": 1}, "metadata": metadata});
        let too_large = shortened(success).expect("its output is left out");
        assert_eq!((&too_large["status"], &too_large["metadata"]), (&"error".into(), &metadata));
        let error = &too_large["error"];
        assert_eq!((&error["code"], &error["details"]["block_type"]), (&2002.into(), &"fs.get".into()));
        let bare = shortened(too_large.clone()).expect("its details are left out");
        assert_eq!((&bare["error"]["code"], &bare["error"]["message"]), (&2002.into(), &error["message"]));
        assert_eq!(bare["error"]["details"], serde_json::json!({}));
        assert_eq!(shortened(bare), None);
        assert_eq!(shorter(&Bytes::from_static(b"nonsense")), None);
    }
}
