//! Series by tenant: one for each that the pool names, and one for all others.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use prometheus::{CounterVec, IntCounterVec, IntGaugeVec, Opts, Registry};

use super::series::{count, counters, gauges, register};
use crate::policy::OTHER;
use crate::schedule::Held;

const TENANT: &str = "tenant";
const RUNNING: &str = "Tasks of the tenant that run now";
const QUEUED: &str = "Accepted tasks of the tenant that wait for a slot";
const EXECUTIONS: &str = "Tasks of the tenant that have ended";
const REFUSED: &str = "Assignments of the tenant refused because its budget was used up (2004)";
const CPU: &str = "CPU time that blocks of the tenant have used";

#[derive(Debug)]
pub(super) struct TenantSeries {
    running: IntGaugeVec,
    queued: IntGaugeVec,
    executions: IntCounterVec,
    refused: IntCounterVec,
    cpu: CounterVec,
    shown: Mutex<HashSet<String>>,
}

impl TenantSeries {
    /// Those of all that nobody names, at 0.
    pub(super) fn new(registry: &Registry) -> Self {
        let cpu = CounterVec::new(Opts::new("worker_tenant_cpu_seconds_total", CPU), &[TENANT]);
        let series = Self {
            running: gauges(registry, "worker_tenant_tasks_running", RUNNING, TENANT),
            queued: gauges(registry, "worker_tenant_tasks_queued", QUEUED, TENANT),
            executions: counters(registry, "worker_tenant_executions_total", EXECUTIONS, &[TENANT]),
            refused: counters(registry, "worker_tenant_refused_total", REFUSED, &[TENANT]),
            cpu: register(registry, cpu),
            shown: Mutex::default(),
        };
        series.set(&HashMap::new());
        series
    }

    pub(super) fn executed(&self, tenant: &str) {
        self.executions.with_label_values(&[tenant]).inc();
    }

    pub(super) fn used_cpu_time(&self, tenant: &str, time: Duration) {
        self.cpu.with_label_values(&[tenant]).inc_by(time.as_secs_f64());
    }

    pub(super) fn refused(&self, tenant: &str) {
        self.refused.with_label_values(&[tenant]).inc();
    }

    /// Shows these tenants, and all others as one; who was shown before and is not among them is forgotten.
    pub(super) fn set(&self, held: &HashMap<&str, Held>) {
        let others = (OTHER, held.get(OTHER).copied().unwrap_or_default());
        let named = held.iter().map(|(tenant, held)| (*tenant, *held)).filter(|(tenant, _)| *tenant != OTHER);
        let mut shown = HashSet::new();
        for (tenant, Held { running, queued }) in named.chain([others]) {
            self.running.with_label_values(&[tenant]).set(count(running));
            self.queued.with_label_values(&[tenant]).set(count(queued));
            self.executions.with_label_values(&[tenant]);
            self.refused.with_label_values(&[tenant]);
            self.cpu.with_label_values(&[tenant]);
            shown.insert(tenant.to_owned());
        }
        let mut known = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        for gone in known.difference(&shown) {
            self.forget(gone);
        }
        *known = shown;
    }

    fn forget(&self, tenant: &str) {
        // What was never there need not go.
        let _ = self.running.remove_label_values(&[tenant]);
        let _ = self.queued.remove_label_values(&[tenant]);
        let _ = self.executions.remove_label_values(&[tenant]);
        let _ = self.refused.remove_label_values(&[tenant]);
        let _ = self.cpu.remove_label_values(&[tenant]);
    }
}
