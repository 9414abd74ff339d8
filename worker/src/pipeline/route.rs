//! A delivery that runs on another class of workers: passed on under its first identity, then settled.

use std::sync::Arc;

use super::Pipeline;
use super::rejection::Rejection;
use crate::admission::Refusal;
use crate::assignment::Assignment;
use crate::broker::streams::Source;
use crate::fault::Cause;
use crate::intake::{Delivery, Settlement};
use crate::pool::Pool;
use crate::publication::Elsewhere;

impl Pipeline {
    /// Whether workers of another class have the slots that this one lacks. What came from the route never goes there
    /// again.
    pub(super) fn is_for_the_route(&self, delivery: &Delivery, assignment: &Assignment) -> bool {
        assignment.pool == Pool::Gpu
            && self.schedule.size(Pool::Gpu) == 0
            && delivery.source() == Source::Intake
            && self.streams.borrow().route().is_some()
    }

    /// No verdict: whoever has the slots says it, and finds by the first identity what is recorded.
    pub(super) async fn pass_on(self: Arc<Self>, (delivery, assignment): (Delivery, Assignment)) {
        let subject = &self.settings.route_subject;
        if self.store_elsewhere(Elsewhere::Gpu, &delivery, subject).await.is_none() {
            let refused = Rejection::refused(&assignment, self.no_room_for_headers());
            return self.reject((delivery, refused)).await;
        }
        self.metrics.passed_on();
        tracing::info!(
            assignment_id = %assignment.key.assignment_id,
            tenant_id = assignment.key.tenant.as_str(),
            trace_id = assignment.correlation.trace_id,
            subject,
            "Assignment passed on"
        );
        delivery.settle(Settlement::Done).await;
    }

    fn no_room_for_headers(&self) -> Refusal {
        let message = format!(
            "the assignment and the headers of one that is passed on are larger than the broker takes: publish it on {}",
            self.settings.route_subject
        );
        Refusal { cause: Cause::NeverFits, message }
    }
}
