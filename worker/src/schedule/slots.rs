//! One pool of slots, and the fair queue in front of it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::fair_queue::{FairQueue, Held, Place, Share, Started};
use crate::ids::TenantId;
use crate::policy::{Policy, Terms};

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

#[derive(Clone, Debug)]
pub(super) struct Slots(Arc<Shared>);

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
pub(super) enum Door {
    Open,
    /// Only who need not wait.
    NoQueue,
    Closed,
}

pub(super) enum Entry {
    Free(Slot),
    Queued(Turn),
    Closed,
}

/// A place in a queue, given up when it is dropped.
pub(super) struct Turn {
    slots: Slots,
    place: Option<Place>,
    receiver: oneshot::Receiver<Slot>,
}

impl Turn {
    /// Waits for it.
    pub(super) async fn come(mut self) -> Result<Slot, Closed> {
        let slot = (&mut self.receiver).await;
        self.place = None;
        slot.map_err(|_| Closed)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(place) = &self.place {
            self.slots.lock().queue.remove(place, Instant::now());
        }
    }
}

impl Slots {
    pub(super) fn new(size: usize) -> Self {
        let state =
            State { free: size, door: Door::Open, paused: false, queue: FairQueue::new(), moved: Instant::now() };
        Self(Arc::new(Shared { size, state: Mutex::new(state) }))
    }

    pub(super) fn size(&self) -> usize {
        self.0.size
    }

    pub(super) fn busy(&self) -> usize {
        self.0.size - self.lock().free
    }

    pub(super) fn waiting(&self) -> usize {
        self.lock().queue.len()
    }

    pub(super) fn held_back(&self) -> usize {
        self.lock().queue.held_back()
    }

    pub(super) fn held_back_of(&self, tenant: &TenantId) -> usize {
        self.lock().queue.held_back_of(tenant)
    }

    pub(super) fn has_waiting(&self, tenant: &TenantId) -> bool {
        self.lock().queue.has_waiting(tenant)
    }

    pub(super) fn tenants(&self) -> Vec<(TenantId, Held)> {
        self.lock().queue.tenants()
    }

    pub(super) fn impatient(&self, now: Instant) -> usize {
        self.lock().queue.find(usize::MAX, |waiter| waiter.until < now).len()
    }

    /// Sends at most `most` of the impatient away, and says how many.
    pub(super) fn send_away(&self, most: usize, now: Instant) -> usize {
        let mut state = self.lock();
        let places = state.queue.find(most, |waiter| waiter.until < now);
        let sent: Vec<_> = places.iter().filter_map(|place| state.queue.remove(place, now)).collect();
        drop(state);
        sent.len()
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().door == Door::Closed
    }

    /// For how long work has waited without any being started, for want of a slot.
    pub(super) fn stuck_for(&self) -> Duration {
        let state = self.lock();
        if state.free > 0 || state.queue.is_empty() { Duration::ZERO } else { state.moved.elapsed() }
    }

    /// A slot also while it is paused, but not from those who wait.
    pub(super) fn alone(&self, tenant: &TenantId, terms: Terms) -> Result<Slot, Closed> {
        let now = Instant::now();
        let mut state = self.lock();
        if state.door == Door::Closed || state.free == 0 {
            return Err(Closed);
        }
        let started = state.queue.start(tenant, terms.priority, self.share(terms), now).ok_or(Closed)?;
        state.free -= 1;
        Ok(self.slot(started, now))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn enter(&self, tenant: &TenantId, priority: u8, terms: Terms, patience: Duration) -> Entry {
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

    pub(super) fn set_shares(&self, policy: &Policy) {
        self.lock().queue.set_shares(|tenant| self.share(policy.terms(tenant)), Instant::now());
        self.hand_out();
    }

    fn share(&self, terms: Terms) -> Share {
        let ceiling = (self.0.size * usize::from(terms.max_slot_share) / 100).max(1);
        // Whoever may have all of them waits for a slot like everybody.
        Share { weight: terms.weight, ceiling: if ceiling < self.0.size { ceiling } else { usize::MAX } }
    }

    pub(super) fn set_paused(&self, paused: bool) {
        let sent_away = {
            let mut state = self.lock();
            state.paused = paused;
            if paused { state.queue.clear() } else { Vec::new() }
        };
        drop(sent_away);
    }

    pub(super) fn set_door(&self, door: Door) {
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
