//! A delivery that does not run: kept or stored first, then said, then settled.

use std::collections::HashMap;
use std::sync::Arc;

use async_nats::{HeaderMap, Message};
use bytes::Bytes;

use super::Pipeline;
use super::judge::Judged;
use crate::admission::Refusal;
use crate::assignment::{Addressee, Assignment, Undecodable};
use crate::blocks::BlockKind;
use crate::broker::kv;
use crate::broker::streams::DELIVERY_BUCKET;
use crate::contract::{self, Stage};
use crate::failpoint::{self, Point};
use crate::fault::{Cause, Fault, Invalid};
use crate::ids::AssignmentKey;
use crate::intake::{Delivery, Settlement};
use crate::publication::Publication;
use crate::report;
use crate::report::ledger::refused_subject;
use crate::telemetry::{self, SpanIds};
use crate::trace_context::TraceContext;

/// Why a delivery does not run.
pub(super) struct Rejection {
    addressee: Addressee,
    /// What it asks for, where that could be read.
    kind: Option<BlockKind>,
    fault: Fault,
    ends: RejectionEnd,
    /// Whether a worker with other settings would accept it.
    is_by_settings: bool,
}

enum RejectionEnd {
    /// Kept as a dead letter, then said.
    DeadLetter(Stage),
    /// Stored for redeliveries, then said: the Router may send it again.
    Refused(AssignmentKey),
}

impl Rejection {
    pub(super) fn undecodable(undecodable: Undecodable) -> Self {
        let Undecodable { addressee, invalid } = undecodable;
        let fault = Fault::new(invalid.cause, invalid.to_string());
        Self { addressee, kind: None, fault, ends: RejectionEnd::DeadLetter(Stage::Decode), is_by_settings: false }
    }

    /// What its block refuses before it touches anything.
    pub(super) fn not_allowed(assignment: &Assignment, invalid: Invalid) -> Self {
        let undecodable = Undecodable { addressee: assignment.addressee(), invalid };
        Self { kind: Some(assignment.block.kind()), is_by_settings: true, ..Self::undecodable(undecodable) }
    }

    pub(super) fn refused(assignment: &Assignment, refusal: Refusal) -> Self {
        let ends = if refusal.cause.is_retryable() {
            RejectionEnd::Refused(assignment.key.clone())
        } else {
            RejectionEnd::DeadLetter(Stage::Admit)
        };
        let fault = Fault::new(refusal.cause, refusal.message);
        let kind = Some(assignment.block.kind());
        Self { addressee: assignment.addressee(), kind, fault, ends, is_by_settings: true }
    }

    /// Why, for a result.
    pub(super) fn into_fault(self) -> Fault {
        self.fault
    }
}

/// A delivery, and what this worker makes of it.
pub(super) type Judgement = (Delivery, Result<Judged, Rejection>);

/// What may have been refused before: redeliveries. What is wrong for good is found wrong each time.
fn refusable((delivery, judgement): &Judgement) -> Option<AssignmentKey> {
    match judgement {
        Ok(Judged::Runs(assignment) | Judged::PassesOn(assignment) | Judged::Ends(assignment, _)) => {
            (delivery.delivered() > 1).then(|| assignment.key.clone())
        }
        Err(_) => None,
    }
}

/// Where a rejection for good by a worker's settings is kept: others may have other ones.
fn rejected_note(publication: &Publication) -> String {
    kv::subject(DELIVERY_BUCKET, &format!("{}.rejected", contract::escape(&publication.to_header())))
}

impl Pipeline {
    /// What was refused once stays refused, whatever has changed since: the Router has been told so, and may have sent it
    /// again. Returns the others. Only redeliveries ask.
    pub(super) async fn repeat_refusals(self: &Arc<Self>, judged: Vec<Judgement>) -> Vec<Judgement> {
        let keys: Vec<_> = judged.iter().filter_map(refusable).collect();
        if keys.is_empty() {
            return judged;
        }
        let (refusals, rejections) = tokio::join!(self.read_refusals(&keys), self.read_rejections(&judged));
        let mut others = Vec::with_capacity(judged.len());
        for one in judged {
            let publication = one.0.publication();
            let refusal = refusable(&one).and_then(|key| refusals.get(&refused_subject(&key)));
            let refusal = refusal.filter(|(refused, _)| refused == publication).map(|(_, verdict)| verdict);
            let rejection = || rejections.get(&rejected_note(publication)).map(|kept| &kept.payload);
            match refusal.or_else(rejection).cloned() {
                Some(verdict) => self.spawn(Self::refuse_again, (one.0, verdict)),
                None => others.push(one),
            }
        }
        others
    }

