//! Whose turn it is, by priority and age, and under each tenant's ceiling. Pure and sync: time, weights and ceilings come in
//! as arguments.

mod class; // one class of priorities

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::{Duration, Instant};

use crate::ids::TenantId;
use class::Class;

/// A priority class that has not been served for this long counts as one class higher, for twice as long as two.
/// So the lowest class is served at least every ten of these, whatever comes in above it.
const AGEING: Duration = Duration::from_secs(1);
/// Priorities are 0 to 9.
const CLASSES: usize = 10;

/// Priority classes, higher first but none forgotten; within a class tenants by what they owe; within a tenant
/// first-in-first-out. A tenant that holds as many slots as it may is not in the queue's order until it gives one back.
#[derive(Debug)]
pub struct FairQueue<T> {
    classes: [Class<T>; CLASSES],
    tenants: HashMap<TenantId, Holding>,
    len: usize,
    /// Of these, how many belong to tenants at their ceiling.
    held_back: usize,
    next: u64,
}

/// What a tenant is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Its part of the time beside others that want some.
    pub weight: u32,
    /// The most slots that it may hold at once.
    pub ceiling: usize,
}

/// What a tenant has in a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Slots that it holds.
    pub running: usize,
    /// Items that wait.
    pub queued: usize,
}

impl Held {
    /// The same tenant's in another queue too.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self { running: self.running + other.running, queued: self.queued + other.queued }
    }
}

/// Where an item waits.
#[derive(Clone, Debug)]
pub struct Place {
    tenant: TenantId,
    class: usize,
    number: u64,
}

/// Work that has started: what [`FairQueue::finish`] needs of it.
#[derive(Debug)]
pub struct Started {
    tenant: TenantId,
    class: usize,
    charged: u64,
}

/// A tenant that waits or runs.
#[derive(Debug)]
struct Holding {
    share: Share,
    running: usize,
    waiting: usize,
}

