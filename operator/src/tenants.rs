//! What tenants use of what they may: what the broker keeps of it, and what workers say. Pure: no client, time is an
//! argument.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use beamline_crds::{Exceeded, TenantStatus};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::Deserialize;

use crate::pool::{Limits, Quotas};
use crate::reports::{Crew, TenantReport, by_tenant};

/// As many tenants are shown.
pub const SHOWN: usize = 20;

/// What the broker keeps of tenants.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Kept {
    /// What each has used of its budget that was asked about.
    pub accounts: BTreeMap<String, Account>,
    /// Blocks that each may run at once, as workers have shared them out among them.
    pub slots: BTreeMap<String, Leases>,
    /// What each has parked; `None` where nothing is.
    pub parked: Option<BTreeMap<String, Parked>>,
}

/// What a tenant has used of its budget in a window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Account {
    /// Unix time in milliseconds.
    window_start: i64,
    /// How long the window is.
    window_ms: i64,
    /// Executions that workers have leased.
    executions: i64,
    /// CPU time, charged when it has been used; more than the budget is debt.
    cpu_time_ms: i64,
}

/// Who runs how many blocks of a tenant at once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Leases {
    leases: BTreeMap<String, Lease>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
struct Lease {
    slots: i64,
    /// Unix time in milliseconds.
    until: i64,
}

/// What a tenant has parked, by the class of workers that it waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parked {
    /// For those without GPU slots.
    pub general: Shelf,
    /// For those with some.
    pub gpu: Shelf,
}

/// Assignments that are parked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shelf {
    /// That no worker has taken yet.
    pub waiting: i64,
    /// That workers hold.
    pub in_flight: i64,
}

/// What tenants do in a pool at a moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tenants {
    /// The busiest of them.
    pub busiest: Vec<TenantStatus>,
    /// What is parked of all of them; `None` where nothing can be.
    pub parked: Option<i64>,
    /// What of it is work for workers without GPU slots.
    pub general: Taken,
    /// And for those with some.
    pub gpu: Taken,
}

/// Parked work that is demand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// It may run now.
    pub runnable: i64,
    /// Workers hold it.
    pub in_flight: i64,
}

impl Parked {
    fn waiting(self) -> i64 {
        self.general.waiting.saturating_add(self.gpu.waiting)
    }
}

impl Taken {
    /// Both.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self {
            runnable: self.runnable.saturating_add(other.runnable),
            in_flight: self.in_flight.saturating_add(other.in_flight),
        }
    }
}

impl Account {
    /// What is used of the window of this moment: nothing of one that is over, but for CPU time that is still owed.
    fn at(self, now: i64, quotas: &Quotas) -> Self {
        let length = i64::try_from(quotas.window.as_millis()).unwrap_or(i64::MAX).max(1);
        let start = now.saturating_sub(now.rem_euclid(length)).max(self.window_start);
        if start < self.window_start.saturating_add(self.window_ms) {
            return self;
        }
        let turns = start.saturating_sub(self.window_start) / self.window_ms.max(1);
        let paid = quotas.cpu_time_ms.map_or(i64::MAX, |limit| limit.saturating_mul(turns));
        let cpu_time_ms = self.cpu_time_ms.saturating_sub(paid).max(0);
        Self { window_start: start, window_ms: length, executions: 0, cpu_time_ms }
    }

    /// Executions that may begin before the window ends.
    fn left(self, quotas: &Quotas) -> i64 {
        if quotas.cpu_time_ms.is_some_and(|limit| self.cpu_time_ms >= limit) {
            return 0;
        }
        quotas.executions.map_or(i64::MAX, |limit| limit.saturating_sub(self.executions).max(0))
    }

    /// Which budgets are used up, and when they are there again.
    fn exceeded(self, quotas: &Quotas) -> Option<Exceeded> {
        let is_used_up = |limit: Option<i64>, used: i64| limit.is_some_and(|limit| used >= limit);
        let executions = is_used_up(quotas.executions, self.executions).then_some("executions");
        let cpu_time = is_used_up(quotas.cpu_time_ms, self.cpu_time_ms).then_some("cpuTimeMs");
        let budget = [executions, cpu_time].into_iter().flatten().collect::<Vec<_>>().join(", ");
        let end = self.window_start.saturating_add(self.window_ms);
        let until = Timestamp::from_second(end.saturating_add(999).div_euclid(1000)).ok()?;
        (!budget.is_empty()).then_some(Exceeded { budget, until: Time(until) })
    }
}

impl Leases {
    fn taken(&self, now: i64) -> i64 {
        let valid = self.leases.values().filter(|lease| lease.until > now);
        valid.fold(0, |sum, lease| sum.saturating_add(lease.slots.max(0)))
    }
}

