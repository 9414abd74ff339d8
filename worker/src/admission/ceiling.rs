//! How much of a tenant's work runs at once, over all workers of a pool.
//!
//! Each worker leases units from a key of the tenant's in a bucket, so that what it starts is decided here. A lease that is
//! not renewed is given out again: later than its own worker stops to start anything on it, by more than the workers'
//! clocks may differ.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::broker::kv::Bucket;
use crate::broker::streams::{QUOTA_BUCKET, Ready};
use crate::broker::{Broker, Stored};
use crate::contract;
use crate::health::{Concern, Health};
use crate::ids::TenantId;
use crate::intake::Parking;

/// How long a lease holds from its last renewal.
const LEASE: Duration = Duration::from_secs(30);
/// From this age on a lease is renewed.
const RENEW: Duration = Duration::from_secs(10);
/// How much workers' clocks may differ: so long after its end a lease of another worker is given out again.
const CLOCK_DIFFERENCE: Duration = Duration::from_secs(5);
/// Between two looks at what is due, or has not been used since the last one.
const LOOK: Duration = Duration::from_secs(1);
/// After there was no unit, before the broker is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(250);
/// Other workers may change a key at the same moment.
const TRIES: u32 = 8;
/// Leases that are renewed at once.
const AT_ONCE: usize = 16;

/// The right to run one piece of a tenant's work; the unit is free again when this is dropped.
#[derive(Debug)]
#[must_use = "dropping it gives the unit back"]
pub struct Unit {
    ceilings: Ceilings,
    tenant: TenantId,
}

/// The units that this worker has leased, by tenant. Clones share them.
#[derive(Clone, Debug)]
pub struct Ceilings(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    bucket: Bucket,
    streams: watch::Receiver<Ready>,
    health: Health,
    /// The pool, escaped.
    pool: String,
    /// Unique to this process: one that was started anew does not go on with what its predecessor had.
    worker: String,
    tenants: Mutex<HashMap<TenantId, Held>>,
    parking: Arc<Parking>,
}

/// What this worker has of one tenant's.
#[derive(Debug)]
struct Held {
    lease: Lease,
    running: u64,
    /// The most that ran at once since the last look.
    peak: u64,
    /// Units that somebody waits for.
    wanted: u64,
    /// The ceiling, as the policy said it last.
    most: u64,
    /// Since when there is no unit to be had.
    refused: Option<Instant>,
    /// Whether the bucket may say something else than `lease`: nobody has heard what became of a write.
    is_unsure: bool,
    /// One question at a time.
    asking: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Lease {
    units: u64,
    /// When it was asked for last; `None` while there is none.
    asked: Option<Instant>,
}

impl Lease {
    fn holds(&self, now: Instant) -> bool {
        self.asked.is_some_and(|asked| now.saturating_duration_since(asked) < LEASE)
    }

    fn is_due(&self, now: Instant) -> bool {
        self.asked.is_some_and(|asked| now.saturating_duration_since(asked) >= RENEW)
    }
}

impl Held {
    fn new() -> Self {
        Self {
            lease: Lease::default(),
            running: 0,
            peak: 0,
            wanted: 0,
            most: 0,
            refused: None,
            is_unsure: false,
            asking: Arc::default(),
        }
    }

    fn free(&self, most: u64, now: Instant) -> u64 {
        if self.lease.holds(now) { self.lease.units.min(most).saturating_sub(self.running) } else { 0 }
    }

    /// Whether the bucket is to be told how many units it is to have from now on.
    fn is_due(&self, units: u64, now: Instant) -> bool {
        units < self.lease.units || self.lease.is_due(now) || self.is_unsure
    }

    fn was_refused(&self, now: Instant) -> bool {
        self.refused.is_some_and(|refused| now.saturating_duration_since(refused) < ASK_AGAIN)
    }
}

impl Ceilings {
    /// Units of this pool's tenants, leased from the bucket of the broker that this connection leads to; `health` is told
    /// where that cannot be asked.
    pub fn new(
        broker: Broker,
        streams: watch::Receiver<Ready>,
        health: Health,
        pool: &str,
        worker: &str,
        parking: Arc<Parking>,
    ) -> Self {
        let bucket = Bucket::new(broker, QUOTA_BUCKET);
        let worker = format!("{worker},{:016x}", fastrand::u64(..));
        let pool = contract::escape(pool).into_owned();
        Self(Arc::new(Shared { bucket, streams, health, pool, worker, tenants: Mutex::default(), parking }))
    }

