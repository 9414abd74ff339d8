//! The purse of each tenant: units of its budget that this worker has leased from the pool's account, and may use without
//! asking anybody.
//!
//! Whoever needs more than there is goes to the account, one at a time and for all who wait. An answer that is lost counts
//! against the tenant: units that may have been leased are not used, and units that may have been given back neither.

mod kept; // where the accounts are

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;

use super::account::{Account, Budget, Lease, Spent, Visit, Window};
use crate::backoff;
use crate::contract;
use crate::ids::TenantId;

pub use kept::Kept;

/// What is not used of a lease goes back after this, in milliseconds.
const TERM: i64 = 5_000;
/// How long it is believed that an account has nothing left, in milliseconds.
const BELIEVED: i64 = 1_000;
/// How long whoever needs units waits for an account that does not answer, in milliseconds.
const PATIENCE: i64 = 10_000;
/// A purse that has been empty and untouched for so long is forgotten, in milliseconds.
const FORGOTTEN: i64 = 60_000;
/// Accounts that are visited at once, of those that nobody waits for.
const VISITS: usize = 16;
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// Where the accounts of a pool are kept, and what time it is there.
pub trait Accounts: Send + Sync {
    /// Unix time in milliseconds, by this worker's clock.
    fn now(&self) -> i64;

    /// Returns after so long.
    fn pause(&self, time: Duration) -> impl Future<Output = ()> + Send;

    /// The value of a key, with its revision.
    fn read(&self, key: &str) -> impl Future<Output = Result<Option<(Bytes, u64)>, Unreachable>> + Send;

    /// Replaces the value of this revision; 0 where there is none yet.
    fn write(&self, key: &str, value: Bytes, revision: u64) -> impl Future<Output = Written> + Send;
}

/// Nobody answers for the accounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unreachable;

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// It stands.
    Stored,
    /// Somebody else has written since.
    Refused,
    /// It does not stand, and will not.
    Failed,
    /// It may stand, now or later.
    Unknown,
}

/// The purses of all tenants that have a budget.
#[derive(Debug)]
pub struct Budgets<A> {
    accounts: A,
    pool: String,
    purses: Mutex<BTreeMap<TenantId, Arc<Purse>>>,
}

/// One tenant's.
#[derive(Debug)]
struct Purse {
    key: String,
    state: Mutex<State>,
    /// Held by whoever visits the account.
    counter: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct State {
    budget: Budget,
    /// Of the units.
    window: Option<Window>,
    units: u64,
    /// When they go back.
    term_ends: i64,
    /// Whether they go back now, whatever the term.
    is_over: bool,
    /// At the last visit.
    cpu_left_ms: Option<u64>,
    /// Used since then, and not charged yet.
    cpu_time: Duration,
    /// Units that are waited for.
    asked_for: u64,
    /// Why there is nothing, as it was known at the first of these moments, until the second.
    known: Option<(Short, i64, i64)>,
    touched: i64,
}

/// What came of taking units.
#[derive(Debug)]
pub struct Taken {
    /// What there is.
    pub grant: Grant,
    /// Why there is less than was asked for.
    pub short: Option<Short>,
}

/// Why a tenant gets no more units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Short {
    /// Its budget is used up for this window.
    Spent(Spent, Window),
    /// Its account could not be asked.
    Unreachable,
}

/// Units that were taken together. Those that nobody has taken out go back into the purse.
#[derive(Debug)]
pub struct Grant {
    units: u64,
    charge: Charge,
}

/// One execution's unit of a budget: used, unless it is given back.
#[derive(Clone, Debug)]
pub struct Charge {
    purse: Arc<Purse>,
    window: Window,
    moment: i64,
}

impl Grant {
    /// How many there are.
    pub const fn units(&self) -> u64 {
        self.units
    }
}

impl Iterator for Grant {
    type Item = Charge;

