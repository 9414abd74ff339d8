//! Bytes in, and the duty to settle them. Takes no more than the pool has room for.

mod pull; // what is asked for
mod group; // core mode: what the broker hands out and forgets
mod load; // how much is here, and how much more may come
mod hold; // until when the broker leaves a delivery to us
mod parked; // what could not run when it came
mod parking; // whose work that is

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use async_nats::jetstream::AckKind;
use bytes::Bytes;
use jiff::Timestamp;

use crate::broker::Broker;
use crate::broker::streams::Source;
use crate::contract;
use crate::gate::Gate;
use crate::health::Health;
use crate::publication::{FirstIdentity, Publication};
use hold::Held;
use load::{Counted, Waiting};

pub use group::join;
pub use hold::{Hold, Holds, renew};
pub(crate) use load::Load;
pub use load::Room;
pub use parked::{Allowance, take_up};
pub use parking::{Lane, Parking};
pub use pull::take;

/// How often room is looked at when nothing frees any: memory and the measured rate change without a word.
const TICK: Duration = Duration::from_millis(100);
/// Deliveries that travel on together: one look-up for all of them. The broker answers at most 1 024 at once.
const CHUNK: usize = 512;

/// What work is taken in with, and what counts it; shared with whoever gets the work done.
#[derive(Clone, Debug)]
pub struct Parts {
    pub(crate) broker: Broker,
    pub(crate) health: Health,
    pub(crate) gate: Arc<Gate>,
    pub(crate) load: Arc<Load>,
    pub(crate) holds: Holds,
    pub(crate) parking: Arc<Parking>,
}

/// A message that the broker still holds us responsible for.
///
/// Dropping it unsettled is safe: the broker redelivers it when the hold has lapsed.
#[must_use = "settle it, or the broker redelivers"]
#[derive(Debug)]
pub struct Delivery {
    payload: Bytes,
    headers: Option<Box<HeaderMap>>,
    broker: Broker,
    source: Source,
    identity: FirstIdentity,
    delivered: i64,
    held: Held,
    received: Instant,
    waiting: Option<Waiting>,
    is_surplus: bool,
    has_unreadable_headers: bool,
    bytes: Counted,
}

/// How a delivery ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// Everything that follows from it is safe elsewhere.
    Done,
    /// Handed back, at once, for another worker.
    HandBack,
    /// Handed back, to be delivered again after this.
    PutOff(Duration),
}

impl Delivery {
    /// What the Router published.
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// The headers that it was published with.
    pub fn headers(&self) -> Option<&HeaderMap> {
        self.headers.as_deref()
    }

    /// Where it was pulled from.
    pub const fn source(&self) -> Source {
        self.source
    }

    /// Whether it had been accepted and parked before it came here.
    pub const fn is_parked(&self) -> bool {
        matches!(self.source, Source::Parked(_))
    }

    /// Which publication it carries, under the first identity of one that was passed on.
    pub fn publication(&self) -> &Publication {
        &self.identity.publication
    }

    /// What it is known by wherever it is put.
    pub fn first_identity(&self) -> &FirstIdentity {
        &self.identity
    }

    /// How often the broker has delivered it, this time included.
    pub fn delivered(&self) -> i64 {
        self.delivered
    }

    /// When this worker got it.
    pub fn received(&self) -> Instant {
        self.received
    }

    /// Whether the Router asks for a new execution whatever is recorded.
    pub fn is_replay(&self) -> bool {
        self.headers().is_some_and(is_replay)
    }

    /// Whether the broker may have given it to another worker by now: then nothing may start on it.
    pub fn is_lapsed(&self) -> bool {
        self.held.hold().is_lapsed()
    }

    /// When the broker got it; one that was passed on, when it first did.
    pub fn published(&self) -> Timestamp {
        self.identity.published
    }

    /// Whether it came, unasked for, to a worker without room.
    pub fn is_surplus(&self) -> bool {
        self.is_surplus
    }

    /// Whether it was published with headers that nobody can read: then it comes without any.
    pub fn has_unreadable_headers(&self) -> bool {
        self.has_unreadable_headers
    }

    /// Its hold, for whoever hears of a renewal.
    pub fn hold(&self) -> Arc<Hold> {
        Arc::clone(self.held.hold())
    }

    /// Past this moment its hold is not renewed any more: what does not end by itself must not keep it for ever.
    pub fn must_end_by(&self, end: Option<Instant>) {
        self.held.hold().must_end_by(end);
    }

    /// Whether its block has begun.
    pub fn has_begun(&self) -> bool {
        self.waiting.is_none()
    }

    /// Its work needs so much memory: payload and result count as no less while it is here.
    pub fn reserve(&mut self, memory_mb: u64) {
        self.bytes.reserve(usize::try_from(memory_mb << 20).unwrap_or(usize::MAX));
    }

    /// How many bytes count for it.
    pub fn bytes(&self) -> usize {
        self.bytes.amount()
    }

    /// How much a result of so many bytes adds to what counts for it already.
    pub fn beyond_reserved(&self, bytes: usize) -> usize {
        self.bytes.beyond(bytes)
    }

    /// It has begun, or ended without beginning: it no longer counts as waiting here.
    pub fn started(&mut self) {
        self.waiting = None;
    }

    /// Tells the broker how it ended. A lost message only causes a redelivery, which the record answers.
    pub async fn settle(self, settlement: Settlement) {
        let kind = match settlement {
            Settlement::Done => AckKind::Ack,
            // The broker would apply it to whoever holds the delivery now.
            Settlement::HandBack | Settlement::PutOff(_) if self.is_lapsed() => return,
            Settlement::HandBack => AckKind::Nak(None),
            Settlement::PutOff(wait) => AckKind::Nak(Some(wait)),
        };
        let Some(reply) = self.held.hold().reply().cloned() else { return };
        // On a slow link, large results would hold it up on the connection that they go out on until the hold has lapsed. What
        // is handed back goes behind the note that says so.
        let connection =
            if settlement == Settlement::Done { self.broker.lookups().clone() } else { self.broker.client() };
        if let Err(error) = connection.publish(reply, kind.into()).await {
            tracing::debug!(%error, ?settlement, "cannot settle");
        }
    }
}

/// Whether these ask for a new execution whatever is recorded.
pub fn is_replay(headers: &HeaderMap) -> bool {
    headers.get(contract::HEADER_REPLAY).is_some_and(|value| value.as_str() == "true")
}
