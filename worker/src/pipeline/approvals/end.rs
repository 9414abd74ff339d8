//! What a request comes to: whoever replaces it by its result ends it, and concludes it after that.

use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use serde_json::value::RawValue;
use tracing::{Instrument, Span};

use crate::approval::request::{Outcome, Request, State};
use crate::assignment::Assignment;
use crate::blocks::Block;
use crate::broker::kv::Entry;
use crate::broker::{Expected, Stored};
use crate::failpoint::{self, Point};
use crate::pipeline::Pipeline;
use crate::report::dead_letter::Came;
use crate::report::ledger::Record;
use crate::report::{self, StepResult};
use crate::telemetry;

/// Whoever ended a request concludes it within milliseconds; after this, somebody else does.
pub(super) const CONCLUSION_GRACE_MS: i64 = 10_000;
/// How long a deadline waits for answers that the broker already has.
const HEAR_OUT: Duration = Duration::from_secs(10);
const HEAR_OUT_PAUSE: Duration = Duration::from_millis(100);

/// What a look at a request came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// Somebody is still waited for.
    Waits,
    /// Its result is published.
    Ended,
}

/// Why a request is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// Something was said. A deadline that has passed meanwhile is left to whoever watches it.
    News,
    /// It is due.
    Due,
}

impl Pipeline {
    /// Looks at a request of which something was said or that is due, and ends it where it comes to something.
    pub(super) async fn bring_forward(&self, mut entry: Entry, reason: Reason) -> Progress {
        let mut has_heard_out = false;
        loop {
            let Some(request) = Request::decode(&entry) else { return unreadable(&entry) };
            let published = match &request.state {
                State::Open(published) => published,
                State::Ended { .. } if reason == Reason::Due && is_left_behind(&entry) => {
                    self.conclude(&entry, &request).await;
                    return Progress::Ended;
                }
                // Whoever ended it is about to conclude it.
                State::Ended { .. } => return Progress::Ended,
            };
            let Ok(assignment) = Assignment::decode(published.get().as_bytes()) else { return unreadable(&entry) };
            let Block::Human(approval) = &*assignment.block else { return unreadable(&entry) };
            let answers = self.until_read(|| self.approvals.answers_to(&request, approval.approvers())).await;
            let cancelled = self.until_read(|| self.approvals.cancel_of(&request)).await;
            let now = Timestamp::now();
            match (request.outcome(approval, answers, cancelled, entry.stored, now), reason) {
                (None, _) | (Some(Outcome::NotAnswered), Reason::News) => return Progress::Waits,
                (Some(Outcome::NotAnswered), Reason::Due) if !has_heard_out => {
                    self.hear_out().await;
                    has_heard_out = true;
                }
                (Some(outcome), _) => {
                    let span = self.outcome_span(&request, &assignment);
                    let ended = self.end(&entry, request, &assignment, outcome, now).instrument(span.clone()).await;
                    if let Some((entry, request)) = ended {
                        failpoint::reach(Point::RequestEnded).await;
                        let publish = telemetry::publish_span(&span, &self.span_ids(&assignment));
                        self.conclude(&entry, &request).instrument(publish).await;
                        return Progress::Ended;
                    }
                    match self.read_request(&entry.key).await {
                        Some(known) => entry = known,
                        None => return Progress::Ended,
                    }
                }
            }
        }
    }

