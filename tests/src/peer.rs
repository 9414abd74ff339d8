//! Whom `http.request` calls: a server whose answers are in the path, and which remembers who asked.
//!
//! `/ok`, `/echo`, `/status/<code>`, `/flaky/<n>` and `/retry-after/<seconds>/<n>` (the first `n` requests with the same
//! `Idempotency-Key` get 503), `/slow/<ms>`, `/gate/<name>/<n>` (answers, with `n` bytes if it says so, when the test
//! opens it), `/cookie` (sets one), `/reset`, `/redirect/<n>`,
//! `/gzip`, `/bytes/<n>`, `/garbled/<code>/<n>` (`n` control characters). A query only tells cases apart. `/hits` tells how often each `Idempotency-Key` came, and
//! `/kept/<word>` what came to paths that begin with that word, in base64. It takes a collector's traces, too.

use std::collections::{BTreeMap, HashSet};
use std::io::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use flate2::Compression;
use flate2::write::GzEncoder;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::wait::SOON;

/// A server; ended when it is dropped.
#[derive(Debug)]
pub struct Peer {
    address: SocketAddr,
    state: Arc<State>,
    server: JoinHandle<()>,
}

/// A request that arrived.
#[derive(Clone, Debug)]
pub struct Hit {
    /// When.
    pub at: Instant,
    /// How.
    pub method: String,
    /// What for, query included.
    pub path: String,
    /// By name, in lower case.
    pub headers: BTreeMap<String, String>,
    /// What came with it.
    pub body: Vec<u8>,
}

#[derive(Debug)]
struct State {
    hits: Mutex<Vec<Hit>>,
    open: Mutex<HashSet<String>>,
    at_once: Mutex<AtOnce>,
    changed: watch::Sender<usize>,
}

