//! A delivery that does not run: kept or stored first, then said, then settled.

use std::sync::Arc;

use super::Pipeline;
use crate::admission::Refusal;
use crate::assignment::{Addressee, Assignment, AssignmentKey, Undecodable};
use crate::failpoint::{self, Point};
use crate::fault::Fault;
use crate::intake::{Delivery, Settlement};
use crate::report;
use crate::report::dead_letter::Stage;
use crate::telemetry::TraceContext;

/// Why a delivery does not run.
pub(super) struct Rejection {
    addressee: Addressee,
    fault: Fault,
    ends: RejectionEnd,
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
        Self { addressee, fault, ends: RejectionEnd::DeadLetter(Stage::Decode) }
    }

    pub(super) fn refused(assignment: &Assignment, refusal: Refusal) -> Self {
        let ends = match refusal.cause.is_retryable() {
            true => RejectionEnd::Refused(assignment.key.clone()),
            false => RejectionEnd::DeadLetter(Stage::Admit),
        };
        Self { addressee: assignment.addressee(), fault: Fault::new(refusal.cause, refusal.message), ends }
    }
}

impl Pipeline {
    /// Dead letter or stored refusal first, verdict second, so that what was said is also kept; settled when the broker
    /// has the verdict.
    pub(super) async fn reject(self: Arc<Self>, (delivery, rejection): (Delivery, Rejection)) {
        let Rejection { addressee, fault, ends } = rejection;
        let verdict = report::rejected(&addressee, fault.cause, &fault.message, &self.settings.worker_id);
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
            let trace = TraceContext::of(delivery.headers(), addressee.trace_id.as_deref());
            self.outbox.refuse(verdict, trace).await;
        }
        failpoint::reach(Point::AfterResult).await;
        delivery.settle(Settlement::Done).await;
        failpoint::reach(Point::AfterSettle).await;
    }
}
