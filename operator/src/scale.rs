//! How many workers a pool should have, and why. Pure: no client, no clock. Nothing else decides replicas.
//!
//! As many as finish what waits and runs within `backlogSeconds`, and as keep up with what arrives. More come in one
//! step; fewer only when fewer would have been enough for `stabilizationSeconds`. Between "surely too few" and "surely
//! too many" a number stays as it is, so that a steady load has a steady number of workers.

mod learn; // what the work teaches
mod words; // a decision in words

use std::collections::VecDeque;
use std::time::Duration;

use beamline_crds::LimitedBy;

use crate::pool::{Bounds, Class, Kind, Mode, Scaling, ValidPool};

pub use learn::{Done, Learned};
use learn::{Lessons, Look};
pub use words::{Held, Need, Why};

/// A pod takes this many seconds to start, as long as none has been seen to.
const POD_START: f64 = 3.0;
/// Between work that waits and the API server's knowing of more workers.
const REACTION: f64 = 1.0;
/// How sure it must be that more arrives, or less, in standard deviations of as many random arrivals.
const SURE: f64 = 2.5;
/// The same of what is seen within seconds, which is looked at far more often than it can change.
const SURE_IN_SECONDS: f64 = 4.0;

/// How many workers of each class.
#[derive(Clone, Debug, PartialEq)]
pub struct Decisions {
    /// Who decided.
    pub mode: Mode,
    /// Those without GPUs of their own.
    pub general: Decision,
    /// Those with GPUs.
    pub gpu: Option<Decision>,
}

/// How many workers of each class, whoever decided it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replicas {
    /// Those without GPUs of their own.
    pub general: i32,
    /// Those with GPUs.
    pub gpu: Option<i32>,
}

impl Decisions {
    /// Just the numbers.
    pub fn replicas(&self) -> Replicas {
        Replicas { general: self.general.desired, gpu: self.gpu.as_ref().map(|gpu| gpu.desired) }
    }
}

/// How many workers, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// The number decided.
    pub desired: i32,
    /// The reason.
    pub why: Why,
    /// What the work taught.
    pub learned: Learned,
    /// Whether the number may change though nothing but time passes.
    pub is_waiting: bool,
}

impl Decision {
    /// What keeps the number below what the work asks for.
    pub fn limited_by(&self) -> LimitedBy {
        self.why.limit.map_or(LimitedBy::None, |(limit, _)| limit)
    }
}

/// What there is to see of a class.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seen {
    /// The work; `None` where it cannot be read.
    pub work: Option<Work>,
    /// Those who do it.
    pub workers: Workers,
}

/// What there is to do.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Assignments that no worker has taken yet.
    pub pending: i64,
    /// Assignments that workers hold.
    pub in_flight: i64,
    /// Cancels, answers and approvals past their deadline: each is one waiting message. `None` where that is not known.
    pub due: Option<i64>,
    /// What arrived within seconds.
    pub recent: Flow,
    /// What arrived within half a minute or so.
    pub lately: Flow,
    /// All assignments that have ended, as the broker counts them: workers have ended no more.
    pub ended: i64,
}

/// What came within a time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Flow {
    /// Messages.
    pub messages: i64,
    /// Within so many seconds.
    pub seconds: f64,
}

impl Flow {
    /// Messages in a second.
    pub fn rate(self) -> f64 {
        if self.seconds > 0.0 { self.messages as f64 / self.seconds } else { 0.0 }
    }

    /// Surely not fewer than these, as random as arrivals are.
    fn at_least(self, sure: f64) -> f64 {
        self.off(-sure).max(0.0)
    }

    /// Surely not more.
    fn at_most(self, sure: f64) -> f64 {
        self.off(sure)
    }

    fn off(self, deviations: f64) -> f64 {
        let messages = self.messages as f64;
        if self.seconds > 0.0 { (messages + deviations * messages.sqrt()) / self.seconds } else { 0.0 }
    }
}

/// Those who do it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Workers {
    /// How many the Deployment asks for, where there is one.
    pub asked: Option<i32>,
    /// Pods that take work.
    pub ready: i32,
    /// Pods that should take work by now and do not: no capacity.
    pub failing: i32,
    /// Seconds that the latest pods took to start.
    pub start: Option<f64>,
    /// What they have done.
    pub done: Done,
}

/// Within which rules a class is scaled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rules {
    /// Whether nothing is decided.
    pub paused: bool,
    /// Between which numbers.
    pub bounds: Bounds,
    /// What the upper one is.
    pub limit: LimitedBy,
    /// Blocks that one worker runs at once, at least.
    pub slots: i32,
    /// Blocks that one worker runs at once, at most.
    pub all_slots: i32,
    /// Within this a backlog is finished.
    pub backlog: Duration,
    /// For so long fewer must have been enough.
    pub stabilization: Duration,
    /// For so long there must have been nothing to do before the last one goes.
    pub idle_to_zero: Duration,
}

