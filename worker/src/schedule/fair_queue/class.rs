//! One class of priorities: tenants by what they owe, and first come first served within a tenant.
//!
//! Deficit round-robin with the smallest quantum there is: each tenant has an account of the time that its work took,
//! divided by its weight, and whoever owes least is next. What a block will take is not known when it starts, so the
//! mean of its tenant's is charged then, and the difference when it has ended.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::ids::TenantId;

/// No work costs less, so that even that which takes no time is taken in turns.
const LEAST_COST: Duration = Duration::from_micros(1);
/// How much one more measurement moves the mean.
const MEAN_OF: u32 = 8;
/// Accounts that are settled are forgotten when there are twice as many as after the last time, and more than this.
const FEW_ACCOUNTS: usize = 64;

#[derive(Debug)]
pub(super) struct Class<T> {
    lanes: HashMap<TenantId, Lane<T>>,
    /// Tenants with work and below their ceiling, by what they owe, and in turn where they owe the same.
    order: BTreeMap<Seat, TenantId>,
    /// What those owed who were served last: whoever comes new owes no less, or it would be served alone for long.
    /// And no more is owed than this by whoever worked while nobody waited.
    now: u64,
    /// What work takes, as of late.
    mean: Duration,
    /// Since when the class waits: its last service, or when somebody could be served again.
    pub(super) since: Option<Instant>,
    forget_at: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Seat {
    owes: u64,
    number: u64,
}

/// One tenant in one class: its account, and what waits.
#[derive(Debug)]
struct Lane<T> {
    items: VecDeque<(u64, T)>,
    seat: Option<Seat>,
    /// Nanoseconds of work by weight.
    owes: u64,
    /// What its work takes, as of late.
    mean: Duration,
    running: usize,
}

impl<T> Class<T> {
    pub(super) fn new() -> Self {
        Self {
            lanes: HashMap::new(),
            order: BTreeMap::new(),
            now: 0,
            mean: LEAST_COST,
            since: None,
            forget_at: FEW_ACCOUNTS,
        }
    }

    /// All that waits, with its tenant and its number.
    pub(super) fn items(&self) -> impl Iterator<Item = (&TenantId, u64, &T)> {
        let lanes = self.lanes.iter();
        lanes.flat_map(|(tenant, lane)| lane.items.iter().map(move |(number, item)| (tenant, *number, item)))
    }

    #[cfg(test)]
    pub(super) fn accounts(&self) -> usize {
        self.lanes.len()
    }

    fn lane(&mut self, tenant: &TenantId) -> &mut Lane<T> {
        if self.lanes.len() >= self.forget_at && !self.lanes.contains_key(tenant) {
            let now = self.now;
            self.lanes.retain(|_, lane| !lane.items.is_empty() || lane.running > 0 || lane.owes > now);
            self.forget_at = FEW_ACCOUNTS.max(2 * self.lanes.len());
        }
        let (mean, owes) = (self.mean, self.now);
        self.lanes.entry(tenant.clone()).or_insert_with(|| Lane {
            items: VecDeque::new(),
            seat: None,
            owes,
            mean,
            running: 0,
        })
    }

    pub(super) fn push(&mut self, tenant: &TenantId, number: u64, item: T) {
        if self.lane(tenant).items.is_empty() {
            self.catch_up(tenant);
        }
        self.lane(tenant).items.push_back((number, item));
    }

    /// Whoever has let others go first for want of work, or at its ceiling, has no claim for that.
    pub(super) fn catch_up(&mut self, tenant: &TenantId) {
        if let Some(lane) = self.lanes.get_mut(tenant) {
            lane.owes = lane.owes.max(self.now);
        }
    }

    /// Gives the tenant its place in the order, if it has work and none yet.
    pub(super) fn seat(&mut self, tenant: &TenantId, number: u64, now: Instant) {
        let Some(lane) = self.lanes.get_mut(tenant).filter(|lane| lane.seat.is_none() && !lane.items.is_empty()) else {
            return;
        };
        let seat = Seat { owes: lane.owes, number };
        lane.seat = Some(seat);
        self.order.insert(seat, tenant.clone());
        self.since.get_or_insert(now);
    }

    pub(super) fn unseat(&mut self, tenant: &TenantId) {
        if let Some(seat) = self.lanes.get_mut(tenant).and_then(|lane| lane.seat.take()) {
            self.order.remove(&seat);
        }
        if self.order.is_empty() {
            self.since = None;
        }
    }

    /// The first item of whoever owes least. Its tenant has no seat until it is charged.
    pub(super) fn take(&mut self) -> Option<(TenantId, T)> {
        let (_, tenant) = self.order.pop_first()?;
        let lane = self.lanes.get_mut(&tenant)?;
        lane.seat = None;
        let (_, item) = lane.items.pop_front()?;
        Some((tenant, item))
    }

    /// Charges the start of one piece of work, and seats the tenant anew where it may go on.
    pub(super) fn charge(&mut self, tenant: &TenantId, weight: u32, seat: Option<u64>, now: Instant) -> u64 {
        let lane = self.lane(tenant);
        let charged = by_weight(lane.mean, weight);
        let owed = lane.owes;
        lane.owes += charged;
        lane.running += 1;
        self.now = self.now.max(owed);
        self.unseat(tenant);
        if let Some(number) = seat {
            self.seat(tenant, number, now);
        }
        self.since = (!self.order.is_empty()).then_some(now);
        charged
    }

    /// Corrects what was charged by what it took.
    pub(super) fn settle(&mut self, tenant: &TenantId, weight: u32, charged: u64, cost: Duration, now: Instant) {
        let Some(lane) = self.lanes.get_mut(tenant) else { return };
        lane.running -= 1;
        let cost = cost.max(LEAST_COST);
        lane.owes = (lane.owes + by_weight(cost, weight)).saturating_sub(charged);
        lane.mean = moved(lane.mean, cost);
        self.mean = moved(self.mean, cost);
        if let Some(seat) = lane.seat {
            let owes = lane.owes;
            lane.seat = Some(Seat { owes, ..seat });
            self.order.remove(&seat);
            self.order.insert(Seat { owes, ..seat }, tenant.clone());
            self.since.get_or_insert(now);
        } else if self.order.is_empty() {
            self.now = self.now.max(lane.owes);
        }
    }

    pub(super) fn remove(&mut self, tenant: &TenantId, number: u64, now: Instant) -> Option<T> {
        let lane = self.lanes.get_mut(tenant)?;
        let index = lane.items.binary_search_by_key(&number, |(number, _)| *number).ok()?;
        let (_, item) = lane.items.remove(index)?;
        if lane.items.is_empty() {
            let since = self.since;
            self.unseat(tenant);
            self.since = (!self.order.is_empty()).then_some(since.unwrap_or(now));
        }
        Some(item)
    }

    pub(super) fn clear(&mut self, items: &mut Vec<T>) {
        for lane in self.lanes.values_mut() {
            items.extend(lane.items.drain(..).map(|(_, item)| item));
            lane.seat = None;
        }
        self.order.clear();
        self.since = None;
    }
}

fn moved(mean: Duration, cost: Duration) -> Duration {
    // Nothing has been measured yet.
    if mean == LEAST_COST { cost } else { (mean * (MEAN_OF - 1) + cost) / MEAN_OF }
}

fn by_weight(cost: Duration, weight: u32) -> u64 {
    let nanos = u64::try_from(cost.as_nanos()).unwrap_or(u64::MAX / 4).min(u64::MAX / 4);
    nanos / u64::from(weight.max(1))
}
