//! Approvals: parked when they arrive, brought forward by whoever learns something about them, and then concluded.
//!
//! Every step stores first and looks second, and each can be repeated by any worker: the request's revision decides who
//! ends it, the record what is published, and the request is removed last.

use std::collections::HashSet;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use jiff::Timestamp;
use serde_json::value::RawValue;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span};

use super::durable::may_replace;
use super::{Arrival, Pipeline};
use crate::approval::answer::Answer;
use crate::approval::deadlines::Deadlines;
use crate::approval::request::{Outcome, Request, State};
use crate::approval::{AfterAnEnd, Opened};
use crate::assignment::Assignment;
use crate::blocks::Block;
use crate::blocks::human::Approval;
use crate::broker::kv::{Change, Entry};
use crate::broker::{Expected, StoreError, Stored};
use crate::execute::Execution;
use crate::failpoint::{self, Point};
use crate::fault::{Cause, Fault, Invalid};
use crate::ids::AssignmentKey;
use crate::intake::{Delivery, Settlement};
use crate::metrics::IgnoredAnswer;
use crate::report::dead_letter::Came;
use crate::report::ledger::Record;
use crate::report::{self, StepResult};
use crate::telemetry;
use crate::vital::Vital;

/// Requests that are looked at at once when many are due.
const LOOKS: usize = 16;
/// So many workers do not all look at the same moment.
const SPREAD_MS: i64 = 250;
/// Workers of the request's own pool come first; those of others help when none has come for so long.
const OTHER_POOLS_GRACE_MS: i64 = 60_000;
/// Whoever ended a request concludes it within milliseconds; after this, somebody else does.
const CONCLUSION_GRACE_MS: i64 = 10_000;
/// A request that is still there is looked at again.
const LOOK_AGAIN_MS: i64 = 10_000;
/// The clock may be set: the next deadline is looked at no later than this.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// How long a deadline waits for answers that the broker already has.
const HEAR_OUT: Duration = Duration::from_secs(10);
const HEAR_OUT_PAUSE: Duration = Duration::from_millis(100);

/// What a look at a request came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// Somebody is still waited for.
    Waits,
    /// Its result is published.
    Ended,
}

/// Why a request is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    /// Something was said. A deadline that has passed meanwhile is left to whoever watches it.
    News,
    /// It is due.
    Due,
}

/// Ends requests at their deadlines, and concludes what a worker left behind, until `stop`.
async fn watch(pipeline: Arc<Pipeline>, stop: CancellationToken) {
    tokio::select! {
        () = pipeline.jetstream() => {}
        () = stop.cancelled() => return,
    }
    let mut changes = pipeline.approvals.requests().watch(pipeline.health.clone());
    let mut looks = FuturesUnordered::new();
    loop {
        let now = Timestamp::now().as_millisecond();
        let due_in = {
            let mut deadlines = pipeline.deadlines();
            pipeline.metrics.set_approvals_open(deadlines.len());
            while looks.len() < LOOKS
                && let Some(key) = deadlines.take(now)
            {
                looks.push(pipeline.look_at(key));
            }
            deadlines.next().map_or(i64::MAX, |due| due.saturating_sub(now)).max(0).unsigned_abs()
        };
        tokio::select! {
            change = changes.recv() => match change {
                Some(Change::Anew) => pipeline.deadlines().clear(),
                Some(Change::Put(entry)) => pipeline.note_open(&entry),
                Some(Change::Removed(key)) => pipeline.deadlines().remove(&key),
                Some(Change::Current) => pipeline.deadlines().complete(),
                None => return,
            },
            Some((key, is_there)) = looks.next() => {
                let mut deadlines = pipeline.deadlines();
                if is_there {
                    deadlines.again(&key, Timestamp::now().as_millisecond() + LOOK_AGAIN_MS);
                } else {
                    deadlines.forget(&key);
                }
            }
            () = tokio::time::sleep(Duration::from_millis(due_in).min(LONGEST_SLEEP)), if looks.len() < LOOKS => {}
            () = stop.cancelled() => break,
        }
    }
    // Whatever is dropped here, another worker does: but what has begun is better finished.
    while looks.next().await.is_some() {}
}

impl Pipeline {
    /// Has a task watch the deadlines of approvals until `stop`. A drain waits for it.
    pub fn watch_approvals(self: &Arc<Self>, stop: CancellationToken, vital: &Vital) {
        self.tasks.spawn(vital.watched("watch approvals", watch(Arc::clone(self), stop)));
    }

