//! The steps of a stop, which `shutdown` puts in order.

use std::time::Duration;

use super::Pipeline;
use crate::health::Concern;

/// How long the broker may take to be sent what was said.
const LAST_WORDS: Duration = Duration::from_secs(1);

impl Pipeline {
    /// The worker is not ready any more.
    pub(crate) fn begin_to_drain(&self) {
        self.health.raise(Concern::Draining, "the worker was told to stop");
    }

    /// Hands back what waits, where another worker is given it.
    pub(crate) fn hand_waiting_back(&self) {
        if self.hands_back() {
            self.schedule.close();
        }
    }

    /// Returns when everything that came in is settled or handed back, and stopped where it ran.
    pub(crate) async fn settled(&self) {
        self.tasks.close();
        self.tasks.wait().await;
        self.engine.stopped().await;
    }

    /// How many deliveries are neither settled nor handed back.
    pub(crate) fn unsettled(&self) -> usize {
        self.tasks.len()
    }

    /// Ends what still waits or runs.
    pub(crate) fn cut_off(&self) {
        self.cut.cancel();
        self.schedule.close();
    }

    /// Gives back what was leased of tenants' ceilings, within a limit.
    pub(crate) async fn give_units_back(&self) {
        let _ = tokio::time::timeout(LAST_WORDS, self.ceilings.give_back()).await;
    }

    /// Returns when the broker has been sent all that was said, within a limit.
    pub(crate) async fn flush(&self) {
        self.broker.flush_within(LAST_WORDS).await;
    }
}
