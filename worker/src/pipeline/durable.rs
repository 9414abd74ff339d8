//! Writes that must become definite: each is repeated until the broker has surely done or refused it.

use std::collections::HashMap;
use std::fmt::Display;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use serde_json::value::RawValue;

use super::{Arrival, Pipeline};
use crate::assignment::{Addressee, Assignment};
use crate::backoff;
use crate::broker::{Expected, StoreError, Stored};
use crate::contract::Stage;
use crate::execute::Attempt;
use crate::failpoint::{self, Point};
use crate::fault::Fault;
use crate::health::Concern;
use crate::ids::{AssignmentKey, TenantId};
use crate::intake::Delivery;
use crate::publication::Publication;
use crate::report::dead_letter::Came;
use crate::report::ledger::Record;
use crate::report::spool::SpooledOutcome;
use crate::report::{self, StepResult};
use crate::trace_context::TraceContext;

/// What the names and numbers around a result may need of the broker's largest message: nine ids of at most 256 bytes,
/// each byte escaped, and the fixed fields.
const ENVELOPE_BYTES: usize = 8 * 1024;
/// The broker's limit counts a record's headers too; they have no more than this.
const HEADER_BYTES: usize = 1024;
/// So long may the broker take before an outcome is kept on the disk too.
const SPOOL_AFTER: Duration = Duration::from_millis(500);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// What stands in the record at the end.
pub(super) enum Recorded {
    /// This worker's outcome.
    Ours(Bytes),
    /// An outcome that somebody recorded before.
    Theirs(Record),
}

impl Pipeline {
    /// Writes the record until its outcome is definite, and returns what stands in the end.
    pub(super) async fn record(
        &self,
        arrival: &Arrival,
        expected: Expected,
        step: &mut StepResult,
        result: Bytes,
    ) -> Recorded {
        let Arrival { delivery, assignment, .. } = arrival;
        let key = &assignment.key;
        let (mut expected, mut result) = (expected, result);
        loop {
            let write = |result| self.ledger.write(key, delivery.publication(), expected, result);
            let shorter = |result: &Bytes| {
                let is_shorter = step.shorten(assignment, result.len());
                is_shorter.then(|| self.encode(step, assignment))
            };
            let (stored, written) = {
                let writing = pin!(self.until_it_fits(result.clone(), shorter, write));
                self.spooled(|| outcome(delivery, key, expected, &result), writing).await
            };
            result = written;
            if let Stored::At(_) = stored {
                return Recorded::Ours(result);
            }
            let stored = Box::pin(self.read_records(std::slice::from_ref(key))).await.into_values().next();
            match stored {
                None => expected = Expected::NOTHING,
                Some(record) if record.result == result => return Recorded::Ours(result),
                Some(record) if record.gives_way_to(delivery.publication()) => expected = record.place,
                Some(record) => return Recorded::Theirs(record),
            }
        }
    }

    /// Awaits a write; where that takes long and there is a disk for it, the outcome lies there meanwhile.
    pub(super) async fn spooled<T>(
        &self,
        outcome: impl Fn() -> Option<SpooledOutcome>,
        writing: impl Future<Output = T>,
    ) -> T {
        let Some(spool) = &self.settings.spool else { return writing.await };
        let mut writing = pin!(writing);
        if let Ok(written) = tokio::time::timeout(SPOOL_AFTER, &mut writing).await {
            return written;
        }
        let Some(outcome) = outcome().map(Arc::new) else { return writing.await };
        let keeping = tokio::task::spawn_blocking({
            let (spool, outcome) = (spool.clone(), Arc::clone(&outcome));
            move || spool.keep(&outcome)
        });
        let kept = keeping.await;
        if let Ok(Err(error)) = &kept {
            tracing::warn!(%error, "an outcome cannot be kept on the disk: only this worker's memory has it");
        }
        let _on_disk = matches!(kept, Ok(Ok(()))).then(|| self.on_disk.token());
        let written = writing.await;
        spool.forget(&outcome);
        written
    }

    /// Records what a worker that ended could not: before anything is pulled, so that its redelivery finds it.
    pub async fn record_spooled(&self) {
        let Some(spool) = &self.settings.spool else { return };
        let kept = spool.kept().unwrap_or_else(|error| {
            tracing::error!(%error, "the outcomes on the disk cannot be read");
            Vec::new()
        });
        for outcome in kept {
            self.record_outcome(&outcome).await;
            spool.forget(&outcome);
        }
    }

