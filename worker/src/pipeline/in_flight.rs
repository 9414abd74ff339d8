//! Which assignments run here: copies wait for the record of the first, and a redelivery renews its hold.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::Arrival;
use super::cancel::Stop;
use super::deaths::DeliveryId;
use crate::broker::Expected;
use crate::cancel::Tombstone;
use crate::ids::AssignmentKey;
use crate::intake::{Delivery, Hold};
use crate::publication::Publication;
use crate::report::ledger::Record;

/// Shared by all tasks of a pipeline.
#[derive(Clone, Debug, Default)]
pub(super) struct InFlight(Arc<Mutex<HashMap<AssignmentKey, Running>>>);

#[derive(Debug)]
struct Running {
    which: DeliveryId,
    hold: Arc<Hold>,
    stop: Arc<Stop>,
    lapsed_looks: u32,
    copies: Vec<Arrival>,
    outcome: Option<Box<(Publication, Bytes)>>,
}

impl Running {
    /// One that was parked or passed on may be here twice: from both places.
    fn is_about(&self, delivery: &Delivery) -> bool {
        self.which.publication == *delivery.publication() && self.which.source == delivery.source()
    }
}

/// What a flight leaves behind.
pub(super) struct Landed {
    /// Those that waited for its end.
    pub(super) copies: Vec<Arrival>,
    /// How it ended, where no record says so: what its copies are answered with.
    pub(super) outcome: Option<Box<Record>>,
}

/// What an arrival is to the work that is here already.
pub(super) enum Claim {
    /// Nothing else here works on it.
    First(Arrival, Flight),
    /// Another publication of it runs: it comes back when that one lands.
    SetAside,
    /// This very publication runs: the broker has just given it to us again.
    Renewed,
}

/// The claim on an assignment; given up when it lands or is dropped.
#[derive(Debug)]
pub(super) struct Flight {
    in_flight: InFlight,
    key: Option<AssignmentKey>,
}

impl InFlight {
    pub(super) fn claim(&self, arrival: Arrival) -> Claim {
        match self.lock().entry(arrival.assignment.key.clone()) {
            Entry::Vacant(vacant) => {
                let flight = Flight { in_flight: self.clone(), key: Some(vacant.key().clone()) };
                vacant.insert(Running {
                    which: DeliveryId::of(&arrival.delivery),
                    hold: arrival.delivery.hold(),
                    stop: Arc::clone(&arrival.stop),
                    lapsed_looks: 0,
                    copies: Vec::new(),
                    outcome: None,
                });
                Claim::First(arrival, flight)
            }
            Entry::Occupied(running) if running.get().is_about(&arrival.delivery) => {
                running.get().hold.renew_by(&arrival.delivery.hold());
                Claim::Renewed
            }
            Entry::Occupied(mut running) => {
                let copies = &mut running.get_mut().copies;
                copies.retain(|copy| copy.delivery.publication() != arrival.delivery.publication());
                copies.push(arrival);
                Claim::SetAside
            }
        }
    }

    /// Whether this assignment runs here.
    pub(super) fn has(&self, key: &AssignmentKey) -> bool {
        self.lock().contains_key(key)
    }

    /// Tells the work on this assignment of a cancel that stands; its copies look for it when it is their turn.
    pub(super) fn stop(&self, key: &AssignmentKey, tombstone: &Tombstone) {
        if let Some(running) = self.lock().get(key) {
            running.stop.raise(tombstone);
        }
    }

    /// Tells the work on this assignment, and the copies that wait for it, that somebody has just cancelled it.
    pub(super) fn hear(&self, key: &AssignmentKey, words: &Arc<str>) {
        if let Some(running) = self.lock().get(key) {
            running.copies.iter().map(|copy| &copy.stop).chain([&running.stop]).for_each(|stop| stop.hear(words));
        }
    }

    /// Notes how the work on this assignment has ended, for copies that wait.
    pub(super) fn ended(&self, key: &AssignmentKey, publication: &Publication, result: &Bytes) {
        if let Some(running) = self.lock().get_mut(key) {
            running.outcome = Some(Box::new((publication.clone(), result.clone())));
        }
    }

    /// What is still here although its hold has lapsed this many looks ago; each once.
    pub(super) fn lapsed(&self, looks: u32) -> Vec<DeliveryId> {
        let mut running = self.lock();
        let lapsed = running.values_mut().filter_map(|running| {
            running.lapsed_looks = if running.hold.is_lapsed() { running.lapsed_looks.saturating_add(1) } else { 0 };
            (running.lapsed_looks == looks).then(|| running.which.clone())
        });
        lapsed.collect()
    }

    /// How many copies wait for the record of an assignment.
    pub(super) fn copies(&self, key: &AssignmentKey) -> usize {
        self.lock().get(key).map_or(0, |running| running.copies.len())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<AssignmentKey, Running>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Flight {
    /// Ends the claim and returns the copies that waited for it.
    pub(super) fn land(mut self) -> Landed {
        let Some(Running { copies, outcome, .. }) = self.end() else {
            return Landed { copies: Vec::new(), outcome: None };
        };
        let outcome = outcome.filter(|_| !copies.is_empty()).map(|outcome| {
            let (publication, result) = *outcome;
            Box::new(Record::new(result, Expected::NOTHING, Some(publication)))
        });
        Landed { copies, outcome }
    }

    fn end(&mut self) -> Option<Running> {
        self.in_flight.lock().remove(&self.key.take()?)
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        // After a panic: the copies' deliveries lapse, and the broker brings them back.
        self.end();
    }
}