impl Rules {
    /// The rules of this class.
    pub fn of(pool: &ValidPool, class: &Class) -> Self {
        let Scaling { mode: _, backlog, stabilization, idle_to_zero } = pool.scaling;
        let quota = quota(class);
        let Bounds { min, max, queue_depth_per_replica } = class.bounds;
        let (max, limit) = match quota {
            Some(quota) if quota < max => (quota, LimitedBy::MaxTotal),
            _ => (max, LimitedBy::MaxReplicas),
        };
        let slots = class.slots.cpu.max(class.slots.io).max(class.slots.gpu);
        let all_slots = class.slots.cpu.saturating_add(class.slots.io).saturating_add(class.slots.gpu);
        let bounds = Bounds { min: min.min(max), max, queue_depth_per_replica };
        Self { paused: pool.paused, bounds, limit, slots, all_slots, backlog, stabilization, idle_to_zero }
    }

    /// The same for the step between none and one, where another decides on the rest.
    #[must_use]
    pub fn of_one(self) -> Self {
        let Bounds { min, max: _, queue_depth_per_replica } = self.bounds;
        Self { bounds: Bounds { min: min.min(1), max: 1, queue_depth_per_replica }, limit: LimitedBy::None, ..self }
    }
}

/// What is kept of a class from one decision to the next.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scaler {
    desired: Option<i32>,
    learned: Learned,
    lessons: Lessons,
    /// What was needed within the stabilization window: each holds from its time until the next one's.
    needs: VecDeque<(Duration, i32)>,
    idle_since: Option<Duration>,
}

/// What is needed: not surely fewer than `low`, not surely more than `high`.
struct Needed {
    low: i32,
    likely: i32,
    high: i32,
    why: Need,
}

impl Scaler {
    /// Goes on where another operator has stopped.
    pub fn after(desired: Option<i32>, learned: Learned) -> Self {
        Self { desired, learned, lessons: Lessons::after(learned), ..Self::default() }
    }

    /// Another has decided on this number meanwhile.
    pub const fn starts_from(&mut self, desired: i32) {
        self.desired = Some(desired);
    }

    /// Seconds that a pod takes to start, as far as that is known.
    pub const fn usual_start(&self) -> Option<f64> {
        self.learned.start
    }

    /// The number of workers from now on. `now` goes on evenly, whatever the clock does.
    pub fn decide(&mut self, rules: &Rules, seen: &Seen, now: Duration) -> Decision {
        self.learn(rules, seen, now);
        let current = self.desired.or(seen.workers.asked).unwrap_or(rules.bounds.min);
        if rules.paused {
            return self.keep(current, Need::Paused(current));
        }
        let Some(work) = &seen.work else {
            let kept = current.clamp(rules.bounds.min, rules.bounds.max);
            return self.keep(kept, Need::Unreadable(kept));
        };
        if self.needs.is_empty() {
            self.needs.push_back((now, current));
        }
        let mut needed = self.needed(rules, work);
        let tolerated = (seen.workers.ready / 4).max(1);
        let failing = seen.workers.failing;
        for number in [&mut needed.low, &mut needed.likely, &mut needed.high] {
            // Others do the work of those that do not start, as long as these are few.
            *number = number.saturating_add(if *number > 0 { failing.min(tolerated) } else { 0 });
        }
        let lately = self.note(needed.high, now, rules.stabilization);
        let (mut desired, mut held) = if needed.low > current {
            (needed.likely, None)
        } else {
            let kept = current.min(lately);
            (kept, (kept > needed.high).then_some(Held::Lately(kept, rules.stabilization)))
        };
        if desired <= 0 && current > 0 && rules.bounds.min <= 0 {
            held = self.awake(rules, work, now);
            desired = i32::from(held.is_some());
        }
        let mut limit = None;
        if failing > tolerated && desired > current {
            (desired, limit) = (current, Some((LimitedBy::UnreadyPods, current)));
        }
        if desired > rules.bounds.max {
            (desired, limit) = (rules.bounds.max, Some((rules.limit, rules.bounds.max)));
        }
        if desired < rules.bounds.min {
            (desired, held) = (rules.bounds.min, Some(Held::Minimum(rules.bounds.min)));
        }
        let is_waiting = desired > rules.bounds.min || current > desired;
        self.settle(desired, Why { need: needed.why, held, failing, limit }, is_waiting)
    }

    fn learn(&mut self, rules: &Rules, seen: &Seen, now: Duration) {
        let waits = seen.work.is_some_and(|work| work.pending > 0);
        let ended = seen.work.map(|work| work.ended);
        let look = Look { at: now, done: seen.workers.done, ready: seen.workers.ready, waits, ended };
        self.learned.rate = self.lessons.learn(look, rules.slots..=rules.all_slots).or(self.learned.rate);
        self.learned.start = seen.workers.start.or(self.learned.start);
        let is_idle = seen.work.is_some_and(|work| {
            work.pending == 0 && work.in_flight == 0 && work.due == Some(0) && work.recent.messages == 0
        });
        self.idle_since = if is_idle { self.idle_since.or(Some(now)) } else { None };
    }

