//! Where an assignment runs, and in what order: pools of slots, each with a fair queue in front.

pub mod fair_queue; // whose turn it is

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};

use crate::ids::TenantId;
use crate::policy::{Policy, Terms};
use crate::pool::{ByPool, Pool};
use fair_queue::{FairQueue, Place, Share, Started};

/// The pools of this worker.
#[derive(Debug)]
pub struct Schedule {
    pools: ByPool<Slots>,
    policy: watch::Receiver<Arc<Policy>>,
}

/// The right to run one block; its place is given on when it is dropped, and the time charged to its tenant.
#[derive(Debug)]
#[must_use = "dropping it gives the slot away"]
pub struct Slot {
    slots: Slots,
    started: Option<Started>,
    begun: Instant,
}

/// It shall not start here: the worker is stopping or takes no work for now, one assignment is to run alone, or another
/// worker has room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

impl Schedule {
    /// Empty pools of these sizes, shared among tenants as the policy of the moment says.
    pub fn new(sizes: ByPool<usize>, policy: watch::Receiver<Arc<Policy>>) -> Self {
        Self { pools: ByPool::new(|pool| Slots::new(*sizes.of(pool))), policy }
    }

    /// What tenants are given, and whether the worker is paused.
    pub fn policy(&self) -> watch::Receiver<Arc<Policy>> {
        self.policy.clone()
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
        let terms = self.policy.borrow().terms(tenant);
        match self.pool(pool).enter(tenant, priority.unwrap_or(terms.priority), terms, patience) {
            Entry::Free(slot) => Ok(slot),
            Entry::Closed => Err(Closed),
            Entry::Queued(mut turn) => {
                let slot = (&mut turn.receiver).await;
                turn.place = None;
                slot.map_err(|_| Closed)
            }
        }
    }

    /// How many slots a pool has.
    pub fn size(&self, pool: Pool) -> usize {
        self.pool(pool).0.size
    }

    /// How many slots of a pool are taken.
    pub fn busy(&self, pool: Pool) -> usize {
        let slots = self.pool(pool);
        slots.0.size - slots.lock().free
    }

    /// How many wait for a pool.
    pub fn waiting(&self, pool: Pool) -> usize {
        self.pool(pool).lock().queue.len()
    }

    /// How many of them wait because their tenant holds as many slots as it may.
    pub fn held_back(&self, pool: Pool) -> usize {
        self.pool(pool).lock().queue.held_back()
    }

    /// How many have lost their patience.
    pub fn impatient(&self) -> usize {
        let now = Instant::now();
        let impatient = |pool: Pool| self.pool(pool).lock().queue.find(usize::MAX, |waiter| waiter.until < now).len();
        Pool::ALL.into_iter().map(impatient).sum()
    }