    fn next(&mut self) -> Option<Charge> {
        self.units = self.units.checked_sub(1)?;
        Some(self.charge.clone())
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        self.charge.purse.lock().put_back(self.charge.window, self.units);
    }
}

impl Charge {
    /// When the unit was taken, in Unix milliseconds: a moment of its window, also where this worker's clock is slow.
    pub fn moment(&self) -> i64 {
        self.moment
    }

    /// Nothing was executed for it.
    pub fn give_back(self) {
        self.purse.lock().put_back(self.window, 1);
    }
}

impl<A: Accounts> Budgets<A> {
    /// No purses yet; `pool` names all workers that share the accounts.
    pub fn new(accounts: A, pool: &str) -> Self {
        Self { accounts, pool: contract::escape(pool).into_owned(), purses: Mutex::default() }
    }

    /// Unix time in milliseconds, by this worker's clock.
    pub fn now(&self) -> i64 {
        self.accounts.now()
    }

    /// Units for so many executions, or fewer, where that is known without asking anybody.
    pub fn at_hand(&self, tenant: &TenantId, budget: Budget, count: u64) -> Option<Taken> {
        self.purse(tenant, budget).take(self.accounts.now(), budget, count)
    }

    /// What there is here for so many executions, where the account is not waited for.
    pub fn take_here(&self, tenant: &TenantId, budget: Budget, count: u64) -> Taken {
        let (purse, now) = (self.purse(tenant, budget), self.accounts.now());
        let taken = purse.lock().take_here(now, budget, count);
        purse.taken(now, taken)
    }

    /// Takes units for so many executions: as many as there are, where there are fewer.
    pub async fn take(&self, tenant: &TenantId, budget: Budget, count: u64) -> Taken {
        let purse = self.purse(tenant, budget);
        let began = self.accounts.now();
        if let Some(taken) = purse.take(began, budget, count) {
            return taken;
        }
        let _asking = Asking::new(&purse, count);
        let _at_the_counter = purse.counter.lock().await;
        let mut failures = 0;
        loop {
            // Whoever was here before may have brought enough.
            let now = self.accounts.now();
            if let Some(taken) = purse.take(now, budget, count) {
                return taken;
            }
            if self.visit(&purse).await.is_ok() {
                continue;
            }
            let now = self.accounts.now();
            if now.saturating_sub(began) >= PATIENCE {
                purse.lock().learn_that(Short::Unreachable, now, now + BELIEVED);
                continue;
            }
            self.accounts.pause(backoff::doubling(FIRST_PAUSE, MAX_PAUSE, failures, fastrand::f64())).await;
            failures += 1;
        }
    }

    /// Charges CPU time that was used, with the next visit.
    pub fn charge_cpu_time(&self, tenant: &TenantId, budget: Budget, time: Duration) {
        if budget.cpu_time.is_some() {
            self.purse(tenant, budget).lock().cpu_time += time;
        }
    }

    /// Gives back what leases have left at their end, and charges CPU time. What cannot be done now is tried by the next.
    pub async fn settle(&self) {
        let now = self.accounts.now();
        let purses = {
            let mut purses = self.purses();
            purses.retain(|_, purse| Arc::strong_count(purse) > 1 || !purse.lock().may_be_forgotten(now));
            let due = purses.values().filter(|purse| purse.lock().is_due(now));
            due.cloned().collect::<Vec<_>>()
        };
        let visits = futures::stream::iter(purses);
        visits
            .for_each_concurrent(VISITS, |purse| async move {
                // Whoever is at the counter does it along.
                if let Ok(_at_the_counter) = purse.counter.try_lock() {
                    let _ = self.visit(&purse).await;
                }
            })
            .await;
    }

    /// Gives everything back.
    pub async fn close(&self) {
        self.purses().values().for_each(|purse| purse.lock().is_over = true);
        self.settle().await;
    }

