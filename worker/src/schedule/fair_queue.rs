//! Whose turn it is. Pure and sync: time comes in as an argument.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::assignment::TenantId;

/// A priority class that has not been served for this long counts as one class higher, for twice as long as two.
/// So the lowest class is served at least every ten of these, whatever comes in above it.
const AGEING: Duration = Duration::from_secs(1);
/// Priorities are 0 to 9.
const CLASSES: usize = 10;

/// Priority classes, higher first but none forgotten; within a class round-robin over tenants; within a tenant
/// first-in-first-out.
#[derive(Debug)]
pub struct FairQueue<T> {
    classes: [Class<T>; CLASSES],
    len: usize,
}

#[derive(Debug)]
struct Class<T> {
    lanes: HashMap<TenantId, VecDeque<T>>,
    /// Tenants with work, in the order they will be served. Invariant: exactly the keys of `lanes`.
    turns: VecDeque<TenantId>,
    /// Since when the class waits: its last service, or when it stopped being empty.
    since: Option<Instant>,
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> FairQueue<T> {
    /// An empty queue.
    pub fn new() -> Self {
        Self { classes: std::array::from_fn(|_| Class::new()), len: 0 }
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Puts an item at the end of its tenant's lane; a priority above 9 counts as 9.
    pub fn push(&mut self, tenant: &TenantId, priority: u8, item: T, now: Instant) {
        let class = usize::from(priority).min(CLASSES - 1);
        if let Some(class) = self.classes.get_mut(class) {
            class.push(tenant, item, now);
            self.len += 1;
        }
    }

    /// The next item: of the class that ranks highest by priority and age.
    pub fn pop(&mut self, now: Instant) -> Option<T> {
        let ranked = self.classes.iter_mut().enumerate().filter_map(|(class, waiting)| {
            let age = now.saturating_duration_since(waiting.since?);
            Some((class as f64 + age.as_secs_f64() / AGEING.as_secs_f64(), waiting))
        });
        let (_, class) = ranked.max_by(|(one, _), (other, _)| one.total_cmp(other))?;
        let item = class.pop(now)?;
        self.len -= 1;
        Some(item)
    }
}

impl<T> Class<T> {
    fn new() -> Self {
        Self { lanes: HashMap::new(), turns: VecDeque::new(), since: None }
    }

    fn push(&mut self, tenant: &TenantId, item: T, now: Instant) {
        self.since.get_or_insert(now);
        match self.lanes.get_mut(tenant) {
            Some(lane) => lane.push_back(item),
            None => {
                self.lanes.insert(tenant.clone(), VecDeque::from([item]));
                self.turns.push_back(tenant.clone());
            }
        }
    }

    fn pop(&mut self, now: Instant) -> Option<T> {
        let tenant = self.turns.pop_front()?;
        let lane = self.lanes.get_mut(&tenant)?;
        let item = lane.pop_front();
        if lane.is_empty() {
            self.lanes.remove(&tenant);
        } else {
            self.turns.push_back(tenant);
        }
        self.since = (!self.turns.is_empty()).then_some(now);
        item
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tenant(name: &str) -> TenantId {
        TenantId::parse(name).expect("a tenant id")
    }

    fn served(queue: &mut FairQueue<&'static str>, now: Instant) -> Vec<&'static str> {
        std::iter::from_fn(|| queue.pop(now)).collect()
    }

    #[test]
    fn a_busy_tenant_does_not_starve_a_quiet_one() {
        let (mut queue, now) = (FairQueue::new(), Instant::now());
        for job in ["a1", "a2", "a3"] {
            queue.push(&tenant("a"), 4, job, now);
        }
        queue.push(&tenant("b"), 4, "b1", now);
        assert_eq!(served(&mut queue, now), ["a1", "b1", "a2", "a3"]);
    }

    #[test]
    fn higher_priority_goes_first() {
        let (mut queue, now) = (FairQueue::new(), Instant::now());
        queue.push(&tenant("a"), 1, "low", now);
        queue.push(&tenant("a"), 9, "high", now);
        assert_eq!(served(&mut queue, now), ["high", "low"]);
    }

    #[test]
    fn the_lowest_class_is_served_within_ten_seconds_of_a_flood_above_it() {
        let (mut queue, start) = (FairQueue::new(), Instant::now());
        queue.push(&tenant("quiet"), 0, "low", start);
        let waited = (0..20_000).map(Duration::from_millis).find(|waited| {
            queue.push(&tenant("loud"), 9, "high", start + *waited);
            queue.pop(start + *waited) == Some("low")
        });
        assert!(waited.is_some_and(|waited| waited < Duration::from_secs(10)), "{waited:?}");
    }

    proptest! {
        #[test]
        fn everything_comes_out_once_and_in_order_within_a_tenant_and_class(
            jobs in prop::collection::vec((0_usize..5, 0_u8..10), 0..200)
        ) {
            let (mut queue, now) = (FairQueue::new(), Instant::now());
            for (number, (name, priority)) in jobs.iter().enumerate() {
                queue.push(&tenant(&name.to_string()), *priority, (*name, *priority, number), now);
            }
            let served: Vec<_> = std::iter::from_fn(|| queue.pop(now)).collect();
            prop_assert!(queue.is_empty());
            prop_assert_eq!(served.len(), jobs.len());
            for (index, one) in served.iter().enumerate() {
                let later = served.iter().skip(index + 1);
                let same_lane = later.filter(|other| (other.0, other.1) == (one.0, one.1));
                prop_assert!(same_lane.into_iter().all(|other| other.2 > one.2));
            }
        }

        #[test]
        fn within_a_class_no_tenant_is_ahead_of_another_by_more_than_one(
            jobs in prop::collection::vec(0_usize..4, 1..200)
        ) {
            let (mut queue, now) = (FairQueue::new(), Instant::now());
            let mut left = [0_usize; 4];
            for name in &jobs {
                queue.push(&tenant(&name.to_string()), 4, *name, now);
                left[*name] += 1;
            }
            let mut turns = [0_usize; 4];
            while let Some(name) = queue.pop(now) {
                left[name] -= 1;
                turns[name] += 1;
                for other in 0..4 {
                    prop_assert!(left[other] == 0 || turns[name] <= turns[other] + 1);
                }
            }
        }
    }
}
