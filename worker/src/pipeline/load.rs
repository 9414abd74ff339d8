//! How much the worker holds, how much more it can use, and when that is too much.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::Pipeline;
use crate::broker::streams::Source;
use crate::gate;
use crate::health::Concern;
use crate::pool::Pool;

/// The most that is fetched ahead of free slots, unless there are more slots.
const MAX_LOOK_AHEAD: usize = 1000;
/// The most that waits here for slots of its own tenants: more of it would stop the intake, for everybody.
const MAX_HELD_BACK: usize = 1000;
/// A pool that has let work wait for this long without starting any is overloaded.
const OVERLOADED: Duration = Duration::from_secs(30);

/// Between two samples.
const SAMPLE: Duration = Duration::from_millis(100);
/// Samples after which a worker has lived on although a hold has lapsed, and says so: 3 s.
const LIVED_ON: u32 = 30;

/// Samples what changes by itself until the worker has stopped.
pub async fn observe(pipeline: Arc<Pipeline>, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(SAMPLE);
    let mut last = Instant::now();
    while !stop.is_cancelled() {
        ticks.tick().await;
        pipeline.load.sample(last.elapsed());
        last = Instant::now();
        gate::keep(&pipeline);
        for pool in Pool::ALL {
            pipeline.metrics.set_queue_depth(pool, pipeline.schedule.waiting(pool));
            pipeline.metrics.set_slots(pool, pipeline.schedule.size(pool));
            pipeline.metrics.set_slots_busy(pool, pipeline.schedule.busy(pool));
        }
        pipeline.metrics.set_tenants_file_broken(pipeline.gate.has_stale_policy());
        pipeline.metrics.set_memory_held(pipeline.load.bytes());
        pipeline.note_overload();
        pipeline.note_lapses();
        pipeline.metrics.set_nats_connected(!pipeline.health.is_raised(Concern::NatsDisconnected));
    }
}

impl Pipeline {
    /// How much may be fetched from there at this moment.
    pub(crate) fn room(&self, source: Source) -> Room {
        let slots = self.slots(source);
        let busy: usize = pools(source).iter().map(|pool| self.schedule.busy(*pool)).sum();
        let look_ahead = self.look_ahead(source);
        // What waits for its own tenant takes nobody else's place.
        let held_back: usize = pools(source).iter().map(|pool| self.schedule.held_back(*pool)).sum();
        let waiting = self.load.flow(source).waiting().saturating_sub(held_back);
        let free = if self.takes_none(source) || held_back >= MAX_HELD_BACK {
            0
        } else {
            (slots - busy + look_ahead).saturating_sub(waiting)
        };
        Room { free, whole: slots + look_ahead, waiting }
    }

    fn takes_none(&self, source: Source) -> bool {
        let is_full = |pool: &Pool| {
            let waiting = self.schedule.waiting(*pool).saturating_sub(self.schedule.held_back(*pool));
            waiting >= self.longest_queue(source, *pool)
        };
        // What could not be stored would only pile up here. Whoever could not store it clears the concern.
        let cannot_store = self.health.is_raised(Concern::StorageRefused);
        let is_told_not_to = self.quarantine.is_occupied() || self.load.asks_for_nothing.load(Ordering::Acquire);
        is_told_not_to
            || !self.gate.is_open()
            || self.holds_too_much()
            || cannot_store
            || pools(source).iter().any(is_full)
    }

    fn slots(&self, source: Source) -> usize {
        pools(source).iter().map(|pool| self.schedule.size(*pool)).sum()
    }

    fn look_ahead(&self, source: Source) -> usize {
        self.slots(source).max(self.load.flow(source).finished_per_100_ms().min(MAX_LOOK_AHEAD))
    }

    /// From which length on a pool's queue stops what comes from there. What the route brings must never stop the intake.
    fn longest_queue(&self, source: Source, pool: Pool) -> usize {
        let beside = match (source, pool) {
            (Source::Intake, Pool::Gpu) => self.look_ahead(Source::GpuRoute),
            _ => 0,
        };
        self.look_ahead(source).max(1) + beside
    }

    fn note_overload(&self) {
        let stuck = Pool::ALL.into_iter().find(|pool| self.schedule.stuck_for(*pool) >= OVERLOADED);
        match stuck {
            Some(pool) => self.health.raise(Concern::PoolOverloaded, format!("work waits for {} slots", pool.as_str())),
            None => self.health.clear(Concern::PoolOverloaded),
        }
        if self.holds_too_much() {
            self.health.raise(Concern::MemoryFull, "payloads, results and what assignments asked for")
        } else {
            self.health.clear(Concern::MemoryFull)
        }
    }

    /// A worker that lives on after a lapse has not died of what it holds, however long that still takes.
    fn note_lapses(&self) {
        self.in_flight.lapsed(LIVED_ON).into_iter().for_each(|which| self.deaths.lapsed(which));
    }

    /// Whether more bytes are here than may be.
    pub(crate) fn holds_too_much(&self) -> bool {
        self.load.bytes() as u64 >= self.settings.max_memory_bytes
    }
}

/// Where what comes from there can run.
const fn pools(source: Source) -> &'static [Pool] {
    match source {
        Source::Intake => &Pool::ALL,
        Source::GpuRoute => &[Pool::Gpu],
    }
}

/// How many deliveries the worker can use at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Room {
    /// Free slots and look-ahead, less what waits here already.
    pub(crate) free: usize,
    /// Free slots and look-ahead of an idle worker: a request for much less than this is not worth its cost.
    pub(crate) whole: usize,
    /// What came from there and waits for the next free slot.
    pub(crate) waiting: usize,
}

/// What the worker holds of the broker's: shared by everything that takes or frees room.
#[derive(Debug, Default)]
pub(crate) struct Load {
    bytes: Arc<AtomicUsize>,
    asks_for_nothing: AtomicBool,
    intake: Arc<Flow>,
    gpu_route: Arc<Flow>,
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
    /// What came from there.
    pub(crate) const fn flow(&self, source: Source) -> &Arc<Flow> {
        match source {
            Source::Intake => &self.intake,
            Source::GpuRoute => &self.gpu_route,
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

    fn flows(&self) -> impl Iterator<Item = &Arc<Flow>> {
        [&self.intake, &self.gpu_route].into_iter()
    }

    /// Bytes of payloads and results held, or what their work has reserved where that is more.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Counts bytes for as long as the guard lives.
    pub(crate) fn hold_bytes(&self, bytes: usize) -> Counted {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        Counted { total: Arc::clone(&self.bytes), amount: bytes, reserved: 0 }
    }

    /// Closes a sample of the rates that took `elapsed`.
    fn sample(&self, elapsed: Duration) {
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
        let load = Load::default();
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
