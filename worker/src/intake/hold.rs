//! Until when the broker leaves a delivery to us, and the one task that renews every hold in time.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_nats::Subject;
use async_nats::jetstream::AckKind;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use slab::Slab;
use tokio_util::sync::CancellationToken;

use crate::broker::Broker;
use crate::broker::streams::ACK_WAIT;
use crate::contract;
use crate::pipeline::Pipeline;

/// Between two looks at which holds are due.
const LOOK: Duration = Duration::from_millis(100);
/// Renewals that are begun at one look. The others are due at the next one, long before they lapse.
const MAX_AT_ONCE: usize = 512;

/// Until when the broker leaves a delivery to us: `ack_wait` from the last renewal that it answered.
#[derive(Debug)]
pub struct Hold {
    start: Instant,
    renewed_ms: AtomicU64,
    is_being_renewed: AtomicBool,
    /// Where the broker hears about the delivery.
    reply: Subject,
}

impl Hold {
    fn new(reply: Subject) -> Self {
        Self { start: Instant::now(), renewed_ms: AtomicU64::new(0), is_being_renewed: AtomicBool::new(false), reply }
    }

    /// The broker answered what was asked at `asked`, or delivered it to us again then.
    pub fn renew_from(&self, asked: Instant) {
        let millis = contract::millis(asked.duration_since(self.start));
        self.renewed_ms.fetch_max(millis, Ordering::Relaxed);
    }

    /// Whether the broker may have given the delivery to another worker by now.
    pub fn is_lapsed(&self) -> bool {
        self.age() >= ACK_WAIT
    }

    pub(super) const fn reply(&self) -> &Subject {
        &self.reply
    }

    /// On a lapsed hold nothing is said to the broker, since another worker may hold the delivery now.
    fn is_due(&self) -> bool {
        (ACK_WAIT / 3..ACK_WAIT).contains(&self.age())
    }

    fn age(&self) -> Duration {
        self.start.elapsed().saturating_sub(Duration::from_millis(self.renewed_ms.load(Ordering::Relaxed)))
    }
}

/// The holds on all deliveries that are here.
#[derive(Clone, Debug, Default)]
pub struct Holds(Arc<Mutex<Slab<Arc<Hold>>>>);

/// Tells the broker that each delivery is being worked on, well before its hold lapses, until `stop`. Only what it answers
/// counts.
pub async fn renew(pipeline: Arc<Pipeline>, stop: CancellationToken) {
    let mut looks = tokio::time::interval(LOOK);
    let mut renewals = FuturesUnordered::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = looks.tick() => {
                let due = pipeline.holds.take_due();
                renewals.extend(due.into_iter().map(|hold| renew_one(&pipeline.broker, hold)));
            }
            Some(()) = renewals.next() => {}
        }
    }
}

/// A hold that is renewed until this is dropped.
#[derive(Debug)]
pub(super) struct Held {
    holds: Holds,
    place: usize,
    hold: Arc<Hold>,
}

impl Holds {
    /// The hold on a delivery that has just arrived.
    pub(super) fn take(&self, reply: Subject) -> Held {
        let hold = Arc::new(Hold::new(reply));
        let place = self.lock().insert(Arc::clone(&hold));
        Held { holds: self.clone(), place, hold }
    }

    fn take_due(&self) -> Vec<Arc<Hold>> {
        let holds = self.lock();
        let due = holds.iter().map(|(_, hold)| hold).filter(|hold| hold.is_due());
        let free = due.filter(|hold| !hold.is_being_renewed.swap(true, Ordering::Relaxed));
        free.take(MAX_AT_ONCE).cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Slab<Arc<Hold>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    pub(super) const fn hold(&self) -> &Arc<Hold> {
        &self.hold
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.holds.lock().try_remove(self.place);
    }
}

async fn renew_one(broker: &Broker, hold: Arc<Hold>) {
    let asked = Instant::now();
    match broker.client().request(hold.reply.clone(), AckKind::Progress.into()).await {
        Ok(_) => hold.renew_from(asked),
        Err(error) => tracing::debug!(%error, "a progress ack was not answered"),
    }
    hold.is_being_renewed.store(false, Ordering::Relaxed);
}