/// Requests that are not answered yet.
#[derive(Debug, Default)]
struct AtOnce {
    now: usize,
    most: usize,
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Peer {
    /// A server on a loopback port.
    pub async fn start() -> Self {
        Self::on("127.0.0.1:0").await
    }

    /// A server on this address.
    pub async fn on(address: &str) -> Self {
        let listener = TcpListener::bind(address).await.expect("an address to listen on");
        let address = listener.local_addr().expect("the listener has an address");
        let state = Arc::new(State {
            hits: Mutex::default(),
            open: Mutex::default(),
            at_once: Mutex::default(),
            changed: watch::Sender::new(0),
        });
        let server = tokio::spawn(serve(listener, Arc::clone(&state)));
        Self { address, state, server }
    }

    /// The URL of a path.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// All requests so far whose path begins so.
    pub fn hits(&self, path: &str) -> Vec<Hit> {
        let hits = self.state.hits.lock().unwrap();
        hits.iter().filter(|hit| hit.path.starts_with(path)).cloned().collect()
    }

    /// Waits until at least so many requests have arrived whose path begins so.
    pub async fn arrived(&self, path: &str, count: usize) -> Vec<Hit> {
        let mut changed = self.state.changed.subscribe();
        let arrived = changed.wait_for(|_| self.hits(path).len() >= count);
        let arrived = tokio::time::timeout(SOON * 2, arrived).await.is_ok();
        assert!(arrived, "{} of {count} requests for {path} arrived", self.hits(path).len());
        self.hits(path)
    }

    /// The most requests that were ever here at once, without an answer.
    pub fn most_at_once(&self) -> usize {
        self.state.at_once.lock().unwrap().most
    }

    /// Answers everybody who waits or will wait at this gate.
    pub fn open(&self, gate: &str) {
        self.state.open.lock().unwrap().insert(gate.to_owned());
        self.state.changed.send_modify(|count| *count += 1);
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Hit {
    /// What makes repeated attempts of one assignment the same to us.
    pub fn key(&self) -> &str {
        self.headers.get("idempotency-key").map_or("", String::as_str)
    }
}

async fn serve(listener: TcpListener, state: Arc<State>) {
    while let Ok((stream, _)) = listener.accept().await {
        let _ = stream.set_nodelay(true);
        tokio::spawn(converse(stream, Arc::clone(&state)));
    }
}

/// One connection, request by request, until the client goes or is sent away.
async fn converse(stream: TcpStream, state: Arc<State>) {
    let mut stream = BufReader::new(stream);
    while let Some(hit) = read(&mut stream).await {
        let answer = answer(&state, &hit);
        state.note(hit);
        state.begun();
        let answer = answer.await;
        state.at_once.lock().unwrap().now -= 1;
        let Some(answer) = answer else {
            let _ = stream.get_ref().set_zero_linger();
            return;
        };
        if stream.write_all(&answer.encode()).await.is_err() {
            return;
        }
    }
}

async fn read(stream: &mut BufReader<TcpStream>) -> Option<Hit> {
    let mut line = String::new();
    stream.read_line(&mut line).await.ok()?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await.ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    Some(Hit { at: Instant::now(), method, path, headers, body })
}

/// What the path asks for; `None` breaks the connection. It looks at earlier requests before it is awaited.
fn answer(state: &Arc<State>, hit: &Hit) -> impl Future<Output = Option<Answer>> + Send + use<> {
    let path = hit.path.split('?').next().unwrap_or_default();
    let words: Vec<String> = path.trim_start_matches('/').split('/').map(str::to_owned).collect();
    let (hit, state) = (hit.clone(), Arc::clone(state));
    let earlier = state.hits_like(&hit);
    async move {
        let number = |word: Option<&String>| word.and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        let (first, second) = (number(words.get(1)), number(words.get(2)));
        Some(match words.first().map(String::as_str).unwrap_or_default() {
            "ok" => Answer::ok(),
            "echo" => Answer { body: hit.body.clone(), ..Answer::ok() }.typed(&hit),
            "status" => Answer::status(first),
            "flaky" if earlier < first => Answer::status(503),
            "retry-after" if earlier < second => Answer::status(503).with("retry-after", first.to_string()),
            "flaky" | "retry-after" => Answer::ok(),
            "slow" => {
                tokio::time::sleep(Duration::from_millis(first)).await;
                Answer::ok()
            }
            "gate" => {
                let gate = words.get(1).cloned().unwrap_or_default();
                let mut changed = state.changed.subscribe();
                let _ = changed.wait_for(|_| state.open.lock().unwrap().contains(&gate)).await;
                if second > 0 { Answer::bytes(second) } else { Answer::ok() }
            }
            "cookie" => Answer::ok().with("set-cookie", "session=of-a-tenant"),
            "reset" => return None,
            "redirect" if first > 0 => Answer::status(302).with("location", format!("/redirect/{}", first - 1)),
            "redirect" => Answer::ok(),
            "gzip" => Answer { body: gzip(&Answer::ok().body), ..Answer::ok().with("content-encoding", "gzip") },
            "bytes" => Answer::bytes(first),
            "garbled" => Answer { body: vec![1; usize::try_from(second).unwrap_or_default()], ..Answer::status(first) },
            "hits" => Answer::json(200, &state.counts()),
            "kept" => Answer::json(200, &state.bodies(words.get(1).map(String::as_str).unwrap_or_default())),
            "v1" => Answer::ok(),
            _ => Answer::status(404),
        })
    }
}

impl State {
    fn note(&self, hit: Hit) {
        self.hits.lock().unwrap().push(hit);
        self.changed.send_modify(|count| *count += 1);
    }

    fn begun(&self) {
        let mut at_once = self.at_once.lock().unwrap();
        at_once.now += 1;
        at_once.most = at_once.most.max(at_once.now);
    }

    /// How often each key came, as JSON.
    fn counts(&self) -> String {
        let hits = self.hits.lock().unwrap();
        let mut counts = BTreeMap::<&str, u64>::new();
        hits.iter().filter(|hit| !hit.key().is_empty()).for_each(|hit| *counts.entry(hit.key()).or_default() += 1);
        serde_json::to_string(&counts).expect("plain data")
    }

    /// What came to paths that begin so, as JSON.
    fn bodies(&self, word: &str) -> String {
        let hits = self.hits.lock().unwrap();
        let these = hits.iter().filter(|hit| hit.path.trim_start_matches('/').split('/').next() == Some(word));
        let bodies: Vec<_> = these.map(|hit| BASE64_STANDARD.encode(&hit.body)).collect();
        serde_json::to_string(&bodies).expect("plain data")
    }

    /// Earlier requests for the same with the same key.
    fn hits_like(&self, hit: &Hit) -> u64 {
        let hits = self.hits.lock().unwrap();
        hits.iter().filter(|earlier| earlier.path == hit.path && earlier.key() == hit.key()).map(|_| 1).sum()
    }
}

impl Answer {
    fn ok() -> Self {
        Self::json(200, r#"{"output":"processed"}"#)
    }

    fn status(status: u64) -> Self {
        Self::json(u16::try_from(status).unwrap_or(500), &format!(r#"{{"status":{status}}}"#))
    }

    fn bytes(count: u64) -> Self {
        Self { body: vec![b'x'; usize::try_from(count).unwrap_or_default()], ..Self::ok() }
    }

    fn json(status: u16, body: &str) -> Self {
        Self { status, headers: vec![("content-type", "application/json".to_owned())], body: body.into() }
    }

    fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// With the content type of the request.
    fn typed(self, hit: &Hit) -> Self {
        let content_type = hit.headers.get("content-type").cloned().unwrap_or_default();
        Self { headers: vec![("content-type", content_type)], ..self }
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = format!("HTTP/1.1 {} Answer\r\ncontent-length: {}\r\n", self.status, self.body.len());
        for (name, value) in &self.headers {
            bytes.push_str(&format!("{name}: {value}\r\n"));
        }
        bytes.push_str("\r\n");
        [bytes.into_bytes(), self.body.clone()].concat()
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).expect("memory takes everything");
    encoder.finish().expect("memory takes everything")
}
