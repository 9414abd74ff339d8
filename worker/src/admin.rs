//! The HTTP side door for probes and scrapes. It reports what others found out and decides nothing about work.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use jiff::{Timestamp, Unit};
use serde::Serialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::broker::streams::Mode;
use crate::health::{Concern, Health};
use crate::metrics::Metrics;
use crate::pulse;

/// Probes and scrapes need a handful. A further one takes the place of the oldest: whoever asks now is answered, however
/// many connections others hold open.
const MAX_CONNECTIONS: usize = 64;
/// How long a client may take to send its request's header.
const HEADER_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a connection may last, so that a client that reads nothing gives its place back. Each is for one request: one
/// that asks again and again without reading would keep this thread busy and fill the system's buffers.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long open answers may take after the stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);
/// Nothing of ours holds the runtime up for this long: a restart helps.
const STALLED: Duration = Duration::from_secs(20);
/// After the operating system refused a connection (no file descriptors): it will not be better at once.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Serves on a thread and a runtime of its own: probes are answered while a block holds up everything else.
///
/// # Errors
/// The address cannot be listened on, or there is no thread to be had.
pub fn serve_apart(
    address: SocketAddr,
    mode: Mode,
    health: Health,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let serve = move || {
        runtime.block_on(async {
            match TcpListener::from_std(listener) {
                Ok(listener) => serve(listener, mode, health, metrics, stop).await,
                Err(error) => tracing::error!(%error, "nobody answers probes and scrapes"),
            }
        });
    };
    std::thread::Builder::new().name("admin".to_owned()).spawn(serve).map(drop)
}

/// Answers `/_health`, `/livez`, `/readyz` and `/metrics` until the stop.
pub async fn serve(listener: TcpListener, mode: Mode, health: Health, metrics: Arc<Metrics>, stop: CancellationToken) {
    let router = router(mode, health, metrics);
    let connections = TaskTracker::new();
    let mut open: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                open.retain(|connection| !connection.is_finished());
                if open.len() >= MAX_CONNECTIONS
                    && let Some(oldest) = open.pop_front()
                {
                    oldest.abort();
                }
                open.push_back(connections.spawn(answer(stream, router.clone())).abort_handle());
            }
            Err(_) => tokio::time::sleep(ACCEPT_RETRY).await,
        }
    }
    connections.close();
    let _ = tokio::time::timeout(STOP_TIMEOUT, connections.wait()).await;
}

/// Answers one request. Its errors are the client's: a probe that hung up is nothing to log.
async fn answer(stream: TcpStream, router: Router) {
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .keep_alive(false)
        .max_headers(64)
        .max_buf_size(16 * 1024)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let _ = tokio::time::timeout(EXCHANGE_TIMEOUT, connection).await;
}

fn router(mode: Mode, health: Health, metrics: Arc<Metrics>) -> Router {
    Router::new()
        .route("/_health", get(async move |State(health): State<Health>| overall(&health, mode)))
        // No concern fails it: a restart only helps a process that does not move.
        .route("/livez", get(async || alive(pulse::runtime_silent_for())))
        .route("/readyz", get(ready))
        .with_state(health)
        .route("/metrics", get(move || async move { scrape(&metrics) }))
}

/// The body of `/_health`.
#[derive(Serialize)]
struct Overall {
    status: &'static str,
    timestamp: String,
    /// Said only where it is not the usual one: everybody else gets the published body.
    #[serde(skip_serializing_if = "Option::is_none")]
    delivery: Option<&'static str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    reasons: Vec<String>,
}

