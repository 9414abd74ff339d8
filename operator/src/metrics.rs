//! What the operator counts, and what the pools say. Labels of counters are closed sets: kinds of children and reasons of
//! errors, never a pool's name.

mod pools;

use std::sync::OnceLock;
use std::time::Instant;

use axum::http::StatusCode;
use jiff::Timestamp;
use kube::runtime::reflector::Store;
use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
    process_collector::ProcessCollector,
};

use crate::watched::Watched;

pub use pools::series;

/// The operator's own series, and the pools'.
pub struct Metrics {
    registry: Registry,
    pools: OnceLock<Store<Watched>>,
    reconciles: IntCounterVec,
    seconds: Histogram,
    applies: IntCounterVec,
    running: IntGauge,
    calls: IntCounterVec,
    statuses: IntCounter,
    scalings: IntCounterVec,
    leader: IntGauge,
}

/// A reconcile that is under way for as long as this is held.
#[must_use = "it counts until it is dropped"]
pub struct Running(IntGauge);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Metrics {
    /// A registry of its own, so that tests do not share one.
    pub fn register() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let reconciles = IntCounterVec::new(
            Opts::new("beamline_operator_reconciles_total", "Reconciles, by result: ok or the reason of the error"),
            &["result"],
        )?;
        let seconds = Histogram::with_opts(HistogramOpts::new(
            "beamline_operator_reconcile_seconds",
            "How long a reconcile takes",
        ))?;
        let running = IntGauge::new(
            "beamline_operator_reconciles_running",
            "Reconciles under way: as many as --concurrency while pools wait for their turn",
        )?;
        let calls = IntCounterVec::new(
            Opts::new(
                "beamline_operator_api_calls_total",
                "Calls of the API server, by the code of its answer, or none",
            ),
            &["code"],
        )?;
        let applies =
            IntCounterVec::new(Opts::new("beamline_operator_applies_total", "Writes of children, by kind"), &["kind"])?;
        let statuses = IntCounter::new("beamline_operator_status_writes_total", "Writes of a WorkerPool's status")?;
        let scalings = IntCounterVec::new(
            Opts::new(
                "beamline_scale_changes_total",
                "Changes of how many workers are asked for, by direction: up, down",
            ),
            &["direction"],
        )?;
        let leader = IntGauge::new("beamline_operator_leader", "1 while this operator is the one that acts")?;
        registry.register(Box::new(reconciles.clone()))?;
        registry.register(Box::new(seconds.clone()))?;
        registry.register(Box::new(running.clone()))?;
        registry.register(Box::new(calls.clone()))?;
        registry.register(Box::new(applies.clone()))?;
        registry.register(Box::new(statuses.clone()))?;
        registry.register(Box::new(scalings.clone()))?;
        registry.register(Box::new(leader.clone()))?;
        registry.register(Box::new(ProcessCollector::for_self()))?;
        let pools = OnceLock::new();
        Ok(Self { registry, pools, reconciles, seconds, running, calls, applies, statuses, scalings, leader })
    }

    /// A reconcile begins.
    pub fn runs(&self) -> Running {
        self.running.inc();
        Running(self.running.clone())
    }

    /// A reconcile ended.
    pub fn reconciled(&self, result: &'static str, started: Instant) {
        self.reconciles.with_label_values(&[result]).inc();
        self.seconds.observe(started.elapsed().as_secs_f64());
    }

    /// The API server was asked, and answered with this code or not at all.
    pub fn called(&self, code: Option<StatusCode>) {
        self.calls.with_label_values(&[code.as_ref().map_or("none", StatusCode::as_str)]).inc();
    }

    /// A child is written.
    pub fn applied(&self, kind: &'static str) {
        self.applies.with_label_values(&[kind]).inc();
    }

    /// A status is written.
    pub fn status_written(&self) {
        self.statuses.inc();
    }

    /// Another number of workers is asked for.
    pub fn scaled(&self, was: i32, is: i32) {
        if was != is {
            self.scalings.with_label_values(&[if is > was { "up" } else { "down" }]).inc();
        }
    }

    /// Leadership was won or lost.
    pub fn leads(&self, leads: bool) {
        self.leader.set(i64::from(leads));
    }

    /// From now on the pools of this cache are shown.
    pub fn show(&self, pools: Store<Watched>) {
        // Set once: an operator leads once in its life.
        let _ = self.pools.set(pools);
    }

    /// All series in Prometheus' text format.
    pub fn text(&self) -> prometheus::Result<String> {
        let mut families = self.registry.gather();
        if let Some(pools) = self.pools.get() {
            let pools = pools.state();
            families.extend(series(pools.iter().filter_map(|watched| watched.pool.as_ref().ok()), Timestamp::now())?);
        }
        TextEncoder::new().encode_to_string(&families)
    }
}
