//! A delivery that does not run: kept or stored first, then said, then settled.

use std::sync::Arc;

use bytes::Bytes;

use super::Pipeline;
use super::deaths::DeliveryId;
use super::durable::may_replace;
use super::judge::Judged;
use crate::admission::Refusal;
use crate::assignment::{Addressee, Assignment, Undecodable};
use crate::blocks::BlockKind;
use crate::contract::Stage;
use crate::failpoint::{self, Point};
use crate::fault::{Cause, Fault, Invalid};
use crate::ids::AssignmentKey;
use crate::intake::{Delivery, Settlement};
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
    /// What it is about, where another worker may have accepted that before.
    doubted: Option<Box<Assignment>>,
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
        Self { addressee, kind: None, fault, ends: RejectionEnd::DeadLetter(Stage::Decode), doubted: None }
    }

    /// What its block refuses before it touches anything.
    pub(super) fn not_allowed(assignment: &Assignment, invalid: Invalid) -> Self {
        let undecodable = Undecodable { addressee: assignment.addressee(), invalid };
        Self { kind: Some(assignment.block.kind()), ..Self::undecodable(undecodable) }
    }

    pub(super) fn refused(assignment: &Assignment, refusal: Refusal) -> Self {
        let ends = if refusal.cause.is_retryable() {
            RejectionEnd::Refused(assignment.key.clone())
        } else {
            RejectionEnd::DeadLetter(Stage::Admit)
        };
        let fault = Fault::new(refusal.cause, refusal.message);
        let kind = Some(assignment.block.kind());
        Self { addressee: assignment.addressee(), kind, fault, ends, doubted: None }
    }

    /// The same, unless what is known of the assignment tells that it was accepted.
    pub(super) fn doubted(self, assignment: Assignment) -> Self {
        Self { doubted: Some(Box::new(assignment)), ..self }
    }

    /// Why, for a result.
    pub(super) fn into_fault(self) -> Fault {
        self.fault
    }
}

/// A delivery, and what this worker makes of it.
pub(super) type Judgement = (Delivery, Result<Judged, Rejection>);

/// What a redelivery may have been refused for before. What is wrong for good is found wrong each time.
fn refusable((delivery, judgement): &Judgement) -> Option<AssignmentKey> {
    let is_redelivery = delivery.delivered() > 1;
    match judgement {
        Ok(Judged::Runs(assignment) | Judged::PassesOn(assignment) | Judged::Ends(assignment, _)) => {
            is_redelivery.then(|| assignment.key.clone())
        }
        Err(Rejection { doubted, .. }) => doubted.as_ref().map(|assignment| assignment.key.clone()),
    }
}

impl Pipeline {
    /// What was refused once stays refused, whatever has changed since: the Router has been told so, and may have sent it
    /// again. Returns the others. Only redeliveries ask.
    pub(super) async fn repeat_refusals(self: &Arc<Self>, judged: Vec<Judgement>) -> Vec<Judgement> {
        let keys: Vec<_> = judged.iter().filter_map(refusable).collect();
        if keys.is_empty() {
            return judged;
        }
        let refusals = self.read_refusals(&keys).await;
        let mut others = Vec::with_capacity(judged.len());
        for one in judged {
            let refusal = refusable(&one).and_then(|key| refusals.get(&refused_subject(&key)));
            match refusal.filter(|(publication, _)| publication == one.0.publication()) {
                Some((_, verdict)) => self.spawn(Self::refuse_again, (one.0, verdict.clone())),
                None => others.push(one),
            }
        }
        others
    }

    /// What a worker with other settings has accepted ends as a result: that is so where something is recorded or noted of
    /// it. The rest is rejected, as it may have been before.
    pub(super) async fn resolve_doubts(&self, judged: Vec<Judgement>) -> Vec<Judgement> {
        let doubted = judged.iter().filter_map(|(delivery, judgement)| {
            let assignment = judgement.as_ref().err()?.doubted.as_ref()?;
            Some((assignment.key.clone(), DeliveryId::of(delivery)))
        });
        let (keys, deliveries): (Vec<_>, Vec<_>) = doubted.unzip();
        if keys.is_empty() {
            return judged;
        }
        let records = self.read_records(&keys).await;
        let mut noted = self.deaths.are_noted(&deliveries).await.into_iter();
        let resolved = judged.into_iter().map(|(delivery, judgement)| {
            let resolved = judgement.or_else(|mut rejection| {
                let Some(assignment) = rejection.doubted.take() else { return Err(rejection) };
                let record = records.get(&report::ledger::subject(&assignment.key));
                let is_answered = record.is_some_and(|record| !may_replace(record, &delivery));
                let was_accepted = noted.next().unwrap_or(false) || is_answered;
                if was_accepted { Ok(Judged::Ends(*assignment, rejection.into_fault())) } else { Err(rejection) }
            });
            (delivery, resolved)
        });
        resolved.collect()
    }

    async fn refuse_again(self: Arc<Self>, (delivery, verdict): (Delivery, Bytes)) {
        let trace = TraceContext::of(delivery.headers(), report::addressee_of(&verdict).trace_id.as_deref());
        self.outbox.refuse(verdict, trace).await;
        delivery.settle(Settlement::Done).await;
    }

    /// Dead letter or stored refusal first, verdict second, so that what was said is also kept; settled when the broker
    /// has the verdict.
    pub(super) async fn reject(self: Arc<Self>, (delivery, rejection): (Delivery, Rejection)) {
        let Rejection { addressee, kind, fault, ends, doubted: _ } = rejection;
        let trace = TraceContext::of(delivery.headers(), addressee.trace_id.as_deref());
        let span = telemetry::receive_span(trace.as_ref(), &self.ids_of(&addressee, kind));
        telemetry::mark_failed(&span);
        let verdict = report::rejected(&addressee, fault.cause, &fault.message, &self.identity.worker_id);
        match &ends {
            RejectionEnd::DeadLetter(stage) => {
                self.keep_dead_letter(&delivery, &addressee, *stage, &fault, &[]).await;
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
