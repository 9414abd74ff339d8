//! A delivery that runs on another class of workers: passed on under its first identity, then settled.

use std::sync::Arc;

use async_nats::HeaderMap;

use super::Pipeline;
use super::rejection::Rejection;
use crate::admission::Refusal;
use crate::assignment::Assignment;
use crate::broker::streams::Source;
use crate::broker::wire_len;
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
        let (headers, payload) = (headers_for(Elsewhere::Gpu, &delivery), delivery.payload());
        let store = || async {
            // Where the broker takes less than before, no other try can succeed.
            if wire_len(&headers) + payload.len() > self.broker.max_payload() {
                return Ok(None);
            }
            let subject = self.settings.route_subject.clone();
            self.broker.store(subject, headers.clone(), payload.clone()).await.map(Some)
        };
        if self.until_definite(store).await.is_none() {
            let refused = Rejection::refused(&assignment, self.no_room_for_headers());
            return self.reject((delivery, refused)).await;
        }
        self.metrics.passed_on();
        tracing::info!(
            assignment_id = %assignment.key.assignment_id,
            tenant_id = assignment.key.tenant.as_str(),
            trace_id = assignment.correlation.trace_id,
            subject = self.settings.route_subject,
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

/// The headers that it goes to another place with: those of the Router, but for what it told the broker about its own
/// publish, and the first identity.
pub(super) fn headers_for(place: Elsewhere, delivery: &Delivery) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, values) in delivery.headers().into_iter().flat_map(HeaderMap::iter) {
        if !name.to_string().to_ascii_lowercase().starts_with("nats-") {
            values.iter().for_each(|value| headers.append(name.clone(), value.clone()));
        }
    }
    delivery.first_identity().add_to(&mut headers, place);
    headers
}