impl Holding {
    const fn is_at_ceiling(&self) -> bool {
        self.running >= self.share.ceiling
    }
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> FairQueue<T> {
    /// An empty queue.
    pub fn new() -> Self {
        Self { classes: std::array::from_fn(|_| Class::new()), tenants: HashMap::new(), len: 0, held_back: 0, next: 0 }
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// How many of them wait for their own tenant to give a slot back, and not for anybody else.
    pub fn held_back(&self) -> usize {
        self.held_back
    }

    /// How many of these are a tenant's.
    pub fn held_back_of(&self, tenant: &TenantId) -> usize {
        self.tenants.get(tenant).filter(|holding| holding.is_at_ceiling()).map_or(0, |holding| holding.waiting)
    }

    /// Whether work of this tenant waits.
    pub fn has_waiting(&self, tenant: &TenantId) -> bool {
        self.tenants.get(tenant).is_some_and(|holding| holding.waiting > 0)
    }

    /// Who waits or runs.
    pub fn tenants(&self) -> Vec<(TenantId, Held)> {
        let held = |holding: &Holding| Held { running: holding.running, queued: holding.waiting };
        self.tenants.iter().map(|(tenant, holding)| (tenant.clone(), held(holding))).collect()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Puts an item at the end of its tenant's lane; a priority above 9 counts as 9.
    pub fn push(&mut self, tenant: &TenantId, priority: u8, share: Share, item: T, now: Instant) -> Place {
        let class = usize::from(priority).min(CLASSES - 1);
        let number = self.number();
        self.adopt(tenant, share, now);
        if let (Some(holding), Some(class)) = (self.tenants.get_mut(tenant), self.classes.get_mut(class)) {
            holding.waiting += 1;
            self.len += 1;
            self.held_back += usize::from(holding.is_at_ceiling());
            let is_at_ceiling = holding.is_at_ceiling();
            class.push(tenant, number, item);
            if !is_at_ceiling {
                class.seat(tenant, number, now);
            }
        }
        Place { tenant: tenant.clone(), class, number }
    }

    /// Starts work of a tenant that need not wait: nobody is before it.
    ///
    /// `None` where it holds as many slots as it may.
    pub fn start(&mut self, tenant: &TenantId, priority: u8, share: Share, now: Instant) -> Option<Started> {
        let class = usize::from(priority).min(CLASSES - 1);
        self.adopt(tenant, share, now);
        let is_at_ceiling = self.tenants.get(tenant).is_some_and(Holding::is_at_ceiling);
        if is_at_ceiling {
            return None;
        }
        self.classes.get_mut(class)?.catch_up(tenant);
        Some(self.charge(tenant.clone(), class, now))
    }

    /// The next item: of the class that ranks highest by priority and age.
    pub fn pop(&mut self, now: Instant) -> Option<(T, Started)> {
        let ranked = self.classes.iter().enumerate().filter_map(|(class, waiting)| {
            let age = now.saturating_duration_since(waiting.since?);
            Some((class as f64 + age.as_secs_f64() / AGEING.as_secs_f64(), class))
        });
        let (_, class) = ranked.max_by(|(one, _), (other, _)| one.total_cmp(other))?;
        let (tenant, item) = self.classes.get_mut(class)?.take()?;
        self.len -= 1;
        if let Some(holding) = self.tenants.get_mut(&tenant) {
            holding.waiting -= 1;
        }
        let started = self.charge(tenant, class, now);
        Some((item, started))
    }

    /// The places of at most `most` that are so, lowest class first: they would wait longest.
    pub fn find(&self, most: usize, is_so: impl Fn(&T) -> bool) -> Vec<Place> {
        let classes = self.classes.iter().enumerate();
        let items = classes.flat_map(|(class, waiting)| waiting.items().map(move |item| (class, item)));
        let found = items.filter(|(_, (_, _, item))| is_so(item)).take(most);
        found.map(|(class, (tenant, number, _))| Place { tenant: tenant.clone(), class, number }).collect()
    }

    /// Takes an item out that still waits.
    pub fn remove(&mut self, place: &Place, now: Instant) -> Option<T> {
        let class = self.classes.get_mut(place.class)?;
        let item = class.remove(&place.tenant, place.number, now)?;
        self.len -= 1;
        if let Some(holding) = self.tenants.get_mut(&place.tenant) {
            holding.waiting -= 1;
            self.held_back -= usize::from(holding.is_at_ceiling());
        }
        self.forget(&place.tenant);
        Some(item)
    }

    /// Work has ended that took `cost`.
    pub fn finish(&mut self, started: Started, cost: Duration, now: Instant) {
        let Started { tenant, class, charged } = started;
        let Some(holding) = self.tenants.get_mut(&tenant) else { return };
        let was_at_ceiling = holding.is_at_ceiling();
        holding.running -= 1;
        let (weight, is_free_again) = (holding.share.weight, was_at_ceiling && !holding.is_at_ceiling());
        if is_free_again {
            self.held_back -= holding.waiting;
        }
        if let Some(class) = self.classes.get_mut(class) {
            class.settle(&tenant, weight, charged, cost, now);
        }
        if is_free_again {
            self.seat(&tenant, now);
        }
        self.forget(&tenant);
    }

    /// Gives each tenant that waits or runs the share that it is due from now on.
    pub fn set_shares(&mut self, share: impl Fn(&TenantId) -> Share, now: Instant) {
        let tenants: Vec<TenantId> = self.tenants.keys().cloned().collect();
        for tenant in tenants {
            let share = share(&tenant);
            self.adopt(&tenant, share, now);
        }
    }

    /// Sends all that waits away; what runs stays on its tenant's account.
    pub fn clear(&mut self) -> Vec<T> {
        let mut items = Vec::with_capacity(self.len);
        for class in &mut self.classes {
            class.clear(&mut items);
        }
        (self.len, self.held_back) = (0, 0);
        self.tenants.retain(|_, holding| {
            holding.waiting = 0;
            holding.running > 0
        });
        items
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Makes the tenant known with this share, which may lift its ceiling or lower it.
    fn adopt(&mut self, tenant: &TenantId, share: Share, now: Instant) {
        let holding = match self.tenants.get_mut(tenant) {
            Some(holding) if holding.share == share => return,
            Some(holding) => holding,
            None => {
                self.tenants.insert(tenant.clone(), Holding { share, running: 0, waiting: 0 });
                return;
            }
        };
        let was_at_ceiling = holding.is_at_ceiling();
        holding.share = share;
        match (was_at_ceiling, holding.is_at_ceiling()) {
            (true, false) => {
                self.held_back -= holding.waiting;
                self.seat(tenant, now);
            }
            (false, true) => {
                self.held_back += holding.waiting;
                self.unseat(tenant);
            }
            _ => {}
        }
    }

    /// Counts a slot, and charges what the work will probably take.
    fn charge(&mut self, tenant: TenantId, class: usize, now: Instant) -> Started {
        let (mut weight, mut reaches_ceiling) = (1, false);
        if let Some(holding) = self.tenants.get_mut(&tenant) {
            holding.running += 1;
            weight = holding.share.weight;
            if holding.running == holding.share.ceiling {
                reaches_ceiling = true;
                self.held_back += holding.waiting;
            }
        }
        if reaches_ceiling {
            self.unseat(&tenant);
        }
        let number = self.number();
        let charged = self
            .classes
            .get_mut(class)
            .map_or(0, |class| class.charge(&tenant, weight, (!reaches_ceiling).then_some(number), now));
        Started { tenant, class, charged }
    }

    fn seat(&mut self, tenant: &TenantId, now: Instant) {
        let number = self.number();
        for class in &mut self.classes {
            class.catch_up(tenant);
            class.seat(tenant, number, now);
        }
    }

    fn unseat(&mut self, tenant: &TenantId) {
        self.classes.iter_mut().for_each(|class| class.unseat(tenant));
    }

    fn forget(&mut self, tenant: &TenantId) {
        if let Entry::Occupied(holding) = self.tenants.entry(tenant.clone())
            && holding.get().running == 0
            && holding.get().waiting == 0
        {
            holding.remove();
        }
    }
}

#[cfg(test)]
mod tests;