    /// One of at most so many units of a tenant; `None` where there is none to be had now.
    pub async fn take(&self, tenant: &TenantId, most: u64) -> Option<Unit> {
        if let Some(unit) = self.take_here(tenant, most) {
            return Some(unit);
        }
        self.lease(tenant, most, 1).await;
        self.take_here(tenant, most)
    }

    /// How many of these units could be taken now; leases more where fewer than `wanted` are here, if that does not take
    /// longer than this.
    pub async fn available(&self, tenant: &TenantId, most: u64, wanted: u64, patience: Duration) -> u64 {
        let free = |held: &HashMap<TenantId, Held>| held.get(tenant).map_or(0, |held| held.free(most, Instant::now()));
        if free(&self.lock()) < wanted {
            let _ = tokio::time::timeout(patience, self.lease(tenant, most, wanted)).await;
        }
        free(&self.lock()).min(wanted)
    }

    /// Renews leases, and gives back what has not been used for a while, for as long as the worker runs.
    pub async fn keep(&self) {
        loop {
            tokio::time::sleep(LOOK).await;
            self.ask_all(self.due(|held| held.peak.max(held.running))).await;
        }
    }

    /// Gives back all that is not used.
    pub async fn give_back(&self) {
        self.ask_all(self.due(|held| held.running)).await;
    }

    async fn ask_all(&self, due: Vec<(TenantId, u64)>) {
        let asking = futures::stream::iter(due).map(|(tenant, units)| async move {
            let Some(asking) = self.asking(&tenant) else { return };
            let _turn = asking.lock().await;
            self.ask(&tenant, units).await;
        });
        asking.buffer_unordered(AT_ONCE).collect::<()>().await;
    }

    /// Whose leases are due, each with how many units it is to have from now on.
    fn due(&self, used: impl Fn(&Held) -> u64) -> Vec<(TenantId, u64)> {
        let now = Instant::now();
        let mut tenants = self.lock();
        tenants.retain(|_, held| held.running > 0 || held.wanted > 0 || held.lease.units > 0 || held.is_unsure);
        let due = tenants.iter_mut().filter_map(|(tenant, held)| {
            let used = used(held);
            held.peak = held.running;
            held.is_due(used, now).then(|| (tenant.clone(), used))
        });
        due.collect()
    }

    fn take_here(&self, tenant: &TenantId, most: u64) -> Option<Unit> {
        let mut tenants = self.lock();
        let held = tenants.get_mut(tenant).filter(|held| held.free(most, Instant::now()) > 0)?;
        held.running += 1;
        held.peak = held.peak.max(held.running);
        Some(Unit { ceilings: self.clone(), tenant: tenant.clone() })
    }

    async fn lease(&self, tenant: &TenantId, most: u64, wanted: u64) {
        let (asking, waiting) = {
            let mut tenants = self.lock();
            let held = tenants.entry(tenant.clone()).or_insert_with(Held::new);
            if held.was_refused(Instant::now()) {
                return;
            }
            held.wanted += wanted;
            held.most = most;
            (Arc::clone(&held.asking), Waiting { ceilings: self, tenant, units: wanted })
        };
        let _turn = asking.lock().await;
        // Whoever asked before may have asked for us too.
        let units = self.lock().get(tenant).and_then(|held| {
            let (units, now) = ((held.running + held.wanted).min(most), Instant::now());
            let is_enough = held.was_refused(now) || held.running + held.free(most, now) >= units;
            (!is_enough).then_some(units)
        });
        if let Some(units) = units {
            self.ask(tenant, units).await;
        }
        drop(waiting);
    }

    /// Asks the bucket for so many units in all. Only what is certainly written counts, and what is given back is not used
    /// from before the write on.
    async fn ask(&self, tenant: &TenantId, units: u64) {
        if !self.0.streams.borrow().has_jetstream {
            return self.lease_here(tenant, units);
        }
        let key = self.key(tenant);
        for _ in 0..TRIES {
            let (asked, now) = (Instant::now(), Timestamp::now().as_millisecond());
            let entry = match self.0.bucket.get(&key).await {
                Ok(entry) => entry,
                Err(error) => return self.failed(tenant, &error),
            };
            let mut leases = entry.as_ref().map(|entry| Leases::decode(&entry.value)).unwrap_or_default();
            let granted = {
                let mut tenants = self.lock();
                let Some(held) = tenants.get_mut(tenant) else { return };
                let asks_for = Asked { units, running: held.running, most: held.most };
                let granted = leases.grant(&self.0.worker, asks_for, now);
                held.refused = (granted < units).then_some(asked);
                if granted <= held.lease.units && granted < units && !held.is_due(units, asked) {
                    return;
                }
                held.lease.units = held.lease.units.min(granted);
                held.is_unsure = true;
                granted
            };
            let found = entry.map(|entry| entry.revision);
            match self.0.bucket.replace(&key, leases.encode(), found).await {
                Ok(Stored::At(_)) => {
                    if let Some(held) = self.lock().get_mut(tenant) {
                        (held.lease, held.is_unsure) = (Lease { units: granted, asked: Some(asked) }, false);
                    }
                    return;
                }
                Ok(Stored::Refused) => {}
                Err(error) => return self.failed(tenant, &error),
            }
        }
    }

