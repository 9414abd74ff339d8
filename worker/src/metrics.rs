//! What is counted. Label values are closed sets: ids, paths and URLs go to spans and logs, never to labels, and of tenants
//! only those are labels that the pool names.

mod tenants; // by tenant

use std::collections::HashMap;
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::{Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge};
use prometheus::{IntGaugeVec, Opts, Registry};

use crate::blocks::BlockKind;
use crate::contract::Stage;
use crate::contract::Status;
use crate::fault::Cause;
use crate::pool::{ByPool, Pool};
use crate::schedule::Held;
use tenants::TenantSeries;

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
const TASKS: &str = "worker_tasks_total";
const USAGE: &str = "CPU time that blocks have used since the start (cpu_time_ms), payloads, results and reservations held now (memory_mb)";
const PASSED_ON: &str = "Assignments passed on to workers with GPU slots";
const REPLAYED: &str = "Stored results published again instead of running twice";
const REDELIVERIES: &str = "Deliveries that were not the first of their message";
const PUBLISH_RETRIES: &str = "Publishes repeated because the broker did not confirm them";
const LOG_LINES_DROPPED: &str = "Log lines dropped because nothing read them";
const TENANTS_FILE_BROKEN: &str = "1 while the tenants file cannot be used and what it said before holds";
const APPROVALS_OPEN: &str = "Approvals that wait, of all pools: every worker knows the same ones";
const CONTROL_DROPPED: &str = "Cancels and answers to approvals that cannot be read";
const PARKED: &str = "Assignments that were parked until their tenants may have them run";
const WEBHOOK_FAILURES: &str = "Requests for approval that the webhook could not be told";
const BYTES_PER_MB: f64 = 1024.0 * 1024.0;

/// Every series of this worker, resolved once, so that recording neither locks nor allocates.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    tasks: ByKind<ByStatus<IntCounter>>,
    latency: ByKind<Histogram>,
    cpu_time: Gauge,
    memory: Gauge,
    queue_depth: ByPool<IntGauge>,
    slots: ByPool<IntGauge>,
    slots_busy: ByPool<IntGauge>,
    rejected: IntCounterVec,
    passed_on: IntCounter,
    parked: IntCounter,
    dead_letters: IntCounterVec,
    replayed: IntCounter,
    redeliveries: IntCounter,
    retries: ByKind<IntCounter>,
    publish_retries: IntCounter,
    nats_connected: IntGauge,
    tenants_file_broken: IntGauge,
    log_lines_dropped: IntCounter,
    approvals_open: IntGauge,
    answers_ignored: IntCounterVec,
    webhook_failures: IntCounter,
    control_dropped: IntCounter,
    tenants: TenantSeries,
}

/// Why an answer to an approval does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IgnoredAnswer {
    /// It breaks the contract.
    Malformed,
    /// It is from somebody who was not asked.
    Unlisted,
}

impl IgnoredAnswer {
    const ALL: [Self; 2] = [Self::Malformed, Self::Unlisted];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Unlisted => "unlisted",
        }
    }
}

impl Metrics {
    /// All series at 0, in a registry of their own together with those of the process.
    #[expect(clippy::new_without_default, reason = "each one is a registry of its own: not a value to default to")]
    pub fn new() -> Self {
        let registry = Registry::new();
        enlist(&registry, ProcessCollector::for_self());
        build_info(&registry);
        let usage = usage(&registry);
        Self {
            tasks: tasks(&registry),
            latency: latency(&registry),
            cpu_time: usage.with_label_values(&["cpu_time_ms"]),
            memory: usage.with_label_values(&["memory_mb"]),
            queue_depth: by_pool(&registry, "worker_pool_queue_depth", "Accepted tasks that wait for a slot"),
            slots: by_pool(&registry, "worker_slots", "Tasks that can run at once"),
            slots_busy: by_pool(&registry, "worker_slots_busy", "Tasks that run now"),
            rejected: rejected(&registry),
            passed_on: counter(&registry, "worker_assignments_passed_on_total", PASSED_ON),
            parked: counter(&registry, "worker_assignments_parked_total", PARKED),
            dead_letters: dead_letters(&registry),
            replayed: counter(&registry, "worker_results_replayed_total", REPLAYED),
            redeliveries: counter(&registry, "worker_redeliveries_total", REDELIVERIES),
            retries: retries(&registry),
            publish_retries: counter(&registry, "worker_publish_retries_total", PUBLISH_RETRIES),
            nats_connected: gauge(&registry, "worker_nats_connected", "1 while the broker is connected"),
            tenants_file_broken: gauge(&registry, "worker_tenants_file_broken", TENANTS_FILE_BROKEN),
            log_lines_dropped: counter(&registry, "worker_log_lines_dropped_total", LOG_LINES_DROPPED),
            approvals_open: gauge(&registry, "worker_approvals_open", APPROVALS_OPEN),
            answers_ignored: answers_ignored(&registry),
            webhook_failures: counter(&registry, "worker_approval_webhook_failures_total", WEBHOOK_FAILURES),
            control_dropped: counter(&registry, "worker_control_messages_dropped_total", CONTROL_DROPPED),
            tenants: TenantSeries::new(&registry),
            registry,
        }
    }