    /// Sends at most `most` of those away, and says how many.
    pub fn send_away(&self, most: usize) -> usize {
        let (now, mut left) = (Instant::now(), most);
        for pool in Pool::ALL {
            let mut state = self.pool(pool).lock();
            let places = state.queue.find(left, |waiter| waiter.until < now);
            let sent: Vec<_> = places.iter().filter_map(|place| state.queue.remove(place, now)).collect();
            drop(state);
            left -= sent.len();
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
        let (slots, terms, now) = (self.pool(pool), self.policy.borrow().terms(tenant), Instant::now());
        let mut state = slots.lock();
        if state.door == Door::Closed || state.free == 0 {
            return Err(Closed);
        }
        let started = state.queue.start(tenant, terms.priority, slots.share(terms), now).ok_or(Closed)?;
        state.free -= 1;
        Ok(slots.slot(started, now))
    }

    /// Whether it has been closed for good.
    pub fn is_closed(&self) -> bool {
        self.pools.io.lock().door == Door::Closed
    }

    /// For how long a pool has let work wait without starting any, for want of a slot.
    pub fn stuck_for(&self, pool: Pool) -> Duration {
        let state = self.pool(pool).lock();
        if state.free > 0 || state.queue.is_empty() { Duration::ZERO } else { state.moved.elapsed() }
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

#[derive(Clone, Debug)]
struct Slots(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    size: usize,
    // A std mutex: never held across an await, and a turn costs less than parking would.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    free: usize,
    door: Door,
    paused: bool,
    queue: FairQueue<Waiter>,
    /// When work last started, or began to wait behind nobody.
    moved: Instant,
}

/// Whoever waits for a turn; dropping it sends it away.
#[derive(Debug)]
struct Waiter {
    /// When it has lost its patience.
    until: Instant,
    turn: oneshot::Sender<Slot>,
}

/// Who may come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Door {
    Open,
    /// Only who need not wait.
    NoQueue,
    Closed,
}

enum Entry {
    Free(Slot),
    Queued(Turn),
    Closed,
}

/// A place in a queue, given up when it is dropped.
struct Turn {
    slots: Slots,
    place: Option<Place>,
    receiver: oneshot::Receiver<Slot>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(place) = &self.place {
            self.slots.lock().queue.remove(place, Instant::now());
        }
    }
}

impl Slots {
    fn new(size: usize) -> Self {
        let state =
            State { free: size, door: Door::Open, paused: false, queue: FairQueue::new(), moved: Instant::now() };
        Self(Arc::new(Shared { size, state: Mutex::new(state) }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, tenant: &TenantId, priority: u8, terms: Terms, patience: Duration) -> Entry {
        let (now, share) = (Instant::now(), self.share(terms));
        let mut state = self.lock();
        if state.door == Door::Closed || state.paused {
            return Entry::Closed;
        }
        // Whoever waits while a slot is free may not have it.
        if state.free > 0
            && let Some(started) = state.queue.start(tenant, priority, share, now)
        {
            state.free -= 1;
            state.moved = now;
            return Entry::Free(self.slot(started, now));
        }
        if state.door == Door::NoQueue {
            return Entry::Closed;
        }
        if state.queue.is_empty() {
            state.moved = now;
        }
        let (turn, receiver) = oneshot::channel();
        let waiter = Waiter { until: now + patience, turn };
        let place = state.queue.push(tenant, priority, share, waiter, now);
        Entry::Queued(Turn { slots: self.clone(), place: Some(place), receiver })
    }

    /// Gives free slots to whoever is next.
    fn hand_out(&self) {
        while let Some((waiter, slot)) = self.next() {
            // Outside the lock: where the waiter has just gone away, its slot is dropped, which comes back here.
            let _ = waiter.turn.send(slot);
        }
    }

    fn next(&self) -> Option<(Waiter, Slot)> {
        let now = Instant::now();
        let mut state = self.lock();
        if state.free == 0 {
            return None;
        }
        let (waiter, started) = state.queue.pop(now)?;
        state.free -= 1;
        state.moved = now;
        Some((waiter, self.slot(started, now)))
    }

    fn slot(&self, started: Started, begun: Instant) -> Slot {
        Slot { slots: self.clone(), started: Some(started), begun }
    }

    fn set_shares(&self, policy: &Policy) {
        self.lock().queue.set_shares(|tenant| self.share(policy.terms(tenant)), Instant::now());
        self.hand_out();
    }

    fn share(&self, terms: Terms) -> Share {
        let ceiling = (self.0.size * usize::from(terms.max_slot_share) / 100).max(1);
        // Whoever may have all of them waits for a slot like everybody.
        Share { weight: terms.weight, ceiling: if ceiling < self.0.size { ceiling } else { usize::MAX } }
    }

    fn set_paused(&self, paused: bool) {
        let sent_away = {
            let mut state = self.lock();
            state.paused = paused;
            if paused { state.queue.clear() } else { Vec::new() }
        };
        drop(sent_away);
    }

    fn set_door(&self, door: Door) {
        let sent_away = {
            let mut state = self.lock();
            if state.door != Door::Closed {
                state.door = door;
            }
            if state.door == Door::Open { Vec::new() } else { state.queue.clear() }
        };
        drop(sent_away);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(started) = self.started.take() {
            let now = Instant::now();
            let mut state = self.slots.lock();
            state.queue.finish(started, now.saturating_duration_since(self.begun), now);
            state.free += 1;
        }
        self.slots.hand_out();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn tenant(name: &str) -> TenantId {
        TenantId::parse(name).expect("a tenant id")
    }

    fn one_io_slot() -> Schedule {
        Schedule::new(ByPool { cpu: 1, gpu: 0, io: 1 }, watch::Sender::new(Arc::default()).subscribe())
    }

    #[tokio::test]
    async fn a_slot_goes_to_the_next_in_turn_when_it_is_dropped() {
        let schedule = one_io_slot();
        let (a, b) = (tenant("a"), tenant("b"));
        let first = schedule.slot(Pool::Io, &a, None, LONG).await.expect("a free slot");
        let second = schedule.slot(Pool::Io, &b, None, LONG);
        tokio::pin!(second);
        assert!(futures::poll!(&mut second).is_pending());
        assert_eq!((schedule.busy(Pool::Io), schedule.waiting(Pool::Io)), (1, 1));
        drop(first);
        let _second = second.await.expect("the slot of the first");
        assert_eq!((schedule.busy(Pool::Io), schedule.waiting(Pool::Io)), (1, 0));
    }

    #[tokio::test]
    async fn whoever_leaves_the_queue_costs_no_slot() {
        let schedule = one_io_slot();
        let a = tenant("a");
        let first = schedule.slot(Pool::Io, &a, None, LONG).await.expect("a free slot");
        {
            let left = schedule.slot(Pool::Io, &a, None, LONG);
            tokio::pin!(left);
            assert!(futures::poll!(&mut left).is_pending());
            drop(first);
        }
        assert_eq!(schedule.busy(Pool::Io), 0);
    }

    #[tokio::test]
    async fn a_place_in_the_queue_is_free_as_soon_as_whoever_waited_is_gone() {
        let schedule = one_io_slot();
        let a = tenant("a");
        let _running = schedule.slot(Pool::Io, &a, None, LONG).await.expect("a free slot");
        {
            let left = schedule.slot(Pool::Io, &a, None, LONG);
            tokio::pin!(left);
            assert!(futures::poll!(&mut left).is_pending());
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
            held.push(schedule.slot(Pool::Io, &a, None, LONG).await.expect("a free slot"));
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
        let _first = schedule.slot(Pool::Io, &a, None, LONG).await.expect("a free slot");
        let second = schedule.slot(Pool::Io, &a, None, LONG);
        tokio::pin!(second);
        assert!(futures::poll!(&mut second).is_pending());
        policy.send_replace(Arc::default());
        let _second = second.await.expect("its share is the whole pool now");
        following.abort();
    }

    #[tokio::test]
    async fn who_must_not_wait_is_sent_away_and_may_come_back() {
        let schedule = one_io_slot();
        let a = tenant("a");
        let running = schedule.slot(Pool::Io, &a, None, LONG).await.expect("a free slot");
        let waiting = schedule.slot(Pool::Io, &a, None, LONG);
        tokio::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        schedule.turn_away();
        assert_eq!(waiting.await.err(), Some(Closed));
        assert_eq!(schedule.slot(Pool::Io, &a, None, LONG).await.err(), Some(Closed));
        assert!(schedule.slot(Pool::Cpu, &a, None, LONG).await.is_ok(), "it need not wait there");
        schedule.let_wait();
        let waiting = schedule.slot(Pool::Io, &a, None, LONG);
        tokio::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
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
        let _io = schedule.slot(Pool::Io, &a, None, LONG).await.expect("a free slot");
        assert!(schedule.slot(Pool::Cpu, &a, None, LONG).await.is_ok());
    }

    #[tokio::test]
    async fn no_more_are_sent_away_than_asked_and_none_that_has_just_come() {
        let schedule = one_io_slot();
        let a = tenant("a");
        let _running = schedule.slot(Pool::Io, &a, None, LONG).await.expect("a free slot");
        let mut patient = Box::pin(schedule.slot(Pool::Io, &a, None, LONG));
        assert!(futures::poll!(&mut patient).is_pending());
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
        let running = schedule.slot(Pool::Io, &a, None, LONG).await.expect("a free slot");
        let waiting = schedule.slot(Pool::Io, &a, None, LONG);
        tokio::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
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
        let _running = schedule.slot(Pool::Io, &a, None, LONG).await.expect("a free slot");
        let waiting = schedule.slot(Pool::Io, &a, None, LONG);
        tokio::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        schedule.close();
        assert_eq!(waiting.await.err(), Some(Closed));
        assert_eq!(schedule.slot(Pool::Cpu, &a, None, LONG).await.err(), Some(Closed));
    }
}
