//! The three public spans. Without a collector they are `Span::none()`, and the cost is one load of a flag.

use std::sync::atomic::{AtomicBool, Ordering};

use async_nats::HeaderMap;
use opentelemetry::Context;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::field::Empty;
use tracing::{Span, error_span};
use tracing_opentelemetry::OpenTelemetrySpanExt;

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
    /// Whose work it is.
    pub tenant_id: &'a str,
    /// As the Router wrote it.
    pub trace_id: Option<&'a str>,
    /// Which run of the flow.
    pub run_id: Option<&'a str>,
    /// `job.type`.
    pub block_type: &'static str,
    /// This worker.
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
pub fn receive_span(remote: Option<Context>, ids: &SpanIds<'_>) -> Span {
    if !is_on() {
        return Span::none();
    }
    let span = public_span!(None, "worker.assignment.receive", "consumer", ids);
    if let Some(remote) = remote {
        // Fails only where nothing exports.
        let _ = span.set_parent(remote);
    }
    span
}

/// `worker.block.execute`: a block in its slot, over all attempts.
pub fn execute_span(receive: &Span, ids: &SpanIds<'_>) -> Span {
    if is_on() { public_span!(receive, "worker.block.execute", "internal", ids) } else { Span::none() }
}

/// `worker.result.publish`: until the broker has the result.
pub fn publish_span(receive: &Span, ids: &SpanIds<'_>) -> Span {
    if is_on() { public_span!(receive, "worker.result.publish", "producer", ids) } else { Span::none() }
}

/// Says that what the span stands for failed.
pub fn mark_failed(span: &Span) {
    span.record("otel.status_code", "ERROR");
}

/// Whose trace an assignment belongs to: the header `traceparent` (W3C), else a `trace_id` that is itself a
/// `traceparent` or a trace id (32 hex digits, dashes allowed). None when nothing is exported.
pub fn remote_parent(headers: Option<&HeaderMap>, trace_id: Option<&str>) -> Option<Context> {
    if !is_on() {
        return None;
    }
    headers.and_then(parent_of_headers).or_else(|| trace_id.and_then(parent_of_trace_id))
}

fn parent_of_headers(headers: &HeaderMap) -> Option<Context> {
    parent(&Headers(headers))
}

fn parent_of_trace_id(trace_id: &str) -> Option<Context> {
    parent(&TraceParent(trace_id)).or_else(|| {
        let trace_id = TraceId::from_hex(&plain_trace_id(trace_id)?).ok()?;
        let [.., a, b, c, d, e, f, g, h] = trace_id.to_bytes();
        // A parent has a span id. Nobody told us one, so it is made of the trace id: the same for all workers.
        let span_id = match SpanId::from_bytes([a, b, c, d, e, f, g, h]) {
            SpanId::INVALID => SpanId::from_bytes([0, 0, 0, 0, 0, 0, 0, 1]),
            span_id => span_id,
        };
        let remote = SpanContext::new(trace_id, span_id, TraceFlags::SAMPLED, true, TraceState::NONE);
        remote.is_valid().then(|| Context::new().with_remote_span_context(remote))
    })
}

fn plain_trace_id(trace_id: &str) -> Option<String> {
    let plain: String = trace_id.chars().filter(|c| *c != '-').collect();
    (plain.len() == 32 && plain.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some(plain)
}

fn parent(carrier: &dyn Extractor) -> Option<Context> {
    let context = TraceContextPropagator::new().extract_with_context(&Context::new(), carrier);
    context.span().span_context().is_valid().then_some(context)
}

/// NATS headers keep their case, and senders differ in it.
struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        let (_, values) = self.0.iter().find(|(name, _)| AsRef::<str>::as_ref(*name).eq_ignore_ascii_case(key))?;
        values.first().map(|value| value.as_str())
    }

    fn keys(&self) -> Vec<&str> {
        self.0.iter().map(|(name, _)| name.as_ref()).collect()
    }
}

struct TraceParent<'a>(&'a str);

impl Extractor for TraceParent<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        (key == "traceparent").then_some(self.0)
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent"]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn ids(context: Option<Context>) -> Option<(String, String)> {
        let context = context?;
        let span = context.span().span_context().clone();
        assert!(span.is_remote() && span.is_sampled());
        Some((span.trace_id().to_string(), span.span_id().to_string()))
    }

    fn pair(trace_id: &str, span_id: &str) -> Option<(String, String)> {
        Some((trace_id.to_owned(), span_id.to_owned()))
    }

    #[test]
    fn a_header_names_the_parent_whatever_its_case() {
        for name in ["traceparent", "Traceparent", "TRACEPARENT"] {
            let mut headers = HeaderMap::new();
            headers.insert("Nats-Msg-Id", "1");
            headers.insert(name, TRACEPARENT);
            let expected = pair("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
            assert_eq!(ids(parent_of_headers(&headers)), expected, "{name}");
        }
    }

    #[test]
    fn a_trace_id_that_is_one_in_the_w3c_sense_is_kept() {
        let plain = "0af7651916cd43dd8448eb211c80319c";
        assert_eq!(ids(parent_of_trace_id(TRACEPARENT)), pair(plain, "b7ad6b7169203331"));
        assert_eq!(ids(parent_of_trace_id(plain)), pair(plain, "8448eb211c80319c"));
        assert_eq!(ids(parent_of_trace_id("0af76519-16cd-43dd-8448-eb211c80319c")), pair(plain, "8448eb211c80319c"));
        let zeros = "0af7651916cd43dd0000000000000000";
        assert_eq!(ids(parent_of_trace_id(zeros)), pair(zeros, "0000000000000001"));
    }

    #[test]
    fn any_other_trace_id_begins_a_trace() {
        for text in ["trace-abc", "", "00000000000000000000000000000000", "+af7651916cd43dd8448eb211c80319c", "é"] {
            assert_eq!(ids(parent_of_trace_id(text)), None, "{text}");
        }
        let mut headers = HeaderMap::new();
        headers.insert("traceparent", "nonsense");
        assert_eq!(ids(parent_of_headers(&headers)), None);
    }
}