    /// A task ended: how, how long it took and what it used.
    pub fn finished(&self, kind: BlockKind, status: Status, latency: Duration, cpu_time: Duration) {
        self.tasks.of(kind).of(status).inc();
        self.latency.of(kind).observe(millis(latency));
        self.cpu_time.add(millis(cpu_time));
    }

    /// Accepted tasks of the pool that wait for a slot.
    pub fn set_queue_depth(&self, pool: Pool, tasks: usize) {
        self.queue_depth.of(pool).set(count(tasks));
    }

    /// Tasks that the pool can run at once.
    pub fn set_slots(&self, pool: Pool, slots: usize) {
        self.slots.of(pool).set(count(slots));
    }

    /// Tasks of the pool that run now.
    pub fn set_slots_busy(&self, pool: Pool, slots: usize) {
        self.slots_busy.of(pool).set(count(slots));
    }

    /// Bytes of payloads and results held now.
    pub fn set_memory_held(&self, bytes: usize) {
        self.memory.set(count(bytes) as f64 / BYTES_PER_MB);
    }

    /// An assignment was refused.
    pub fn rejected(&self, cause: Cause) {
        self.rejected.with_label_values(&[&cause.code().to_string()]).inc();
    }

    /// An assignment was passed on to another class of workers.
    pub fn passed_on(&self) {
        self.passed_on.inc();
    }

    /// An assignment was parked.
    pub fn parked(&self) {
        self.parked.inc();
    }

    /// A dead letter was written.
    pub fn dead_letter(&self, stage: Stage) {
        self.dead_letters.with_label_values(&[stage.as_str()]).inc();
    }

    /// A stored result was published again.
    pub fn result_replayed(&self) {
        self.replayed.inc();
    }

    /// A delivery was not the first of its message.
    pub fn redelivered(&self) {
        self.redeliveries.inc();
    }

    /// A block is tried again.
    pub fn retried(&self, kind: BlockKind) {
        self.retries.of(kind).inc();
    }

    /// A publish is repeated.
    pub fn publish_retried(&self) {
        self.publish_retries.inc();
    }

    /// Whether the broker is connected.
    pub fn set_nats_connected(&self, connected: bool) {
        self.nats_connected.set(i64::from(connected));
    }

    /// Whether the tenants file cannot be used, and an older one holds.
    pub fn set_tenants_file_broken(&self, broken: bool) {
        self.tenants_file_broken.set(i64::from(broken));
    }

    /// Approvals that wait, as far as this worker knows.
    pub fn set_approvals_open(&self, open: usize) {
        self.approvals_open.set(count(open));
    }

    /// An answer to an approval does not count.
    pub fn answer_ignored(&self, why: IgnoredAnswer) {
        self.answers_ignored.with_label_values(&[why.as_str()]).inc();
    }

    /// The webhook could not be told of a request for approval.
    pub fn webhook_failed(&self) {
        self.webhook_failures.inc();
    }

    /// A cancel or an answer to an approval cannot be read.
    pub fn control_message_dropped(&self) {
        self.control_dropped.inc();
    }

    /// A task of the tenant with this label ended, and used so much.
    pub fn tenant_executed(&self, tenant: &str, cpu_time: Duration) {
        self.tenants.executed(tenant, cpu_time);
    }

    /// An assignment of the tenant with this label was refused for its budget.
    pub fn tenant_refused(&self, tenant: &str) {
        self.tenants.refused(tenant);
    }

    /// What is here of each tenant, by its label. Who is not among them any more has no series any more.
    pub fn set_tenants(&self, held: &HashMap<&str, Held>) {
        self.tenants.set(held);
    }

    /// For the one who drops log lines.
    pub(crate) fn log_lines_dropped(&self) -> IntCounter {
        self.log_lines_dropped.clone()
    }