    async fn read_rejections(&self, judged: &[Judgement]) -> HashMap<String, Message> {
        let redeliveries = judged.iter().filter(|one| refusable(one).is_some());
        let notes: Vec<_> = redeliveries.map(|(delivery, _)| rejected_note(delivery.publication())).collect();
        let bucket = kv::stream(DELIVERY_BUCKET);
        self.until_read(|| self.broker.last(&bucket, notes.clone())).await
    }

    async fn refuse_again(self: Arc<Self>, (delivery, verdict): (Delivery, Bytes)) {
        let trace = TraceContext::of(delivery.headers(), report::addressee_of(&verdict).trace_id.as_deref());
        self.outbox.refuse(verdict, trace).await;
        delivery.settle(Settlement::Done).await;
    }

    /// Dead letter or stored refusal first, verdict second, so that what was said is also kept; settled when the broker
    /// has the verdict. What is not wanted any more is accepted and ends as cancelled, where it could be sent again.
    pub(super) async fn reject(self: Arc<Self>, (delivery, rejection): (Delivery, Rejection)) {
        if let RejectionEnd::Refused(key) = &rejection.ends
            && let Some(cancelled) = self.standing_cancel(&delivery, key).await
            && let Ok(assignment) = Assignment::decode(delivery.payload())
        {
            return Box::pin(self.end_cancelled(delivery, assignment, cancelled)).await;
        }
        let Rejection { addressee, kind, fault, ends, is_by_settings } = rejection;
        let trace = TraceContext::of(delivery.headers(), addressee.trace_id.as_deref());
        let span = telemetry::receive_span(trace.as_ref(), &self.ids_of(&addressee, kind));
        telemetry::mark_failed(&span);
        let verdict = report::rejected(&addressee, fault.cause, &fault.message, &self.identity.worker_id);
        match &ends {
            RejectionEnd::DeadLetter(stage) => {
                self.keep_dead_letter(&delivery, &addressee, *stage, &fault, &[]).await;
                if is_by_settings && self.hands_back() {
                    let (note, kept) = (rejected_note(delivery.publication()), verdict.clone().unwrap_or_default());
                    let store = || self.broker.store(note.clone(), HeaderMap::new(), kept.clone());
                    self.until_definite(store).await;
                }
            }
            RejectionEnd::Refused(key) => {
                let stored = verdict.clone().unwrap_or_default();
                let store = || self.ledger.write_refusal(key, delivery.publication(), stored.clone());
                self.until_definite(store).await;
            }
        }
        self.metrics.rejected(fault.cause);
        if let RejectionEnd::Refused(AssignmentKey { tenant, .. }) = &ends
            && fault.cause == Cause::OverBudget
        {
            self.metrics.tenant_refused(self.gate.policy().label(tenant));
            self.tallies.refused(tenant);
        }
        tracing::info!(
            assignment_id = addressee.assignment_id,
            tenant_id = addressee.tenant_id,
            trace_id = addressee.trace_id,
            code = fault.cause.code(),
            reason = fault.message,
            "Assignment rejected"
        );
        if let Some(verdict) = verdict {
            failpoint::reach(Point::BeforeResult).await;
            self.outbox.refuse(verdict, trace).await;
        }
        failpoint::reach(Point::AfterResult).await;
        delivery.settle(Settlement::Done).await;
        failpoint::reach(Point::AfterSettle).await;
    }

    /// Accepted, and ended before it has begun.
    pub(super) async fn end_cancelled(self: Arc<Self>, delivery: Delivery, assignment: Assignment, cancelled: Fault) {
        let mut arrival = self.arrival(delivery, assignment);
        self.say_accepted(&mut arrival, self.saying_now()).await;
        self.end_refused((Box::new(arrival), cancelled)).await;
    }

    fn ids_of<'a>(&'a self, addressee: &'a Addressee, kind: Option<BlockKind>) -> SpanIds<'a> {
        SpanIds {
            tenant_id: addressee.tenant_id.as_deref(),
            trace_id: addressee.trace_id.as_deref(),
            run_id: addressee.run_id.as_deref(),
            block_type: kind.map(BlockKind::as_str),
            worker_id: &self.identity.worker_id,
        }
    }
}