    /// Stores the request, tells its approvers and settles the delivery: from then on it needs nobody until it is due.
    pub(super) async fn park(&self, mut arrival: Box<Arrival>, approval: &Approval, record: Option<Record>) {
        let begun = Instant::now();
        arrival.delivery.started();
        let Some(mut request) = request(&arrival, self.identity.pool.clone(), record.as_ref()) else { return };
        if let Some(fault) = self.does_not_fit(&request, &arrival.assignment, approval) {
            let (expected, queued) = (request.replaces, request.queued);
            return self.finish(arrival, expected, queued, Execution::not_begun(fault)).await;
        }
        let mut after_an_end = AfterAnEnd::LookFirst;
        let (entry, is_asked) = loop {
            let open = || self.approvals.open(&request, after_an_end);
            match self.while_held(&arrival.delivery, open).await {
                None => return,
                Some(Opened::At(entry)) => break (entry, false),
                Some(Opened::Joined(entry)) => break (entry, true),
                Some(Opened::Ended(entry, ended)) => self.conclude(&entry, &ended).await,
                Some(Opened::Before) => {}
                Some(Opened::TooLarge(limit)) => {
                    let message =
                        format!("the request for approval has {} bytes, more than {limit}", request.encode().len());
                    let (expected, queued) = (request.replaces, request.queued);
                    let execution = Execution::not_begun(Fault::new(Cause::OverCap, message));
                    return self.finish(arrival, expected, queued, execution).await;
                }
            }
            let key = std::slice::from_ref(&arrival.assignment.key);
            let record = self.read_records(key).await.into_values().next();
            if let Some(record) = record.as_ref().filter(|record| !may_replace(record, &arrival.delivery)) {
                self.metrics.result_replayed();
                return self.answer(arrival, record.clone()).await;
            }
            request.since = request.since.or_else(|| record.as_ref().map(|_| arrival.delivery.published()));
            request.replaces = record.map_or(Expected::NOTHING, |record| record.place);
            after_an_end = AfterAnEnd::AskAgain;
        };
        failpoint::reach(Point::RequestStored).await;
        // Before the watch says so: what waits here for this one comes next.
        self.note_open(&entry);
        let progress = self.bring_forward(entry.clone(), Reason::News).await;
        let announcement = (progress == Progress::Waits && !is_asked).then(|| {
            // What waits may have been stored by an earlier delivery.
            let waits = Request::decode(&entry).unwrap_or(request);
            self.announcement(&waits, &arrival.assignment, approval)
        });
        if is_asked {
            arrival.costs_nothing();
        }
        self.leave_to_its_request(arrival, announcement, begun).await;
    }

    /// Has the request that waits under its id answer this publication too: nothing else is run, whatever it asks for. It
    /// comes back where no such request waits any more.
    pub(super) async fn join(&self, mut arrival: Box<Arrival>) -> Option<Box<Arrival>> {
        let begun = Instant::now();
        let (key, publication) = (&arrival.assignment.key, arrival.delivery.publication());
        match self.while_held(&arrival.delivery, || self.approvals.join(key, publication)).await? {
            Opened::Before => {
                self.deadlines().remove(&key.token());
                Some(arrival)
            }
            Opened::Ended(entry, ended) => {
                self.conclude(&entry, &ended).await;
                Some(arrival)
            }
            // Where the bucket has no room for one more name, the result is published all the same.
            Opened::At(_) | Opened::Joined(_) | Opened::TooLarge(_) => {
                arrival.costs_nothing();
                self.leave_to_its_request(arrival, None, begun).await;
                None
            }
        }
    }

    /// Settles what a request answers from now on.
    async fn leave_to_its_request(&self, arrival: Box<Arrival>, announcement: Option<Bytes>, begun: Instant) {
        let Arrival { mut delivery, assignment, said, trace, .. } = *arrival;
        delivery.started();
        let before = self.before(said.as_ref(), &assignment);
        self.outbox.park(announcement, before, trace).await;
        failpoint::reach(Point::RequestAnnounced).await;
        self.load.flow(delivery.source()).finished(begun.elapsed());
        delivery.settle(Settlement::Done).await;
        failpoint::reach(Point::AfterSettle).await;
    }

    /// Which of these have a request that waits, in their order; nothing where none has. What this worker has not been told
    /// yet is asked for. To be asked before their records are read: a request goes when there is its record.
    pub(super) async fn waiting_for_a_person(&self, keys: &[AssignmentKey]) -> Vec<bool> {
        if self.deadlines().has_none() || !self.has_jetstream() {
            return Vec::new();
        }
        let tokens: Vec<_> = keys.iter().map(AssignmentKey::token).collect();
        let known: Vec<_> = {
            let deadlines = self.deadlines();
            tokens.iter().map(|token| deadlines.has(token)).collect()
        };
        let unknown = tokens.iter().zip(&known).filter(|(_, known)| known.is_none());
        let unknown: Vec<_> = unknown.map(|(token, _)| token.clone()).collect();
        let found = if unknown.is_empty() { HashSet::new() } else { self.ask_which_wait(&unknown).await };
        tokens.iter().zip(known).map(|(token, known)| known.unwrap_or_else(|| found.contains(token))).collect()
    }

