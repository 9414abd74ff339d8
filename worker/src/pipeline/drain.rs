//! The steps of a stop, which `shutdown` puts in order.

use std::time::{Duration, Instant};

use super::Pipeline;
use crate::health::Concern;
use crate::pool::Pool;

/// How long the broker may take to be sent what was said.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A broker that has been away for so long is not waited for, where nothing would be lost.
const AWAY: Duration = Duration::from_secs(5);
/// Between two looks at that.
const LOOK: Duration = Duration::from_millis(100);

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

    /// Returns when the broker has been away for a while, and all that time nothing here would have been lost.
    pub(crate) async fn nothing_to_lose(&self) {
        let mut since: Option<Instant> = None;
        while since.is_none_or(|since| since.elapsed() < AWAY) {
            tokio::time::sleep(LOOK).await;
            let is_so = self.health.is_raised(Concern::NatsDisconnected) && self.has_nothing_to_lose();
            since = if is_so { since.or_else(|| Some(Instant::now())) } else { None };
        }
    }

    /// Nothing runs, and each outcome is on the disk: whatever else is here the broker still has. In core mode it has
    /// nothing, so that each task has to have come to an outcome there.
    fn has_nothing_to_lose(&self) -> bool {
        let runs = Pool::ALL.into_iter().any(|pool| self.schedule.busy(pool) > 0);
        let (will_run, owed) =
            if self.hands_back() { (false, self.outcomes.len()) } else { (self.load.waiting() > 0, self.tasks.len()) };
        !runs && !will_run && owed == self.on_disk.len()
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
