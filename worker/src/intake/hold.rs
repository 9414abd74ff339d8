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
use crate::pulse;

/// Between two looks at which holds are due.
const LOOK: Duration = Duration::from_millis(100);
/// Renewals that are begun at one look. The others are due at the next one, long before they lapse.
const MAX_AT_ONCE: usize = 512;

/// Until when the broker leaves a delivery to us: `ack_wait` from the last renewal that it answered.
#[derive(Debug)]
pub struct Hold {
    start: Instant,
    renewed_ms: AtomicU64,
    /// From when on it is not renewed any more.
    end_ms: AtomicU64,
    /// Stops of this process when the subscription was made that brought it.
    gaps: AtomicU64,
    is_being_renewed: AtomicBool,
    /// Where the broker hears about the delivery.
    reply: Subject,
}

impl Hold {
    fn new(reply: Subject, gaps: u64) -> Self {
        Self {
            start: Instant::now(),
            renewed_ms: AtomicU64::new(0),
            end_ms: AtomicU64::new(u64::MAX),
            gaps: AtomicU64::new(gaps),
            is_being_renewed: AtomicBool::new(false),
            reply,
        }
    }

    /// The broker has delivered it to us again, with this hold.
    pub fn renew_by(&self, newer: &Self) {
        self.gaps.fetch_max(newer.gaps.load(Ordering::Relaxed), Ordering::Relaxed);
        self.renew_from(newer.start);
    }

    /// The broker answered what was asked at `asked`.
    fn renew_from(&self, asked: Instant) {
        let millis = contract::millis(asked.duration_since(self.start));
        self.renewed_ms.fetch_max(millis, Ordering::Relaxed);
    }

    /// Whether the broker may have given the delivery to another worker by now. A process that was stopped cannot tell
    /// for what it had, nor for what was under way to it then.
    pub fn is_lapsed(&self) -> bool {
        self.gaps.load(Ordering::Relaxed) != pulse::gaps() || self.age() >= ACK_WAIT
    }

    pub(super) fn must_end_by(&self, end: Option<Instant>) {
        let end = end.map_or(u64::MAX, |end| contract::millis(end.saturating_duration_since(self.start)));
        self.end_ms.store(end, Ordering::Relaxed);
    }

    pub(super) const fn reply(&self) -> &Subject {
        &self.reply
    }

    /// On a lapsed hold nothing is said to the broker, since another worker may hold the delivery now.
    fn is_due(&self) -> bool {
        let is_over = contract::millis(self.start.elapsed()) >= self.end_ms.load(Ordering::Relaxed);
        self.age() >= ACK_WAIT / 3 && !self.is_lapsed() && !is_over
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
    pub(super) fn take(&self, reply: Subject, gaps: u64) -> Held {
        let hold = Arc::new(Hold::new(reply, gaps));
        let place = self.lock().insert(Arc::clone(&hold));
        Held { holds: self.clone(), place, hold }
    }

    /// How many deliveries are here, whatever has become of them.
    pub fn count(&self) -> usize {
        self.lock().len()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn aged(seconds: u64) -> Hold {
        let start = Instant::now().checked_sub(Duration::from_secs(seconds)).expect("the machine is up for longer");
        Hold { start, ..Hold::new("reply".into(), pulse::gaps()) }
    }

    #[test]
    fn a_hold_is_due_from_a_third_of_its_time_until_it_has_lapsed() {
        assert_eq!([0, 3, 4, 9, 10].map(|age| aged(age).is_due()), [false, false, true, true, false]);
        assert!(!aged(9).is_lapsed() && aged(10).is_lapsed());
    }

    #[test]
    fn what_should_have_ended_is_not_renewed() {
        let hold = aged(5);
        hold.must_end_by(Some(Instant::now()));
        assert!(!hold.is_due());
        hold.must_end_by(Some(Instant::now() + ACK_WAIT));
        assert!(hold.is_due());
        hold.must_end_by(None);
        assert!(hold.is_due());
    }

    #[test]
    fn what_came_before_a_stop_has_lapsed_until_it_is_delivered_again() {
        let hold = Hold::new("reply".into(), pulse::gaps().wrapping_sub(1));
        assert!(hold.is_lapsed() && !hold.is_due());
        hold.gaps.store(0, Ordering::Relaxed);
        hold.renew_by(&Hold::new("reply".into(), pulse::gaps()));
        assert!(!hold.is_lapsed());
    }
}
