//! Work that its tenant may not have run yet: parked under its first identity, then settled; and taken up again later.
//!
//! What is parked holds no slot and no delivery, and so it holds up nobody.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::Stream;
use bytes::Bytes;
use futures::FutureExt;
use jiff::Timestamp;

use super::{Arrival, Pipeline};
use crate::admission::ceiling::Unit;
use crate::assignment::Assignment;
use crate::broker::streams::{DELIVERY_BUCKET, Parked, Source};
use crate::broker::{Expected, Stored, kv};
use crate::cancel::Cancel;
use crate::contract;
use crate::execute::Execution;
use crate::fault::{Cause, Fault};
use crate::ids::{AssignmentKey, TenantId};
use crate::intake::{Allowance, Delivery, Settlement, is_replay};
use crate::pool::Pool;
use crate::publication::{Elsewhere, FirstIdentity};
use crate::report::{self, StepResult};
use crate::trace_context::TraceContext;

/// What a message that is pulled has besides its payload, at most.
const ENVELOPE_BYTES: usize = 8 * 1024;
/// How long it may take to learn whether parked work may run.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long a worker may take to hear of a cancel, and to note what it parks.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Its tenant is at a ceiling, or has older work that waits for the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NotYet;

impl Pipeline {
    /// Takes what the tenant's ceilings have left for this; it is given back when the work has ended. What has to wait for a
    /// budget takes nothing.
    pub(super) async fn within_ceilings(&self, arrival: &mut Arrival) -> Result<Option<Unit>, NotYet> {
        if arrival.is_deferred {
            return Err(NotYet);
        }
        let tenant = &arrival.assignment.key.tenant;
        let quotas = self.schedule.terms(tenant).quotas;
        if quotas.concurrent.is_none() && quotas.memory_mb.is_none() {
            return Ok(None);
        }
        if self.is_behind_parked_work(&arrival.delivery, &arrival.assignment) {
            return Err(NotYet);
        }
        if let Some(most) = quotas.memory_bytes() {
            let held = self.memory.hold_within(tenant, arrival.delivery.bytes(), most);
            arrival.memory = Some(held.ok_or(NotYet)?);
        }
        match quotas.concurrent {
            None => Ok(None),
            // Whoever has no ceiling waits for a slot without room for this question.
            Some(most) => Box::pin(self.ceilings.take(tenant, most)).await.map(Some).ok_or(NotYet),
        }
    }

    /// Whether older work of its tenant waits for the same.
    pub(super) fn is_behind_parked_work(&self, delivery: &Delivery, assignment: &Assignment) -> bool {
        !delivery.is_parked() && self.parking.lane(waits_for(assignment.pool)).has_work_of(&assignment.key.tenant)
    }

    /// How much of a tenant's parked work may run here at this moment.
    pub(super) async fn allowance(self: &Arc<Self>, parked: Parked, tenant: &TenantId) -> Allowance {
        let messages = self.room_for_parked(parked, tenant);
        if messages == 0 {
            return Allowance::NOTHING;
        }
        let quotas = self.schedule.terms(tenant).quotas;
        let free = quotas.memory_bytes().map(|most| self.memory.free(tenant, most));
        if free == Some(0) {
            return Allowance::NOTHING;
        }
        // Units of a budget that could not be used here would be missing elsewhere, and for longer than those of a ceiling.
        let messages = self.known_to_be_paid_for(tenant, messages);
        let messages = self.within_the_ceiling(tenant, quotas.concurrent, messages).await;
        let messages = self.paid_for(tenant, messages).await;
        Allowance { messages, bytes: free.map(|free| free.saturating_add(ENVELOPE_BYTES)) }
    }

