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

use super::Parts;
use crate::broker::Broker;
use crate::broker::streams::ACK_WAIT;
use crate::contract;
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
    /// Where the broker hears about the delivery; `None` where it has forgotten it, and so the hold never lapses.
    reply: Option<Subject>,
}

impl Hold {
    fn new(reply: Option<Subject>, gaps: u64) -> Self {
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
        self.is_lapsed_at(Instant::now())
    }

    pub(super) fn must_end_by(&self, end: Option<Instant>) {
        let end = end.map_or(u64::MAX, |end| contract::millis(end.saturating_duration_since(self.start)));
        self.end_ms.store(end, Ordering::Relaxed);
    }

    pub(super) const fn reply(&self) -> Option<&Subject> {
        self.reply.as_ref()
    }

    fn is_lapsed_at(&self, now: Instant) -> bool {
        self.reply.is_some() && (self.gaps.load(Ordering::Relaxed) != pulse::gaps() || self.age(now) >= ACK_WAIT)
    }

    /// On a lapsed hold nothing is said to the broker, since another worker may hold the delivery now.
    fn is_due_at(&self, now: Instant) -> bool {
        let since_start = contract::millis(now.saturating_duration_since(self.start));
        let is_over = since_start >= self.end_ms.load(Ordering::Relaxed);
        self.reply.is_some() && self.age(now) >= ACK_WAIT / 3 && !self.is_lapsed_at(now) && !is_over
    }

    fn age(&self, now: Instant) -> Duration {
        let renewed = Duration::from_millis(self.renewed_ms.load(Ordering::Relaxed));
        now.saturating_duration_since(self.start).saturating_sub(renewed)
    }
}

/// The holds on all deliveries that are here.
#[derive(Clone, Debug, Default)]
pub struct Holds(Arc<Mutex<Slab<Arc<Hold>>>>);

/// Tells the broker that each delivery is being worked on, well before its hold lapses, until `stop`. Only what it answers
/// counts.
pub async fn renew(parts: Parts, stop: CancellationToken) {
    let mut looks = tokio::time::interval(LOOK);
    let mut renewals = FuturesUnordered::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = looks.tick() => {
                let due = parts.holds.take_due();
                renewals.extend(due.into_iter().map(|hold| renew_one(&parts.broker, hold)));
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
    pub(super) fn take(&self, reply: Option<Subject>, gaps: u64) -> Held {
        let hold = Arc::new(Hold::new(reply, gaps));
        let place = self.lock().insert(Arc::clone(&hold));
        Held { holds: self.clone(), place, hold }
    }

    /// How many deliveries are here, whatever has become of them.
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    fn take_due(&self) -> Vec<Arc<Hold>> {
        let (holds, now) = (self.lock(), Instant::now());
        let due = holds.iter().map(|(_, hold)| hold).filter(|hold| hold.is_due_at(now));
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
    let Some(reply) = hold.reply.clone() else { return };
    let asked = Instant::now();
    // On a slow link, large results would hold it up on the connection that they go out on.
    match broker.lookups().request(reply, AckKind::Progress.into()).await {
        Ok(_) => hold.renew_from(asked),
        Err(error) => tracing::debug!(%error, "a progress ack was not answered"),
    }
    hold.is_being_renewed.store(false, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hold() -> Hold {
        Hold::new(Some("reply".into()), pulse::gaps())
    }

    fn at(hold: &Hold, seconds: u64) -> Instant {
        hold.start + Duration::from_secs(seconds)
    }

    #[test]
    fn a_hold_is_due_from_a_third_of_its_time_until_it_has_lapsed() {
        let hold = hold();
        let is_due = [0, 3, 4, 9, 10].map(|age| hold.is_due_at(at(&hold, age)));
        assert_eq!(is_due, [false, false, true, true, false]);
        assert!(!hold.is_lapsed_at(at(&hold, 9)) && hold.is_lapsed_at(at(&hold, 10)));
    }

    #[test]
    fn what_should_have_ended_is_not_renewed() {
        let hold = hold();
        let now = at(&hold, 5);
        hold.must_end_by(Some(now));
        assert!(!hold.is_due_at(now));
        hold.must_end_by(Some(now + ACK_WAIT));
        assert!(hold.is_due_at(now));
        hold.must_end_by(None);
        assert!(hold.is_due_at(now));
    }

    #[test]
    fn what_came_before_a_stop_has_lapsed_until_it_is_delivered_again() {
        let hold = Hold::new(Some("reply".into()), pulse::gaps().wrapping_sub(1));
        assert!(hold.is_lapsed() && !hold.is_due_at(at(&hold, 5)));
        hold.gaps.store(0, Ordering::Relaxed);
        hold.renew_by(&Hold::new(Some("reply".into()), pulse::gaps()));
        assert!(!hold.is_lapsed());
    }

    #[test]
    fn what_the_broker_has_forgotten_never_lapses() {
        let hold = Hold { reply: None, ..hold() };
        hold.gaps.store(pulse::gaps().wrapping_sub(1), Ordering::Relaxed);
        assert!([4, 60].iter().all(|age| !hold.is_lapsed_at(at(&hold, *age)) && !hold.is_due_at(at(&hold, *age))));
    }
}