    async fn record_outcome(&self, outcome: &SpooledOutcome) {
        let assignment_id = outcome.assignment_id.as_str();
        let result = Bytes::copy_from_slice(outcome.result.get().as_bytes());
        let identity = TenantId::parse(&outcome.tenant_id).zip(Publication::parse(&outcome.publication));
        let Some((tenant, publication)) = identity else {
            return tracing::error!(assignment_id, "discarded an outcome from the disk that cannot be recorded");
        };
        if self.may_be_answered_already(outcome.published).await {
            return tracing::warn!(assignment_id, "discarded a late outcome from the disk");
        }
        let key = AssignmentKey { tenant, assignment_id: assignment_id.into() };
        let write = |result| self.ledger.write(&key, &publication, outcome.expected, result);
        let (stored, result) = self.until_it_fits(result, report::shorter, write).await;
        match stored {
            Stored::At(_) if !self.ledger.is_kept() => {
                self.keep_letter_of(outcome, &result, &publication).await;
                let trace = TraceContext::of(None, report::addressee_of(&result).trace_id.as_deref());
                self.outbox.publish(result, None, Some(outcome.publication.clone()), trace).await;
                tracing::info!(assignment_id, "published an outcome from the disk");
            }
            Stored::At(_) => tracing::info!(assignment_id, "recorded an outcome from the disk"),
            Stored::Refused => tracing::info!(assignment_id, "an outcome from the disk was superseded"),
        }
    }

    /// Its worker may have ended before the letter was kept. Attempts before the last one are not known any more.
    async fn keep_letter_of(&self, outcome: &SpooledOutcome, result: &Bytes, publication: &Publication) {
        let record = Record::new(result.clone(), Expected::NOTHING, None);
        let Some((fault, published)) = record.dead_letter(self.settings.letters).zip(outcome.assignment.as_deref())
        else {
            return;
        };
        let payload = Bytes::copy_from_slice(published.get().as_bytes());
        let addressee = match Assignment::decode(&payload) {
            Ok(assignment) => assignment.addressee(),
            Err(undecodable) => undecodable.addressee,
        };
        let came = Came { payload: Some(&payload), trace: None, publication, delivered: 1 };
        self.until_definite(|| self.dead_letters.rewrite(&came, &addressee, fault)).await;
    }

    /// What only this worker has until it is published: nobody would deliver it again, so its dead letter, where one is
    /// due, is up to whoever reads this too.
    pub(super) fn unrecorded(
        &self,
        delivery: &Delivery,
        key: &AssignmentKey,
        result: &Bytes,
    ) -> Option<SpooledOutcome> {
        if self.ledger.is_kept() {
            return None;
        }
        let is_due = Record::new(result.clone(), Expected::NOTHING, None).dead_letter(self.settings.letters).is_some();
        let assignment = if is_due { raw(delivery.payload()) } else { None };
        Some(SpooledOutcome { assignment, ..outcome(delivery, key, Expected::NOTHING, result)? })
    }

    pub(super) fn encode(&self, step: &mut StepResult, assignment: &Assignment) -> Bytes {
        step.encode(assignment, &self.identity.worker_id, self.largest_result())
    }

    /// The most bytes of an output that leave room for what a record says around it.
    pub(super) fn largest_output(&self) -> usize {
        self.broker.max_payload().saturating_sub(ENVELOPE_BYTES)
    }

    fn largest_result(&self) -> usize {
        self.broker.max_payload().saturating_sub(HEADER_BYTES)
    }

