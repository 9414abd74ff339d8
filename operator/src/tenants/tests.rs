//! Windows that turn, ceilings that have room, and what people are told of them.

use serde_json::{Value, json};

use super::*;
use crate::pool::tests::valid;

/// A minute begins with it.
const NOON: i64 = 1_795_608_000_000;

fn at(millis: i64) -> Timestamp {
    Timestamp::from_millisecond(NOON + millis).expect("in range")
}

fn limits(tenants: Value) -> Limits {
    valid(&json!({"tenants": tenants}).to_string()).limits
}

fn account(start: i64, executions: i64, cpu_time_ms: i64) -> Account {
    let kept = json!({"version": "1", "window_start": NOON + start, "window_ms": 60_000, "executions": executions, "cpu_time_ms": cpu_time_ms});
    serde_json::from_value(kept).expect("an account")
}

fn one<T>(value: T) -> BTreeMap<String, T> {
    BTreeMap::from([("acme".to_owned(), value)])
}

fn parked(waiting: i64) -> Option<BTreeMap<String, Parked>> {
    Some(one(Parked { general: Shelf { waiting, in_flight: 0 }, ..Parked::default() }))
}

fn crew(reports: &[(&str, u32, u32, u64)]) -> Crew {
    let report = |(id, running, queued, refused): &(&str, u32, u32, u64)| TenantReport {
        id: (*id).to_owned(),
        running: *running,
        queued: *queued,
        refused: *refused,
    };
    Crew { tenants: reports.iter().map(report).collect(), ..Crew::default() }
}

fn seen(limits: &Limits, kept: &Kept, crew: &Crew, millis: i64) -> Tenants {
    tenants(limits, kept, [crew, &Crew::default()], at(millis))
}

fn runnable(limits: &Limits, kept: &Kept, millis: i64) -> i64 {
    seen(limits, kept, &Crew::default(), millis).general.runnable
}

#[test]
fn parked_work_may_run_when_its_window_has_turned_and_not_before() {
    let limits = limits(json!({"defaults": {"onExceeded": "Defer", "quotas": {"executions": 100, "window": "1m"}}}));
    let kept = Kept { accounts: one(account(0, 100, 0)), parked: parked(250), ..Kept::default() };
    assert_eq!([0, 59_999].map(|now| runnable(&limits, &kept, now)), [0, 0]);
    assert_eq!(runnable(&limits, &kept, 60_000), 100, "as much as the new window has");
    let given_back = Kept { accounts: one(account(0, 93, 0)), ..kept.clone() };
    assert_eq!(runnable(&limits, &given_back, 1), 7, "workers have given units back");
    assert_eq!(runnable(&limits, &kept, -3_600_000), 0, "a clock that is behind opens no window");
    let unknown = Kept { accounts: BTreeMap::new(), ..kept };
    assert_eq!(runnable(&limits, &unknown, 60_000), 0, "it was not asked about");
}

#[test]
fn cpu_time_that_is_owed_is_paid_with_the_windows_to_come() {
    let limits = limits(json!({"defaults": {"quotas": {"cpuTimeMs": 1000, "window": "1m"}}}));
    let kept = Kept { accounts: one(account(0, 0, 3500)), parked: parked(5), ..Kept::default() };
    let owed = [0, 60_000, 120_000, 179_999, 180_000];
    assert_eq!(owed.map(|now| runnable(&limits, &kept, now)), [0, 0, 0, 0, 5]);
    let said = seen(&limits, &kept, &Crew::default(), 120_000).busiest.remove(0);
    assert_eq!((said.cpu_time_ms_used, said.cpu_time_ms_limit), (Some(1500), Some(1000)));
}

#[test]
fn work_over_a_ceiling_may_run_when_slots_are_free_or_their_holder_is_gone() {
    let limits = limits(json!({"named": [{"id": "acme", "quotas": {"concurrent": 4}}]}));
    let leases = json!({"version": "1", "leases": {
        "a": {"slots": 3, "until": NOON + 30_000}, "b": {"slots": 1, "until": NOON + 20_000},
    }});
    let leases: Leases = serde_json::from_value(leases).expect("leases");
    let accounts = one(Account::default());
    let kept = Kept { accounts, slots: one(leases), parked: parked(9) };
    assert_eq!([0, 20_000, 30_000].map(|now| runnable(&limits, &kept, now)), [0, 1, 4]);
    let few = Kept { parked: parked(2), ..kept };
    assert_eq!(runnable(&limits, &few, 30_000), 2);
}

