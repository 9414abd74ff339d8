//! Whose work is parked, as far as this worker knows, and whose turn it is to be looked after. No client here.
//!
//! Work that may not run yet waits in a stream, so that it holds up nobody. While a tenant has some there, what arrives of
//! its own waits behind it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::broker::streams::Parked;
use crate::ids::TenantId;

/// After parked work could not start although there seemed to be room for it, before its tenant is looked at again.
const REST: Duration = Duration::from_secs(1);
/// Of so many pulls in vain for a tenant that has work in the stream, one waits for a moment.
const IN_VAIN: u32 = 4;

/// What is parked, by the class of workers that it waits for.
#[derive(Debug, Default)]
pub struct Parking {
    general: Lane,
    gpu: Lane,
}

/// The parked work that one class of workers takes up again.
#[derive(Debug, Default)]
pub struct Lane {
    tenants: Mutex<HashMap<TenantId, Known>>,
    changed: Notify,
    /// Why some of it cannot be taken up.
    unusable: Mutex<Option<String>>,
}

/// What is known of one tenant's parked work.
#[derive(Clone, Copy, Debug)]
struct Known {
    waits: bool,
    /// When it was last known to wait.
    since: Instant,
    /// When it was looked after last.
    seen: Option<Instant>,
    rests_until: Option<Instant>,
    /// Pulls since the last one that brought something.
    in_vain: u32,
}

impl Parking {
    /// The parked work of one class.
    pub const fn lane(&self, parked: Parked) -> &Lane {
        match parked {
            Parked::General => &self.general,
            Parked::Gpu => &self.gpu,
        }
    }

    /// Why some of it cannot be taken up, if that is so.
    pub fn unusable(&self) -> Option<String> {
        self.general.unusable().or_else(|| self.gpu.unusable())
    }

    /// Something has become free: parked work may go on.
    pub fn wake(&self) {
        self.general.wake();
        self.gpu.wake();
    }
}

impl Lane {
    /// Something may have become free: of no interest while nothing is known to be parked.
    pub fn wake(&self) {
        if !self.is_empty() {
            self.changed.notify_one();
        }
    }

    /// Returns when something may have become free, or has been parked, since the last look.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Work of this tenant has been parked.
    pub fn parked(&self, tenant: &TenantId) {
        self.note(tenant, true, Instant::now());
        self.wake();
    }

    /// Whether work of this tenant waits, so that more of it has to wait behind.
    pub fn has_work_of(&self, tenant: &TenantId) -> bool {
        let tenants = self.lock();
        !tenants.is_empty() && tenants.get(tenant).is_some_and(|known| known.waits)
    }

    /// Whether its work was in the stream at the last look, be it waiting or running, or has been parked since.
    pub fn knows(&self, tenant: &TenantId) -> bool {
        self.lock().contains_key(tenant)
    }

    /// Whether nothing is known to be parked.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// The broker says whose work the stream has, be it waiting or running: asked for at `asked`.
    pub fn told(&self, tenants: impl IntoIterator<Item = TenantId>, asked: Instant) {
        let mut known = self.lock();
        let mut told = HashMap::new();
        for tenant in tenants {
            let before = known.remove(&tenant);
            let rest = before.unwrap_or(Known { waits: true, since: asked, seen: None, rests_until: None, in_vain: 0 });
            told.insert(tenant, Known { waits: true, ..rest });
        }
        // What was parked since then it did not know yet.
        told.extend(known.drain().filter(|(_, known)| known.waits && known.since >= asked));
        *known = told;
    }

    /// At most so many tenants with work, those that were looked after least lately first.
    pub fn next(&self, most: usize) -> Vec<TenantId> {
        let now = Instant::now();
        let mut tenants = self.lock();
        let waits = |known: &Known| known.waits && known.rests_until.is_none_or(|until| until <= now);
        let mut next: Vec<_> = tenants.iter_mut().filter(|(_, known)| waits(known)).collect();
        next.sort_by_key(|(_, known)| known.seen);
        next.truncate(most);
        let seen = |(tenant, known): (&TenantId, &mut Known)| {
            known.seen = Some(now);
            tenant.clone()
        };
        next.into_iter().map(seen).collect()
    }