    /// A bucket that is gone is made anew by whoever keeps the streams, once it knows.
    fn failed(&self, tenant: &TenantId, error: &dyn Display) {
        tracing::debug!(%error, "cannot lease units of a ceiling");
        self.0.health.raise_unless_away(Concern::StreamsUnavailable, error.to_string());
        if let Some(held) = self.lock().get_mut(tenant) {
            held.refused = Some(Instant::now());
        }
    }

    /// A broker that keeps nothing leaves each worker a ceiling of its own.
    fn lease_here(&self, tenant: &TenantId, units: u64) {
        if let Some(held) = self.lock().get_mut(tenant) {
            held.lease = Lease { units: units.min(held.most), asked: Some(Instant::now()) };
        }
    }

    fn asking(&self, tenant: &TenantId) -> Option<Arc<tokio::sync::Mutex<()>>> {
        self.lock().get(tenant).map(|held| Arc::clone(&held.asking))
    }

    fn key(&self, tenant: &TenantId) -> String {
        format!("{}.{}.concurrent", self.0.pool, contract::escape(tenant.as_str()))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TenantId, Held>> {
        self.0.tenants.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        if let Some(held) = self.ceilings.lock().get_mut(&self.tenant) {
            held.running = held.running.saturating_sub(1);
        }
        self.ceilings.0.parking.wake();
    }
}

/// Units that somebody waits for, until this is dropped.
struct Waiting<'c> {
    ceilings: &'c Ceilings,
    tenant: &'c TenantId,
    units: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(held) = self.ceilings.lock().get_mut(self.tenant) {
            held.wanted = held.wanted.saturating_sub(self.units);
        }
    }
}

/// What a worker asks for.
#[derive(Clone, Copy, Debug)]
struct Asked {
    /// So many units in all.
    units: u64,
    /// What it runs now, and has leased already, is never taken from it.
    running: u64,
    /// Over all workers.
    most: u64,
}

/// The value of a tenant's key: what each worker has leased.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Leases {
    version: String,
    leases: BTreeMap<String, Leased>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Leased {
    slots: u64,
    /// Unix time in milliseconds.
    until: i64,
}

impl Leases {
    /// What cannot be read is not ours: it counts for nothing and is replaced.
    fn decode(value: &[u8]) -> Self {
        serde_json::from_slice(value).unwrap_or_else(|error| {
            tracing::warn!(%error, "the leases of a ceiling cannot be read: begun anew");
            Self::default()
        })
    }

    fn encode(&self) -> Bytes {
        contract::encode(&Self { version: contract::VERSION.to_owned(), leases: self.leases.clone() })
    }

