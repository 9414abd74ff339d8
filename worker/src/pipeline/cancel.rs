//! Work that somebody wants stopped.

use std::sync::{Mutex, PoisonError};

use jiff::Timestamp;
use tokio::sync::Notify;

use super::Pipeline;
use crate::cancel::Tombstone;
use crate::fault::{Cause, Fault};
use crate::ids::AssignmentKey;
use crate::report::ledger::Record;

impl Pipeline {
    /// Stops what is here under this key, and whatever arrives under it while the cancel stands.
    pub(crate) fn cancel(&self, key: &AssignmentKey, tombstone: &Tombstone) {
        // In this order: work that comes in between meets the one or the other.
        self.remember_cancel(key, tombstone);
        self.stop_here(key, tombstone);
    }

    /// Stops whatever arrives under this key while the cancel stands.
    pub(crate) fn remember_cancel(&self, key: &AssignmentKey, tombstone: &Tombstone) {
        self.tombstones.put(key, tombstone);
    }

    /// What is recorded under this key, if that can be told at once.
    pub(crate) async fn recorded(&self, key: &AssignmentKey) -> Option<Record> {
        let found = self.ledger.look_up(std::slice::from_ref(key)).await;
        found.unwrap_or_default().into_values().next()
    }

    /// Stops what is here under this key: waiting for a slot, running, or between two attempts.
    pub(crate) fn stop_here(&self, key: &AssignmentKey, tombstone: &Tombstone) {
        self.in_flight.stop(key, tombstone);
    }
}

/// Whether a piece of work is wanted no more.
#[derive(Debug, Default)]
pub(super) struct Stop {
    tombstone: Mutex<Option<Tombstone>>,
    raised: Notify,
}

impl Stop {
    /// The latest cancel counts.
    pub(super) fn raise(&self, tombstone: &Tombstone) {
        let mut known = self.tombstone.lock().unwrap_or_else(PoisonError::into_inner);
        if known.as_ref().is_none_or(|known| known.at < tombstone.at) {
            *known = Some(tombstone.clone());
            self.raised.notify_waiters();
        }
    }

    /// Returns when there is a cancel that is no older than `since`.
    pub(super) async fn requested(&self, since: Timestamp) -> Fault {
        loop {
            let raised = self.raised.notified();
            if let Some(tombstone) = self.since(since) {
                return Fault::new(Cause::Cancelled, &*tombstone.words);
            }
            raised.await;
        }
    }

    fn since(&self, since: Timestamp) -> Option<Tombstone> {
        let known = self.tombstone.lock().unwrap_or_else(PoisonError::into_inner);
        known.clone().filter(|tombstone| tombstone.at >= since)
    }
}
