//! When a query must end: at its deadline, at its limit of CPU time, or when nobody waits for it any more.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::blocks::cpu::CpuTime;

/// The longest wait for a writer's lock; a retry waits longer without holding a thread.
const MAX_BUSY: Duration = Duration::from_secs(1);
/// How long one look at the lock is away from the next.
const BUSY_STEP: Duration = Duration::from_millis(5);

/// Asked by SQLite's handlers, on its thread.
#[derive(Debug)]
pub(super) struct Stop {
    deadline: Instant,
    cpu_time: CpuTime,
    is_abandoned: AtomicBool,
}

/// Held by the waiting side: when it goes, the query stops.
pub(super) struct StopsWhenDropped(Arc<Stop>);

impl Stop {
    pub(super) fn new(deadline: Instant, cpu_time: CpuTime) -> (Arc<Self>, StopsWhenDropped) {
        let stop = Arc::new(Self { deadline, cpu_time, is_abandoned: AtomicBool::new(false) });
        (Arc::clone(&stop), StopsWhenDropped(stop))
    }

    pub(super) fn is_due(&self) -> bool {
        self.is_abandoned.load(Ordering::Relaxed) || Instant::now() >= self.deadline
    }

    /// Asked now and then while the query computes; true stops it.
    pub(super) fn must_stop(&self) -> bool {
        self.cpu_time.lap();
        self.is_due() || self.cpu_time.check().is_err()
    }

    pub(super) fn cpu_time(&self) -> &CpuTime {
        &self.cpu_time
    }

    /// One wait for a lock; false when it is not worth another.
    pub(super) fn wait_for_lock(&self, since: Instant) -> bool {
        if self.is_due() || since.elapsed() >= MAX_BUSY {
            return false;
        }
        std::thread::sleep(BUSY_STEP);
        true
    }
}

impl Drop for StopsWhenDropped {
    fn drop(&mut self) {
        self.0.is_abandoned.store(true, Ordering::Relaxed);
    }
}
