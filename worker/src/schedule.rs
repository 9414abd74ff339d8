//! Where an assignment runs, and in what order: pools of slots, each with a fair queue in front.

pub mod fair_queue; // whose turn it is

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::assignment::{Pool, TenantId};
use fair_queue::FairQueue;

/// The pools of this worker.
#[derive(Debug)]
pub struct Schedule {
    cpu: Slots,
    gpu: Slots,
    io: Slots,
}

/// How many blocks run at once, by pool.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Slots for work that computes.
    pub cpu: usize,
    /// Slots for accelerator work.
    pub gpu: usize,
    /// Slots for work that waits.
    pub io: usize,
}

/// The right to run one block; its place is given on when it is dropped.
#[derive(Debug)]
#[must_use = "dropping it gives the slot away"]
pub struct Slot(Slots);

/// The worker is stopping: nothing starts any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

impl Schedule {
    /// Empty pools of these sizes.
    pub fn new(sizes: Sizes) -> Self {
        Self { cpu: Slots::new(sizes.cpu), gpu: Slots::new(sizes.gpu), io: Slots::new(sizes.io) }
    }

    /// Waits for a turn in a pool. Dropping the future gives the place in the queue up.
    ///
    /// # Errors
    /// The schedule has been closed.
    pub async fn slot(&self, pool: Pool, tenant: &TenantId, priority: u8) -> Result<Slot, Closed> {
        let turn = match self.pool(pool).enter(tenant, priority) {
            Entry::Free(slot) => return Ok(slot),
            Entry::Closed => return Err(Closed),
            Entry::Queued(turn) => turn,
        };
        turn.await.map_err(|_| Closed)
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

    /// For how long a pool has let work wait without starting any.
    pub fn stuck_for(&self, pool: Pool) -> Duration {
        let state = self.pool(pool).lock();
        if state.queue.is_empty() { Duration::ZERO } else { state.moved.elapsed() }
    }

    /// Sends everybody who waits away, and everybody who comes.
    pub fn close(&self) {
        for pool in Pool::ALL {
            let mut state = self.pool(pool).lock();
            state.closed = true;
            state.queue = FairQueue::new();
        }
    }

    fn pool(&self, pool: Pool) -> &Slots {
        match pool {
            Pool::Cpu => &self.cpu,
            Pool::Gpu => &self.gpu,
            Pool::Io => &self.io,
        }
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
    closed: bool,
    queue: FairQueue<oneshot::Sender<Slot>>,
    /// When work last started, or began to wait behind nobody.
    moved: Instant,
}

enum Entry {
    Free(Slot),
    Queued(oneshot::Receiver<Slot>),
    Closed,
}

impl Slots {
    fn new(size: usize) -> Self {
        let state = State { free: size, closed: false, queue: FairQueue::new(), moved: Instant::now() };
        Self(Arc::new(Shared { size, state: Mutex::new(state) }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, tenant: &TenantId, priority: u8) -> Entry {
        let mut state = self.lock();
        if state.closed {
            return Entry::Closed;
        }
        if state.free > 0 {
            state.free -= 1;
            return Entry::Free(Slot(self.clone()));
        }
        if state.queue.is_empty() {
            state.moved = Instant::now();
        }
        let (sender, receiver) = oneshot::channel();
        state.queue.push(tenant, priority, sender, Instant::now());
        Entry::Queued(receiver)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let next = {
            let mut state = self.0.lock();
            loop {
                match state.queue.pop(Instant::now()) {
                    Some(waiter) if waiter.is_closed() => {}
                    Some(waiter) => {
                        state.moved = Instant::now();
                        break Some(waiter);
                    }
                    None => {
                        state.free += 1;
                        break None;
                    }
                }
            }
        };
        // Outside the lock: where the waiter has just gone away, its slot is dropped, which comes back here.
        if let Some(waiter) = next {
            let _ = waiter.send(Slot(self.0.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(name: &str) -> TenantId {
        TenantId::parse(name).expect("a tenant id")
    }

    fn one_io_slot() -> Schedule {
        Schedule::new(Sizes { cpu: 1, gpu: 0, io: 1 })
    }

    #[tokio::test]
    async fn a_slot_goes_to_the_next_in_turn_when_it_is_dropped() {
        let schedule = one_io_slot();
        let (a, b) = (tenant("a"), tenant("b"));
        let first = schedule.slot(Pool::Io, &a, 4).await.expect("a free slot");
        let second = schedule.slot(Pool::Io, &b, 4);
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
        let first = schedule.slot(Pool::Io, &a, 4).await.expect("a free slot");
        {
            let left = schedule.slot(Pool::Io, &a, 4);
            tokio::pin!(left);
            assert!(futures::poll!(&mut left).is_pending());
            drop(first);
        }
        assert_eq!(schedule.busy(Pool::Io), 0);
    }

    #[tokio::test]
    async fn pools_do_not_wait_for_each_other() {
        let schedule = one_io_slot();
        let a = tenant("a");
        let _io = schedule.slot(Pool::Io, &a, 4).await.expect("a free slot");
        assert!(schedule.slot(Pool::Cpu, &a, 4).await.is_ok());
    }

    #[tokio::test]
    async fn a_closed_schedule_sends_waiters_and_comers_away() {
        let schedule = one_io_slot();
        let a = tenant("a");
        let _running = schedule.slot(Pool::Io, &a, 4).await.expect("a free slot");
        let waiting = schedule.slot(Pool::Io, &a, 4);
        tokio::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        schedule.close();
        assert_eq!(waiting.await.err(), Some(Closed));
        assert_eq!(schedule.slot(Pool::Cpu, &a, 4).await.err(), Some(Closed));
    }
}
