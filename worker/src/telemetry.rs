//! Logs and traces. Neither may hold up work: a reader that is stuck or a collector that is away costs lines and spans,
//! which are counted and dropped.

mod lines; // an event as a line
mod output; // lines to standard output, from a thread of its own
mod spans; // the three public spans

use std::sync::OnceLock;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::level_filters::LevelFilter;
use tracing::subscriber::SetGlobalDefaultError;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{Layer, Registry};

use crate::config::Config;
use crate::metrics::Metrics;
use lines::LineLayer;
use output::Output;

pub use spans::{SpanIds, execute_span, mark_failed, publish_span, receive_span, remote_parent};

/// How long a collector may take for one batch; also a stop waits for it.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a stop waits for the last lines and for the last spans, each.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(3);

/// Why there are no logs or traces.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No client for the collector.
    #[error("cannot set up the exporter of traces")]
    Exporter(#[source] ExporterBuildError),
    /// The operating system gave no thread.
    #[error("cannot start the thread that writes logs")]
    Thread(#[source] std::io::Error),
    /// Set up before.
    #[error("logs are already set up in this process")]
    AlreadySet(#[source] SetGlobalDefaultError),
}

/// What has to be flushed at the end.
#[must_use = "shut it down, or the last lines and spans are lost"]
#[derive(Debug)]
pub struct Telemetry {
    output: Output,
    traces: Option<SdkTracerProvider>,
}

/// Sets up logs on standard output and, where there is a collector, traces. Call it once, outside of any task.
///
/// # Errors
/// See [`Error`].
pub fn init(config: &Config, metrics: &Metrics) -> Result<Telemetry, Error> {
    let output =
        Output::start(std::io::stdout(), config.log_format, metrics.log_lines_dropped()).map_err(Error::Thread)?;
    let traces = match &config.otlp_endpoint {
        Some(endpoint) => Some(exporter(endpoint, &config.worker_id)?),
        None => None,
    };
    let logs = LineLayer::new(config.log_format, output.clone()).with_filter(config.log_filter.clone());
    let spans = traces.as_ref().map(|traces| {
        // Only ours, and only the names and attributes that are public.
        let ours = filter_fn(|metadata| metadata.is_span() && metadata.target() == spans::TARGET);
        tracing_opentelemetry::layer()
            .with_tracer(traces.tracer("beamline_worker"))
            .with_location(false)
            .with_threads(false)
            .with_tracked_inactivity(false)
            .with_target(false)
            .with_level(false)
            .with_filter(ours.with_max_level_hint(LevelFilter::ERROR))
    });
    tracing::subscriber::set_global_default(Registry::default().with(logs).with(spans)).map_err(Error::AlreadySet)?;
    if traces.is_some() {
        spans::turn_on();
    }
    log_panics();
    Ok(Telemetry { output, traces })
}

impl Telemetry {
    /// Writes what is left, for a few seconds at most. It blocks its thread.
    pub fn shutdown(self) {
        if let Some(traces) = self.traces
            && let Err(error) = traces.shutdown_with_timeout(FLUSH_TIMEOUT)
        {
            tracing::warn!(%error, "the last traces were not exported");
        }
        self.output.flush(FLUSH_TIMEOUT);
    }
}

/// The exporter reads the other `OTEL_*` variables itself (headers, sampling, batches).
fn exporter(endpoint: &url::Url, worker_id: &str) -> Result<SdkTracerProvider, Error> {
    // A no-op when the program has done so already, as it should.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let exporter = SpanExporter::builder()
        .with_http()
        .with_endpoint(traces_url(endpoint))
        .with_timeout(EXPORT_TIMEOUT)
        .build()
        .map_err(Error::Exporter)?;
    let resource = Resource::builder()
        .with_service_name("beamline-worker")
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .with_attribute(KeyValue::new("service.instance.id", worker_id.to_owned()))
        .build();
    // The batch queue is bounded, and what finds it full is dropped.
    Ok(SdkTracerProvider::builder().with_resource(resource).with_batch_exporter(exporter).build())
}

/// The endpoint is a base: each signal has its path below it.
fn traces_url(base: &url::Url) -> String {
    format!("{}/v1/traces", base.as_str().trim_end_matches('/'))
}

/// A panic is a line like any other. What it says may quote data, so only a text that is in our own source is repeated.
fn log_panics() {
    static HOOKED: OnceLock<()> = OnceLock::new();
    HOOKED.get_or_init(|| {
        std::panic::set_hook(Box::new(|panic| {
            let location = panic.location().map(ToString::to_string).unwrap_or_default();
            let reason = panic.payload().downcast_ref::<&'static str>().copied().unwrap_or("not shown");
            tracing::error!(location, reason, "panicked");
        }));
    });
}
