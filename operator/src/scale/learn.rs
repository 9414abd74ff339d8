//! What the work teaches about workers: how many assignments one ends in a second when it is busy, and how long a pod
//! takes to start. Idle time teaches nothing, and what the work is made of may change.

use std::ops::RangeInclusive;
use std::time::Duration;

/// Busy time of one worker after which what was learned before counts for about a third.
const MEMORY: f64 = 120.0;
/// Fewer ended assignments tell no rate.
const LEAST: f64 = 10.0;
/// As long between two looks that what waited at both has waited in between.
const WATCHED: f64 = 5.0;
/// Seconds after which what the broker saw end, and no worker has spoken of, counts for about a third.
const UNSPOKEN: f64 = 60.0;

/// What is known about the workers of a class.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Learned {
    /// Assignments that one worker ends in a second when it is busy.
    pub rate: Option<f64>,
    /// Seconds from a pod's creation until it takes work.
    pub start: Option<f64>,
}

/// What the workers of a class have done, all numbers only growing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Done {
    /// Assignments that ended.
    pub finished: u64,
    /// Seconds that these held their slots, all slots taken together.
    pub work: f64,
    /// Blocks that would have run at once had the fullest pool of slots been full, summed over blocks that ran.
    pub full: f64,
    /// The blocks that this is a sum over.
    pub ran: f64,
}

/// How a class was at a look.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Look {
    pub(super) at: Duration,
    pub(super) done: Done,
    pub(super) ready: i32,
    pub(super) waits: bool,
    /// Assignments that have ended, as the broker counts them; `None` where it cannot be read.
    pub(super) ended: Option<i64>,
}

/// Sums that forget.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Lessons {
    last: Option<Look>,
    /// Assignments that workers say have ended, and that the broker has not seen end.
    claimed: f64,
    /// Assignments that it has seen end, and that no worker has spoken of.
    unspoken: f64,
    ended: f64,
    /// Seconds of one busy worker.
    busy: f64,
    /// Blocks that one worker runs at once when it is busy.
    slots: Option<f64>,
}

impl Lessons {
    /// What another operator has learned counts half of what it can.
    pub(super) fn after(learned: Learned) -> Self {
        let busy = MEMORY / 2.0;
        learned.rate.map_or_else(Self::default, |rate| Self { ended: rate * busy, busy, ..Self::default() })
    }

    /// Blocks that one worker runs at once when it is busy; as long as none has run, what its slots say.
    pub(super) fn slots(&self, on_paper: i32) -> f64 {
        self.slots.unwrap_or_else(|| f64::from(on_paper)).max(1.0)
    }

    /// Takes in what happened since the last look, and says the rate, if there is one. A worker runs so many blocks at
    /// once, whatever it says.
    pub(super) fn learn(&mut self, mut now: Look, slots_on_paper: RangeInclusive<i32>) -> Option<f64> {
        now.ended = now.ended.or(self.last.and_then(|last| last.ended));
        let before = self.last.replace(now)?;
        let claimed = now.done.finished.checked_sub(before.done.finished)? as f64;
        let ended = self.believed(claimed, &before, &now);
        let (fewest, most) = slots_on_paper.into_inner();
        let ran = now.done.ran - before.done.ran;
        let seen = (now.done.full - before.done.full) / ran;
        if ran > 0.0 && seen <= f64::from(most) {
            self.slots = Some(self.slots.map_or(seen, |slots| slots + (seen - slots) * (ran / 100.0).min(0.2)));
        }
        if ended <= 0.0 {
            return None;
        }
        let slots = self.slots(fewest);
        let own_time = (now.done.work - before.done.work).max(0.0) / slots;
        let busy = own_time.max(Self::all_the_time(&before, &now, ended, slots));
        let kept = (-busy / MEMORY).exp();
        (self.ended, self.busy) = (self.ended * kept + ended, self.busy * kept + busy);
        (self.ended >= LEAST && self.busy > 0.0).then(|| significant(self.ended / self.busy))
    }

    /// What workers say has ended, as far as the broker has seen it too; who is ahead waits for the other.
    fn believed(&mut self, claimed: f64, before: &Look, now: &Look) -> f64 {
        let seen = now.ended.zip(before.ended).map_or(0, |(now, before)| now.saturating_sub(before).max(0));
        let kept = (-now.at.saturating_sub(before.at).as_secs_f64() / UNSPOKEN).exp();
        self.claimed += claimed;
        self.unspoken = self.unspoken * kept + seen as f64;
        let both = self.claimed.min(self.unspoken);
        (self.claimed, self.unspoken) = (self.claimed - both, self.unspoken - both);
        both
    }

    /// Where work waited all along and each slot was used again and again, the workers were busy all the time, whatever
    /// the blocks themselves took: what lies between them counts too.
    fn all_the_time(before: &Look, now: &Look, ended: f64, slots: f64) -> f64 {
        let seconds = now.at.saturating_sub(before.at).as_secs_f64();
        let workers = f64::from(before.ready.min(now.ready));
        let is_busy = before.waits && now.waits && seconds <= WATCHED && ended >= 2.0 * slots * workers;
        if is_busy { workers * seconds } else { 0.0 }
    }
}

