//! What this worker does at the moment, for whoever looks after it, and whether they want it to take work.

use std::time::{Duration, Instant};

use super::Pipeline;
use crate::pool::ByPool;

/// Between two looks at what somebody waits for.
const LOOK: Duration = Duration::from_millis(5);

/// What a worker does at a moment, and has done until then.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Activity {
    /// Blocks that may run at once.
    pub(crate) slots: ByPool<usize>,
    /// Blocks that run.
    pub(crate) busy: ByPool<usize>,
    /// Deliveries here that have not begun.
    pub(crate) waiting: usize,
    /// Whether the policy pauses it.
    pub(crate) is_paused: bool,
    /// Blocks that have ended.
    pub(crate) finished: u64,
    /// How long these held their slots.
    pub(crate) work: Duration,
}

impl Pipeline {
    /// What this worker does now.
    pub(crate) fn activity(&self) -> Activity {
        let (finished, work) = self.load.done();
        Activity {
            slots: ByPool::new(|pool| self.schedule.size(pool)),
            busy: ByPool::new(|pool| self.schedule.busy(pool)),
            waiting: self.load.waiting(),
            is_paused: self.gate.is_paused(),
            finished,
            work,
        }
    }

    /// What whoever looks after the worker wants of it.
    pub(crate) fn tell(&self, pull: bool) {
        self.gate.tell(pull);
    }

    /// Whether neither the policy nor whoever looks after the worker keeps it from taking work.
    pub(crate) fn may_take_work(&self) -> bool {
        self.gate.is_open()
    }

    /// Returns when nothing that is published from now on is missed, or this worker shall take nothing; not later than this.
    pub async fn misses_nothing(&self, limit: Duration) {
        let since = Instant::now();
        while self.load.is_out() && self.may_take_work() && since.elapsed() < limit {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Whether nothing can begin here before something is pulled.
    pub(crate) fn is_still(&self) -> bool {
        self.load.open_pulls() == 0 && self.load.waiting() == 0
    }
}
