//! What the operator counts. Labels are closed sets: kinds of children and reasons of errors, never a pool's name.

use std::time::Instant;

use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
    process_collector::ProcessCollector,
};

/// The operator's own series.
pub struct Metrics {
    registry: Registry,
    reconciles: IntCounterVec,
    seconds: Histogram,
    applies: IntCounterVec,
    statuses: IntCounter,
    leader: IntGauge,
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
        let applies =
            IntCounterVec::new(Opts::new("beamline_operator_applies_total", "Writes of children, by kind"), &["kind"])?;
        let statuses = IntCounter::new("beamline_operator_status_writes_total", "Writes of a WorkerPool's status")?;
        let leader = IntGauge::new("beamline_operator_leader", "1 while this operator is the one that acts")?;
        registry.register(Box::new(reconciles.clone()))?;
        registry.register(Box::new(seconds.clone()))?;
        registry.register(Box::new(applies.clone()))?;
        registry.register(Box::new(statuses.clone()))?;
        registry.register(Box::new(leader.clone()))?;
        registry.register(Box::new(ProcessCollector::for_self()))?;
        Ok(Self { registry, reconciles, seconds, applies, statuses, leader })
    }

    /// A reconcile ended.
    pub fn reconciled(&self, result: &'static str, started: Instant) {
        self.reconciles.with_label_values(&[result]).inc();
        self.seconds.observe(started.elapsed().as_secs_f64());
    }

    /// A child is written.
    pub fn applied(&self, kind: &'static str) {
        self.applies.with_label_values(&[kind]).inc();
    }

    /// A status is written.
    pub fn status_written(&self) {
        self.statuses.inc();
    }

    /// Leadership was won or lost.
    pub fn leads(&self, leads: bool) {
        self.leader.set(i64::from(leads));
    }

    /// All series in Prometheus' text format.
    pub fn text(&self) -> prometheus::Result<String> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}
