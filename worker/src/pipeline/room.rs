//! How much more may come at this moment, and when what is here is too much.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::Pipeline;
use crate::broker::streams::{Parked, Source};
use crate::health::Concern;
use crate::ids::TenantId;
use crate::intake::Room;
use crate::pool::Pool;

/// The most that is fetched ahead of free slots, unless there are more slots.
const MAX_LOOK_AHEAD: usize = 1000;
/// The most that waits here for slots of its own tenants: more of it would stop the intake, for everybody.
const MAX_HELD_BACK: usize = 1000;
/// A pool that has let work wait for this long without starting any is overloaded.
const OVERLOADED: Duration = Duration::from_secs(30);

/// Between two samples.
const SAMPLE: Duration = Duration::from_millis(100);
/// There may be many of them.
const TENANTS_EVERY: Duration = Duration::from_secs(1);
/// Samples after which a worker has lived on although a hold has lapsed, and says so: 3 s.
const LIVED_ON: u32 = 30;

/// Samples what changes by itself until the worker has stopped.
pub async fn observe(pipeline: Arc<Pipeline>, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(SAMPLE);
    let mut last = Instant::now();
    let mut tenants_seen = None;
    while !stop.is_cancelled() {
        ticks.tick().await;
        pipeline.load.sample(last.elapsed());
        last = Instant::now();
        pipeline.keep_the_gate();
        for pool in Pool::ALL {
            pipeline.metrics.set_queue_depth(pool, pipeline.schedule.waiting(pool));
            pipeline.metrics.set_slots(pool, pipeline.schedule.size(pool));
            pipeline.metrics.set_slots_busy(pool, pipeline.schedule.busy(pool));
        }
        if tenants_seen.is_none_or(|seen: Instant| seen.elapsed() >= TENANTS_EVERY) {
            pipeline.observe_tenants();
            tenants_seen = Some(Instant::now());
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
    pub(super) fn room(&self, source: Source) -> Room {
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

    /// Whether as much of a tenant's waits here for its own slots as there is room for ahead of free ones: more of what the
    /// broker has forgotten would be out of every other worker's reach.
    pub(super) fn has_enough_of(&self, source: Source, tenant: &TenantId) -> bool {
        let held_back: usize = pools(source).iter().map(|pool| self.schedule.held_back_of(*pool, tenant)).sum();
        held_back >= self.look_ahead(source)
    }

    /// How many of a tenant's parked messages may start here now, or soon: one may wait for the next slot, so that what
    /// comes in from elsewhere does not take each. None of them counts in anybody's look-ahead.
    pub(super) fn room_for_parked(&self, parked: Parked, tenant: &TenantId) -> usize {
        let source = Source::Parked(parked);
        if self.may_take_none() {
            return 0;
        }
        let busy: usize = pools(source).iter().map(|pool| self.schedule.busy(*pool)).sum();
        let (free, waiting) = (self.slots(source) - busy, self.load.flow(source).waiting());
        // What waits beside free slots waits for its own tenant, or for others: it is in nobody else's way.
        let has_waiting = || pools(source).iter().any(|pool| self.schedule.has_waiting(*pool, tenant));
        let first = free > 0 && waiting < MAX_HELD_BACK && !has_waiting();
        free.max(1).saturating_sub(waiting).max(usize::from(first))
    }

    fn takes_none(&self, source: Source) -> bool {
        let parked = self.load.flow(Source::Parked(Parked::General)).waiting()
            + self.load.flow(Source::Parked(Parked::Gpu)).waiting();
        let is_full = |pool: &Pool| {
            let others = self.schedule.held_back(*pool) + parked;
            self.schedule.waiting(*pool).saturating_sub(others) >= self.longest_queue(source, *pool)
        };
        self.may_take_none() || pools(source).iter().any(is_full)
    }

    fn may_take_none(&self) -> bool {
        // What could not be stored would only pile up here. Whoever could not store it tries it again until it can.
        let cannot_store = self.health.is_raised(Concern::StorageRefused) || self.broker.keeps_outcomes_here();
        let is_told_not_to = self.quarantine.is_occupied() || self.load.asks_for_nothing();
        is_told_not_to || !self.gate.is_open() || self.load.is_full() || cannot_store
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

    /// Hands back what waits here while the gate is closed.
    fn keep_the_gate(&self) {
        if !self.hands_back() {
            return;
        }
        if self.gate.is_open() {
            self.schedule.let_wait();
        } else if self.load.open_pulls() == 0 {
            // Not before the open pulls have ended: what is handed back would come back to them.
            self.schedule.turn_away();
        }
    }

    fn note_overload(&self) {
        let stuck = Pool::ALL.into_iter().find(|pool| self.schedule.stuck_for(*pool) >= OVERLOADED);
        match stuck {
            Some(pool) => self.health.raise(Concern::PoolOverloaded, format!("work waits for {} slots", pool.as_str())),
            None => self.health.clear(Concern::PoolOverloaded),
        }
        if self.load.is_full() {
            self.health.raise(Concern::MemoryFull, "payloads, results and what assignments asked for")
        } else {
            self.health.clear(Concern::MemoryFull)
        }
    }

    /// A worker that lives on after a lapse has not died of what it holds, however long that still takes.
    fn note_lapses(&self) {
        self.in_flight.lapsed(LIVED_ON).into_iter().for_each(|which| self.deaths.lapsed(which));
    }
}

/// Where what comes from there can run.
const fn pools(source: Source) -> &'static [Pool] {
    match source {
        Source::Intake => &Pool::ALL,
        Source::GpuRoute | Source::Parked(Parked::Gpu) => &[Pool::Gpu],
        Source::Parked(Parked::General) => &[Pool::Cpu, Pool::Io],
    }
}
