//! How often an assignment has killed its worker.
//!
//! The broker counts deliveries, but not why they ended. So workers note in a bucket, one key for each delivery of a
//! publication: that the block of a redelivery begins, and that a delivery ended with its worker alive. A death is a
//! delivery that began and did not end so. The first delivery is not noted when it begins: that one has begun is
//! assumed, so that the usual case costs nothing. Notes that are late, lost or too old only make fewer deaths, but for
//! the one that is assumed.

use std::collections::HashMap;
use std::time::Duration;

use async_nats::{HeaderMap, Message};
use bytes::Bytes;

use crate::broker::streams::{DELIVERY_BUCKET, Source};
use crate::broker::{Broker, StoreError, kv};
use crate::contract;
use crate::fault::{Cause, Fault};
use crate::intake::Delivery;
use crate::publication::Publication;

/// How many of the latest deliveries are looked at; hand-backs do not count, so a poison may have more.
const LOOKED_AT: i64 = 32;
/// Its block begins.
const BEGUN: &str = "begun";
/// It ended, and its worker lived on.
const ENDED: &str = "ended";
/// A block waits no longer than this for its note.
const BEGIN_LIMIT: Duration = Duration::from_secs(1);
/// The note of a lapse is tried this often: the broker was away, or still is.
const LAPSE_TRIES: u32 = 100;
const LAPSE_PAUSE: Duration = Duration::from_secs(1);
/// After this, nothing is known: a bucket that cannot be read does not hold up work.
const READ_TRIES: u32 = 3;

/// One delivery of a publication.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DeliveryId {
    pub(super) publication: Publication,
    /// Where from: each place counts its own deliveries.
    pub(super) source: Source,
    /// How often it has been delivered, from 1.
    pub(super) delivered: i64,
}

/// What an assignment's deaths mean for its next delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Suspicion {
    /// It runs among others.
    None,
    /// It runs alone.
    Quarantined,
    /// It does not run any more, after so many deaths.
    Poison(u32),
}

impl Suspicion {
    pub(super) const fn after(deaths: u32) -> Self {
        match deaths {
            0 | 1 => Self::None,
            2 | 3 => Self::Quarantined,
            _ => Self::Poison(deaths),
        }
    }
}

/// What comes of a poison.
pub(super) fn too_many(deaths: u32) -> Fault {
    Fault::new(Cause::Poison, format!("killed its workers {deaths} times: it does not run any more"))
}

/// The notes of all workers.
#[derive(Clone, Debug)]
pub(super) struct Deaths {
    broker: Broker,
}

impl Deaths {
    pub(super) const fn new(broker: Broker) -> Self {
        Self { broker }
    }

    /// For each delivery, the deaths before it.
    pub(super) async fn before(&self, deliveries: &[DeliveryId]) -> Vec<u32> {
        let notes = self.of_earlier(deliveries).await;
        let count = |notes: &HashMap<String, Message>| {
            let note = |which: &DeliveryId| notes.get(&subject(which)).map(|message| message.payload.clone());
            deliveries.iter().map(|which| count(which, note)).collect()
        };
        notes.as_ref().map_or_else(|| vec![0; deliveries.len()], count)
    }

    /// What is noted of earlier deliveries; `None` where that cannot be read.
    async fn of_earlier(&self, deliveries: &[DeliveryId]) -> Option<HashMap<String, Message>> {
        let keys: Vec<String> =
            deliveries.iter().flat_map(DeliveryId::earlier).map(|earlier| subject(&earlier)).collect();
        if keys.is_empty() {
            return None;
        }
        let stream = kv::stream(DELIVERY_BUCKET);
        let mut notes = self.broker.last(&stream, keys.clone()).await;
        for _ in 1..READ_TRIES {
            if notes.is_err() {
                tokio::time::sleep(LAPSE_PAUSE).await;
                notes = self.broker.last(&stream, keys.clone()).await;
            }
        }
        let unknown = |error: &_| tracing::warn!(%error, "cannot tell how often assignments have killed their workers");
        notes.inspect_err(unknown).ok()
    }

    /// The block of a redelivery begins. Where this cannot be noted in time, its death would not count.
    pub(super) async fn begins(&self, which: &DeliveryId) {
        if which.delivered > 1 && tokio::time::timeout(BEGIN_LIMIT, self.store(which, BEGUN)).await.is_err() {
            tracing::debug!("cannot note in time that a redelivery begins");
        }
    }