    /// Gives a worker what there is of what it asks for, from `now` on, and says how much that is.
    fn grant(&mut self, worker: &str, asked: Asked, now: i64) -> u64 {
        let difference = i64::try_from(contract::millis(CLOCK_DIFFERENCE)).unwrap_or(i64::MAX);
        let lease = i64::try_from(contract::millis(LEASE)).unwrap_or(i64::MAX);
        self.leases.retain(|_, leased| leased.until.saturating_add(difference) >= now);
        let own = self.leases.remove(worker).map_or(0, |leased| leased.slots);
        let others: u64 = self.leases.values().map(|leased| leased.slots).sum();
        let granted = asked.units.min(asked.most.saturating_sub(others)).max(own.min(asked.running));
        if granted > 0 {
            self.leases.insert(worker.to_owned(), Leased { slots: granted, until: now.saturating_add(lease) });
        }
        granted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: u64 = 5;

    fn asked(units: u64, running: u64) -> Asked {
        Asked { units, running, most: MOST }
    }

    #[test]
    fn no_more_is_leased_than_there_is_and_a_lease_that_ended_is_given_out_again() {
        let mut leases = Leases::default();
        assert_eq!(leases.grant("a", asked(3, 0), 0), 3);
        assert_eq!(leases.grant("b", asked(3, 0), 0), 2);
        assert_eq!(leases.grant("a", asked(4, 3), 10_000), 3, "the rest is the other's");
        assert_eq!(
            leases.grant("b", asked(5, 2), 35_000),
            2,
            "the lease of the first still holds, or its clock is late"
        );
        assert_eq!(leases.grant("b", asked(5, 2), 45_001), 5);
        assert_eq!(leases.grant("a", asked(3, 3), 45_001), 0, "it came too late to go on with it");
        assert_eq!(leases.grant("b", asked(0, 0), 45_002), 0);
        assert_eq!(Leases::decode(&leases.encode()).leases.len(), 0);
    }

    #[test]
    fn a_ceiling_that_is_lowered_takes_nothing_from_what_runs() {
        let mut leases = Leases::default();
        assert_eq!(leases.grant("a", asked(5, 0), 0), 5);
        let lowered = Asked { most: 2, ..asked(5, 4) };
        assert_eq!(leases.grant("a", lowered, 1), 4);
        assert_eq!(leases.grant("b", Asked { most: 5, ..asked(5, 0) }, 2), 1, "raised again");
    }

    #[test]
    fn what_cannot_be_read_counts_for_nothing() {
        assert!(Leases::decode(b"nonsense").leases.is_empty());
    }

    /// A worker of the simulation, whose clock is wrong.
    struct Worker {
        name: String,
        clock: i64,
        lease: Lease,
        running: u64,
        /// What it has read and not written yet: the revision, what it will write, and what it got.
        writing: Option<(u64, Leases, u64, Instant)>,
    }

    /// Random takes, ends, renewals, deaths, pauses and lost writes of several workers: the most that ever ran at once on
    /// leases that held. What is left of a lease that had ended when its worker got another counts for neither.
    fn most_at_once(seed: u64, checks_revisions: bool) -> u64 {
        let mut random = fastrand::Rng::with_seed(seed);
        let start = Instant::now();
        let (mut value, mut revision, mut time, mut born, mut worst) = (Leases::default(), 0, 0_u64, 0, 0);
        let mut new = |random: &mut fastrand::Rng| {
            born += 1;
            let clock = random.i64(0..5000);
            Worker { name: format!("w{born}"), clock, lease: Lease::default(), running: 0, writing: None }
        };
        let mut workers: Vec<Worker> = (0..4).map(|_| new(&mut random)).collect();
        for _ in 0..400 {
            time += if random.u8(0..40) == 0 { random.u64(0..60_000) } else { random.u64(0..400) };
            let now = start + Duration::from_millis(time);
            let index = random.usize(0..workers.len());
            let Some(worker) = workers.get_mut(index) else { continue };
            match random.u8(0..20) {
                0 => *worker = new(&mut random),
                1..8 if worker.lease.holds(now) && worker.running < worker.lease.units.min(MOST) => worker.running += 1,
                8..11 => worker.running = worker.running.saturating_sub(1),
                11..16 if worker.writing.is_none() => {
                    let mut read = value.clone();
                    let units = worker.running + random.u64(0..3);
                    let wall = i64::try_from(time).unwrap() + worker.clock;
                    let granted = read.grant(&worker.name, asked(units, worker.running), wall);
                    worker.lease.units = worker.lease.units.min(granted);
                    worker.writing = Some((revision, read, granted, now));
                }
                _ => {
                    let Some((read_at, wanted, granted, asked)) = worker.writing.take() else { continue };
                    if read_at == revision || !checks_revisions {
                        (value, revision) = (wanted, revision + 1);
                        // The answer may be lost.
                        if random.u8(0..10) > 0 {
                            worker.lease = Lease { units: granted, asked: Some(asked) };
                        }
                    }
                }
            }
            let holds = workers.iter().filter(|worker| worker.lease.holds(now));
            worst = worst.max(holds.map(|worker| worker.running.min(worker.lease.units)).sum());
        }
        worst
    }

    #[test]
    fn over_all_workers_never_more_runs_than_the_ceiling() {
        for seed in 0..20_000 {
            assert!(most_at_once(seed, true) <= MOST, "seed {seed}");
        }
        assert!((0..20_000).any(|seed| most_at_once(seed, true) == MOST), "it is reached");
    }

    #[test]
    fn without_revisions_the_simulation_finds_too_many() {
        assert!((0..2000).any(|seed| most_at_once(seed, false) > MOST));
    }
}
