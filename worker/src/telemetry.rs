//! Logs and traces. Neither may hold up work: a reader that is stuck or a collector that is away costs lines and spans,
//! which are counted and dropped.

mod lines; // an event as a line
mod output; // lines to standard output, from a thread of its own
mod spans; // the three public spans

use std::sync::OnceLock;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{ExporterBuildError, Protocol, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::Subscriber;
use tracing::level_filters::LevelFilter;
use tracing::subscriber::SetGlobalDefaultError;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{EnvFilter, Layer, Registry};
use url::Url;

use crate::metrics::Metrics;
use lines::LineLayer;
use output::Output;

pub use spans::{SpanIds, context_of, execute_span, mark_failed, outcome_span, publish_span, receive_span};

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

/// How a log line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// The public shape, for machines.
    Json,
    /// For a terminal.
    Text,
}

/// What an administrator decides about logs and traces.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How log lines look.
    pub log_format: LogFormat,
    /// Which are written.
    pub log_filter: EnvFilter,
    /// The collector of traces.
    pub otlp_endpoint: Option<Url>,
    /// Whose they are.
    pub worker_id: String,
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
pub fn init(settings: &Settings, metrics: &Metrics) -> Result<Telemetry, Error> {
    let output =
        Output::start(std::io::stdout(), settings.log_format, metrics.log_lines_dropped()).map_err(Error::Thread)?;
    let traces = match &settings.otlp_endpoint {
        Some(endpoint) => Some(exporter(endpoint, &settings.worker_id)?),
        None => None,
    };
    let subscriber = subscriber(settings.log_format, settings.log_filter.clone(), output.clone(), traces.as_ref());
    tracing::subscriber::set_global_default(subscriber).map_err(Error::AlreadySet)?;
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

fn subscriber(
    format: LogFormat,
    filter: EnvFilter,
    output: Output,
    traces: Option<&SdkTracerProvider>,
) -> impl Subscriber + Send + Sync {
    let logs = LineLayer::new(format, output).with_filter(filter);
    let spans = traces.map(|traces| {
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
    Registry::default().with(logs).with(spans)
}

/// The exporter reads the other `OTEL_*` variables itself (headers, sampling, batches).
fn exporter(endpoint: &Url, worker_id: &str) -> Result<SdkTracerProvider, Error> {
    // A no-op when the program has done so already, as it should.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let exporter = SpanExporter::builder()
        .with_http()
        .with_protocol(Protocol::HttpBinary)
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
fn traces_url(base: &Url) -> String {
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::mpsc::{self, Receiver};
    use std::time::Instant;

    use prometheus::IntCounter;

    use super::*;
    use crate::trace_context::TraceContext;

    const TRACE_ID: &str = "0af7651916cd43dd8448eb211c80319c";
    const IDS: SpanIds<'static> = SpanIds {
        tenant_id: Some("tenant-789"),
        trace_id: Some(TRACE_ID),
        run_id: Some("run-def"),
        block_type: Some("http.request"),
        worker_id: "worker-1",
    };

    /// Runs `work` with traces to `endpoint`, and takes them down again.
    fn traced(endpoint: &str, work: impl FnOnce()) {
        spans::turn_on();
        let traces = exporter(&endpoint.parse().unwrap(), IDS.worker_id).unwrap();
        let dropped = IntCounter::new("dropped", "dropped").unwrap();
        let output = Output::start(std::io::sink(), LogFormat::Json, dropped).unwrap();
        tracing::subscriber::with_default(
            subscriber(LogFormat::Json, EnvFilter::new("warn"), output.clone(), Some(&traces)),
            work,
        );
        Telemetry { output, traces: Some(traces) }.shutdown();
    }

    fn three_spans() {
        let trace = TraceContext::of(None, IDS.trace_id);
        let receive = receive_span(trace.as_ref(), &IDS);
        execute_span(&receive, &IDS).in_scope(|| tracing::error_span!("a span of a library"));
        mark_failed(&receive);
        publish_span(&receive, &IDS);
    }

    /// A collector that takes one request, and hands out its head and its body.
    fn collector() -> (String, Receiver<(String, Vec<u8>)>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let (sender, requests) = mpsc::channel();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            sender.send(read_request(&mut stream)).unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").unwrap();
        });
        (endpoint, requests)
    }

    fn read_request(stream: &mut TcpStream) -> (String, Vec<u8>) {
        let (mut request, mut piece) = (Vec::new(), [0; 4096]);
        loop {
            let read = stream.read(&mut piece).unwrap();
            request.extend_from_slice(&piece[..read]);
            let Some(end) = request.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
            let head = String::from_utf8_lossy(&request[..end]).to_ascii_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
            if read == 0 || request.len() >= end + 4 + length {
                return (head, request.split_off(end + 4));
            }
        }
    }

    #[test]
    fn a_collector_gets_the_three_public_spans_in_the_assignments_trace() {
        let (endpoint, requests) = collector();
        traced(&endpoint, three_spans);

        let (head, body) = requests.recv_timeout(Duration::from_secs(5)).unwrap();
        assert!(head.starts_with("post /v1/traces http/1.1"), "{head}");
        assert!(head.contains("content-type: application/x-protobuf"), "{head}");
        let count = |wanted: &[u8]| body.windows(wanted.len()).filter(|window| *window == wanted).count();
        for name in ["worker.assignment.receive", "worker.block.execute", "worker.result.publish"] {
            assert_eq!(count(name.as_bytes()), 1, "{name}");
        }
        for attribute in ["tenant_id", "trace_id", "run_id", "block_type", "worker_id"] {
            assert_eq!(count(attribute.as_bytes()), 3, "{attribute}");
        }
        let trace_id = opentelemetry::trace::TraceId::from_hex(TRACE_ID).unwrap();
        assert_eq!(count(&trace_id.to_bytes()), 3);
        assert_eq!(count(b"beamline-worker"), 1);
        // The one that is marked as failed: field 15, a status of which field 3, the code, is 2.
        assert_eq!(count(&[0x7a, 2, 0x18, 2]), 1);
        for private in ["a span of a library", "thread.id", "code.", "busy_ns", "idle_ns"] {
            assert_eq!(count(private.as_bytes()), 0, "{private}");
        }
    }

    #[test]
    fn a_collector_that_is_away_or_silent_holds_up_neither_work_nor_the_end() {
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let away = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        for address in [silent.local_addr().unwrap(), away] {
            let started = Instant::now();
            let mut worked = Duration::ZERO;
            traced(&format!("http://{address}"), || {
                (0..5_000).for_each(|_| three_spans());
                worked = started.elapsed();
            });
            let ending = started.elapsed() - worked;
            // Work that waited for each batch would take many times this, and an end that waited for all that is queued
            // twice that.
            assert!(worked < 10 * EXPORT_TIMEOUT, "{worked:?}");
            assert!(ending < EXPORT_TIMEOUT + FLUSH_TIMEOUT + Duration::from_secs(4), "{ending:?}");
        }
    }

    #[test]
    fn the_path_of_traces_lies_below_the_endpoint() {
        for (base, url) in [
            ("http://host:4318", "http://host:4318/v1/traces"),
            ("http://host:4318/", "http://host:4318/v1/traces"),
            ("https://host/otlp/", "https://host/otlp/v1/traces"),
        ] {
            assert_eq!(traces_url(&base.parse().unwrap()), url);
        }
    }
}