    /// It is about to be handed back: on its way to the broker before that, but not awaited.
    pub(super) async fn handed_back(&self, which: &DeliveryId) {
        self.broker.publish(subject(which), Bytes::from_static(ENDED.as_bytes())).await;
    }

    /// Its hold has lapsed and this worker lives on: noted as soon as the broker is there.
    pub(super) fn lapsed(&self, which: DeliveryId) {
        let notes = self.clone();
        tokio::spawn(async move {
            for _ in 0..LAPSE_TRIES {
                if notes.store(&which, ENDED).await.is_ok() {
                    return;
                }
                tokio::time::sleep(LAPSE_PAUSE).await;
            }
        });
    }

    async fn store(&self, which: &DeliveryId, note: &'static str) -> Result<(), StoreError> {
        self.broker.store(subject(which), HeaderMap::new(), Bytes::from_static(note.as_bytes())).await.map(drop)
    }
}

impl DeliveryId {
    pub(super) fn of(delivery: &Delivery) -> Self {
        let (source, delivered) = (delivery.source(), delivery.delivered());
        Self { publication: delivery.publication().clone(), source, delivered }
    }

    /// The deliveries before this one that are looked at.
    fn earlier(&self) -> impl Iterator<Item = Self> {
        let first = (self.delivered - LOOKED_AT).max(1);
        (first..self.delivered).map(|delivered| Self { delivered, ..self.clone() })
    }
}

/// The deaths before a delivery, by what is noted of the earlier ones.
fn count(which: &DeliveryId, note: impl Fn(&DeliveryId) -> Option<Bytes>) -> u32 {
    let is_death = |earlier: &DeliveryId| match (earlier.delivered, note(earlier)) {
        (1, note) => note.is_none_or(|note| note != ENDED),
        (_, note) => note.is_some_and(|note| note == BEGUN),
    };
    which.earlier().filter(is_death).map(|_| 1).sum()
}

fn subject(which: &DeliveryId) -> String {
    let DeliveryId { publication, source, delivered } = which;
    let place = match source {
        Source::Intake => "",
        Source::GpuRoute => "gpu.",
        Source::Parked(_) => "parked.",
    };
    kv::subject(DELIVERY_BUCKET, &format!("{}.{place}{delivered}", contract::escape(&publication.to_header())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::streams::Parked;

    fn delivery(delivered: i64) -> DeliveryId {
        let publication = Publication::parse("S,t0,7").expect("a publication");
        DeliveryId { publication, source: Source::Intake, delivered }
    }

    #[track_caller]
    fn expect(deaths: u32, delivered: i64, notes: &[(i64, &'static str)]) {
        let note = |which: &DeliveryId| {
            let noted = notes.iter().find(|(delivered, _)| *delivered == which.delivered);
            noted.map(|(_, note)| Bytes::from_static(note.as_bytes()))
        };
        assert_eq!(count(&delivery(delivered), note), deaths);
    }

    #[test]
    fn a_death_is_a_delivery_that_began_and_did_not_end() {
        expect(0, 1, &[]);
        expect(1, 2, &[]);
        expect(0, 2, &[(1, ENDED)]);
        expect(4, 5, &[(2, BEGUN), (3, BEGUN), (4, BEGUN)]);
        expect(3, 5, &[(2, BEGUN), (3, ENDED), (4, BEGUN)]);
    }

    #[test]
    fn what_only_waited_when_its_worker_died_is_suspected_once_at_most() {
        expect(1, 30, &[]);
        expect(0, 100, &[]);
    }

    #[test]
    fn two_deaths_isolate_and_four_end() {
        assert_eq!([0, 1].map(Suspicion::after), [Suspicion::None; 2]);
        assert_eq!([2, 3].map(Suspicion::after), [Suspicion::Quarantined; 2]);
        assert_eq!(Suspicion::after(4), Suspicion::Poison(4));
    }

    #[test]
    fn each_place_of_a_publication_has_notes_of_its_own() {
        let notes = [Source::Intake, Source::GpuRoute, Source::Parked(Parked::General)]
            .map(|source| subject(&DeliveryId { source, ..delivery(3) }));
        assert_eq!(notes, ["3", "gpu.3", "parked.3"].map(|number| format!("$KV.caf-deliveries.S=2Ct0=2C7.{number}")));
    }
}
