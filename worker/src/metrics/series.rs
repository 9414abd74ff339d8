//! How series are made: each from the start, at 0, with its labels resolved once.

use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

use super::IgnoredAnswer;
use crate::blocks::BlockKind;
use crate::contract::{Stage, Status};
use crate::fault::Cause;
use crate::pool::ByPool;

/// Public: alerts are written against these bounds.
const LATENCY_BUCKETS_MS: [f64; 12] =
    [5.0, 10.0, 25.0, 50.0, 100.0, 200.0, 300.0, 500.0, 1000.0, 2500.0, 5000.0, 10_000.0];
/// The codes that a refusal can carry, shown from the start.
const REJECTIONS: [Cause; 7] = [
    Cause::InvalidInput,
    Cause::MissingField,
    Cause::InvalidFormat,
    Cause::NoSuchPool,
    Cause::NotAllowed,
    Cause::OverBudget,
    Cause::Overloaded,
];
const LATENCY: &str = "Milliseconds from the start of a task to its end, retries included";
/// The series of finished tasks.
pub(super) const TASKS: &str = "worker_tasks_total";
const USAGE: &str = "CPU time that blocks have used since the start (cpu_time_ms), payloads, results and reservations held now (memory_mb)";

/// One value per block kind. A new kind does not compile until it has its series.
#[derive(Debug)]
pub(super) struct ByKind<T> {
    http: T,
    fs_put: T,
    fs_get: T,
    sql: T,
    human: T,
}

impl<T> ByKind<T> {
    pub(super) fn new(make: impl Fn(BlockKind) -> T) -> Self {
        Self {
            http: make(BlockKind::Http),
            fs_put: make(BlockKind::FsPut),
            fs_get: make(BlockKind::FsGet),
            sql: make(BlockKind::Sql),
            human: make(BlockKind::Human),
        }
    }

    pub(super) const fn of(&self, kind: BlockKind) -> &T {
        match kind {
            BlockKind::Http => &self.http,
            BlockKind::FsPut => &self.fs_put,
            BlockKind::FsGet => &self.fs_get,
            BlockKind::Sql => &self.sql,
            BlockKind::Human => &self.human,
        }
    }
}

/// One value per status of a finished task.
#[derive(Debug)]
pub(super) struct ByStatus<T> {
    success: T,
    error: T,
    timeout: T,
    cancelled: T,
}

impl<T> ByStatus<T> {
    pub(super) fn new(make: impl Fn(Status) -> T) -> Self {
        Self {
            success: make(Status::Success),
            error: make(Status::Error),
            timeout: make(Status::Timeout),
            cancelled: make(Status::Cancelled),
        }
    }

    pub(super) const fn of(&self, status: Status) -> &T {
        match status {
            Status::Success => &self.success,
            Status::Error => &self.error,
            Status::Timeout => &self.timeout,
            Status::Cancelled => &self.cancelled,
        }
    }
}

pub(super) fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

pub(super) fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

pub(super) fn tasks(registry: &Registry) -> ByKind<ByStatus<IntCounter>> {
    let tasks = counters(registry, TASKS, "Tasks finished, by block type and status", &["type", "status"]);
    ByKind::new(|kind| ByStatus::new(|status| tasks.with_label_values(&[kind.as_str(), status.as_str()])))
}

pub(super) fn latency(registry: &Registry) -> ByKind<Histogram> {
    let options = HistogramOpts::new("worker_task_latency_ms", LATENCY).buckets(LATENCY_BUCKETS_MS.to_vec());
    let latency = register(registry, HistogramVec::new(options, &["type"]));
    ByKind::new(|kind| latency.with_label_values(&[kind.as_str()]))
}

pub(super) fn usage(registry: &Registry) -> GaugeVec {
    register(registry, GaugeVec::new(Opts::new("worker_resource_usage", USAGE), &["type"]))
}

pub(super) fn retries(registry: &Registry) -> ByKind<IntCounter> {
    let retries = counters(registry, "worker_retries_total", "Attempts after the first, by block type", &["type"]);
    ByKind::new(|kind| retries.with_label_values(&[kind.as_str()]))
}

pub(super) fn rejected(registry: &Registry) -> IntCounterVec {
    let rejected =
        counters(registry, "worker_assignments_rejected_total", "Assignments refused, by error code", &["code"]);
    for cause in REJECTIONS {
        rejected.with_label_values(&[&cause.code().to_string()]);
    }
    rejected
}

pub(super) fn answers_ignored(registry: &Registry) -> IntCounterVec {
    let help = "Answers to approvals that do not count, by the reason";
    let ignored = counters(registry, "worker_approval_answers_ignored_total", help, &["reason"]);
    for why in IgnoredAnswer::ALL {
        ignored.with_label_values(&[why.as_str()]);
    }
    ignored
}

pub(super) fn dead_letters(registry: &Registry) -> IntCounterVec {
    let help = "Dead letters written, by the stage that failed";
    let dead_letters = counters(registry, "worker_dead_letters_total", help, &["stage"]);
    for stage in Stage::ALL {
        dead_letters.with_label_values(&[stage.as_str()]);
    }
    dead_letters
}

pub(super) fn build_info(registry: &Registry) {
    let info = gauges(registry, "worker_build_info", "Always 1; its label says which version runs", "version");
    info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
}

pub(super) fn by_pool(registry: &Registry, name: &str, help: &str) -> ByPool<IntGauge> {
    let gauges = gauges(registry, name, help, "pool");
    ByPool::new(|pool| gauges.with_label_values(&[pool.as_str()]))
}

pub(super) fn gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    register(registry, IntGauge::new(name, help))
}

pub(super) fn counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    register(registry, IntCounter::new(name, help))
}

pub(super) fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    register(registry, IntCounterVec::new(Opts::new(name, help), labels))
}

pub(super) fn gauges(registry: &Registry, name: &str, help: &str, label: &str) -> IntGaugeVec {
    register(registry, IntGaugeVec::new(Opts::new(name, help), &[label]))
}

#[expect(clippy::expect_used, reason = "names and labels are constants, and every test of this module makes them all")]
pub(super) fn register<C: Collector + Clone + 'static>(registry: &Registry, made: prometheus::Result<C>) -> C {
    let collector = made.expect("the name and the labels are well-formed");
    enlist(registry, collector.clone());
    collector
}

#[expect(clippy::expect_used, reason = "names are constants, and every test of this module registers them all")]
pub(super) fn enlist(registry: &Registry, collector: impl Collector + 'static) {
    registry.register(Box::new(collector)).expect("no two series share a name");
}