    /// Puts into the purse what those who wait for units need, gives back what is over, and charges what was used.
    async fn visit(&self, purse: &Purse) -> Result<(), Unreachable> {
        let mut conflicts = 0;
        loop {
            let found = self.accounts.read(&purse.key).await?;
            let now = self.accounts.now();
            let (budget, visit) = purse.lock().plan(now);
            let (mut account, revision) = match found {
                None => (Account::new(now, &budget), 0),
                Some((kept, revision)) => {
                    let account = Account::decode(&kept).unwrap_or_else(|| {
                        tracing::warn!(key = purse.key, "what is kept of a budget is no account: it begins anew");
                        Account::new(now, &budget)
                    });
                    (account, revision)
                }
            };
            let lease = account.visit(now, &budget, &visit);
            if lease.units == 0 && visit.unused.is_none() && visit.cpu_time_ms == 0 {
                purse.lock().learn(&visit, lease, now);
                return Ok(());
            }
            match self.accounts.write(&purse.key, account.encode(), revision).await {
                Written::Stored => {
                    purse.lock().learn(&visit, lease, now);
                    return Ok(());
                }
                Written::Refused => purse.lock().undo(&visit),
                Written::Failed => {
                    purse.lock().undo(&visit);
                    return Err(Unreachable);
                }
                Written::Unknown => return Err(Unreachable),
            }
            self.accounts.pause(backoff::doubling(FIRST_PAUSE, MAX_PAUSE / 20, conflicts, fastrand::f64())).await;
            conflicts += 1;
        }
    }

    fn purse(&self, tenant: &TenantId, budget: Budget) -> Arc<Purse> {
        let mut purses = self.purses();
        if let Some(purse) = purses.get(tenant) {
            return Arc::clone(purse);
        }
        let key = format!("{}.{}", self.pool, contract::escape(tenant.as_str()));
        let purse =
            Arc::new(Purse { key, state: Mutex::new(State::new(budget)), counter: tokio::sync::Mutex::default() });
        purses.insert(tenant.clone(), Arc::clone(&purse));
        purse
    }

