//! How much the worker holds of the broker's, how fast it goes, and how much more it can use.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Notify;

use crate::broker::streams::{Parked, Source};

/// How many deliveries the worker can use at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Free slots and look-ahead, less what waits here already.
    pub free: usize,
    /// Free slots and look-ahead of an idle worker: a request for much less than this is not worth its cost.
    pub whole: usize,
    /// What came from there and waits for the next free slot.
    pub waiting: usize,
}

/// What the worker holds of the broker's: shared by everything that takes or frees room.
#[derive(Debug)]
pub(crate) struct Load {
    bytes: Arc<AtomicUsize>,
    max_bytes: u64,
    asks_for_nothing: AtomicBool,
    intake: Arc<Flow>,
    gpu_route: Arc<Flow>,
    parked: Arc<Flow>,
    gpu_parked: Arc<Flow>,
}

/// What came from one source, and how fast it goes.
#[derive(Debug, Default)]
pub(crate) struct Flow {
    waiting: AtomicUsize,
    asked_for: AtomicUsize,
    is_out: AtomicBool,
    pulls: AtomicUsize,
    freed: Notify,
    finished: AtomicUsize,
    per_100_ms: AtomicUsize,
    done: AtomicU64,
    work_micros: AtomicU64,
}

impl Load {
    /// Nothing held yet; `max_bytes` of payloads and results may be.
    pub(crate) fn new(max_bytes: u64) -> Self {
        Self {
            bytes: Arc::default(),
            max_bytes,
            asks_for_nothing: AtomicBool::default(),
            intake: Arc::default(),
            gpu_route: Arc::default(),
            parked: Arc::default(),
            gpu_parked: Arc::default(),
        }
    }

    /// What came from there.
    pub(crate) const fn flow(&self, source: Source) -> &Arc<Flow> {
        match source {
            Source::Intake => &self.intake,
            Source::GpuRoute => &self.gpu_route,
            Source::Parked(Parked::General) => &self.parked,
            Source::Parked(Parked::Gpu) => &self.gpu_parked,
        }
    }

    /// Deliveries here that have not begun, wherever they came from.
    pub(crate) fn waiting(&self) -> usize {
        self.flows().map(|flow| flow.waiting()).sum()
    }

    /// Deliveries that were asked for and may still come.
    pub(crate) fn open_pulls(&self) -> usize {
        self.flows().map(|flow| flow.asked_for.load(Ordering::Acquire)).sum()
    }

    /// Whether a queue group that it belongs to gives it nothing yet, or no more.
    pub(crate) fn is_out(&self) -> bool {
        self.flows().any(|flow| flow.is_out.load(Ordering::Acquire))
    }

    /// While the guard lives, nothing is pulled.
    pub(crate) fn stop_asking(&self) -> AsksForNothing<'_> {
        self.asks_for_nothing.store(true, Ordering::Release);
        AsksForNothing(self)
    }

    /// Blocks that have ended so far, and how long these held their slots.
    pub(crate) fn done(&self) -> (u64, Duration) {
        let sum = |of: fn(&Flow) -> &AtomicU64| self.flows().map(|flow| of(flow).load(Ordering::Relaxed)).sum();
        (sum(|flow| &flow.done), Duration::from_micros(sum(|flow| &flow.work_micros)))
    }

    /// Whether somebody has stopped the pulls.
    pub(crate) fn asks_for_nothing(&self) -> bool {
        self.asks_for_nothing.load(Ordering::Acquire)
    }

    fn flows(&self) -> impl Iterator<Item = &Arc<Flow>> {
        [&self.intake, &self.gpu_route, &self.parked, &self.gpu_parked].into_iter()
    }

    /// Bytes of payloads and results held, or what their work has reserved where that is more.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Whether more bytes are here than may be.
    pub(crate) fn is_full(&self) -> bool {
        self.bytes() as u64 >= self.max_bytes
    }

    /// Counts bytes for as long as the guard lives.
    pub(crate) fn hold_bytes(&self, bytes: usize) -> Counted {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        Counted { total: Arc::clone(&self.bytes), amount: bytes, reserved: 0 }
    }

    /// Closes a sample of the rates that took `elapsed`.
    pub(crate) fn sample(&self, elapsed: Duration) {
        self.flows().for_each(|flow| flow.sample(elapsed));
    }
}