impl Kept {
    /// How much of what this tenant has parked may run now. Of one that was not asked about nothing: its turn comes when
    /// others have less parked.
    fn room(&self, tenant: &str, quotas: &Quotas, now: i64) -> i64 {
        if !quotas.are_some() {
            return i64::MAX;
        }
        let Some(account) = self.accounts.get(tenant) else { return 0 };
        let taken = self.slots.get(tenant).map_or(0, |leases| leases.taken(now));
        let room = quotas.concurrent.map_or(i64::MAX, |limit| limit.saturating_sub(taken).max(0));
        account.at(now, quotas).left(quotas).min(room)
    }
}

/// What tenants do now.
pub fn tenants(limits: &Limits, kept: &Kept, crews: [&Crew; 2], now: Timestamp) -> Tenants {
    let now = now.as_millisecond();
    let said = by_tenant(crews.into_iter().flat_map(|crew| &crew.tenants));
    let parked = kept.parked.iter().flatten();
    let (mut general, mut gpu, mut waiting) = (Taken::default(), Taken::default(), 0_i64);
    for (tenant, parked) in parked.clone() {
        let mut room = kept.room(tenant, &limits.of(tenant), now);
        let mut taken = |shelf: Shelf| {
            let runnable = shelf.waiting.min(room);
            room -= runnable;
            Taken { runnable, in_flight: shelf.in_flight }
        };
        general = general.plus(taken(parked.general));
        gpu = gpu.plus(taken(parked.gpu));
        waiting = waiting.saturating_add(parked.waiting());
    }
    let known = said.keys().copied().chain(parked.map(|(tenant, _)| tenant.as_str()));
    let mut known: Vec<&str> = known.chain(kept.accounts.keys().map(String::as_str)).collect();
    known.sort_unstable();
    known.dedup();
    let rows = known.into_iter().map(|tenant| {
        let said = said.get(tenant).cloned().unwrap_or_default();
        row(tenant, &said, limits, kept, now)
    });
    let mut busiest: Vec<TenantStatus> = rows.filter(is_something).collect();
    busiest.sort_by_cached_key(|row| (Reverse((row.running + row.queued, row.executions_used)), row.id.clone()));
    busiest.truncate(SHOWN);
    Tenants { busiest, parked: kept.parked.is_some().then_some(waiting), general, gpu }
}

fn row(tenant: &str, said: &TenantReport, limits: &Limits, kept: &Kept, now: i64) -> TenantStatus {
    let quotas = limits.of(tenant);
    let account = kept.accounts.get(tenant).filter(|_| quotas.have_a_budget()).map(|account| account.at(now, &quotas));
    TenantStatus {
        id: tenant.to_owned(),
        // Of one that is not bounded, workers lease more than they use.
        executions_used: account.filter(|_| quotas.executions.is_some()).map(|account| account.executions),
        executions_limit: quotas.executions,
        cpu_time_ms_used: account.map(|account| account.cpu_time_ms),
        cpu_time_ms_limit: quotas.cpu_time_ms,
        running: i64::from(said.running),
        queued: i64::from(said.queued),
        parked: kept.parked.as_ref().and_then(|parked| parked.get(tenant)).map_or(0, |parked| parked.waiting()),
        refused: i64::try_from(said.refused).unwrap_or(i64::MAX),
        exceeded: account.and_then(|account| account.exceeded(&quotas)),
    }
}

/// Whether it does anything, or has done something in this window.
fn is_something(row: &TenantStatus) -> bool {
    let used = row.executions_used.unwrap_or(0).max(row.cpu_time_ms_used.unwrap_or(0));
    [row.running, row.queued, row.parked, row.refused, used].into_iter().any(|number| number > 0)
}

/// Tenants whose accounts matter, at most so many: those that do something, those that may run what is parked, and those
/// that have used something of this window.
pub fn to_ask_about(limits: &Limits, kept: &Kept, crews: [&Crew; 2], now: Timestamp, most: usize) -> BTreeSet<String> {
    let said = crews.into_iter().flat_map(|crew| &crew.tenants).map(|one| &one.id);
    let mut parked: Vec<(&String, &Parked)> = kept.parked.iter().flatten().collect();
    parked.sort_by_key(|(_, parked)| Reverse(parked.waiting()));
    let now = now.as_millisecond();
    let has_used = |(tenant, account): &(&String, &Account)| {
        let Account { executions, cpu_time_ms, .. } = account.at(now, &limits.of(tenant));
        executions > 0 || cpu_time_ms > 0
    };
    let before = kept.accounts.iter().filter(has_used).map(|(tenant, _)| tenant);
    let all = said.chain(parked.into_iter().map(|(tenant, _)| tenant)).chain(before);
    let mut chosen = BTreeSet::new();
    for tenant in all.filter(|tenant| limits.of(tenant).are_some()) {
        if chosen.len() < most {
            chosen.insert(tenant.clone());
        }
    }
    chosen
}

#[cfg(test)]
mod tests;