fn overall(health: &Health, mode: Mode) -> Response {
    let reasons = health.reasons(Concern::fails_health);
    let (code, status) =
        if reasons.is_empty() { (StatusCode::OK, "healthy") } else { (StatusCode::SERVICE_UNAVAILABLE, "unhealthy") };
    let now = Timestamp::now();
    let timestamp = now.round(Unit::Second).unwrap_or(now).to_string();
    let delivery = (mode != Mode::JetStream).then(|| mode.as_str());
    match serde_json::to_string(&Overall { status, timestamp, delivery, reasons }) {
        Ok(body) => (code, [(header::CONTENT_TYPE, "application/json")], body).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

fn alive(silent_for: Duration) -> Response {
    if silent_for <= STALLED {
        return "ok\n".into_response();
    }
    let reason = format!("stalled: nothing has moved for {} s\n", silent_for.as_secs());
    (StatusCode::SERVICE_UNAVAILABLE, reason).into_response()
}

async fn ready(State(health): State<Health>) -> Response {
    let reasons = health.reasons(Concern::fails_readyz);
    if reasons.is_empty() {
        "ok\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n").into_response()
    }
}

fn scrape(metrics: &Metrics) -> Response {
    ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], metrics.encode()).into_response()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// A real server on a port of its own.
    struct Server {
        address: SocketAddr,
        health: Health,
        stop: CancellationToken,
        task: tokio::task::JoinHandle<()>,
    }

    impl Server {
        async fn start() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let (health, stop) = (Health::new(), CancellationToken::new());
            let task =
                tokio::spawn(serve(listener, Mode::JetStream, health.clone(), Arc::new(Metrics::new()), stop.clone()));
            Self { address, health, stop, task }
        }

        async fn connect(&self) -> TcpStream {
            TcpStream::connect(self.address).await.unwrap()
        }

        /// The answer to one request: its head and its body.
        async fn ask(&self, method: &str, path: &str) -> (String, String) {
            let mut stream = self.connect().await;
            let request = format!("{method} {path} HTTP/1.1\r\nHost: worker\r\nConnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            let (head, body) = answer.split_once("\r\n\r\n").expect("an answer has a head");
            (head.to_ascii_lowercase(), body.to_owned())
        }

        async fn code(&self, path: &str) -> u16 {
            let (head, _) = self.ask("GET", path).await;
            head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status line has a code")
        }
    }

    #[tokio::test]
    async fn health_has_the_public_shape() {
        let server = Server::start().await;
        let (head, body) = server.ask("GET", "/_health").await;
        assert!(head.starts_with("http/1.1 200") && head.contains("content-type: application/json"), "{head}");
        let timestamp =
            body.strip_prefix(r#"{"status":"healthy","timestamp":""#).and_then(|rest| rest.strip_suffix(r#""}"#));
        let timestamp = timestamp.unwrap_or_else(|| panic!("{body}"));
        assert_eq!((timestamp.len(), timestamp.ends_with('Z')), ("2025-01-27T12:00:00Z".len(), true), "{timestamp}");
        timestamp.parse::<Timestamp>().unwrap();

        server.health.raise(Concern::NatsDisconnected, "connection\nrefused");
        let (head, body) = server.ask("GET", "/_health").await;
        assert!(head.starts_with("http/1.1 503"), "{head}");
        assert!(body.starts_with(r#"{"status":"unhealthy","timestamp":""#), "{body}");
        assert!(body.ends_with(r#","reasons":["NATS disconnected: connection refused"]}"#), "{body}");

        server.health.clear(Concern::NatsDisconnected);
        assert_eq!(server.code("/_health").await, 200);
    }

    #[tokio::test]
    async fn each_concern_fails_its_own_endpoints() {
        let server = Server::start().await;
        assert_eq!(server.ask("GET", "/readyz").await.1, "starting: not everything is set up yet\n");
        server.health.clear(Concern::Starting);
        assert_eq!(server.ask("GET", "/readyz").await.1, "ok\n");

        for (concern, expected) in [
            (Concern::Starting, [200, 503, 200]),
            (Concern::NatsDisconnected, [200, 503, 503]),
            (Concern::StreamsUnavailable, [200, 503, 503]),
            (Concern::ParkedWorkUnavailable, [200, 503, 503]),
            (Concern::StorageRefused, [200, 503, 503]),
            (Concern::NotPermitted, [200, 503, 503]),
            (Concern::PoolOverloaded, [200, 200, 503]),
            (Concern::MemoryFull, [200, 200, 200]),
            (Concern::Draining, [200, 503, 200]),
        ] {
            server.health.raise(concern, "");
            let codes = [server.code("/livez").await, server.code("/readyz").await, server.code("/_health").await];
            assert_eq!(codes, expected, "{concern:?}");
            server.health.clear(concern);
        }
    }

    #[test]
    fn only_a_runtime_that_does_not_move_fails_liveness() {
        let codes = [0, 20, 21].map(|seconds| alive(Duration::from_secs(seconds)).status().as_u16());
        assert_eq!(codes, [200, 200, 503]);
    }

    #[tokio::test]
    async fn readiness_names_every_reason_on_its_own_line() {
        let server = Server::start().await;
        server.health.raise(Concern::Draining, "SIGTERM");
        let (_, body) = server.ask("GET", "/readyz").await;
        assert_eq!(body, "starting: not everything is set up yet\ndraining: SIGTERM\n");
    }

    #[tokio::test]
    async fn metrics_are_prometheus_text() {
        let server = Server::start().await;
        let (head, body) = server.ask("GET", "/metrics").await;
        assert!(head.contains("content-type: text/plain; version=0.0.4"), "{head}");
        assert!(body.contains("# TYPE worker_tasks_total counter"), "{body}");
    }

    #[tokio::test]
    async fn nothing_else_is_served() {
        let server = Server::start().await;
        for path in ["/", "/health", "/metrics/", "/_health/x"] {
            assert_eq!(server.code(path).await, 404, "{path}");
        }
        for method in ["POST", "PUT", "DELETE"] {
            for path in ["/_health", "/livez", "/readyz", "/metrics"] {
                let (head, _) = server.ask(method, path).await;
                assert!(head.starts_with("http/1.1 405"), "{method} {path}: {head}");
            }
        }
    }

    #[tokio::test]
    async fn clients_that_send_nothing_lock_nobody_out() {
        let server = Server::start().await;
        let mut slow = Vec::new();
        for _ in 0..3 * MAX_CONNECTIONS {
            let mut stream = server.connect().await;
            stream.write_all(b"GET /_health HTTP/1.1\r\nX-Slow: ").await.unwrap();
            slow.push(stream);
        }
        // The last ones still hold all places.
        let mut last = slow.pop().unwrap();
        assert_eq!(tokio::time::timeout(HEADER_TIMEOUT, server.code("/_health")).await, Ok(200));
        let is_open = last.try_read(&mut [0]).is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
        assert!(is_open, "a younger one was closed");
        assert!(slow.first_mut().unwrap().read_u8().await.is_err(), "the oldest one is still open");
        // Nobody else comes, and yet it has to go.
        assert!(tokio::time::timeout(HEADER_TIMEOUT * 5, last.read_u8()).await.is_ok_and(|read| read.is_err()));
    }

    #[tokio::test]
    async fn of_many_requests_on_one_connection_one_is_answered() {
        let server = Server::start().await;
        let request = "GET /metrics HTTP/1.1\r\nHost: worker\r\n\r\n";
        let mut stream = server.connect().await;
        stream.write_all(request.repeat(100).as_bytes()).await.unwrap();
        let mut answers = Vec::new();
        // What it was not asked to read may break the connection after the answer.
        let _ = stream.read_to_end(&mut answers).await;
        assert_eq!(String::from_utf8_lossy(&answers).matches("HTTP/1.1 200 OK").count(), 1);
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_its_answer_gives_its_place_back() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut deaf = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        // More than the buffers of both sides take.
        let router = Router::new().route("/", get(async || "x".repeat(64 << 20)));
        let answering = tokio::spawn(answer(stream, router));
        deaf.write_all(b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n").await.unwrap();
        tokio::time::timeout(EXCHANGE_TIMEOUT * 3, answering).await.expect("it has ended").unwrap();
    }

    #[tokio::test]
    async fn a_stop_ends_the_server_even_when_clients_stay() {
        let server = Server::start().await;
        let _idle = server.connect().await;
        assert_eq!(server.code("/livez").await, 200);
        server.stop.cancel();
        tokio::time::timeout(STOP_TIMEOUT * 3, server.task).await.expect("it ended").unwrap();
    }
}