    /// Without an answer they count as none: whatever runs, the record decides.
    async fn ask_which_wait(&self, tokens: &[String]) -> HashSet<String> {
        let found = self.approvals.requests().having_values(tokens).await;
        found.inspect_err(|error| tracing::debug!(%error, "cannot tell what waits for a person")).unwrap_or_default()
    }

    /// The request of an entry waits, as far as this worker knows.
    fn note_open(&self, entry: &Entry) {
        let due = self.due(entry, Timestamp::now().as_millisecond());
        self.deadlines().set(&entry.key, due);
    }

    fn deadlines(&self) -> MutexGuard<'_, Deadlines> {
        self.deadlines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A cancel stands from now on: what waits under this key ends, also where nobody waits for that any more.
    pub(crate) async fn cancel_approval(self: &Arc<Self>, key: &AssignmentKey) {
        let _ = self.tasks.spawn(Arc::clone(self).heed_cancel(key.clone())).await;
    }

    /// Somebody has answered, it may be before there is a request. Goes on where nobody waits for that any more.
    ///
    /// # Errors
    /// The field that makes it no answer.
    pub(crate) async fn answered(self: &Arc<Self>, payload: &[u8], at: Timestamp, place: u64) -> Result<(), Invalid> {
        let count = |_: &Invalid| self.metrics.answer_ignored(IgnoredAnswer::Malformed);
        let answer = Answer::decode(payload, at, place).inspect_err(count)?;
        let _ = self.tasks.spawn(Arc::clone(self).heed_answer(answer)).await;
        Ok(())
    }

    /// What came as a cancel or as an answer cannot be read.
    pub(crate) fn note_dropped_control_message(&self) {
        self.metrics.control_message_dropped();
    }

    async fn heed_cancel(self: Arc<Self>, key: AssignmentKey) {
        if let Some(entry) = self.read_request(&key.token()).await {
            self.bring_forward(entry, Reason::News).await;
        }
    }

    /// Keeps the answer first and looks for its request second.
    async fn heed_answer(self: Arc<Self>, answer: Answer) {
        self.keep(&answer).await;
        failpoint::reach(Point::AnswerStored).await;
        let (assignment_id, tenant_id) = (&*answer.of.assignment_id, answer.of.tenant.as_str());
        match self.read_request(&answer.of.token()).await {
            Some(entry) if was_asked(&entry, &answer.said.approver) => {
                self.bring_forward(entry, Reason::News).await;
            }
            Some(_) => {
                if let Some(count) = self.strangers.count() {
                    tracing::warn!(count, assignment_id, tenant_id, "ignored answers of those who were not asked");
                }
                self.metrics.answer_ignored(IgnoredAnswer::Unlisted);
            }
            None => tracing::info!(assignment_id, tenant_id, "an answer came before its request, or after its end"),
        }
    }

