//! The CPU time of one block, wherever it runs: on the thread that polls it, or on one that may wait for a disk.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use cpu_time::ThreadTime;

use crate::fault::{Cause, Fault};

thread_local! {
    /// Up to where this thread's clock has been counted for the work at hand.
    static COUNTED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// What a block has used over all attempts, and may use. Clones share it.
#[derive(Clone, Debug)]
pub struct CpuTime {
    used_nanos: Arc<AtomicU64>,
    limit: Duration,
}

impl CpuTime {
    /// Nothing used yet.
    pub fn new(limit: Duration) -> Self {
        Self { used_nanos: Arc::default(), limit }
    }

    /// Counts what this thread uses for `work`.
    pub fn count<T>(&self, work: impl FnOnce() -> T) -> T {
        COUNTED.set(now());
        let done = work();
        self.lap();
        done
    }

    /// Within [`Self::count`]: counts what has been used up to here.
    pub fn lap(&self) {
        let now = now();
        let lap = now.saturating_sub(COUNTED.replace(now));
        self.used_nanos.fetch_add(u64::try_from(lap.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Whether anybody else may still work on it, and count.
    pub fn is_shared(&mut self) -> bool {
        Arc::get_mut(&mut self.used_nanos).is_none()
    }

    /// What has been counted.
    pub fn used(&self) -> Duration {
        Duration::from_nanos(self.used_nanos.load(Ordering::Relaxed))
    }

    /// Fine while no more than the limit is used.
    ///
    /// # Errors
    /// 2002 above it.
    pub fn check(&self) -> Result<(), Fault> {
        if self.used() <= self.limit {
            return Ok(());
        }
        let message = format!("used more than {} ms of CPU time", self.limit.as_millis());
        Err(Fault::new(Cause::OverCap, message))
    }
}

/// Counts the CPU time of each poll, and ends the work when too much is used.
pub async fn metered<T>(work: impl Future<Output = Result<T, Fault>>, cpu_time: &CpuTime) -> Result<T, Fault> {
    let mut work = pin!(work);
    poll_fn(|context| match cpu_time.count(|| work.as_mut().poll(context)) {
        Poll::Pending => cpu_time.check().map_or_else(|fault| Poll::Ready(Err(fault)), |()| Poll::Pending),
        done => done,
    })
    .await
}
fn now() -> Duration {
    ThreadTime::now().as_duration()
}