    fn purses(&self) -> MutexGuard<'_, BTreeMap<TenantId, Arc<Purse>>> {
        self.purses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Purse {
    /// What can be told without visiting the account.
    fn take(self: &Arc<Self>, now: i64, budget: Budget, count: u64) -> Option<Taken> {
        let taken = self.lock().take(now, budget, count)?;
        Some(self.taken(now, taken))
    }

    fn taken(self: &Arc<Self>, now: i64, (window, units, short): (Window, u64, Option<Short>)) -> Taken {
        let charge = Charge { purse: Arc::clone(self), window, moment: window.moment(now).unwrap_or(now) };
        Taken { grant: Grant { units, charge }, short }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn new(budget: Budget) -> Self {
        Self {
            budget,
            window: None,
            units: 0,
            term_ends: 0,
            is_over: false,
            cpu_left_ms: None,
            cpu_time: Duration::ZERO,
            asked_for: 0,
            known: None,
            touched: 0,
        }
    }

    fn take(&mut self, now: i64, budget: Budget, count: u64) -> Option<(Window, u64, Option<Short>)> {
        let (window, usable) = self.usable(now, budget);
        if let Some(window) = window.filter(|_| usable >= count) {
            self.units -= count;
            return Some((window, count, None));
        }
        // A clock that was set back knows nothing.
        let (short, _, _) = self.known.filter(|(_, since, until)| (*since..*until).contains(&now))?;
        Some(self.take_what_there_is(now, short))
    }

    fn take_here(&mut self, now: i64, budget: Budget, count: u64) -> (Window, u64, Option<Short>) {
        let taken = self.take(now, budget, count);
        taken.unwrap_or_else(|| self.take_what_there_is(now, Short::Unreachable))
    }

    /// Fewer than were asked for.
    fn take_what_there_is(&mut self, now: i64, short: Short) -> (Window, u64, Option<Short>) {
        let (window, usable) = self.usable(now, self.budget);
        let window = match short {
            Short::Spent(_, window) => window,
            Short::Unreachable => window.unwrap_or_else(|| Window::at(now, self.budget.window)),
        };
        let units = if self.window == Some(window) { usable } else { 0 };
        self.units -= units;
        (window, units, Some(short))
    }

    /// How many units may be used at this moment, and of which window.
    fn usable(&mut self, now: i64, budget: Budget) -> (Option<Window>, u64) {
        self.touched = now;
        if self.budget != budget {
            // What was leased under another one goes back first.
            (self.budget, self.is_over, self.known, self.cpu_left_ms) = (budget, self.units > 0, None, None);
        }
        let window = self.usable_window(now);
        let has_cpu_time = self.cpu_left_ms.is_none_or(|left| contract::millis(self.cpu_time) < left);
        let usable = if window.is_some() && has_cpu_time && !self.is_over { self.units } else { 0 };
        (window, usable)
    }

    /// Units that have not been used after all. What belongs to another window is lost.
    fn put_back(&mut self, window: Window, units: u64) {
        if self.window == Some(window) {
            self.units += units;
        }
    }

    fn is_due(&self, now: i64) -> bool {
        self.is_over_at(now) || (self.budget.cpu_time.is_some() && contract::millis(self.cpu_time) > 0)
    }

    /// Whether units go back. Those of a window that is over are void.
    fn is_over_at(&self, now: i64) -> bool {
        self.usable_window(now).is_some() && self.units > 0 && (self.is_over || now >= self.term_ends)
    }

    fn may_be_forgotten(&self, now: i64) -> bool {
        !self.is_due(now) && now.saturating_sub(self.touched) >= FORGOTTEN
    }

    fn usable_window(&self, now: i64) -> Option<Window> {
        self.window.filter(|window| window.moment(now).is_some())
    }

    /// What to visit the account for; what it takes there is not here meanwhile.
    fn plan(&mut self, now: i64) -> (Budget, Visit) {
        let unused = self.window.filter(|_| self.is_over_at(now)).map(|window| (window, self.units));
        if unused.is_some() || self.usable_window(now).is_none() {
            self.units = 0;
        }
        self.is_over = false;
        let cpu_time_ms = if self.budget.cpu_time.is_some() { contract::millis(self.cpu_time) } else { 0 };
        self.cpu_time -= Duration::from_millis(cpu_time_ms);
        (self.budget, Visit { wanted: self.asked_for.saturating_sub(self.units), unused, cpu_time_ms })
    }

    /// It did not happen.
    fn undo(&mut self, visit: &Visit) {
        if let Some((window, units)) = visit.unused {
            self.put_back(window, units);
            self.is_over = true;
        }
        self.cpu_time += Duration::from_millis(visit.cpu_time_ms);
    }

    fn learn(&mut self, visit: &Visit, lease: Lease, now: i64) {
        let Lease { window, units, cpu_left_ms, spent } = lease;
        if self.window != Some(window) {
            (self.window, self.units) = (Some(window), 0);
        }
        if units > 0 {
            self.term_ends = now.saturating_add(TERM);
        }
        self.units += units;
        self.cpu_left_ms = cpu_left_ms;
        self.known = None;
        if let Some(spent) = spent.filter(|_| units < visit.wanted || cpu_left_ms == Some(0)) {
            self.learn_that(Short::Spent(spent, window), now, window.end().min(now.saturating_add(BELIEVED)));
        }
    }

    fn learn_that(&mut self, short: Short, since: i64, until: i64) {
        self.known = Some((short, since, until));
    }
}

/// Units that somebody waits for.
struct Asking<'p> {
    purse: &'p Purse,
    count: u64,
}

impl<'p> Asking<'p> {
    fn new(purse: &'p Purse, count: u64) -> Self {
        purse.lock().asked_for += count;
        Self { purse, count }
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.purse.lock().asked_for -= self.count;
    }
}
