//! Work that somebody wants stopped.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use tokio::sync::Notify;

use super::Pipeline;
use crate::cancel::Tombstone;
use crate::fault::{Cause, Fault};
use crate::ids::AssignmentKey;
use crate::intake::Delivery;
use crate::report::ledger::Record;

impl Pipeline {
    /// Stops what is here under this key, and whatever arrives under it while the cancel stands.
    pub(crate) fn cancel(&self, key: &AssignmentKey, tombstone: &Tombstone) {
        // In this order: work that comes in between meets the one or the other.
        self.tombstones.put(key, tombstone);
        self.in_flight.stop(key, tombstone);
    }

    /// Somebody has just cancelled this: stops what is here under this key, waiting for a slot, running, or between two
    /// attempts, and whatever arrives from now on.
    pub(crate) fn hear_cancel(&self, key: &AssignmentKey, tombstone: &Tombstone) {
        if self.has_jetstream() {
            self.tombstones.expect(key, tombstone);
        } else {
            // Nobody keeps it but whoever hears it.
            self.tombstones.put(key, tombstone);
        }
        self.in_flight.hear(key, &tombstone.words);
    }

    /// What is recorded under this key, if that can be told at once.
    pub(crate) async fn recorded(&self, key: &AssignmentKey) -> Option<Record> {
        let found = self.ledger.look_up(std::slice::from_ref(key)).await;
        found.unwrap_or_default().into_values().next()
    }

    /// The cancel that meets a delivery which would be refused for now, or put off: its Router would send it again. What a
    /// request for approval answers is that request's.
    pub(super) async fn standing_cancel(&self, delivery: &Delivery, key: &AssignmentKey) -> Option<Fault> {
        let tombstone = self.tombstones.get(key)?;
        let keys = std::slice::from_ref(key);
        if self.waiting_for_a_person(keys).await.contains(&true) {
            return None;
        }
        let since = self.cancels_since(delivery, !self.read_records(keys).await.is_empty());
        tombstone.meets(since).then(|| Fault::new(Cause::Cancelled, &*tombstone.words))
    }

    /// Why it ends that was accepted before: for the cancel that stands, where it could be sent again otherwise.
    pub(super) async fn or_cancelled(&self, delivery: &Delivery, key: &AssignmentKey, fault: Fault) -> Fault {
        let cancelled = if fault.cause.is_retryable() { self.standing_cancel(delivery, key).await } else { None };
        cancelled.unwrap_or(fault)
    }

    /// Since when cancels meet a delivery; all that stand do, unless it is to be run anew. What the broker forgets has no
    /// time of the broker's: there only those count that are heard while it is here.
    pub(super) fn cancels_since(&self, delivery: &Delivery, has_record: bool) -> Option<Timestamp> {
        let is_anew = has_record || delivery.is_replay();
        is_anew.then(|| if self.hands_back() { delivery.published() } else { Timestamp::MAX })
    }
}

/// Whether a piece of work is wanted no more: from when this worker knows that it has it.
#[derive(Debug, Default)]
pub(super) struct Stop {
    cancels: Mutex<Cancels>,
    raised: Notify,
}

#[derive(Debug, Default)]
struct Cancels {
    /// The one that stands. Few have one, and many may wait.
    tombstone: Option<Box<Tombstone>>,
    /// The words of one that was heard since the work is here. The broker sends a worker what is heard live before what has
    /// to go through a stream: so it was sent after the work's own message.
    heard: Option<Arc<str>>,
}

impl Stop {
    pub(super) fn raise(&self, tombstone: &Tombstone) {
        self.lock().tombstone = Some(Box::new(tombstone.clone()));
        self.raised.notify_waiters();
    }

    pub(super) fn hear(&self, words: &Arc<str>) {
        self.lock().heard = Some(Arc::clone(words));
        self.raised.notify_waiters();
    }

    /// Returns when there is a cancel, and one from after `since` where that is given.
    pub(super) async fn requested(&self, since: Option<Timestamp>) -> Fault {
        loop {
            let raised = self.raised.notified();
            if let Some(words) = self.words(since) {
                return Fault::new(Cause::Cancelled, &*words);
            }
            raised.await;
        }
    }

    fn words(&self, since: Option<Timestamp>) -> Option<Arc<str>> {
        let cancels = self.lock();
        let meets = |tombstone: &&Tombstone| tombstone.meets(since);
        let standing = || cancels.tombstone.as_deref().filter(meets).map(|tombstone| Arc::clone(&tombstone.words));
        cancels.heard.clone().or_else(standing)
    }

    fn lock(&self) -> MutexGuard<'_, Cancels> {
        self.cancels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