impl Flow {
    /// Deliveries here that have not begun.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// How many deliveries were asked for and may still come, in at most so many pulls.
    pub(crate) fn set_asked_for(&self, deliveries: usize, pulls: usize) {
        self.asked_for.store(deliveries, Ordering::Release);
        self.pulls.store(pulls, Ordering::Release);
    }

    /// Whether its queue group gives it nothing.
    pub(crate) fn set_out(&self, is_out: bool) {
        self.is_out.store(is_out, Ordering::Release);
    }

    /// Pulls that may be open.
    pub(crate) fn pulls(&self) -> usize {
        self.pulls.load(Ordering::Acquire)
    }

    /// One more block has ended, which held its slot for so long.
    pub(crate) fn finished(&self, work: Duration) {
        self.finished.fetch_add(1, Ordering::Relaxed);
        self.done.fetch_add(1, Ordering::Relaxed);
        self.work_micros.fetch_add(u64::try_from(work.as_micros()).unwrap_or_default(), Ordering::Relaxed);
    }

    /// What this worker finishes in 100 ms, as of late.
    pub(crate) fn finished_per_100_ms(&self) -> usize {
        self.per_100_ms.load(Ordering::Relaxed)
    }

    /// A rate rises at once and falls by half a sample.
    fn sample(&self, elapsed: Duration) {
        let finished = self.finished.swap(0, Ordering::Relaxed) as f64;
        let now = (finished * 0.1 / elapsed.as_secs_f64().max(0.001)) as usize;
        let before = self.per_100_ms.load(Ordering::Relaxed);
        self.per_100_ms.store(now.max(before / 2), Ordering::Relaxed);
    }

    /// Returns when a delivery has begun or gone since the last look.
    pub(crate) async fn freed(&self) {
        self.freed.notified().await;
    }
}

/// Nothing is pulled.
#[must_use = "dropping it lets the worker pull again"]
pub(crate) struct AsksForNothing<'a>(&'a Load);

impl Drop for AsksForNothing<'_> {
    fn drop(&mut self) {
        self.0.asks_for_nothing.store(false, Ordering::Release);
    }
}

/// A delivery that is here and has not begun.
#[derive(Debug)]
pub(crate) struct Waiting(Arc<Flow>);

impl Waiting {
    pub(crate) fn new(flow: &Arc<Flow>) -> Self {
        flow.waiting.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(flow))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
        self.0.freed.notify_one();
    }
}

/// An amount that is counted until it is dropped.
#[derive(Debug)]
pub(crate) struct Counted {
    total: Arc<AtomicUsize>,
    amount: usize,
    /// How much of the amount is only reserved.
    reserved: usize,
}

impl Counted {
    /// From now on at least so many count, whatever is there.
    pub(crate) fn reserve(&mut self, bytes: usize) {
        self.reserved = bytes.saturating_sub(self.amount);
        self.amount += self.reserved;
        self.total.fetch_add(self.reserved, Ordering::Relaxed);
    }

    /// How many count.
    pub(crate) const fn amount(&self) -> usize {
        self.amount
    }

    /// How many of these bytes more are not reserved already.
    pub(crate) const fn beyond(&self, bytes: usize) -> usize {
        bytes.saturating_sub(self.reserved)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.total.fetch_sub(self.amount, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_and_what_is_reserved_for_it_count_once() {
        let load = Load::new(1000);
        let mut payload = load.hold_bytes(10);
        payload.reserve(100);
        assert_eq!((load.bytes(), payload.beyond(50), payload.beyond(90), payload.beyond(95)), (100, 0, 0, 5));
        drop(payload);
        let mut payload = load.hold_bytes(10);
        payload.reserve(7);
        assert_eq!((load.bytes(), payload.beyond(50)), (10, 50), "less than what is there reserves nothing");
        drop(payload);
        assert_eq!(load.bytes(), 0);
    }
}