    /// Looks at a request of which something was said or that is due, and ends it where it comes to something.
    async fn bring_forward(&self, mut entry: Entry, reason: Reason) -> Progress {
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
    async fn conclude(&self, entry: &Entry, request: &Request) {
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

    /// What approvers are told; the webhook is told in the background. Again when the delivery comes again.
    fn announcement(&self, request: &Request, assignment: &Assignment, approval: &Approval) -> Bytes {
        let announcement = request.announcement(assignment, approval);
        tracing::info!(
            assignment_id = %request.key.assignment_id,
            tenant_id = request.key.tenant.as_str(),
            trace_id = assignment.correlation.trace_id,
            expires_at = %request.expires_at,
            "Approval requested"
        );
        if let Some(webhook) = self.engine.approval_webhook() {
            let (metrics, assignment_id) = (Arc::clone(&self.metrics), Arc::clone(&request.key.assignment_id));
            let (body, trace) = (announcement.clone(), request.trace.clone());
            tokio::spawn(async move {
                if let Err(fault) = webhook.post(body, trace.as_ref()).await {
                    tracing::warn!(%assignment_id, reason = fault.message, "cannot tell the approval webhook");
                    metrics.webhook_failed();
                }
            });
        }
        announcement
    }

    /// Stores until that is definite, as long as the delivery is ours.
    async fn while_held<F>(&self, delivery: &Delivery, store: impl Fn() -> F) -> Option<Opened>
    where
        F: Future<Output = Result<Opened, StoreError>>,
    {
        let store = || async {
            if delivery.is_lapsed() {
                return Ok(None);
            }
            match store().await {
                Err(StoreError::TooLarge { limit, .. }) => Ok(Some(Opened::TooLarge(limit))),
                outcome => outcome.map(Some),
            }
        };
        self.until_definite(store).await
    }

    /// Keeps an answer: the first of its approver, unless that one is used up.
    async fn keep(&self, answer: &Answer) {
        while let Some(earlier) = self.until_definite(|| self.approvals.keep(answer)).await {
            let stays = match Answer::read(&answer.of, &earlier.value) {
                Some(first) if first.order() <= answer.order() => !self.is_used_up(&first).await,
                Some(_) => self.is_used_up(answer).await,
                None => false,
            };
            let replace = || self.approvals.keep_instead(answer, &earlier);
            if stays || matches!(self.until_definite(replace).await, Stored::At(_)) {
                return;
            }
        }
    }

    /// Whether a kept answer was about a request that has ended.
    async fn is_used_up(&self, answer: &Answer) -> bool {
        match self.read_request(&answer.of.token()).await.as_ref().and_then(Request::decode) {
            Some(request) => !request.heeds(answer.at()),
            None => !self.read_records(std::slice::from_ref(&answer.of)).await.is_empty(),
        }
    }

    fn outcome_span(&self, request: &Request, assignment: &Assignment) -> Span {
        telemetry::outcome_span(request.trace.as_ref(), &self.span_ids(assignment))
    }

    /// And whether it was there.
    async fn look_at(&self, key: Arc<str>) -> (Arc<str>, bool) {
        let entry = self.read_request(&key).await;
        let is_there = entry.is_some();
        if let Some(entry) = entry {
            self.bring_forward(entry, Reason::Due).await;
        }
        (key, is_there)
    }

    /// When this worker should look at a request, in Unix milliseconds.
    fn due(&self, entry: &Entry, now: i64) -> i64 {
        let Some(request) = Request::decode(entry) else { return i64::MAX };
        let due = match request.state {
            State::Open(_) => request.expires_at.as_millisecond(),
            State::Ended { .. } => now + CONCLUSION_GRACE_MS,
        };
        let grace = if request.pool == self.identity.pool { 0 } else { OTHER_POOLS_GRACE_MS };
        due + grace + fastrand::i64(0..SPREAD_MS)
    }

    async fn read_request(&self, key: &str) -> Option<Entry> {
        self.until_read(|| self.approvals.requests().get(key)).await
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

    /// What could never be stored or announced, as a fault.
    fn does_not_fit(&self, request: &Request, assignment: &Assignment, approval: &Approval) -> Option<Fault> {
        let largest = self.largest_output();
        let bytes = request.encode().len().max(request.announcement(assignment, approval).len());
        let message = || format!("the request for approval has {bytes} bytes, the broker takes {largest}");
        (bytes > largest).then(|| Fault::new(Cause::OverCap, message()))
    }
}

/// The request that an arrival asks to store.
fn request(arrival: &Arrival, pool: Option<String>, record: Option<&Record>) -> Option<Request> {
    let Arrival { delivery, assignment, .. } = arrival;
    let requested_at = Timestamp::now();
    let published: Box<RawValue> = serde_json::from_slice(delivery.payload()).ok()?;
    Some(Request {
        key: assignment.key.clone(),
        publication: delivery.publication().clone(),
        pool,
        requested_at,
        expires_at: requested_at.checked_add(assignment.timeout).unwrap_or(Timestamp::MAX),
        queued: delivery.received().elapsed(),
        replaces: record.map_or(Expected::NOTHING, |record| record.place),
        since: (record.is_some() || delivery.is_replay()).then(|| delivery.published()),
        trace: arrival.trace.clone(),
        state: State::Open(published),
    })
}

/// Whether whoever ended a request would have concluded it by now.
fn is_left_behind(entry: &Entry) -> bool {
    let age = Timestamp::now().duration_since(entry.stored);
    age.as_millis() >= i128::from(CONCLUSION_GRACE_MS)
}

/// Whether somebody is one of those whose answer counts; true where that cannot be told any more.
fn was_asked(entry: &Entry, approver: &str) -> bool {
    let Some(State::Open(published)) = Request::decode(entry).map(|request| request.state) else { return true };
    let Ok(assignment) = Assignment::decode(published.get().as_bytes()) else { return true };
    match &*assignment.block {
        Block::Human(approval) => approval.approvers().iter().any(|asked| asked == approver),
        _ => true,
    }
}

fn unreadable(entry: &Entry) -> Progress {
    tracing::error!(key = entry.key, "left alone a request for approval that this version does not understand");
    Progress::Waits
}
