//! `http.request` over the wire: bodies that leave as they come.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_nats::Subscriber;
use beamline_tests::rig::Rig;
use beamline_tests::router::assignment;
use beamline_tests::wait::{SOON, until};
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

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
