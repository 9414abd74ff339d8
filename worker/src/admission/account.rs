//! What all workers of a pool have used of one tenant's budget in one window. Pure: no client and no clock.
//!
//! Windows are aligned to Unix time, and an account only ever moves to a later one: whoever has a slow clock uses units of
//! the window that somebody with a faster one has begun, so that no window ever gives out more than its budget.

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::contract;
use crate::policy::Quotas;

/// A lease is this part of what is left, unless more is asked for: a worker that is killed loses no more than that.
const SHARE: u64 = 128;
/// The most units of a lease, unless more is asked for.
const LARGEST_LEASE: u64 = 8192;

/// What a tenant may use in a window. At least one of them is bounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Executions.
    pub executions: Option<u64>,
    /// CPU time of blocks.
    pub cpu_time: Option<Duration>,
    /// How long a window is.
    pub window: Duration,
}

/// A time in which a budget is used, in Unix milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    start: i64,
    millis: i64,
}

/// One tenant's account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    window: Window,
    /// Units that are leased out.
    executions: u64,
    /// Charged after it was used; more than the budget is debt.
    cpu_time_ms: u64,
}

/// What a worker wants of an account.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Visit {
    /// Units that it needs now.
    pub wanted: u64,
    /// Units of an earlier lease that it has not used.
    pub unused: Option<(Window, u64)>,
    /// CPU time that was used since its last visit.
    pub cpu_time_ms: u64,
}

/// What it gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// When its units may be used.
    pub window: Window,
    /// How many executions; fewer than were wanted only where the budget is used up.
    pub units: u64,
    /// CPU time that is left of the budget.
    pub cpu_left_ms: Option<u64>,
    /// What is used up.
    pub spent: Option<Spent>,
}

/// What is used up of a budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spent {
    /// So many executions.
    Executions(u64),
    /// So much CPU time.
    CpuTime(Duration),
}

impl Budget {
    /// The budget among a tenant's quotas; `None` where it has none.
    pub fn of(quotas: &Quotas) -> Option<Self> {
        let Quotas { executions, cpu_time, window, concurrent: _, memory_mb: _ } = *quotas;
        (executions.is_some() || cpu_time.is_some()).then_some(Self { executions, cpu_time, window })
    }
}

impl Window {
    /// The one of this length that a moment belongs to.
    pub fn at(now: i64, length: Duration) -> Self {
        let millis = i64::try_from(length.as_millis()).unwrap_or(i64::MAX).max(1);
        Self { start: now.saturating_sub(now.rem_euclid(millis)), millis }
    }

    /// The first moment after it.
    pub const fn end(self) -> i64 {
        self.start.saturating_add(self.millis)
    }

    /// How long it is.
    pub const fn length(self) -> Duration {
        Duration::from_millis(self.millis.unsigned_abs())
    }

    /// How much of it is left at a moment.
    pub fn rest(self, now: i64) -> Duration {
        Duration::from_millis(u64::try_from(self.end().saturating_sub(now)).unwrap_or_default())
    }

    /// The moment of the window at which whoever has this clock uses it: a clock may not have come to its start yet. `None`
    /// after its end.
    pub fn moment(self, now: i64) -> Option<i64> {
        (now < self.end()).then_some(now.max(self.start))
    }
}

impl Account {
    /// An account that nobody has used yet.
    pub fn new(now: i64, budget: &Budget) -> Self {
        Self { window: Window::at(now, budget.window), executions: 0, cpu_time_ms: 0 }
    }

    /// Takes back what was not used, charges what was, and leases out what there is of what is wanted.
    pub fn visit(&mut self, now: i64, budget: &Budget, visit: &Visit) -> Lease {
        self.turn(now, budget);
        if let Some((_, units)) = visit.unused.filter(|(window, _)| *window == self.window) {
            self.executions = self.executions.saturating_sub(units);
        }
        self.cpu_time_ms = self.cpu_time_ms.saturating_add(visit.cpu_time_ms);
        let cpu_left_ms = budget.cpu_time.map(|limit| contract::millis(limit).saturating_sub(self.cpu_time_ms));
        let left = budget.executions.unwrap_or(u64::MAX).saturating_sub(self.executions);
        let units = if cpu_left_ms == Some(0) { 0 } else { lease(left, visit.wanted) };
        self.executions += units;
        let spent = match (budget.cpu_time, budget.executions) {
            (Some(limit), _) if cpu_left_ms == Some(0) => Some(Spent::CpuTime(limit)),
            (_, Some(limit)) if units < visit.wanted => Some(Spent::Executions(limit)),
            _ => None,
        };
        Lease { window: self.window, units, cpu_left_ms, spent }
    }

