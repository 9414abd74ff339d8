//! Where an assignment runs, and in what order: pools of slots, each with a fair queue in front.

pub mod fair_queue; // whose turn it is
mod slots; // one pool of them

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::ids::TenantId;
use crate::policy::{Policy, Terms};
use crate::pool::{ByPool, Pool};
use slots::{Door, Entry, Slots};

pub use fair_queue::Held;
pub use slots::{Closed, Slot};

/// The pools of this worker.
#[derive(Debug)]
pub struct Schedule {
    pools: ByPool<Slots>,
    policy: watch::Receiver<Arc<Policy>>,
}

impl Schedule {
    /// Empty pools of these sizes, shared among tenants as the policy of the moment says.
    pub fn new(sizes: ByPool<usize>, policy: watch::Receiver<Arc<Policy>>) -> Self {
        Self { pools: ByPool::new(|pool| Slots::new(*sizes.of(pool))), policy }
    }

    /// What tenants are given, and whether the worker is paused.
    pub fn policy(&self) -> watch::Receiver<Arc<Policy>> {
        self.policy.clone()
    }

    /// What a tenant is given at this moment.
    pub fn terms(&self, tenant: &TenantId) -> Terms {
        self.policy.borrow().terms(tenant)
    }

    /// Waits for a turn in a pool; without a `priority` with its tenant's. After `patience` it may be sent away. Dropping
    /// the future gives the place in the queue up.
    ///
    /// # Errors
    /// The schedule lets nobody wait, or whoever waits was sent away.
    pub async fn slot(
        &self,
        pool: Pool,
        tenant: &TenantId,
        priority: Option<u8>,
        patience: Duration,
    ) -> Result<Slot, Closed> {
        let terms = self.terms(tenant);
        match self.pool(pool).enter(tenant, priority.unwrap_or(terms.priority), terms, patience) {
            Entry::Free(slot) => Ok(slot),
            Entry::Closed => Err(Closed),
            Entry::Queued(turn) => turn.come().await,
        }
    }

    /// How many slots a pool has.
    pub fn size(&self, pool: Pool) -> usize {
        self.pool(pool).size()
    }

    /// How many slots of a pool are taken.
    pub fn busy(&self, pool: Pool) -> usize {
        self.pool(pool).busy()
    }

    /// How many wait for a pool.
    pub fn waiting(&self, pool: Pool) -> usize {
        self.pool(pool).waiting()
    }

    /// How many of them wait because their tenant holds as many slots as it may.
    pub fn held_back(&self, pool: Pool) -> usize {
        self.pool(pool).held_back()
    }

    /// How many of these are a tenant's.
    pub fn held_back_of(&self, pool: Pool, tenant: &TenantId) -> usize {
        self.pool(pool).held_back_of(tenant)
    }

    /// Whether work of this tenant waits for a pool.
    pub fn has_waiting(&self, pool: Pool, tenant: &TenantId) -> bool {
        self.pool(pool).has_waiting(tenant)
    }

    /// What each tenant has here, over all pools.
    pub fn tenants(&self) -> HashMap<TenantId, Held> {
        let mut all = HashMap::new();
        for (tenant, held) in Pool::ALL.into_iter().flat_map(|pool| self.pool(pool).tenants()) {
            let sum: &mut Held = all.entry(tenant).or_default();
            *sum = sum.plus(held);
        }
        all
    }

    /// How many have lost their patience.
    pub fn impatient(&self) -> usize {
        let now = Instant::now();
        Pool::ALL.into_iter().map(|pool| self.pool(pool).impatient(now)).sum()
    }

    /// Sends at most `most` of those away, and says how many.
    pub fn send_away(&self, most: usize) -> usize {
        let (now, mut left) = (Instant::now(), most);
        for pool in Pool::ALL {
            left -= self.pool(pool).send_away(left, now);
        }
        most - left
    }

    /// Sends everybody who waits away, and everybody who comes, until [`Self::resume`]: only [`Self::slot_alone`] gives
    /// slots meanwhile.
    pub fn pause(&self) {
        Pool::ALL.into_iter().for_each(|pool| self.pool(pool).set_paused(true));
    }

    /// Ends a pause.
    pub fn resume(&self) {
        Pool::ALL.into_iter().for_each(|pool| self.pool(pool).set_paused(false));
    }

    /// A slot for whoever has paused everybody else and waited until all slots are free.
    ///
    /// # Errors
    /// The schedule has been closed.
    pub fn slot_alone(&self, pool: Pool, tenant: &TenantId) -> Result<Slot, Closed> {
        self.pool(pool).alone(tenant, self.terms(tenant))
    }

