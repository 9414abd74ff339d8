//! `http.request` over the wire: bodies that leave as they come, HTTPS and HTTP/2.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_nats::Subscriber;
use beamline_tests::rig::Rig;
use beamline_tests::router::assignment;
use beamline_tests::wait::{SOON, until};
use futures::StreamExt;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Request, Response, Version};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::{HandshakeKind, ServerConfig};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;

/// A peer whose answer is written by the test, piece by piece; it ends when the test lets go.
struct Tap {
    url: String,
    pour: mpsc::UnboundedSender<Vec<u8>>,
    requests: Arc<AtomicUsize>,
    written: Arc<AtomicUsize>,
}

impl Tap {
    async fn open() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let (pour, mut poured) = mpsc::unbounded_channel::<Vec<u8>>();
        let (requests, written) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (asked, sent) = (Arc::clone(&requests), Arc::clone(&written));
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                assert!(stream.read(&mut [0; 4096]).await.unwrap() > 0);
                asked.fetch_add(1, Ordering::Relaxed);
                while let Some(bytes) = poured.recv().await {
                    if bytes.is_empty() || stream.write_all(&bytes).await.is_err() {
                        break;
                    }
                    sent.fetch_add(bytes.len(), Ordering::Relaxed);
                }
            }
        });
        Self { url, pour, requests, written }
    }

    fn head(&self, content_type: &str) {
        self.raw(&format!("HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ntransfer-encoding: chunked\r\n\r\n"));
    }

    fn chunk(&self, data: &str) {
        self.raw(&format!("{:x}\r\n{data}\r\n", data.len()));
    }

    fn end(&self) {
        self.raw("0\r\n\r\n");
    }

    /// Ends the connection.
    fn cut(&self) {
        self.raw("");
    }

    fn raw(&self, text: &str) {
        self.pour.send(text.into()).unwrap();
    }
}

/// The next message about a body or a result.
async fn next(messages: &mut Subscriber) -> (String, Value) {
    let said = async {
        loop {
            let message = messages.next().await.expect("the subscription lasts");
            let subject = message.subject.to_string();
            if subject.starts_with("caf.exec.stream.v1.") || subject == "caf.exec.result.v1" {
                return (subject, serde_json::from_slice(&message.payload).unwrap());
            }
        }
    };
    tokio::time::timeout(SOON, said).await.expect("something is said")
}

async fn hears_everything(rig: &Rig) -> Subscriber {
    let messages = rig.router.client().subscribe("caf.exec.>").await.unwrap();
    rig.router.client().flush().await.unwrap();
    messages
}

fn streamed(url: &str) -> Value {
    json!({"type": "http.request", "url": url, "stream": true, "retry_config": {"base_delay_ms": 1}})
}

