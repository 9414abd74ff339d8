//! The three public spans. Without a collector they are `Span::none()`, and the cost is one load of a flag.

use std::sync::atomic::{AtomicBool, Ordering};

use opentelemetry::Context;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::TraceContextExt;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::field::Empty;
use tracing::{Span, error_span};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::trace_context::TraceContext;

/// Tells our spans from those of libraries.
pub(super) const TARGET: &str = "beamline_worker::spans";

static IS_ON: AtomicBool = AtomicBool::new(false);

pub(super) fn turn_on() {
    IS_ON.store(true, Ordering::Relaxed);
}

fn is_on() -> bool {
    IS_ON.load(Ordering::Relaxed)
}

/// The public attributes of every span.
#[derive(Clone, Copy, Debug)]
pub struct SpanIds<'a> {
    /// The tenant whose work it is; `None` where that could not be read.
    pub tenant_id: Option<&'a str>,
    /// As the Router wrote it.
    pub trace_id: Option<&'a str>,
    /// Which run of the flow.
    pub run_id: Option<&'a str>,
    /// `job.type`; `None` where that is not known.
    pub block_type: Option<&'static str>,
    /// The id of this worker.
    pub worker_id: &'a str,
}

/// A span of the level that no log filter but `off` hides: a line within it takes its ids from it.
macro_rules! public_span {
    ($parent:expr, $name:literal, $kind:literal, $ids:expr) => {
        error_span!(
            target: TARGET,
            parent: $parent,
            $name,
            otel.kind = $kind,
            otel.status_code = Empty,
            tenant_id = $ids.tenant_id,
            trace_id = $ids.trace_id,
            run_id = $ids.run_id,
            block_type = $ids.block_type,
            worker_id = $ids.worker_id,
        )
    };
}

/// `worker.assignment.receive`: from the arrival of an assignment; the parent of the other two.
pub fn receive_span(trace: Option<&TraceContext>, ids: &SpanIds<'_>) -> Span {
    if is_on() { under(public_span!(None, "worker.assignment.receive", "consumer", ids), trace) } else { Span::none() }
}

/// `worker.block.execute`: a block in its slot, over all attempts.
pub fn execute_span(receive: &Span, ids: &SpanIds<'_>) -> Span {
    if is_on() { public_span!(receive, "worker.block.execute", "internal", ids) } else { Span::none() }
}

/// `worker.block.execute` of work that waited without a delivery: when it has come to something.
pub fn outcome_span(trace: Option<&TraceContext>, ids: &SpanIds<'_>) -> Span {
    if is_on() { under(public_span!(None, "worker.block.execute", "internal", ids), trace) } else { Span::none() }
}

/// `worker.result.publish`: until the broker has the result.
pub fn publish_span(receive: &Span, ids: &SpanIds<'_>) -> Span {
    if is_on() { public_span!(receive, "worker.result.publish", "producer", ids) } else { Span::none() }
}

/// Says that what the span stands for failed.
pub fn mark_failed(span: &Span) {
    span.record("otel.status_code", "ERROR");
}

/// The span as the context of what it causes elsewhere; none when nothing is exported.
pub fn context_of(span: &Span) -> Option<TraceContext> {
    if !is_on() {
        return None;
    }
    let context = span.context();
    let span = context.span();
    let ids = span.span_context();
    ids.is_valid().then(|| TraceContext {
        parent: format!("00-{}-{}-{:02x}", ids.trace_id(), ids.span_id(), ids.trace_flags().to_u8()),
        state: Some(ids.trace_state().header()).filter(|state| !state.is_empty()),
    })
}

/// A span of this process in a trace that began elsewhere.
fn under(span: Span, trace: Option<&TraceContext>) -> Span {
    if let Some(remote) = trace.and_then(remote_parent) {
        // Fails only where nothing exports.
        let _ = span.set_parent(remote);
    }
    span
}

fn remote_parent(trace: &TraceContext) -> Option<Context> {
    let context = TraceContextPropagator::new().extract_with_context(&Context::new(), trace);
    context.span().span_context().is_valid().then_some(context)
}

impl Extractor for TraceContext {
    fn get(&self, key: &str) -> Option<&str> {
        self.pairs().find(|(name, _)| *name == key).map(|(_, value)| value)
    }

    fn keys(&self) -> Vec<&str> {
        self.pairs().map(|(name, _)| name).collect()
    }
}