    async fn within_the_ceiling(&self, tenant: &TenantId, most: Option<u64>, wanted: usize) -> usize {
        let Some(most) = most.filter(|_| wanted > 0) else { return wanted };
        let wanted = u64::try_from(wanted).unwrap_or(u64::MAX);
        // Others' parked work, and a worker that is told to stop, wait behind this.
        let available = self.ceilings.available(tenant, most, wanted, PATIENCE).await;
        usize::try_from(available).unwrap_or(usize::MAX)
    }

    /// Parks it; what was parked already goes back to where it came from.
    pub(super) async fn park_for_later(&self, mut arrival: Box<Arrival>, cancelled: impl Future<Output = Fault>) {
        arrival.memory = None;
        let (source, parked) = (arrival.delivery.source(), waits_for(arrival.assignment.pool));
        if let Source::Parked(parked) = source {
            self.parking.lane(parked).rests(&arrival.assignment.key.tenant);
        }
        if arrival.delivery.is_parked() || arrival.delivery.is_lapsed() {
            return self.hand_back(arrival.delivery).await;
        }
        if !self.hands_back() {
            return self.end_unrun(arrival, Cause::Overloaded, "its tenant is at its ceiling: send it again").await;
        }
        // Whoever takes it up says no verdict.
        let before = self.before(arrival.said.as_ref(), &arrival.assignment);
        self.outbox.announce(None, before, arrival.trace.clone()).await;
        let token = contract::escape(arrival.assignment.key.tenant.as_str());
        let subject = self.settings.intake.parked_subject(parked, &token);
        let Some(place) = self.store_elsewhere(Elsewhere::Parked, &arrival.delivery, &subject).await else {
            let reason = "the assignment and the headers of one that is parked are larger than the broker takes";
            return self.end_unrun(arrival, Cause::OverCap, reason).await;
        };
        self.note_parked(&arrival.assignment.key, place, cancelled).await;
        let Arrival { mut delivery, assignment, .. } = *arrival;
        self.metrics.parked();
        tracing::info!(
            assignment_id = %assignment.key.assignment_id,
            tenant_id = assignment.key.tenant.as_str(),
            trace_id = assignment.correlation.trace_id,
            "Assignment parked"
        );
        delivery.started();
        delivery.settle(Settlement::Done).await;
        self.parking.lane(parked).parked(&assignment.key.tenant);
    }

    /// Notes where it is, for whoever cancels it; a cancel that came just before is looked for after that.
    async fn note_parked(&self, key: &AssignmentKey, place: u64, cancelled: impl Future<Output = Fault>) {
        let value = Bytes::from(format!("{},{place}", self.settings.intake.parked_stream()));
        self.until_definite(|| self.broker.store(note(key), HeaderMap::new(), value.clone())).await;
        if let Some(fault) = pin!(cancelled).now_or_never() {
            self.end_parked(key, &fault.message, |_, _| true).await;
        }
    }

    /// A cancel stands from now on: what is parked under this key ends, whether or not it may run. `sent` is when the
    /// broker got it, where that is known.
    pub(crate) fn cancel_parked(self: &Arc<Self>, cancel: &Cancel, sent: Option<Timestamp>) {
        if !self.ledger.is_kept() {
            return;
        }
        let (pipeline, key, tombstone) = (Arc::clone(self), cancel.key.clone(), cancel.tombstone(sent));
        self.tasks.spawn(async move {
            let meets = |published, parked| tombstone.is_after_either(published, parked);
            // It may just be on its way there, with a worker that has not heard of the cancel.
            if !pipeline.end_parked(&key, &tombstone.words, meets).await {
                tokio::time::sleep(LOOK_AGAIN).await;
                pipeline.end_parked(&key, &tombstone.words, meets).await;
            }
        });
    }