    /// Everything in Prometheus' text format.
    pub fn encode(&self) -> String {
        let mut families = self.registry.gather();
        // Sorted by name; the public form says the type before the status.
        for tasks in families.iter_mut().filter(|family| family.name() == TASKS) {
            tasks.mut_metric().iter_mut().for_each(|series| series.mut_label().reverse());
        }
        prometheus::TextEncoder::new().encode_to_string(&families).unwrap_or_default()
    }
}

/// One value per block kind. A new kind does not compile until it has its series.
#[derive(Debug)]
struct ByKind<T> {
    http: T,
    fs_put: T,
    fs_get: T,
    sql: T,
    human: T,
}

impl<T> ByKind<T> {
    fn new(make: impl Fn(BlockKind) -> T) -> Self {
        Self {
            http: make(BlockKind::Http),
            fs_put: make(BlockKind::FsPut),
            fs_get: make(BlockKind::FsGet),
            sql: make(BlockKind::Sql),
            human: make(BlockKind::Human),
        }
    }

    const fn of(&self, kind: BlockKind) -> &T {
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
struct ByStatus<T> {
    success: T,
    error: T,
    timeout: T,
    cancelled: T,
}

impl<T> ByStatus<T> {
    fn new(make: impl Fn(Status) -> T) -> Self {
        Self {
            success: make(Status::Success),
            error: make(Status::Error),
            timeout: make(Status::Timeout),
            cancelled: make(Status::Cancelled),
        }
    }

    const fn of(&self, status: Status) -> &T {
        match status {
            Status::Success => &self.success,
            Status::Error => &self.error,
            Status::Timeout => &self.timeout,
            Status::Cancelled => &self.cancelled,
        }
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn tasks(registry: &Registry) -> ByKind<ByStatus<IntCounter>> {
    let tasks = counters(registry, TASKS, "Tasks finished, by block type and status", &["type", "status"]);
    ByKind::new(|kind| ByStatus::new(|status| tasks.with_label_values(&[kind.as_str(), status.as_str()])))
}

fn latency(registry: &Registry) -> ByKind<Histogram> {
    let options = HistogramOpts::new("worker_task_latency_ms", LATENCY).buckets(LATENCY_BUCKETS_MS.to_vec());
    let latency = register(registry, HistogramVec::new(options, &["type"]));
    ByKind::new(|kind| latency.with_label_values(&[kind.as_str()]))
}

fn usage(registry: &Registry) -> GaugeVec {
    register(registry, GaugeVec::new(Opts::new("worker_resource_usage", USAGE), &["type"]))
}

fn retries(registry: &Registry) -> ByKind<IntCounter> {
    let retries = counters(registry, "worker_retries_total", "Attempts after the first, by block type", &["type"]);
    ByKind::new(|kind| retries.with_label_values(&[kind.as_str()]))
}

fn rejected(registry: &Registry) -> IntCounterVec {
    let rejected =
        counters(registry, "worker_assignments_rejected_total", "Assignments refused, by error code", &["code"]);
    for cause in REJECTIONS {
        rejected.with_label_values(&[&cause.code().to_string()]);
    }
    rejected
}

fn answers_ignored(registry: &Registry) -> IntCounterVec {
    let help = "Answers to approvals that do not count, by the reason";
    let ignored = counters(registry, "worker_approval_answers_ignored_total", help, &["reason"]);
    for why in IgnoredAnswer::ALL {
        ignored.with_label_values(&[why.as_str()]);
    }
    ignored
}

fn dead_letters(registry: &Registry) -> IntCounterVec {
    let help = "Dead letters written, by the stage that failed";
    let dead_letters = counters(registry, "worker_dead_letters_total", help, &["stage"]);
    for stage in Stage::ALL {
        dead_letters.with_label_values(&[stage.as_str()]);
    }
    dead_letters
}

fn build_info(registry: &Registry) {
    let info = gauges(registry, "worker_build_info", "Always 1; its label says which version runs", "version");
    info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
}

fn by_pool(registry: &Registry, name: &str, help: &str) -> ByPool<IntGauge> {
    let gauges = gauges(registry, name, help, "pool");
    ByPool::new(|pool| gauges.with_label_values(&[pool.as_str()]))
}

fn gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    register(registry, IntGauge::new(name, help))
}

fn counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    register(registry, IntCounter::new(name, help))
}

fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    register(registry, IntCounterVec::new(Opts::new(name, help), labels))
}

fn gauges(registry: &Registry, name: &str, help: &str, label: &str) -> IntGaugeVec {
    register(registry, IntGaugeVec::new(Opts::new(name, help), &[label]))
}

#[expect(clippy::expect_used, reason = "names and labels are constants, and every test of this module makes them all")]
fn register<C: Collector + Clone + 'static>(registry: &Registry, made: prometheus::Result<C>) -> C {
    let collector = made.expect("the name and the labels are well-formed");
    enlist(registry, collector.clone());
    collector
}