    /// The fault of a step that is due as a dead letter too.
    pub(super) fn due_letter<'s>(&self, step: &'s StepResult) -> Option<&'s Fault> {
        let is_due = |fault: &&Fault| self.settings.letters.include(fault.cause.code(), fault.cause.is_retryable());
        step.error.as_ref().filter(is_due)
    }

    /// Keeps the dead letter of a step that failed for good.
    pub(super) async fn keep_failure(&self, arrival: &Arrival, fault: &Fault, failed: &[Attempt]) {
        let addressee = arrival.assignment.addressee();
        let stage = Stage::of_result(fault.cause.code(), fault.cause.is_retryable());
        self.keep_dead_letter(&arrival.delivery, &addressee, stage, fault, failed).await;
    }

    pub(super) async fn keep_dead_letter(
        &self,
        delivery: &Delivery,
        addressee: &Addressee,
        stage: Stage,
        fault: &Fault,
        failed: &[Attempt],
    ) {
        failpoint::reach(Point::BeforeDeadLetter).await;
        self.until_definite(|| self.dead_letters.write(delivery, addressee, stage, fault, failed)).await;
        failpoint::reach(Point::AfterDeadLetter).await;
        self.metrics.dead_letter(stage);
    }

    /// Repeats a write until the broker has definitely done or refused it; `/readyz` says so meanwhile.
    pub(super) async fn until_definite<T, F>(&self, write: impl Fn() -> F) -> T
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let mut attempt = 0;
        loop {
            match write().await {
                Ok(done) => {
                    if attempt > 0 {
                        self.health.clear(Concern::StorageRefused);
                    }
                    return done;
                }
                Err(error) => {
                    tracing::warn!(%error, attempt, "writing again");
                    // A stream that is gone gives no answer either, where somebody else listens on its subject.
                    if attempt > 0 || !matches!(error, StoreError::Unknown { .. }) {
                        self.health.raise_unless_away(Concern::StorageRefused, error.to_string());
                    }
                    self.metrics.publish_retried();
                }
            }
            tokio::time::sleep(pause(attempt)).await;
            attempt += 1;
        }
    }

    /// The same for what may be larger than anybody takes: then it says less, as long as `shorter` finds something to leave
    /// out. Returns the bytes too that were written in the end.
    pub(super) async fn until_it_fits<T, F>(
        &self,
        mut message: Bytes,
        mut shorter: impl FnMut(&Bytes) -> Option<Bytes>,
        write: impl Fn(Bytes) -> F,
    ) -> (T, Bytes)
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        loop {
            let fitting = || async {
                match write(message.clone()).await {
                    // No other try can succeed.
                    Err(StoreError::TooLarge { .. }) => Ok(None),
                    // The broker has come back with a smaller limit, and hangs up on whoever ignores it.
                    Err(_) if message.len() > self.largest_result() => Ok(None),
                    outcome => outcome.map(Some),
                }
            };
            if let Some(outcome) = self.until_definite(fitting).await {
                return (outcome, message);
            }
            let Some(less) = shorter(&message) else { break };
            message = less;
        }
        // Until somebody raises the limit.
        (self.until_definite(|| write(message.clone())).await, message)
    }

    /// On a lapsed hold another worker may have recorded an outcome that has been dropped since. Unknown counts as so.
    pub(super) async fn may_be_answered_already(&self, published: Timestamp) -> bool {
        match self.ledger.may_have_dropped_since(published).await {
            Ok(may_have_dropped) => may_have_dropped,
            Err(error) => {
                tracing::warn!(%error, "cannot tell whether a late outcome is still wanted");
                true
            }
        }
    }

    /// What is recorded of these.
    pub(super) async fn read_records(&self, keys: &[AssignmentKey]) -> HashMap<String, Record> {
        self.until_read(|| self.ledger.look_up(keys)).await
    }

    /// Which refusals are stored of these.
    pub(super) async fn read_refusals(&self, keys: &[AssignmentKey]) -> HashMap<String, (Publication, Bytes)> {
        self.until_read(|| self.ledger.refusals(keys)).await
    }

    /// Asks until there is an answer: without one nothing may start.
    pub(super) async fn until_read<T, E: Display, F>(&self, ask: impl Fn() -> F) -> T
    where
        F: Future<Output = Result<T, E>>,
    {
        let mut attempt = 0;
        loop {
            match ask().await {
                Ok(answer) => return answer,
                Err(error) => {
                    tracing::warn!(%error, "a look-up failed: asking again");
                    self.health.raise_unless_away(Concern::StreamsUnavailable, error.to_string());
                }
            }
            tokio::time::sleep(pause(attempt)).await;
            attempt += 1;
        }
    }
}

/// Whether a delivery is executed although there is a record.
pub(super) fn may_replace(record: &Record, delivery: &Delivery) -> bool {
    record.may_be_replaced_by(delivery.publication(), delivery.is_replay())
}

/// Between two tries of a write.
fn pause(attempt: u32) -> Duration {
    backoff::doubling(FIRST_PAUSE, MAX_PAUSE, attempt, fastrand::f64())
}

/// As it is kept on the disk. What we encode ourselves is JSON, so there is always one.
fn outcome(delivery: &Delivery, key: &AssignmentKey, expected: Expected, result: &Bytes) -> Option<SpooledOutcome> {
    Some(SpooledOutcome {
        tenant_id: key.tenant.as_str().to_owned(),
        assignment_id: key.assignment_id.to_string(),
        publication: delivery.publication().to_header(),
        published: delivery.published(),
        expected,
        result: raw(result)?,
        assignment: None,
    })
}

fn raw(json: &Bytes) -> Option<Box<RawValue>> {
    RawValue::from_string(String::from_utf8(json.to_vec()).ok()?).ok()
}