#[tokio::test]
async fn a_streamed_body_is_published_event_by_event_while_the_block_still_runs() {
    let (rig, tap) = (Rig::start(&[]).await, Tap::open().await);
    let mut messages = hears_everything(&rig).await;
    let mut payload = assignment("acme.eu", "s 1", streamed(&tap.url));
    payload["trace_id"] = json!("trace-abc");
    rig.router.submit(&payload).await;
    tap.head("text/event-stream");
    tap.chunk("data: é");
    tap.chunk("\n\ndata: 2\n\nda");
    let chunk = |seq: u64, data: &str, last: bool| {
        let chunk = json!({
            "assignment_id": "s 1", "tenant_id": "acme.eu", "trace_id": "trace-abc", "attempt": 1, "seq": seq,
            "data": data, "last": last,
        });
        ("caf.exec.stream.v1.acme=2Eeu.s=201".to_owned(), chunk)
    };
    assert_eq!(next(&mut messages).await, chunk(0, "data: é\n\n", false));
    assert_eq!(next(&mut messages).await, chunk(1, "data: 2\n\n", false));
    assert!(rig.router.story(&payload).results.is_empty(), "the block still runs");

    tap.chunk("ta: 3\n\n");
    assert_eq!(next(&mut messages).await, chunk(2, "data: 3\n\n", false));
    tap.end();
    assert_eq!(next(&mut messages).await, chunk(3, "", true));
    let (subject, mut result) = next(&mut messages).await;
    assert_eq!(subject, "caf.exec.result.v1", "after the last chunk");
    assert!(result["result"]["latency_ms"].take().is_u64());
    let expected = json!({
        "status_code": 200, "headers": {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"},
        "latency_ms": null, "streamed": true, "chunks": 4, "size_bytes": 28,
    });
    assert_eq!((&result["status"], &result["result"]), (&json!("success"), &expected));
}

#[tokio::test]
async fn a_stream_that_breaks_is_not_tried_again_and_has_no_last_chunk() {
    let (rig, tap) = (Rig::start(&["--dlq-exhausted"]).await, Tap::open().await);
    let mut messages = hears_everything(&rig).await;
    let payload = assignment("acme", "cut", streamed(&tap.url));
    rig.router.submit(&payload).await;
    tap.cut();
    until("the first attempt had nothing out, so there is a second", async || {
        tap.requests.load(Ordering::Relaxed) == 2
    })
    .await;
    tap.head("text/plain");
    tap.chunk("part");
    let (_, chunk) = next(&mut messages).await;
    assert_eq!((&chunk["attempt"], &chunk["seq"], &chunk["data"]), (&json!(2), &json!(0), &json!("part")));
    tap.cut();
    let (subject, result) = next(&mut messages).await;
    assert_eq!(subject, "caf.exec.result.v1");
    assert_eq!((&result["status"], &result["error"]["code"]), (&json!("error"), &json!(3001)), "{result}");
    assert_eq!((&result["error"]["retryable"], &result["metadata"]["attempts"]), (&json!(true), &json!(2)));
    assert_eq!(rig.router.letter(&payload).await["attempts"].as_array().unwrap().len(), 2);
    assert_eq!(tap.requests.load(Ordering::Relaxed), 2);

    // The Router may: the chunks begin anew.
    rig.router.submit(&payload).await;
    tap.head("text/plain");
    tap.chunk("whole");
    tap.end();
    let (_, chunk) = next(&mut messages).await;
    assert_eq!((&chunk["attempt"], &chunk["seq"], &chunk["data"]), (&json!(1), &json!(0), &json!("whole")));
    assert_eq!(next(&mut messages).await.1["last"], true);
    assert_eq!(next(&mut messages).await.1["result"]["size_bytes"], 5);
}

#[tokio::test]
async fn a_streamed_block_keeps_its_deadline() {
    let (rig, tap) = (Rig::start(&[]).await, Tap::open().await);
    let mut messages = hears_everything(&rig).await;
    let mut job = streamed(&tap.url);
    job["timeout_ms"] = json!(700);
    rig.router.submit(&assignment("acme", "late", job)).await;
    tap.head("text/plain");
    tap.chunk("part");
    assert_eq!(next(&mut messages).await.1["data"], "part");
    let (_, result) = next(&mut messages).await;
    assert_eq!((&result["status"], &result["error"]["code"]), (&json!("timeout"), &json!(5002)), "{result}");
}

#[tokio::test]
async fn an_error_is_not_streamed_and_the_sandbox_streams_nothing_real() {
    let rig = Rig::start(&[]).await;
    let mut messages = hears_everything(&rig).await;
    rig.router.submit(&assignment("acme", "404", streamed(&rig.peer.url("/status/404")))).await;
    let (_, result) = next(&mut messages).await;
    assert_eq!(
        (&result["error"]["code"], &result["error"]["details"]["body"]),
        (&json!(3003), &json!(r#"{"status":404}"#))
    );

    drop(rig.worker);
    let _sandbox =
        beamline_tests::worker::Worker::named("sandbox").env("WORKER_SANDBOX_MODE", "true").start(&rig.nats).await;
    rig.router.submit(&assignment("acme", "canned", streamed("https://api.example.com/"))).await;
    let (_, chunk) = next(&mut messages).await;
    assert_eq!((&chunk["seq"], &chunk["data"], &chunk["last"]), (&json!(0), &json!(""), &json!(true)));
    let (_, result) = next(&mut messages).await;
    assert_eq!((&result["result"]["chunks"], &result["result"]["sandbox"]), (&json!(1), &json!(true)), "{result}");
}

#[tokio::test]
async fn a_slow_broker_slows_the_peer_down() {
    const PART: usize = 64 * 1024;
    const PARTS: usize = 1500;
    let (rig, tap) = (Rig::start(&[]).await, Tap::open().await);
    let mut messages = hears_everything(&rig).await;
    rig.router.submit(&assignment("acme", "large", streamed(&tap.url))).await;
    tap.head("text/plain");
    tap.chunk("first");
    assert_eq!(next(&mut messages).await.1["seq"], 0);
    rig.nats.pause();
    let part = "x".repeat(PART);
    (0..PARTS).for_each(|_| tap.chunk(&part));
    tap.end();
    // Nobody reads at the broker: what fits into the sockets and one piece is all that the worker takes.
    let mut taken = 0;
    until("the peer is held up", async || {
        tokio::time::sleep(Duration::from_millis(300)).await;
        std::mem::replace(&mut taken, tap.written.load(Ordering::Relaxed)) == tap.written.load(Ordering::Relaxed)
    })
    .await;
    assert!(taken < PARTS * PART / 2, "{taken} bytes were taken");
    rig.nats.resume();
    let mut size = 5;
    for seq in 1.. {
        let (_, chunk) = next(&mut messages).await;
        assert_eq!(chunk["seq"], seq, "nothing is missing");
        size += chunk["data"].as_str().unwrap().len();
        if chunk["last"] == true {
            break;
        }
    }
    let (_, result) = next(&mut messages).await;
    assert_eq!((size, &result["result"]["size_bytes"]), (5 + PARTS * PART, &json!(5 + PARTS * PART)));
}

// HTTPS.

/// An https origin for `localhost`, and what it has seen.
struct Origin {
    port: u16,
    ca: PathBuf,
    seen: Arc<Mutex<Vec<Seen>>>,
    _directory: TempDir,
}

/// A request that an origin has seen.
#[derive(Clone, Debug)]
struct Seen {
    connection: usize,
    is_resumed: bool,
    version: Version,
    uri: String,
    key: String,
}

impl Origin {
    /// Offers these protocols; its certificate ends in that year.
    async fn start(protocols: &[&str], ends: i32) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let mut certificate = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap();
        (certificate.not_before, certificate.not_after) =
            (rcgen::date_time_ymd(2020, 1, 1), rcgen::date_time_ymd(ends, 1, 1));
        let certificate = certificate.self_signed(&key).unwrap();
        let ca = directory.path().join("ca.pem");
        std::fs::write(&ca, certificate.pem()).unwrap();
        let mut config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], PrivatePkcs8KeyDer::from(key.serialize_der()).into())
            .unwrap();
        config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = Arc::default();
        tokio::spawn(serve_tls(listener, TlsAcceptor::from(Arc::new(config)), Arc::clone(&seen)));
        Self { port, ca, seen, _directory: directory }
    }

    fn flags(&self) -> [String; 2] {
        ["--egress-allow=127.0.0.0/8,localhost".to_owned(), format!("--http-ca-file={}", self.ca.display())]
    }

    fn job(&self, path: &str) -> Value {
        let url = format!("https://localhost:{}{path}", self.port);
        json!({"type": "http.request", "method": "POST", "url": url, "body": "hello", "retry_config": {"base_delay_ms": 1}})
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

async fn serve_tls(listener: TcpListener, acceptor: TlsAcceptor, seen: Arc<Mutex<Vec<Seen>>>) {
    for connection in 0.. {
        let (stream, _) = listener.accept().await.unwrap();
        let (acceptor, seen) = (acceptor.clone(), Arc::clone(&seen));
        tokio::spawn(async move {
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let tls = stream.get_ref().1;
            let is_h2 = tls.alpn_protocol() == Some(b"h2");
            let is_resumed = tls.handshake_kind() == Some(HandshakeKind::Resumed);
            let service = service_fn(move |request: Request<Incoming>| {
                let key = request.headers().get("idempotency-key").map(|key| key.to_str().unwrap().to_owned());
                let (version, uri, key) = (request.version(), request.uri().to_string(), key.unwrap_or_default());
                seen.lock().unwrap().push(Seen { connection, is_resumed, version, uri, key });
                let path = request.uri().path().to_owned();
                async move { respond(&path) }
            });
            let stream = TokioIo::new(stream);
            if is_h2 {
                drop(http2::Builder::new(TokioExecutor::new()).serve_connection(stream, service).await)
            } else {
                drop(http1::Builder::new().serve_connection(stream, service).await)
            }
        });
    }
}

/// An error breaks the stream off.
fn respond(path: &str) -> Result<Response<String>, std::io::Error> {
    let answer = Response::builder();
    match path {
        "/reset" => Err(std::io::ErrorKind::Other.into()),
        "/close" => Ok(answer.header("connection", "close").body("closed".to_owned()).unwrap()),
        "/heads" => {
            let large = "x".repeat(3_000);
            let answer = (0..100).fold(answer, |answer, _| answer.header("x-large", &large));
            Ok(answer.body(String::new()).unwrap())
        }
        _ => Ok(answer.body("secret".to_owned()).unwrap()),
    }
}

#[tokio::test]
async fn https_speaks_http_2_where_the_peer_does_and_1_1_where_not() {
    for (protocols, version, uri) in [
        (&["h2", "http/1.1"][..], Version::HTTP_2, true),
        (&["http/1.1"], Version::HTTP_11, false),
        (&[], Version::HTTP_11, false),
    ] {
        let origin = Origin::start(protocols, 2100).await;
        let rig = Rig::start(&origin.flags().each_ref().map(String::as_str)).await;
        for id in ["one", "two"] {
            let result = rig.run("acme", id, origin.job("/p?q=1")).await;
            assert_eq!(
                (&result["status"], &result["result"]["body"]),
                (&json!("success"), &json!("secret")),
                "{result}"
            );
        }
        let seen = origin.seen();
        assert!(seen.iter().all(|seen| seen.version == version && seen.connection == 0), "one connection: {seen:?}");
        assert_eq!(seen.iter().map(|seen| seen.key.as_str()).collect::<Vec<_>>(), ["acme.one", "acme.two"]);
        let absolute = format!("https://localhost:{}/p?q=1", origin.port);
        assert_eq!(seen[0].uri, if uri { absolute.as_str() } else { "/p?q=1" });
    }
}

#[tokio::test]
async fn http_2_streams_break_and_headers_are_capped_as_the_table_says() {
    let origin = Origin::start(&["h2"], 2100).await;
    let rig = Rig::start(&origin.flags().each_ref().map(String::as_str)).await;
    let result = rig.run("acme", "reset", origin.job("/reset")).await;
    assert_eq!((&result["error"]["code"], &result["error"]["retryable"]), (&json!(3001), &json!(true)), "{result}");
    assert_eq!((&result["metadata"]["attempts"], origin.seen().len()), (&json!(3), 3));
    assert!(origin.seen().iter().all(|seen| seen.key == "acme.reset"), "each attempt under the same key");
    let result = rig.run("acme", "heads", origin.job("/heads")).await;
    assert_eq!((&result["error"]["code"], &result["error"]["retryable"]), (&json!(2002), &json!(false)), "{result}");
}

#[tokio::test]
async fn w28_a_certificate_that_nobody_vouches_for_or_that_has_ended_is_final() {
    let (good, ended) = (Origin::start(&["h2"], 2100).await, Origin::start(&["h2"], 2021).await);
    let rig = Rig::start(&ended.flags().each_ref().map(String::as_str)).await;
    for (id, origin) in [("unknown", &good), ("ended", &ended)] {
        let result = rig.run("acme", id, origin.job("/")).await;
        let error = &result["error"];
        assert_eq!((&error["code"], &error["retryable"]), (&json!(3001), &json!(false)), "{result}");
        assert!(error["message"].as_str().unwrap().starts_with("TLS failed: "), "{result}");
        assert_eq!(rig.router.letter(("acme", id)).await["error"]["code"], 3001);
        assert!(origin.seen().is_empty());
    }
}

#[tokio::test]
async fn s22_a_cookie_that_a_peer_sets_comes_back_from_nobody() {
    let rig = Rig::start(&[]).await;
    for (tenant, id) in [("a", "1"), ("a", "2"), ("b", "1")] {
        let result = rig.run(tenant, id, rig.call("/cookie")).await;
        assert_eq!(result["result"]["headers"]["Set-Cookie"], "session=of-a-tenant", "{result}");
    }
    let cookies: Vec<_> = rig.peer.hits("/cookie").iter().map(|hit| hit.headers.get("cookie").cloned()).collect();
    assert_eq!(cookies, [None, None, None]);
}

#[tokio::test]
async fn s22_tenants_share_no_connection_and_no_tls_session() {
    for protocols in [&["http/1.1"][..], &["h2"]] {
        let origin = Origin::start(protocols, 2100).await;
        let rig = Rig::start(&origin.flags().each_ref().map(String::as_str)).await;
        // Over HTTP/1.1 each connection is closed, so that the next one may resume its session.
        let path = if protocols == ["h2"] { "/" } else { "/close" };
        for (tenant, id) in [("a", "1"), ("a", "2"), ("b", "1"), ("b", "2"), ("a", "3")] {
            assert_eq!(rig.run(tenant, id, origin.job(path)).await["status"], "success");
        }
        let seen: Vec<_> = origin.seen().iter().map(|seen| (seen.connection, seen.is_resumed)).collect();
        let expected = match path {
            "/close" => [(0, false), (1, true), (2, false), (3, true), (4, true)],
            _ => [(0, false), (0, false), (1, false), (1, false), (0, false)],
        };
        assert_eq!(seen, expected, "a new tenant begins with a full handshake on a connection of its own");
    }
}