#[test]
fn work_for_gpu_slots_is_demand_of_its_own_class_and_shares_its_tenants_room() {
    let limits = limits(json!({"defaults": {"onExceeded": "Defer", "quotas": {"executions": 100, "window": "1m"}}}));
    let shelves = |general, gpu| {
        Some(one(Parked {
            general: Shelf { waiting: general, in_flight: 1 },
            gpu: Shelf { waiting: gpu, in_flight: 2 },
        }))
    };
    let said = |general, gpu| {
        let kept = Kept { accounts: one(account(0, 93, 0)), parked: shelves(general, gpu), ..Kept::default() };
        seen(&limits, &kept, &Crew::default(), 1)
    };
    let taken = |runnable, in_flight| Taken { runnable, in_flight };
    let told = |general, gpu| (said(general, gpu).general, said(general, gpu).gpu, said(general, gpu).parked);
    assert_eq!(told(0, 3), (taken(0, 1), taken(3, 2), Some(3)));
    assert_eq!(told(5, 9), (taken(5, 1), taken(2, 2), Some(14)), "seven units in all");
    assert_eq!(told(9, 9), (taken(7, 1), taken(0, 2), Some(18)));
}

#[test]
fn what_is_bounded_no_more_may_all_run() {
    let kept = Kept { parked: parked(9), ..Kept::default() };
    assert_eq!(runnable(&Limits::default(), &kept, 0), 9);
}

#[test]
fn the_busiest_are_shown_with_what_they_use_and_may_use() {
    let limits = limits(json!({
        "defaults": {"quotas": {"executions": 6000}},
        "named": [{"id": "acme", "quotas": {"executions": 60000, "cpuTimeMs": 5000}}, {"id": "free"}],
    }));
    let accounts = BTreeMap::from([
        ("acme".to_owned(), account(0, 1234, 812)),
        ("used".to_owned(), account(0, 6000, 0)),
        ("over".to_owned(), account(-60_000, 6000, 0)),
    ]);
    let kept = Kept { accounts, parked: parked(3), ..Kept::default() };
    let said = seen(&limits, &kept, &crew(&[("acme", 12, 30, 0), ("free", 1, 0, 0), ("quiet", 0, 0, 7)]), 1000);
    let rows = serde_json::to_value(&said.busiest).expect("plain data");
    let expected = json!([
        {"id": "acme", "executionsUsed": 1234, "executionsLimit": 60000, "cpuTimeMsUsed": 812, "cpuTimeMsLimit": 5000,
            "running": 12, "queued": 30, "parked": 3, "refused": 0},
        {"id": "free", "executionsLimit": 6000, "running": 1, "queued": 0, "parked": 0, "refused": 0},
        {"id": "used", "executionsUsed": 6000, "executionsLimit": 6000, "cpuTimeMsUsed": 0,
            "running": 0, "queued": 0, "parked": 0, "refused": 0,
            "exceeded": {"budget": "executions", "until": "2026-11-25T12:01:00Z"}},
        {"id": "quiet", "executionsLimit": 6000, "running": 0, "queued": 0, "parked": 0, "refused": 7},
    ]);
    assert_eq!(rows, expected);
    assert_eq!(said.parked, Some(3));
}

#[test]
fn a_window_that_is_over_says_nothing_any_more() {
    let limits = limits(json!({"defaults": {"quotas": {"executions": 10, "cpuTimeMs": 10}}}));
    let kept = Kept { accounts: one(account(0, 10, 10)), ..Kept::default() };
    let exceeded = seen(&limits, &kept, &Crew::default(), 1).busiest.remove(0).exceeded.expect("both");
    assert_eq!(exceeded.budget, "executions, cpuTimeMs");
    let after = [60_000, 60_500, 600_000].map(|now| seen(&limits, &kept, &Crew::default(), now));
    assert_eq!(after, [Tenants::default(), Tenants::default(), Tenants::default()], "and then nothing changes");
    assert!(to_ask_about(&limits, &kept, [&Crew::default(), &Crew::default()], at(60_000), 9).is_empty());
}

#[test]
fn however_many_tenants_there_are_twenty_are_shown_and_not_too_many_asked_about() {
    let limits = limits(json!({"defaults": {"quotas": {"executions": 10}}}));
    let on_the_shelf = |waiting| Parked { general: Shelf { waiting, in_flight: 1 }, ..Parked::default() };
    let all: BTreeMap<String, Parked> =
        (0..10_000).map(|number| (format!("t{number}"), on_the_shelf(number))).collect();
    let kept = Kept { parked: Some(all), ..Kept::default() };
    let crew = crew(&[("busy", 1, 1, 0)]);
    let said = seen(&limits, &kept, &crew, 0);
    assert_eq!((said.busiest.len(), said.busiest[0].id.as_str(), said.general.in_flight), (SHOWN, "busy", 10_000));
    let asked = to_ask_about(&limits, &kept, [&crew, &Crew::default()], at(0), 100);
    assert!(asked.len() == 100 && asked.contains("busy") && asked.contains("t9999"), "{asked:?}");
    assert!(to_ask_about(&Limits::default(), &kept, [&crew, &Crew::default()], at(0), 100).is_empty());
}