    /// Replaces an open request by its result; `None` where somebody else has changed it meanwhile.
    async fn end(
        &self,
        entry: &Entry,
        request: Request,
        assignment: &Assignment,
        outcome: Outcome,
        now: Timestamp,
    ) -> Option<(Entry, Request)> {
        let mut step = StepResult::of(request.execution(outcome, now), assignment.block.kind(), request.queued);
        let by = format!("{},{:016x}", self.identity.worker_id, fastrand::u64(..));
        let end = |step: &mut StepResult| {
            let result = step.encode(assignment, &self.identity.worker_id, self.largest_output());
            let result = RawValue::from_string(String::from_utf8(result.into()).ok()?).ok()?;
            Some(request.clone().ended(result, by.clone()))
        };
        let mut ended = end(&mut step)?;
        let value = ended.encode();
        let shorter = |value: &Bytes| {
            let is_shorter = step.shorten(assignment, value.len());
            ended = end(&mut step).filter(|_| is_shorter)?;
            Some(ended.encode())
        };
        let update = |value| self.approvals.requests().update(&entry.key, value, entry.revision);
        let (stored, value) = self.until_it_fits(value, shorter, update).await;
        let ours = match stored {
            Stored::At(revision) => Entry { value, revision, ..entry.clone() },
            // An earlier try of ours may have done it.
            Stored::Refused => self.read_request(&entry.key).await.filter(|known| known.value == value)?,
        };
        if step.error.is_some() {
            telemetry::mark_failed(&Span::current());
        }
        self.note_outcome(assignment, &step);
        Some((ours, ended))
    }

    /// Outcome recorded, dead letter kept, result published, request removed, in this order.
    pub(super) async fn conclude(&self, entry: &Entry, request: &Request) {
        let State::Ended { result, .. } = &request.state else { return };
        failpoint::reach(Point::BeforeRecord).await;
        let record = self.record_ended(request, Bytes::copy_from_slice(result.get().as_bytes())).await;
        failpoint::reach(Point::AfterRecord).await;
        if record.publication.as_ref() == Some(&request.publication)
            && let Some(fault) = record.dead_letter(self.settings.letters)
        {
            let addressee = report::addressee_of(&record.result);
            let (trace, publication) = (request.trace.clone(), &request.publication);
            let came = Came { payload: None, trace, publication, delivered: 1 };
            self.until_definite(|| self.dead_letters.rewrite(&came, &addressee, fault)).await;
        }
        let id = self.result_id(&request.publication);
        self.outbox.publish(record.result, None, id, request.trace.clone()).await;
        failpoint::reach(Point::AfterResult).await;
        // Refused where somebody else has removed it.
        self.until_definite(|| self.approvals.requests().delete(&entry.key, entry.revision)).await;
        failpoint::reach(Point::RequestRemoved).await;
    }

    /// Writes the record until its outcome is definite, and returns what stands in the end.
    async fn record_ended(&self, request: &Request, mut result: Bytes) -> Record {
        let (key, publication) = (&request.key, &request.publication);
        let mut expected = request.replaces;
        loop {
            let write = |result| self.ledger.write(key, publication, expected, result);
            let (stored, written) = self.until_it_fits(result, report::shorter, write).await;
            result = written;
            if let Stored::At(sequence) = stored {
                return Record::new(result, Expected::last(sequence), Some(publication.clone()));
            }
            match self.read_records(std::slice::from_ref(key)).await.into_values().next() {
                None => expected = Expected::NOTHING,
                Some(record) if record.gives_way_to(publication) => expected = record.place,
                Some(record) => return record,
            }
        }
    }

    fn outcome_span(&self, request: &Request, assignment: &Assignment) -> Span {
        telemetry::outcome_span(request.trace.as_ref(), &self.span_ids(assignment))
    }

    /// Returns when the answers that the broker had at the deadline have been heard by some worker, or after a while.
    async fn hear_out(&self) {
        let heard = async {
            while !self.approvals.are_heard().await {
                tokio::time::sleep(HEAR_OUT_PAUSE).await;
            }
        };
        let _ = tokio::time::timeout(HEAR_OUT, heard).await;
    }
}

/// Whether whoever ended a request would have concluded it by now.
fn is_left_behind(entry: &Entry) -> bool {
    let age = Timestamp::now().duration_since(entry.stored);
    age.as_millis() >= i128::from(CONCLUSION_GRACE_MS)
}

fn unreadable(entry: &Entry) -> Progress {
    tracing::error!(key = entry.key, "left alone a request for approval that this version does not understand");
    Progress::Waits
}
