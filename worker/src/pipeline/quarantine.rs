//! Work that may kill its worker runs alone: nothing else is here that would die with it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::{Arrival, Pipeline};
use crate::schedule::Closed;

/// Between two looks at what is still here.
const LOOK: Duration = Duration::from_millis(20);

/// The place for one quarantined assignment. While it is taken, nothing is pulled.
#[derive(Debug, Default)]
pub(super) struct Quarantine(AtomicBool);

impl Quarantine {
    pub(super) fn is_occupied(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// The right to run alone; dropping it lets the others come again.
#[must_use = "dropping it lets the others come again"]
pub(super) struct Isolation<'a>(&'a Pipeline);

impl Drop for Isolation<'_> {
    fn drop(&mut self) {
        self.0.schedule.resume();
        self.0.quarantine.0.store(false, Ordering::Release);
    }
}

impl Pipeline {
    /// Returns when all else that was here is settled or handed back.
    ///
    /// # Errors
    /// Another one has that place, or the worker stops, or the hold has lapsed meanwhile: it shall run elsewhere.
    pub(super) async fn isolate(&self, arrival: &Arrival) -> Result<Isolation<'_>, Closed> {
        if self.quarantine.0.swap(true, Ordering::AcqRel) {
            // Nothing more is pulled now, so that it does not come straight back.
            self.pulls_ended().await;
            return Err(Closed);
        }
        let isolation = Isolation(self);
        tracing::warn!(assignment_id = %arrival.assignment.key.assignment_id, "it may kill its worker: running it alone");
        self.pulls_ended().await;
        self.schedule.pause();
        while !self.is_alone(arrival) {
            if self.schedule.is_closed() || arrival.delivery.is_lapsed() {
                return Err(Closed);
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(isolation)
    }

    /// Copies of the very assignment wait for its record, and for nothing else.
    fn is_alone(&self, arrival: &Arrival) -> bool {
        let copies = self.in_flight.copies(&arrival.assignment.key);
        self.load.open_pulls() == 0 && self.holds.count() <= 1 + copies
    }

    /// Returns when no open pull can bring anything. While nothing more is to be taken, that is within a second.
    pub(super) async fn pulls_ended(&self) {
        while self.load.open_pulls() > 0 {
            tokio::time::sleep(LOOK).await;
        }
    }
}
