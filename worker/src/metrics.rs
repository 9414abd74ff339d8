//! What is counted. Label values are closed sets: ids, paths and URLs go to spans and logs, never to labels, and of tenants
//! only those are labels that the pool names.

mod series; // how they are made
mod tenants; // by tenant

use std::collections::HashMap;
use std::time::Duration;

use prometheus::process_collector::ProcessCollector;
use prometheus::{Gauge, Histogram, IntCounter, IntCounterVec, IntGauge, Registry};

use crate::blocks::BlockKind;
use crate::contract::{Stage, Status};
use crate::fault::Cause;
use crate::pool::{ByPool, Pool};
use crate::schedule::Held;
use series::{ByKind, ByStatus, TASKS, count, millis};
use tenants::TenantSeries;

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
        series::enlist(&registry, ProcessCollector::for_self());
        series::build_info(&registry);
        let usage = series::usage(&registry);
        Self {
            tasks: series::tasks(&registry),
            latency: series::latency(&registry),
            cpu_time: usage.with_label_values(&["cpu_time_ms"]),
            memory: usage.with_label_values(&["memory_mb"]),
            queue_depth: series::by_pool(&registry, "worker_pool_queue_depth", "Accepted tasks that wait for a slot"),
            slots: series::by_pool(&registry, "worker_slots", "Tasks that can run at once"),
            slots_busy: series::by_pool(&registry, "worker_slots_busy", "Tasks that run now"),
            rejected: series::rejected(&registry),
            passed_on: series::counter(&registry, "worker_assignments_passed_on_total", PASSED_ON),
            parked: series::counter(&registry, "worker_assignments_parked_total", PARKED),
            dead_letters: series::dead_letters(&registry),
            replayed: series::counter(&registry, "worker_results_replayed_total", REPLAYED),
            redeliveries: series::counter(&registry, "worker_redeliveries_total", REDELIVERIES),
            retries: series::retries(&registry),
            publish_retries: series::counter(&registry, "worker_publish_retries_total", PUBLISH_RETRIES),
            nats_connected: series::gauge(&registry, "worker_nats_connected", "1 while the broker is connected"),
            tenants_file_broken: series::gauge(&registry, "worker_tenants_file_broken", TENANTS_FILE_BROKEN),
            log_lines_dropped: series::counter(&registry, "worker_log_lines_dropped_total", LOG_LINES_DROPPED),
            approvals_open: series::gauge(&registry, "worker_approvals_open", APPROVALS_OPEN),
            answers_ignored: series::answers_ignored(&registry),
            webhook_failures: series::counter(&registry, "worker_approval_webhook_failures_total", WEBHOOK_FAILURES),
            control_dropped: series::counter(&registry, "worker_control_messages_dropped_total", CONTROL_DROPPED),
            tenants: TenantSeries::new(&registry),
            registry,
        }
    }

    /// A task ended: how, and how long it took.
    pub fn finished(&self, kind: BlockKind, status: Status, latency: Duration) {
        self.tasks.of(kind).of(status).inc();
        self.latency.of(kind).observe(millis(latency));
    }

    /// A block of the tenant with this label has used so much CPU time.
    pub fn used_cpu_time(&self, tenant: &str, time: Duration) {
        self.cpu_time.add(millis(time));
        self.tenants.used_cpu_time(tenant, time);
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

    /// A task of the tenant with this label ended.
    pub fn tenant_executed(&self, tenant: &str) {
        self.tenants.executed(tenant);
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

#[cfg(test)]
mod tests;
