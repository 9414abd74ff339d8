//! Approvals: asked for when they arrive, brought forward by whoever learns something about them, and then concluded.
//!
//! Every step stores first and looks second, and each can be repeated by any worker: the request's revision decides who
//! ends it, the record what is published, and the request is removed last.

mod watch; // which requests wait, and until when
mod heed; // what is said of them
mod end; // what they come to

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use jiff::Timestamp;
use serde_json::value::RawValue;

use super::durable::may_replace;
use super::{Arrival, Pipeline};
use crate::approval::request::{Request, State};
use crate::approval::{AfterAnEnd, Opened};
use crate::assignment::Assignment;
use crate::blocks::human::Approval;
use crate::broker::kv::Entry;
use crate::broker::{Expected, StoreError};
use crate::execute::Execution;
use crate::failpoint::{self, Point};
use crate::fault::{Cause, Fault};
use crate::intake::{Delivery, Settlement};
use crate::report::ledger::Record;
use end::{Progress, Reason};

impl Pipeline {
    /// Stores the request, tells its approvers and settles the delivery: from then on it needs nobody until it is due.
    pub(super) async fn ask(&self, mut arrival: Box<Arrival>, approval: &Approval, record: Option<Record>) {
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
        self.outbox.announce(announcement, before, trace).await;
        failpoint::reach(Point::RequestAnnounced).await;
        self.load.flow(delivery.source()).finished(begun.elapsed());
        delivery.settle(Settlement::Done).await;
        failpoint::reach(Point::AfterSettle).await;
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

    async fn read_request(&self, key: &str) -> Option<Entry> {
        self.until_read(|| self.approvals.requests().get(key)).await
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