    /// Moves on to the window of this moment. What was used in a window that reaches into it counts there too; CPU time
    /// beyond the budgets of those that are over stays as debt.
    fn turn(&mut self, now: i64, budget: &Budget) {
        let last = self.window;
        let window = Window::at(now.max(last.start), budget.window);
        if last.end() <= window.start {
            let turns = (window.start.saturating_sub(last.start) / last.millis).unsigned_abs();
            let paid = budget.cpu_time.map_or(u64::MAX, |limit| contract::millis(limit).saturating_mul(turns));
            self.executions = 0;
            self.cpu_time_ms = self.cpu_time_ms.saturating_sub(paid);
        }
        self.window = window;
    }

    /// As it is kept.
    pub fn encode(&self) -> Bytes {
        let Self { window, executions, cpu_time_ms } = *self;
        let Window { start, millis } = window;
        let version = Cow::Borrowed(contract::VERSION);
        contract::encode(&Kept { version, window_start: start, window_ms: millis, executions, cpu_time_ms })
    }

    /// From how it is kept; `None` where that is no account.
    pub fn decode(kept: &[u8]) -> Option<Self> {
        let kept: Kept<'_> = serde_json::from_slice(kept).ok()?;
        let Kept { version, window_start: start, window_ms: millis, executions, cpu_time_ms } = kept;
        let is_window = millis > 0 && start.rem_euclid(millis) == 0;
        let window = Window { start, millis };
        (version == contract::VERSION && is_window).then_some(Self { window, executions, cpu_time_ms })
    }
}

#[derive(Deserialize, Serialize)]
struct Kept<'a> {
    version: Cow<'a, str>,
    window_start: i64,
    window_ms: i64,
    executions: u64,
    cpu_time_ms: u64,
}

