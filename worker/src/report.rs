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

use crate::assignment::{Addressee, Assignment};
use crate::blocks::BlockKind;
use crate::contract::{self, ExecResult, Metadata, PublicError, Refused, Status, Verdict};
use crate::execute::Execution;
use crate::fault::{Cause, Fault};

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

    /// Whether [`Self::shorten`] leaves something out.
    pub fn may_be_shorter(&self) -> bool {
        self.outputs.is_some() || self.error.clone().is_some_and(|mut fault| fault.shorten())
    }

    /// No result of so many bytes is taken. Outputs are never cut: they become an error that says so. An error says less.
    /// False where nothing is left to leave out.
    pub fn shorten(&mut self, assignment: &Assignment, bytes: usize) -> bool {
        if self.outputs.is_some() {
            self.become_too_large(assignment, bytes);
            return true;
        }
        self.error.as_mut().is_some_and(Fault::shorten)
    }

    fn become_too_large(&mut self, assignment: &Assignment, bytes: usize) {
        let message = format!("the result has {bytes} bytes, more than the broker takes");
        let mut fault = Fault::new(Cause::OverCap, message);
        fault.details.block_type = Some(assignment.block.kind().as_str());
        (self.status, self.outputs, self.error) = (fault.cause.status(), None, Some(fault));
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
