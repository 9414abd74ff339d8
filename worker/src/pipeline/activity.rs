//! What this worker does at the moment, for whoever looks after it, and whether they want it to take work.

use std::time::Duration;

use super::Pipeline;
use crate::pool::ByPool;

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

    /// Whether a queue group that it belongs to gives it nothing yet, or no more.
    pub(crate) fn is_out(&self) -> bool {
        self.load.is_out()
    }

    /// Whether nothing can begin here before something is pulled.
    pub(crate) fn is_still(&self) -> bool {
        self.load.open_pulls() == 0 && self.load.waiting() == 0
    }
}