    /// Whether it has been closed for good.
    pub fn is_closed(&self) -> bool {
        self.pools.io.is_closed()
    }

    /// For how long a pool has let work wait without starting any, for want of a slot.
    pub fn stuck_for(&self, pool: Pool) -> Duration {
        self.pool(pool).stuck_for()
    }

    /// Gives the slots' shares out anew each time that the policy changes.
    pub async fn follow_policy(&self) {
        let mut policy = self.policy.clone();
        while policy.changed().await.is_ok() {
            let policy = Arc::clone(&policy.borrow_and_update());
            for pool in Pool::ALL {
                self.pool(pool).set_shares(&policy);
            }
        }
        // Nobody changes it any more.
        std::future::pending().await
    }

    /// Sends everybody who waits away, and everybody who comes and finds no free slot, until [`Self::let_wait`].
    pub fn turn_away(&self) {
        self.set_door(Door::NoQueue);
    }

    /// Lets work wait again.
    pub fn let_wait(&self) {
        self.set_door(Door::Open);
    }

    /// Sends everybody who waits away, and everybody who comes, for good.
    pub fn close(&self) {
        self.set_door(Door::Closed);
    }

    fn set_door(&self, door: Door) {
        for pool in Pool::ALL {
            self.pool(pool).set_door(door);
        }
    }