    /// Some of a tenant's work was asked for at `asked`: so much came, and this is whether more of it waits.
    pub fn pulled(&self, tenant: &TenantId, came: usize, more_waits: bool, asked: Instant) {
        self.note(tenant, more_waits, asked);
        if let Some(known) = self.lock().get_mut(tenant) {
            known.in_vain = if came == 0 { known.in_vain.wrapping_add(1) } else { 0 };
        }
    }

    /// Whether a tenant's next pull had better wait for a moment. A broker that counts what waits wrongly answers those that
    /// do not as if there were nothing: nats-server does where a message is deleted while its consumer is made.
    pub fn had_better_wait(&self, tenant: &TenantId) -> bool {
        self.lock().get(tenant).is_some_and(|known| known.in_vain % IN_VAIN == IN_VAIN - 1)
    }

    /// A tenant's work could not start after all.
    pub fn rests(&self, tenant: &TenantId) {
        let now = Instant::now();
        self.note(tenant, true, now);
        if let Some(known) = self.lock().get_mut(tenant) {
            known.rests_until = Some(now + REST);
        }
    }

    /// Why some of it cannot be taken up; `None` where all can.
    pub fn set_unusable(&self, why: Option<String>) {
        *self.unusable.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }

    fn unusable(&self) -> Option<String> {
        self.unusable.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note(&self, tenant: &TenantId, waits: bool, since: Instant) {
        let mut tenants = self.lock();
        let new = Known { waits, since, seen: None, rests_until: None, in_vain: 0 };
        let known = tenants.entry(tenant.clone()).or_insert(new);
        if known.since <= since {
            (known.waits, known.since) = (waits, since);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TenantId, Known>> {
        self.tenants.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(name: &str) -> TenantId {
        TenantId::parse(name).expect("a tenant id")
    }

    #[test]
    fn a_tenant_waits_from_when_its_work_is_parked_until_a_pull_brings_the_last_of_it() {
        let (lane, a) = (Lane::default(), tenant("a"));
        assert!(lane.is_empty() && !lane.has_work_of(&a));
        lane.parked(&a);
        assert!(lane.has_work_of(&a) && !lane.has_work_of(&tenant("b")));
        let asked = Instant::now();
        lane.pulled(&a, 1, true, asked);
        assert!(lane.has_work_of(&a));
        lane.pulled(&a, 1, false, asked);
        assert!(!lane.has_work_of(&a) && !lane.is_empty(), "it may run elsewhere");
        lane.told([], Instant::now());
        assert!(lane.is_empty());
    }

    #[test]
    fn an_answer_that_is_older_than_what_was_parked_says_nothing_of_it() {
        let (lane, a) = (Lane::default(), tenant("a"));
        let asked = Instant::now();
        lane.parked(&a);
        lane.pulled(&a, 0, false, asked - REST);
        lane.told([], asked);
        assert!(lane.has_work_of(&a));
    }

    #[test]
    fn of_four_pulls_in_vain_one_waits_for_a_moment() {
        let (lane, a) = (Lane::default(), tenant("a"));
        let waits = |came: usize| {
            lane.told([a.clone()], Instant::now());
            let waits = lane.had_better_wait(&a);
            lane.pulled(&a, came, false, Instant::now());
            waits
        };
        assert_eq!([0; 8].map(waits), [false, false, false, true, false, false, false, true]);
        assert_eq!([1, 0, 0, 0, 0].map(waits), [false, false, false, false, true]);
    }

    #[test]
    fn tenants_are_looked_after_in_turn_and_not_those_that_rest() {
        let lane = Lane::default();
        let [a, b, c] = ["a", "b", "c"].map(tenant);
        lane.told([a.clone(), b.clone(), c.clone()], Instant::now());
        let mut first = lane.next(2);
        std::thread::sleep(Duration::from_millis(2));
        first.extend(lane.next(1));
        first.sort();
        assert_eq!(first, [a.clone(), b.clone(), c]);
        lane.rests(&a);
        assert!(!lane.next(3).contains(&a) && lane.has_work_of(&a));
    }
}
