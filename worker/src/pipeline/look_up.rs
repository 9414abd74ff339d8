//! What is known of assignments that may run here: whether one runs already, what is recorded of it, and how many workers
//! have died of it.

use std::sync::Arc;

use super::deaths::DeliveryId;
use super::durable::may_replace;
use super::in_flight::Claim;
use super::{Accepted, Arrival, Pipeline};
use crate::report;

impl Pipeline {
    pub(super) async fn look_up(self: &Arc<Self>, arrivals: Vec<Arrival>) -> Vec<Accepted> {
        if arrivals.iter().any(|arrival| arrival.delivery.is_replay()) {
            // Whoever hears cancels has been woken for those that came before it.
            tokio::task::yield_now().await;
        }
        let mut claimed = Vec::with_capacity(arrivals.len());
        for arrival in arrivals {
            match self.in_flight.claim(arrival) {
                Claim::First(arrival, flight) => {
                    if let Some(tombstone) = self.tombstones.get(&arrival.assignment.key) {
                        arrival.stop.raise(&tombstone);
                    }
                    claimed.push((Box::new(arrival), flight));
                }
                Claim::SetAside | Claim::Renewed => {}
            }
        }
        let keys: Vec<_> = claimed.iter().map(|(arrival, _)| arrival.assignment.key.clone()).collect();
        let mut waiting = self.waiting_for_a_person(&keys).await.into_iter();
        let mut records = self.read_records(&keys).await;
        let accepted = claimed.into_iter().map(|(arrival, flight)| {
            // Usually nothing is recorded of any.
            let found = !records.is_empty();
            let record = found.then(|| records.remove(&report::ledger::subject(&arrival.assignment.key))).flatten();
            let is_asked = waiting.next().unwrap_or(false);
            Accepted { arrival, record: record.map(Box::new), is_asked, deaths: 0, flight }
        });
        let mut accepted: Vec<_> = accepted.collect();
        Box::pin(self.count_deaths(&mut accepted)).await;
        accepted
    }

    /// Asks for redeliveries that no record answers; the first delivery of a message costs nothing here.
    async fn count_deaths(&self, accepted: &mut [Accepted]) {
        let suspects = accepted.iter_mut().filter(|accepted| {
            let delivery = &accepted.arrival.delivery;
            delivery.delivered() > 1 && accepted.record.as_ref().is_none_or(|record| may_replace(record, delivery))
        });
        let mut suspects: Vec<_> = suspects.collect();
        let deliveries: Vec<_> = suspects.iter().map(|suspect| DeliveryId::of(&suspect.arrival.delivery)).collect();
        let deaths = self.deaths.before(&deliveries).await;
        suspects.iter_mut().zip(deaths).for_each(|(suspect, deaths)| suspect.deaths = deaths);
    }
}