    /// Records that it was cancelled, publishes that and takes it out of the stream; whether there was any. What was parked
    /// to be run anew ends only where that is so of when it was published and when it was parked.
    async fn end_parked(
        &self,
        key: &AssignmentKey,
        words: &str,
        meets_anew: impl Fn(Timestamp, Timestamp) -> bool,
    ) -> bool {
        let Some((stream, parked)) = self.find_parked(key).await else { return false };
        let Ok(assignment) = Assignment::decode(&parked.payload) else { return true };
        let first = FirstIdentity::read(&parked.headers, Elsewhere::Parked).filter(|_| assignment.key == *key);
        let Some(FirstIdentity { publication, published }) = first else { return true };
        let parked_at = Timestamp::from_nanosecond(parked.time.unix_timestamp_nanos()).unwrap_or_default();
        let cancelled = Execution::not_begun(Fault::new(Cause::Cancelled, words.to_owned()));
        let mut step = StepResult::of(cancelled, assignment.block.kind(), Duration::ZERO);
        let mut result = self.encode(&mut step, &assignment);
        // What is recorded meanwhile gives way to a replay no more than to anything else.
        let mut replays = is_replay(&parked.headers);
        loop {
            let record = self.read_records(std::slice::from_ref(key)).await.into_values().next();
            let is_anew = record.is_some() || is_replay(&parked.headers);
            match &record {
                Some(record) if record.result == result => break,
                // It has ended already: whoever takes it up answers it with that.
                Some(record) if !record.may_be_replaced_by(&publication, replays) => return true,
                _ if is_anew && !meets_anew(published, parked_at) => return true,
                _ => {}
            }
            let expected = record.map_or(Expected::NOTHING, |record| record.place);
            let write = |result| self.ledger.write(key, &publication, expected, result);
            let (stored, written) = self.until_it_fits(result, report::shorter, write).await;
            result = written;
            if stored != Stored::Refused {
                break;
            }
            replays = false;
        }
        self.note_outcome(&assignment, &step);
        let trace = TraceContext::of(Some(&parked.headers), assignment.correlation.trace_id.as_deref());
        self.outbox.publish(result, None, None, trace).await;
        if let Err(error) = stream.delete_message(parked.sequence).await {
            tracing::debug!(%error, "a parked assignment that was cancelled stays: its record answers it");
        }
        true
    }

    /// The message that a note of this key leads to, and the stream that it is in: it may be another pool's.
    async fn find_parked(&self, key: &AssignmentKey) -> Option<(Stream<()>, StreamMessage)> {
        let bucket = kv::stream(DELIVERY_BUCKET);
        let found = self.until_read(|| self.broker.last(&bucket, vec![note(key)])).await;
        let found = found.into_values().next()?;
        let (stream, place) = std::str::from_utf8(&found.payload).ok()?.rsplit_once(',')?;
        let stream = self.broker.jetstream().get_stream_no_info(stream).await.ok()?;
        let message = stream.get_raw_message(place.parse().ok()?).await.ok()?;
        Some((stream, message))
    }

    /// It was accepted before: what is refused now ends as a result.
    pub(super) async fn end_refused(self: Arc<Self>, (arrival, fault): (Box<Arrival>, Fault)) {
        let fault = self.or_cancelled(&arrival.delivery, &arrival.assignment.key, fault).await;
        self.end_unrun(arrival, fault.cause, &fault.message).await;
    }

    async fn end_unrun(&self, mut arrival: Box<Arrival>, cause: Cause, reason: &str) {
        arrival.delivery.started();
        let queued = arrival.delivery.received().elapsed();
        let ended = Execution::not_begun(Fault::new(cause, reason.to_owned()));
        Box::pin(self.finish(arrival, Expected::NOTHING, queued, ended)).await;
    }
}

/// Where it is noted which message of the stream it is.
fn note(key: &AssignmentKey) -> String {
    kv::subject(DELIVERY_BUCKET, &format!("parked.{}", key.token()))
}

/// Which workers it waits for.
const fn waits_for(pool: Pool) -> Parked {
    match pool {
        Pool::Gpu => Parked::Gpu,
        Pool::Cpu | Pool::Io => Parked::General,
    }
}