    const fn pool(&self, pool: Pool) -> &Slots {
        self.pools.of(pool)
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;

    use futures::FutureExt;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn tenant(name: &str) -> TenantId {
        TenantId::parse(name).expect("a tenant id")
    }

    fn one_io_slot() -> Schedule {
        Schedule::new(ByPool { cpu: 1, gpu: 0, io: 1 }, watch::Sender::new(Arc::default()).subscribe())
    }

    async fn slot(schedule: &Schedule, tenant: &TenantId) -> Slot {
        schedule.slot(Pool::Io, tenant, None, LONG).await.expect("a free slot")
    }

    /// Whoever finds no free slot.
    #[track_caller]
    fn waits(schedule: &Schedule, tenant: &TenantId) -> Pin<Box<impl Future<Output = Result<Slot, Closed>>>> {
        let mut slot = Box::pin(schedule.slot(Pool::Io, tenant, None, LONG));
        assert!(slot.as_mut().now_or_never().is_none(), "there is a free slot");
        slot
    }

    #[tokio::test]
    async fn a_slot_goes_to_the_next_in_turn_when_it_is_dropped() {
        let schedule = one_io_slot();
        let (a, b) = (tenant("a"), tenant("b"));
        let first = slot(&schedule, &a).await;
        let second = waits(&schedule, &b);
        assert_eq!((schedule.busy(Pool::Io), schedule.waiting(Pool::Io)), (1, 1));
        drop(first);
        let _second = second.await.expect("the slot of the first");
        assert_eq!((schedule.busy(Pool::Io), schedule.waiting(Pool::Io)), (1, 0));
    }

    #[tokio::test]
    async fn whoever_leaves_the_queue_costs_no_slot() {
        let schedule = one_io_slot();
        let a = tenant("a");
        let first = slot(&schedule, &a).await;
        {
            let _left = waits(&schedule, &a);
            drop(first);
        }
        assert_eq!(schedule.busy(Pool::Io), 0);
    }

    #[tokio::test]
    async fn a_place_in_the_queue_is_free_as_soon_as_whoever_waited_is_gone() {
        let schedule = one_io_slot();
        let a = tenant("a");
        let _running = slot(&schedule, &a).await;
        {
            let _left = waits(&schedule, &a);
            assert_eq!(schedule.waiting(Pool::Io), 1);
        }
        assert_eq!(schedule.waiting(Pool::Io), 0);
    }

    #[tokio::test]
    async fn where_tenants_are_named_one_of_them_never_takes_every_slot() {
        let policy = watch::Sender::new(Arc::new(Policy::parse("tenants: {}").expect("a policy")));
        let schedule = Schedule::new(ByPool { cpu: 0, gpu: 0, io: 4 }, policy.subscribe());
        let (a, b) = (tenant("a"), tenant("b"));
        let mut held = Vec::new();
        for _ in 0..3 {
            held.push(slot(&schedule, &a).await);
        }
        let fourth = schedule.slot(Pool::Io, &a, Some(9), LONG);
        tokio::pin!(fourth);
        assert!(futures::poll!(&mut fourth).is_pending(), "75 % of four slots");
        assert_eq!((schedule.waiting(Pool::Io), schedule.held_back(Pool::Io)), (1, 1));
        let _other = schedule.slot(Pool::Io, &b, Some(0), LONG).await.expect("a slot that nobody else may have");
        assert!(schedule.stuck_for(Pool::Io) > Duration::ZERO, "now every slot is taken");
        held.pop();
        let _fourth = fourth.await.expect("a slot of its own tenant's");
    }

    #[tokio::test]
    async fn a_new_policy_counts_for_those_who_wait_already() {
        let policy = watch::Sender::new(Arc::new(Policy::parse("tenants: {}").expect("a policy")));
        let schedule = Arc::new(Schedule::new(ByPool { cpu: 0, gpu: 0, io: 2 }, policy.subscribe()));
        let following = tokio::spawn({
            let schedule = Arc::clone(&schedule);
            async move { schedule.follow_policy().await }
        });
        let a = tenant("a");
        let _first = slot(&schedule, &a).await;
        let second = waits(&schedule, &a);
        policy.send_replace(Arc::default());
        let _second = second.await.expect("its share is the whole pool now");
        following.abort();
    }

    #[tokio::test]
    async fn who_must_not_wait_is_sent_away_and_may_come_back() {
        let schedule = one_io_slot();
        let a = tenant("a");
        let running = slot(&schedule, &a).await;
        let waiting = waits(&schedule, &a);
        schedule.turn_away();
        assert_eq!(waiting.await.err(), Some(Closed));
        assert_eq!(schedule.slot(Pool::Io, &a, None, LONG).await.err(), Some(Closed));
        assert!(schedule.slot(Pool::Cpu, &a, None, LONG).await.is_ok(), "it need not wait there");
        schedule.let_wait();
        let waiting = waits(&schedule, &a);
        drop(running);
        assert!(waiting.await.is_ok());
        schedule.close();
        schedule.let_wait();
        assert_eq!(schedule.slot(Pool::Cpu, &a, None, LONG).await.err(), Some(Closed), "closed is for good");
    }

    #[tokio::test]
    async fn pools_do_not_wait_for_each_other() {
        let schedule = one_io_slot();
        let a = tenant("a");
        let _io = slot(&schedule, &a).await;
        assert!(schedule.slot(Pool::Cpu, &a, None, LONG).await.is_ok());
    }

    #[tokio::test]
    async fn no_more_are_sent_away_than_asked_and_none_that_has_just_come() {
        let schedule = one_io_slot();
        let a = tenant("a");
        let _running = slot(&schedule, &a).await;
        let _patient = waits(&schedule, &a);
        assert_eq!((schedule.impatient(), schedule.send_away(3)), (0, 0));
        let waiting = (0..3).map(|_| Box::pin(schedule.slot(Pool::Io, &a, None, Duration::ZERO)));
        let mut waiting = futures::future::join_all(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        assert_eq!((schedule.impatient(), schedule.send_away(2)), (3, 2));
        assert!(futures::poll!(&mut waiting).is_pending());
        assert_eq!((schedule.waiting(Pool::Io), schedule.impatient()), (2, 1));
    }

    #[tokio::test]
    async fn a_paused_schedule_has_a_slot_for_one_only_until_it_is_resumed() {
        let schedule = one_io_slot();
        let a = tenant("a");
        let running = slot(&schedule, &a).await;
        let waiting = waits(&schedule, &a);
        schedule.pause();
        assert_eq!(waiting.await.err(), Some(Closed));
        drop(running);
        schedule.let_wait();
        assert_eq!(schedule.slot(Pool::Io, &a, None, LONG).await.err(), Some(Closed));
        let alone = schedule.slot_alone(Pool::Io, &a).expect("its slot");
        assert_eq!(schedule.busy(Pool::Io), 1);
        drop(alone);
        schedule.resume();
        assert!(schedule.slot(Pool::Io, &a, None, LONG).await.is_ok());
    }

    #[tokio::test]
    async fn a_closed_schedule_sends_waiters_and_comers_away() {
        let schedule = one_io_slot();
        let a = tenant("a");
        let _running = slot(&schedule, &a).await;
        let waiting = waits(&schedule, &a);
        schedule.close();
        assert_eq!(waiting.await.err(), Some(Closed));
        assert_eq!(schedule.slot(Pool::Cpu, &a, None, LONG).await.err(), Some(Closed));
    }
}