    fn needed(&self, rules: &Rules, work: &Work) -> Needed {
        let depth = work.pending.saturating_add(work.due.unwrap_or(0)).saturating_add(work.in_flight);
        let at_least_one = i32::from(depth > 0);
        let Some(rate) = self.learned.rate else {
            let per_replica = rules.bounds.queue_depth_per_replica.max(1);
            let replicas = up(depth as f64 / f64::from(per_replica));
            let why = if depth > 0 { Need::Depth { depth, per_replica, replicas } } else { Need::Nothing };
            return Needed { low: replicas, likely: replicas, high: replicas, why };
        };
        let in_time = up(depth as f64 / (rate * self.time_to_work(rules)));
        // More workers than there are blocks to run side by side finish nothing sooner.
        let side_by_side = up(depth as f64 / self.lessons.slots(rules.slots));
        let backlog = in_time.min(side_by_side).max(at_least_one);
        let (recent, lately) = (work.recent.at_least(SURE_IN_SECONDS), work.lately.at_least(SURE));
        let surest = if recent > lately { work.recent } else { work.lately };
        let (surely, likely) = (recent.max(lately), surest.rate().max(work.lately.rate()));
        let most = work.lately.at_most(SURE).max(surely);
        let steady = up(likely / rate);
        let why = if depth == 0 && steady == 0 {
            Need::Nothing
        } else {
            Need::Rate { depth, rate, target: rules.backlog, backlog, arrivals: likely, steady }
        };
        Needed {
            low: backlog.max(up(surely / rate)),
            likely: backlog.max(steady),
            high: backlog.max(up(most / rate)),
            why,
        }
    }

    /// Of the time that a backlog may take, what is left once more workers are there: seconds.
    fn time_to_work(&self, rules: &Rules) -> f64 {
        let target = rules.backlog.as_secs_f64();
        (target - self.learned.start.unwrap_or(POD_START) - REACTION).max(target / 4.0)
    }

    /// The most that was needed at any time within the window.
    fn note(&mut self, need: i32, now: Duration, window: Duration) -> i32 {
        if self.needs.back().is_none_or(|(_, last)| *last != need) {
            self.needs.push_back((now, need));
        }
        while self.needs.get(1).is_some_and(|(second, _)| now.saturating_sub(*second) >= window) {
            self.needs.pop_front();
        }
        self.needs.iter().map(|(_, need)| *need).max().unwrap_or(need)
    }

    /// Why the last worker stays.
    fn awake(&self, rules: &Rules, work: &Work, now: Duration) -> Option<Held> {
        if work.due.is_none() {
            return Some(Held::Unknown);
        }
        let idle = self.idle_since.map(|since| now.saturating_sub(since));
        (idle < Some(rules.idle_to_zero)).then_some(Held::NotIdle(rules.idle_to_zero))
    }

    /// What cannot be known, or must not be changed, leaves everything as it is, and proves nothing.
    fn keep(&mut self, current: i32, need: Need) -> Decision {
        self.needs.clear();
        self.idle_since = None;
        self.settle(current, Why::of(need), false)
    }

    fn settle(&mut self, desired: i32, why: Why, is_waiting: bool) -> Decision {
        self.desired = Some(desired);
        Decision { desired, why, learned: self.learned, is_waiting }
    }
}

/// As many as are needed for all of it.
fn up(workers: f64) -> i32 {
    // What differs by a rounding is the same.
    (workers - 1e-9).ceil() as i32
}

/// The numbers that stand in the spec, within the quota of devices.
pub fn as_written(pool: &ValidPool) -> Decisions {
    let written = |class: &Class| {
        let field = match class.kind {
            Kind::General => "spec.replicas",
            Kind::Gpu => "gpu.replicas",
        };
        let quota = quota(class).filter(|quota| *quota < class.replicas);
        fixed(
            quota.unwrap_or(class.replicas),
            Need::Spec(field, class.replicas),
            quota.map(|quota| (LimitedBy::MaxTotal, quota)),
        )
    };
    Decisions { mode: Mode::Manual, general: written(&pool.general), gpu: pool.gpu.as_ref().map(written) }
}

/// A number that nothing that is seen can change.
pub fn fixed(desired: i32, need: Need, limit: Option<(LimitedBy, i32)>) -> Decision {
    Decision { desired, why: Why { limit, ..Why::of(need) }, learned: Learned::default(), is_waiting: false }
}

/// Pods that there may be devices for.
fn quota(class: &Class) -> Option<i32> {
    class.devices.as_ref().and_then(|devices| Some(devices.max_total? / devices.count.max(1)))
}

#[cfg(test)]
mod tests;
