//! What each tenant does here: how much of it runs and waits, and how much was refused for its budget.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Pipeline;
use crate::ids::TenantId;
use crate::schedule::Held;

/// A tenant of which nothing is here is spoken of for so long: short blocks would come and go between two looks.
const LATELY: Duration = Duration::from_secs(60);
/// Tenants that are remembered. Of more, those are forgotten that were never refused anything.
const REMEMBERED: usize = 4096;

/// What one tenant does here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TenantActivity {
    /// Which one.
    pub(crate) tenant: TenantId,
    /// Its blocks that run, and those that wait for a slot.
    pub(crate) held: Held,
    /// Assignments refused with 2004 since the worker started.
    pub(crate) refused: u64,
}

/// What is remembered of tenants of which nothing is here.
#[derive(Debug, Default)]
pub(super) struct Tallies(Mutex<HashMap<TenantId, Tally>>);

#[derive(Debug)]
struct Tally {
    refused: u64,
    last: Instant,
}

impl Tallies {
    /// A block of the tenant has ended.
    pub(super) fn executed(&self, tenant: &TenantId) {
        self.note(tenant, 0);
    }

    /// An assignment of the tenant was refused for its budget.
    pub(super) fn refused(&self, tenant: &TenantId) {
        self.note(tenant, 1);
    }

    fn note(&self, tenant: &TenantId, refused: u64) {
        let (now, mut tallies) = (Instant::now(), self.lock());
        if let Some(tally) = tallies.get_mut(tenant) {
            (tally.refused, tally.last) = (tally.refused + refused, now);
            return;
        }
        // Whoever was never refused anything is not worth the search.
        if tallies.len() >= REMEMBERED && refused > 0 {
            tallies.retain(|_, tally| tally.refused > 0);
        }
        if tallies.len() < REMEMBERED {
            tallies.insert(tenant.clone(), Tally { refused, last: now });
        }
    }

    /// Adds what is here, the busiest first.
    fn with(&self, held: HashMap<TenantId, Held>) -> Vec<TenantActivity> {
        let mut tallies = self.lock();
        tallies.retain(|_, tally| tally.refused > 0 || tally.last.elapsed() < LATELY);
        let refused = |tenant: &TenantId| tallies.get(tenant).map_or(0, |tally| tally.refused);
        let gone = tallies.keys().filter(|tenant| !held.contains_key(*tenant));
        let mut all: Vec<_> = gone
            .map(|tenant| (tenant, Held::default()))
            .chain(held.iter().map(|(tenant, held)| (tenant, *held)))
            .map(|(tenant, held)| TenantActivity { tenant: tenant.clone(), held, refused: refused(tenant) })
            .collect();
        all.sort_by(|one, other| (Reverse(one.rank()), &one.tenant).cmp(&(Reverse(other.rank()), &other.tenant)));
        all
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TenantId, Tally>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TenantActivity {
    const fn rank(&self) -> (usize, u64) {
        (self.held.running + self.held.queued, self.refused)
    }
}

impl Pipeline {
    /// What each tenant does here that has work here, had some of late, or was refused some: the busiest first.
    pub(crate) fn tenants(&self) -> Vec<TenantActivity> {
        self.tallies.with(self.schedule.tenants())
    }

    /// Counts what is here of each tenant that the policy names, and of all others together.
    pub(super) fn observe_tenants(&self) {
        let policy = self.gate.policy();
        let mut held: HashMap<&str, Held> = policy.named().map(|tenant| (tenant.as_str(), Held::default())).collect();
        let tenants = self.schedule.tenants();
        for (tenant, here) in &tenants {
            let sum = held.entry(policy.label(tenant)).or_default();
            *sum = sum.plus(*here);
        }
        self.metrics.set_tenants(&held);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(name: &str) -> TenantId {
        TenantId::parse(name).expect("a tenant id")
    }

    #[test]
    fn the_busiest_come_first_and_who_was_refused_is_not_forgotten() {
        let tallies = Tallies::default();
        tallies.executed(&tenant("quick"));
        (0..3).for_each(|_| tallies.refused(&tenant("greedy")));
        tallies.refused(&tenant("busy"));
        let held = [("busy", 2, 1), ("busier", 1, 9)];
        let held = held.map(|(name, running, queued)| (tenant(name), Held { running, queued }));
        let all = tallies.with(HashMap::from(held));
        let said: Vec<_> = all.iter().map(|one| (one.tenant.as_str(), one.held.queued, one.refused)).collect();
        assert_eq!(said, [("busier", 9, 0), ("busy", 1, 1), ("greedy", 0, 3), ("quick", 0, 0)]);
    }

    #[test]
    fn whoever_invents_tenants_does_not_fill_the_memory() {
        let tallies = Tallies::default();
        tallies.refused(&tenant("greedy"));
        for number in 0..3 * REMEMBERED {
            tallies.executed(&tenant(&format!("invented-{number}")));
        }
        assert!(tallies.lock().len() <= REMEMBERED);
        assert!(tallies.with(HashMap::new()).iter().any(|one| one.refused == 1), "and those refused are still there");
        for number in 0..3 * REMEMBERED {
            tallies.refused(&tenant(&format!("invented-{number}")));
        }
        assert_eq!(tallies.lock().len(), REMEMBERED);
    }
}