/// Three digits: as it is shown, so that an operator that reads it decides the same.
pub(super) fn significant(value: f64) -> f64 {
    if value <= 0.0 || !value.is_finite() {
        return value;
    }
    let scale = 10_f64.powf(2.0 - value.log10().floor());
    (value * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten looks, a second apart: ended in each, seconds of work in each, blocks running, whether work waits.
    #[track_caller]
    fn rate(workers: i32, ended: u64, work: f64, running: f64, waits: bool) -> Option<f64> {
        let (mut lessons, mut rate) = (Lessons::default(), None);
        let mut done = Done::default();
        for second in 0..10 {
            let look = Look {
                at: Duration::from_secs(second),
                done,
                ready: workers,
                waits,
                ended: Some(done.finished as i64),
            };
            rate = lessons.learn(look, 16..=24).or(rate);
            done.finished += ended;
            done.work += work;
            done.ran += running;
            done.full += running * 16.0;
        }
        rate
    }

    #[test]
    fn a_rate_is_that_of_a_busy_worker_whether_it_is_busy_or_not() {
        // One worker of 16 slots, blocks of 1.6 s: 10 in a second when full.
        assert_eq!(rate(1, 10, 16.0, 16.0, true), Some(10.0));
        assert_eq!(rate(1, 2, 3.2, 3.2, false), Some(10.0));
        assert_eq!(rate(5, 10, 16.0, 16.0, false), Some(10.0));
    }

    #[test]
    fn what_lies_between_short_blocks_counts_where_work_waits() {
        // Blocks of a millisecond: 16 slots would end 16 000 in a second, and 500 is what is seen.
        assert_eq!(rate(1, 500, 0.5, 1.0, true), Some(500.0));
        assert_eq!(rate(1, 500, 0.5, 1.0, false), Some(16_000.0));
    }

    #[test]
    fn nothing_is_learned_from_nothing() {
        assert_eq!(rate(3, 0, 0.0, 0.0, false), None);
        assert_eq!(rate(1, 1, 1.6, 1.6, false), None, "nine are too few");
    }

    #[test]
    fn long_blocks_that_run_do_not_lower_a_rate_before_they_end() {
        let mut lessons = Lessons::after(Learned { rate: Some(9.0), start: None });
        let look = |second, done: Done| Look {
            at: Duration::from_secs(second),
            done,
            ready: 10,
            waits: true,
            ended: Some(done.finished as i64),
        };
        let mut rate = None;
        for second in 0..60 {
            rate = lessons.learn(
                look(second, Done { ran: 160.0 * second as f64, full: 2560.0 * second as f64, ..Done::default() }),
                16..=24,
            );
        }
        assert_eq!(rate, None, "it stays what it was");
        let ended = Done { finished: 160, work: 9600.0, ran: 9600.0, full: 9600.0 * 16.0 };
        let rate = lessons.learn(look(60, ended), 16..=24).expect("a rate");
        assert!((0.26..0.3).contains(&rate), "{rate}");
    }

    #[test]
    fn a_worker_that_starts_over_teaches_nothing_wrong() {
        let mut lessons = Lessons::default();
        let look = |second, finished| Look {
            at: Duration::from_secs(second),
            done: Done { finished, work: finished as f64, ..Done::default() },
            ready: 1,
            waits: false,
            ended: Some(0),
        };
        lessons.learn(look(0, 1000), 16..=24);
        assert_eq!(lessons.learn(look(1, 5), 16..=24), None);
    }

    /// One worker ends 10 assignments in a second, and another says what it likes; the rate after a minute.
    #[track_caller]
    fn beside(lie: impl Fn(u64) -> Done) -> Option<f64> {
        let (mut lessons, mut rate) = (Lessons::default(), None);
        for second in 0..60 {
            let true_ones = 10 * second;
            let Done { finished, work, full, ran } = lie(second);
            let done = Done {
                finished: finished + true_ones,
                work: work + 1.6 * true_ones as f64,
                full: full + 256.0 * second as f64,
                ran: ran + 16.0 * second as f64,
            };
            let at = Duration::from_secs(second);
            let look = Look { at, done, ready: 2, waits: false, ended: Some(1_000_000 + true_ones as i64) };
            rate = lessons.learn(look, 16..=24).or(rate);
        }
        rate
    }

    #[test]
    fn what_the_broker_did_not_see_end_has_not_ended() {
        let honest = beside(|_| Done::default());
        assert_eq!(honest, Some(10.0));
        let once = |second| Done { finished: if second < 30 { 0 } else { 1_000_000_000 }, ..Done::default() };
        assert_eq!(beside(once), honest);
        assert_eq!(beside(|second| Done { finished: 1_000_000_000 * second, ..Done::default() }), honest);
    }

    #[test]
    fn nobody_runs_more_at_once_than_its_slots_hold() {
        let honest = beside(|_| Done::default());
        let running = 1e9;
        let huge = |second: u64| {
            let reports = running * second as f64;
            Done { ran: reports, full: reports * running, ..Done::default() }
        };
        assert_eq!(beside(huge), honest);
    }

    #[test]
    fn a_rate_has_three_digits() {
        assert_eq!([0.26666, 9.0449, 1234.5].map(significant), [0.267, 9.04, 1230.0]);
    }
}