#[expect(clippy::expect_used, reason = "names are constants, and every test of this module registers them all")]
fn enlist(registry: &Registry, collector: impl Collector + 'static) {
    registry.register(Box::new(collector)).expect("no two series share a name");
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::policy::OTHER;

    /// The scrape read back: each series with its labels, and its value.
    fn scrape(metrics: &Metrics) -> BTreeMap<String, f64> {
        let text = metrics.encode();
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        samples
            .map(|line| line.rsplit_once(' ').expect("a sample is a series and a value"))
            .map(|(series, value)| (series.to_owned(), value.parse().expect("a value is a number")))
            .collect()
    }

    #[test]
    fn every_series_exists_before_anything_happened() {
        let samples = scrape(&Metrics::new());
        for kind in BlockKind::ALL.map(BlockKind::as_str) {
            for status in Status::ALL.map(Status::as_str) {
                assert_eq!(samples[&format!(r#"worker_tasks_total{{type="{kind}",status="{status}"}}"#)], 0.0);
            }
            assert_eq!(samples[&format!(r#"worker_task_latency_ms_count{{type="{kind}"}}"#)], 0.0);
            assert_eq!(samples[&format!(r#"worker_retries_total{{type="{kind}"}}"#)], 0.0);
        }
        for pool in Pool::ALL.map(Pool::as_str) {
            for name in ["worker_pool_queue_depth", "worker_slots", "worker_slots_busy"] {
                assert_eq!(samples[&format!(r#"{name}{{pool="{pool}"}}"#)], 0.0);
            }
        }
        for series in [
            r#"worker_resource_usage{type="cpu_time_ms"}"#,
            r#"worker_resource_usage{type="memory_mb"}"#,
            r#"worker_assignments_rejected_total{code="1001"}"#,
            r#"worker_assignments_rejected_total{code="2003"}"#,
            r#"worker_dead_letters_total{stage="decode"}"#,
            r#"worker_dead_letters_total{stage="execute"}"#,
            "worker_assignments_passed_on_total",
            "worker_assignments_parked_total",
            "worker_results_replayed_total",
            "worker_redeliveries_total",
            "worker_publish_retries_total",
            "worker_log_lines_dropped_total",
            "worker_nats_connected",
            "worker_tenants_file_broken",
            "worker_approvals_open",
            r#"worker_approval_answers_ignored_total{reason="malformed"}"#,
            r#"worker_approval_answers_ignored_total{reason="unlisted"}"#,
            "worker_approval_webhook_failures_total",
            "worker_control_messages_dropped_total",
            r#"worker_tenant_tasks_running{tenant="other"}"#,
            r#"worker_tenant_tasks_queued{tenant="other"}"#,
            r#"worker_tenant_executions_total{tenant="other"}"#,
            r#"worker_tenant_refused_total{tenant="other"}"#,
            r#"worker_tenant_cpu_seconds_total{tenant="other"}"#,
        ] {
            assert_eq!(samples.get(series), Some(&0.0), "{series}");
        }
        assert_eq!(samples[&format!(r#"worker_build_info{{version="{}"}}"#, env!("CARGO_PKG_VERSION"))], 1.0);
        assert!(samples.keys().any(|series| series.starts_with("process_")), "{samples:?}");
    }

    #[test]
    fn only_tenants_that_are_named_have_series_of_their_own() {
        let metrics = Metrics::new();
        let held = |running, queued| Held { running, queued };
        metrics.set_tenants(&HashMap::from([("acme", held(2, 30)), (OTHER, held(1, 0)), ("quiet", held(0, 0))]));
        metrics.tenant_executed("acme", Duration::from_millis(250));
        metrics.tenant_refused("acme");
        metrics.tenant_refused(OTHER);
        let samples = scrape(&metrics);
        let of = |series: &str, tenant: &str| samples[&format!(r#"worker_tenant_{series}{{tenant="{tenant}"}}"#)];
        assert_eq!((of("tasks_running", "acme"), of("tasks_queued", "acme")), (2.0, 30.0));
        assert_eq!((of("executions_total", "acme"), of("cpu_seconds_total", "acme")), (1.0, 0.25));
        assert_eq!((of("refused_total", "acme"), of("refused_total", "other")), (1.0, 1.0));
        assert_eq!((of("tasks_running", "other"), of("executions_total", "quiet")), (1.0, 0.0));

        metrics.set_tenants(&HashMap::from([("quiet", held(0, 1))]));
        let samples = scrape(&metrics);
        assert!(!samples.keys().any(|series| series.contains("acme")), "it is named no more: {samples:?}");
        let other = |series: &str| samples[&format!(r#"worker_tenant_{series}{{tenant="other"}}"#)];
        assert_eq!((other("tasks_running"), other("refused_total")), (0.0, 1.0));
    }

    #[test]
    fn a_finished_task_is_counted_once_in_each_of_its_series() {
        let metrics = Metrics::new();
        metrics.finished(BlockKind::Http, Status::Success, Duration::from_millis(150), Duration::from_micros(2500));
        metrics.finished(BlockKind::Http, Status::Timeout, Duration::from_secs(30), Duration::ZERO);

        let samples = scrape(&metrics);
        assert_eq!(samples[r#"worker_tasks_total{type="http.request",status="success"}"#], 1.0);
        assert_eq!(samples[r#"worker_tasks_total{type="http.request",status="timeout"}"#], 1.0);
        assert_eq!(samples[r#"worker_tasks_total{type="sql.query",status="success"}"#], 0.0);
        let bucket = |le: &str| samples[&format!(r#"worker_task_latency_ms_bucket{{type="http.request",le="{le}"}}"#)];
        assert_eq!(["100", "200", "10000", "+Inf"].map(bucket), [0.0, 1.0, 1.0, 2.0]);
        assert_eq!(samples[r#"worker_task_latency_ms_sum{type="http.request"}"#], 30_150.0);
        assert_eq!(samples[r#"worker_resource_usage{type="cpu_time_ms"}"#], 2.5);
    }

    #[test]
    fn the_latency_buckets_are_the_public_ones() {
        let samples = scrape(&Metrics::new());
        let bounds = samples
            .keys()
            .filter_map(|series| series.strip_prefix(r#"worker_task_latency_ms_bucket{type="fs.put",le=""#))
            .filter_map(|rest| rest.trim_end_matches("\"}").parse::<f64>().ok())
            .filter(|bound| bound.is_finite());
        let mut bounds: Vec<f64> = bounds.collect();
        bounds.sort_by(f64::total_cmp);
        assert_eq!(bounds, [5.0, 10.0, 25.0, 50.0, 100.0, 200.0, 300.0, 500.0, 1000.0, 2500.0, 5000.0, 10_000.0]);
    }

    #[test]
    fn facts_land_in_their_own_series() {
        let metrics = Metrics::new();
        metrics.set_queue_depth(Pool::Io, 12);
        metrics.set_slots(Pool::Cpu, 8);
        metrics.set_slots_busy(Pool::Gpu, 2);
        metrics.set_memory_held(512 * 1024 * 1024);
        metrics.rejected(Cause::InvalidFormat);
        metrics.passed_on();
        metrics.parked();
        metrics.dead_letter(Stage::Admit);
        metrics.result_replayed();
        metrics.redelivered();
        metrics.retried(BlockKind::Sql);
        metrics.publish_retried();
        metrics.set_nats_connected(true);
        metrics.set_tenants_file_broken(true);
        metrics.set_approvals_open(7);
        metrics.answer_ignored(IgnoredAnswer::Unlisted);
        metrics.webhook_failed();
        metrics.control_message_dropped();

        let samples = scrape(&metrics);
        for (series, value) in [
            (r#"worker_pool_queue_depth{pool="io"}"#, 12.0),
            (r#"worker_slots{pool="cpu"}"#, 8.0),
            (r#"worker_slots_busy{pool="gpu"}"#, 2.0),
            (r#"worker_resource_usage{type="memory_mb"}"#, 512.0),
            (r#"worker_assignments_rejected_total{code="1003"}"#, 1.0),
            (r#"worker_dead_letters_total{stage="admit"}"#, 1.0),
            ("worker_assignments_passed_on_total", 1.0),
            ("worker_assignments_parked_total", 1.0),
            ("worker_results_replayed_total", 1.0),
            ("worker_redeliveries_total", 1.0),
            (r#"worker_retries_total{type="sql.query"}"#, 1.0),
            ("worker_publish_retries_total", 1.0),
            ("worker_nats_connected", 1.0),
            ("worker_tenants_file_broken", 1.0),
            ("worker_approvals_open", 7.0),
            (r#"worker_approval_answers_ignored_total{reason="unlisted"}"#, 1.0),
            ("worker_approval_webhook_failures_total", 1.0),
            ("worker_control_messages_dropped_total", 1.0),
        ] {
            assert_eq!(samples[series], value, "{series}");
        }
    }
}