/// A part of what is left, or more where more is wanted at once; down to single units near the end.
fn lease(left: u64, wanted: u64) -> u64 {
    match wanted {
        0 => 0,
        wanted => left.min(wanted.max((left / SHARE).min(LARGEST_LEASE))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);
    const NOW: i64 = 1_700_000_040_000;

    fn executions(limit: u64) -> Budget {
        Budget { executions: Some(limit), cpu_time: None, window: MINUTE }
    }

    fn cpu_time(millis: u64) -> Budget {
        Budget { executions: None, cpu_time: Some(Duration::from_millis(millis)), window: MINUTE }
    }

    fn wants(wanted: u64) -> Visit {
        Visit { wanted, ..Visit::default() }
    }

    fn used(cpu_time_ms: u64) -> Visit {
        Visit { cpu_time_ms, ..Visit::default() }
    }

    #[test]
    fn a_lease_shrinks_with_what_is_left_down_to_single_units() {
        assert_eq!([128_000, 1280, 128, 127, 1, 0].map(|left| lease(left, 1)), [1000, 10, 1, 1, 1, 0]);
        assert_eq!((lease(1000, 300), lease(200, 300), lease(1000, 0)), (300, 200, 0));
        assert_eq!(lease(u64::MAX, 1), LARGEST_LEASE);
    }

    #[test]
    fn a_window_begins_where_unix_time_is_a_multiple_of_it() {
        let window = Window::at(NOW + 59_999, MINUTE);
        assert_eq!((window.start, window.end()), (NOW, NOW + 60_000));
        assert_eq!(Window::at(NOW + 60_000, MINUTE).start, NOW + 60_000);
        assert_eq!([NOW - 1, NOW + 5, NOW + 60_000].map(|now| window.moment(now)), [Some(NOW), Some(NOW + 5), None]);
        assert_eq!(Window::at(-1, MINUTE), Window { start: -60_000, millis: 60_000 });
    }

    #[test]
    fn a_budget_is_used_up_and_there_again_after_the_turn() {
        let budget = executions(100);
        let mut account = Account::new(NOW, &budget);
        assert_eq!(account.visit(NOW, &budget, &wants(60)).units, 60);
        let lease = account.visit(NOW + 1, &budget, &wants(60));
        assert_eq!((lease.units, lease.spent), (40, Some(Spent::Executions(100))));
        assert_eq!(account.visit(NOW + 59_999, &budget, &wants(1)).units, 0);
        let lease = account.visit(NOW + 60_000, &budget, &wants(60));
        assert_eq!((lease.units, lease.spent, lease.window.start), (60, None, NOW + 60_000));
    }

    #[test]
    fn a_slow_clock_uses_the_later_window() {
        let budget = executions(100);
        let mut account = Account::new(NOW, &budget);
        account.visit(NOW + 60_000, &budget, &wants(70));
        let late = account.visit(NOW + 59_000, &budget, &wants(70));
        assert_eq!((late.units, late.window.start), (30, NOW + 60_000));
    }

    #[test]
    fn what_is_not_used_goes_back_into_its_own_window_only() {
        let budget = executions(100);
        let mut account = Account::new(NOW, &budget);
        let lease = account.visit(NOW, &budget, &wants(100));
        let back = Visit { unused: Some((lease.window, 30)), ..Visit::default() };
        account.visit(NOW + 1, &budget, &back);
        assert_eq!(account.executions, 70);
        account.visit(NOW + 60_000, &budget, &wants(50));
        account.visit(NOW + 60_001, &budget, &back);
        assert_eq!(account.executions, 50);
    }

    #[test]
    fn a_budget_that_is_lowered_below_what_is_used_gives_nothing_until_the_turn() {
        let mut account = Account::new(NOW, &executions(100));
        account.visit(NOW, &executions(100), &wants(80));
        let lease = account.visit(NOW + 1, &executions(50), &wants(10));
        assert_eq!((lease.units, lease.spent), (0, Some(Spent::Executions(50))));
        assert_eq!(account.visit(NOW + 2, &executions(90), &wants(20)).units, 10, "raised again");
        assert_eq!(account.visit(NOW + 60_000, &executions(50), &wants(99)).units, 50);
    }

    #[test]
    fn what_was_used_counts_in_a_window_of_another_length_that_it_reaches_into() {
        let hour = Budget { window: Duration::from_secs(3600), ..executions(100) };
        let mut account = Account::new(NOW, &executions(100));
        account.visit(NOW, &executions(100), &wants(80));
        assert_eq!(account.visit(NOW + 1, &hour, &wants(100)).units, 20);
        assert_eq!(account.visit(NOW + 2, &executions(100), &wants(100)).units, 0, "and back");
        assert_eq!(account.visit(NOW + 60_000, &executions(100), &wants(100)).units, 100, "until the turn");
    }

    #[test]
    fn cpu_time_is_charged_afterwards_and_debt_is_carried_over() {
        let budget = cpu_time(1000);
        let mut account = Account::new(NOW, &budget);
        assert_eq!(account.visit(NOW, &budget, &used(999)).cpu_left_ms, Some(1));
        assert!(account.visit(NOW, &budget, &wants(1)).units >= 1, "while there is any left");
        let lease = account.visit(NOW, &budget, &Visit { wanted: 1, cpu_time_ms: 2101, ..Visit::default() });
        let spent = Some(Spent::CpuTime(Duration::from_secs(1)));
        assert_eq!((lease.units, lease.cpu_left_ms, lease.spent), (0, Some(0), spent));
        let lease = account.visit(NOW + 60_000, &budget, &wants(1));
        assert_eq!((lease.units, lease.spent), (0, spent), "2100 ms of debt");
        assert_eq!(account.visit(NOW + 180_000, &budget, &wants(1)).cpu_left_ms, Some(900), "two windows later 100");
    }

    #[test]
    fn what_is_kept_is_what_it_says() {
        let account = Account { window: Window { start: NOW, millis: 60_000 }, executions: 17, cpu_time_ms: 5 };
        let kept = account.encode();
        assert_eq!(
            kept,
            r#"{"version":"1","window_start":1700000040000,"window_ms":60000,"executions":17,"cpu_time_ms":5}"#
        );
        assert_eq!(Account::decode(&kept), Some(account));
        for (from, to) in
            [("\"1\"", "\"2\""), (":60000,", ":0,"), (":60000,", ":-60000,"), (":17,", ":-17,"), ("{", "")]
        {
            let text = String::from_utf8_lossy(&kept).replacen(from, to, 1);
            assert_eq!(Account::decode(text.as_bytes()), None, "{text}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// Whatever the clocks of those who come, in whatever order, and whatever they give back of what they got.
        #[test]
        fn no_window_gives_out_more_than_its_budget(
            limit in 1_u64..2000,
            visits in prop::collection::vec((0_i64..240_000, 0_u64..200, 0_u64..3, any::<bool>()), 1..80),
        ) {
            let budget = executions(limit);
            let mut account = Account::new(NOW, &budget);
            let mut given = std::collections::BTreeMap::<i64, u64>::new();
            let mut held: Option<(Window, u64)> = None;
            let mut last = account.window;
            for (moment, wanted, part, gives_back) in visits {
                let unused = held.filter(|_| gives_back).map(|(window, units)| (window, units * part / 2));
                let lease = account.visit(NOW + moment, &budget, &Visit { wanted, unused, cpu_time_ms: 0 });
                if let Some((window, units)) = unused {
                    *given.entry(window.start).or_default() -= units;
                }
                prop_assert!(lease.window.start >= last.start && lease.window.start % 60_000 == 0);
                prop_assert!(lease.units >= wanted || lease.spent.is_some());
                prop_assert_eq!(Account::decode(&account.encode()), Some(account.clone()));
                last = lease.window;
                *given.entry(lease.window.start).or_default() += lease.units;
                held = Some((lease.window, lease.units));
                prop_assert!(given.values().all(|units| *units <= limit), "{:?}", given);
            }
        }

        /// However a window's length and limit change: what is leased out stays within the largest limit so far.
        #[test]
        fn changed_budgets_never_give_out_more_than_the_largest_within_a_shortest_window(
            visits in prop::collection::vec((0_i64..500, 1_u64..50, 1_u64..100, 1_u64..4), 1..60),
        ) {
            let (mut now, mut given) = (NOW, Vec::<(i64, u64)>::new());
            let mut account = Account::new(now, &executions(1));
            for (passes, wanted, limit, seconds) in visits {
                now += passes;
                let budget = Budget { window: Duration::from_secs(seconds), ..executions(limit) };
                let lease = account.visit(now, &budget, &wants(wanted));
                given.push((now, lease.units));
                let since = Window::at(now, Duration::from_secs(1)).start;
                let in_this_second: u64 = given.iter().filter(|(at, _)| *at >= since).map(|(_, units)| units).sum();
                prop_assert!(in_this_second <= 100);
            }
        }

        /// CPU time is a debt until as many windows have paid for it.
        #[test]
        fn a_debt_is_paid_by_as_many_windows_as_it_takes(limit in 1_u64..5000, debt in 0_u64..50_000, later in 1_i64..20) {
            let budget = cpu_time(limit);
            let mut account = Account::new(NOW, &budget);
            account.visit(NOW, &budget, &used(debt));
            let lease = account.visit(NOW + later * 60_000, &budget, &wants(1));
            let rest = debt.saturating_sub(limit * later.unsigned_abs());
            prop_assert_eq!(lease.cpu_left_ms, Some(limit.saturating_sub(rest)));
            prop_assert_eq!(lease.units > 0, rest < limit);
        }

        #[test]
        fn no_bytes_are_an_account_that_could_hurt(bytes in prop::collection::vec(any::<u8>(), 0..80), start: i64, millis: i64) {
            let text = format!(r#"{{"version":"1","window_start":{start},"window_ms":{millis},"executions":{0},"cpu_time_ms":{0}}}"#, u64::MAX);
            for kept in [bytes.as_slice(), text.as_bytes()] {
                if let Some(mut account) = Account::decode(kept) {
                    account.visit(NOW, &executions(5), &Visit { wanted: 9, unused: None, cpu_time_ms: 9 });
                }
            }
        }
    }
}
