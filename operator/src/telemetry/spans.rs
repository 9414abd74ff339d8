//! What the operator does for a pool, as spans: `reconcile` with its steps `observe`, `apply` and `publish`; and `streams`,
//! which has a clock of its own. Each says how it ended.

use tracing::field::Empty;
use tracing::{Instrument, Span, info_span};

/// Tells our spans from those of libraries.
pub(super) const TARGET: &str = "beamline_operator::spans";

macro_rules! of_pool {
    ($what:literal, $namespace:expr, $name:expr) => {
        info_span!(
            target: TARGET,
            parent: None,
            $what,
            otel.status_code = Empty,
            namespace = $namespace,
            name = $name,
            outcome = Empty,
            reason = Empty,
        )
    };
}

/// `reconcile`: one look at one pool.
pub fn reconcile(namespace: &str, name: &str) -> Span {
    of_pool!("reconcile", namespace, name)
}

/// `streams`: one look at the streams and consumers of a pool.
pub fn streams(namespace: &str, name: &str) -> Span {
    of_pool!("streams", namespace, name)
}

/// A step of what is under way.
pub fn step(name: &'static str) -> Span {
    info_span!(target: TARGET, "step", otel.name = name, otel.status_code = Empty, outcome = Empty, reason = Empty)
}

/// Does some work within a span, which then says how it ended.
pub fn within<T, E>(
    span: Span,
    reason: impl FnOnce(&E) -> &'static str,
    work: impl Future<Output = Result<T, E>>,
) -> impl Future<Output = Result<T, E>> {
    // Boxed before it is a part of the future around it, which would hold it twice.
    let work = Box::pin(work.instrument(span.clone()));
    async move {
        let result = work.await;
        ended(&span, result.as_ref().err().map(reason));
        result
    }
}

/// Says how what a span stands for ended: well, or for which reason not.
pub fn ended(span: &Span, failed: Option<&'static str>) {
    match failed {
        None => span.record("outcome", "ok"),
        Some(reason) => span.record("outcome", "error").record("reason", reason).record("otel.status_code", "ERROR"),
    };
}
