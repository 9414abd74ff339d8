//! A proxy before the API server that breaks some of what is asked through it, and counts.
//!
//! It speaks plain HTTP to whoever asks, and has a kubeconfig of its own to ask the API server with.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use futures::future::ready;
use futures::{Stream, StreamExt, stream};
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use kube::Client;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::api::client;

/// How many calls of a hundred meet a fault while there is trouble.
const PERCENT: u32 = 30;
/// The longest that a watch lives while there is trouble.
const WATCH: Duration = Duration::from_secs(8);

/// What may happen to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// Too many requests.
    Answer429,
    /// An internal error.
    Answer500,
    /// Nobody is there to answer.
    Answer503,
    /// A conflict.
    Answer409,
    /// The connection is cut, and the API server has heard nothing.
    CutBefore,
    /// The connection is cut, and the API server has done it.
    CutAfter,
    /// No answer ever comes, and the API server has heard nothing.
    Silence,
}

impl Fault {
    /// Every fault that ends a call.
    pub const ENDING: [Self; 6] =
        [Self::Answer429, Self::Answer500, Self::Answer503, Self::Answer409, Self::CutBefore, Self::CutAfter];
}

/// What may happen to a watch in place of one of its events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    /// The connection is cut.
    Cut,
    /// The API server has forgotten where the watch was.
    Gone,
    /// Nothing breaks: the watch goes on, and the event is never told.
    Lost,
}

/// One call through the proxy.
#[derive(Clone, Debug)]
pub struct Call {
    /// When it came.
    pub at: Instant,
    /// Its method and path.
    pub what: String,
    /// What happened to it.
    pub fault: Option<Fault>,
}

/// A running proxy; ends when it is dropped.
#[derive(Debug)]
pub struct ApiFault {
    shared: Arc<Shared>,
    kubeconfig: PathBuf,
    server: JoinHandle<()>,
    _directory: TempDir,
}

#[derive(Debug, Default)]
struct Shared {
    trouble: Mutex<Trouble>,
    calls: Mutex<Vec<Call>>,
}

#[derive(Clone, Debug, Default)]
struct Trouble {
    faults: Vec<Fault>,
    percent: u32,
    /// Method and part of the path of the one call that is struck, and how.
    strike: Option<(&'static str, &'static str, Fault)>,
    /// Events that watches still tell before one of them breaks, and how.
    breaks: Option<(usize, Break)>,
    /// A part of paths whose watches go on and tell nothing.
    mutes: Option<&'static str>,
    /// A field of pools' specs that is shown to nobody.
    hides: Option<&'static str>,
}

impl ApiFault {
    /// A proxy that asks by this kubeconfig, and breaks nothing yet.
    pub async fn before(kubeconfig: &Path) -> Self {
        let upstream = client(kubeconfig).await;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("an address to listen on");
        let address = listener.local_addr().expect("the listener has an address");
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("kubeconfig");
        std::fs::write(&path, plain(address, upstream.default_namespace()).to_string()).expect("a file");
        let shared = Arc::<Shared>::default();
        let server = tokio::spawn(serve(listener, upstream, Arc::clone(&shared)));
        Self { shared, kubeconfig: path, server, _directory: directory }
    }

    /// For whoever is to ask through it.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// From now on these happen to some of the calls, and every watch is cut soon; nothing happens if there are none.
    pub fn set(&self, faults: &[Fault]) {
        self.be(Trouble { faults: faults.to_vec(), percent: PERCENT, ..Trouble::default() });
    }

    /// From now on this happens to every call, and every watch is cut soon.
    pub fn outage(&self, fault: Fault) {
        self.be(Trouble { faults: vec![fault], percent: 100, ..Trouble::default() });
    }

    /// This happens to the next call of this method whose path has this part, and to no other.
    pub fn strike(&self, method: &'static str, path: &'static str, fault: Fault) {
        self.be(Trouble { strike: Some((method, path, fault)), ..Trouble::default() });
    }

    /// After so many more events on all watches, the one whose turn it is breaks before it tells the next one.
    pub fn break_watch(&self, after: usize, how: Break) {
        self.be(Trouble { breaks: Some((after, how)), ..Trouble::default() });
    }

    /// Whether the watch that was to break has not yet.
    pub fn still_breaks(&self) -> bool {
        self.shared.trouble.lock().expect("nobody panics in there").breaks.is_some()
    }

    /// From now on watches whose path has this part go on, and tell nothing.
    pub fn mute(&self, path: &'static str) {
        self.be(Trouble { mutes: Some(path), ..Trouble::default() });
    }

    /// From now on lists and watches show pools without this field of their spec, as an older type has it.
    pub fn hide(&self, field: &'static str) {
        self.be(Trouble { hides: Some(field), ..Trouble::default() });
    }

    fn be(&self, trouble: Trouble) {
        *self.shared.trouble.lock().expect("nobody panics in there") = trouble;
    }

    /// All calls since the last time that this was asked.
    pub fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.shared.calls.lock().expect("nobody panics in there"))
    }
}

impl Drop for ApiFault {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Shared {
    /// Notes a call, and what is to happen to it.
    fn note(&self, request: &Request<Incoming>) -> Option<Fault> {
        let what = format!("{} {}", request.method(), request.uri());
        let fault = self.trouble.lock().expect("nobody panics in there").choose(request);
        let mut calls = self.calls.lock().expect("nobody panics in there");
        calls.push(Call { at: Instant::now(), what, fault });
        fault
    }

    /// What the watch of this path tells in place of this line, if anything.
    fn tells(&self, path: &str, line: Bytes) -> Option<Result<Bytes, Cut>> {
        let mut trouble = self.trouble.lock().expect("nobody panics in there");
        if trouble.mutes.is_some_and(|muted| path.contains(muted)) {
            return None;
        }
        match &mut trouble.breaks {
            Some((left, _)) if *left > 0 => *left -= 1,
            Some((_, how)) => {
                let how = *how;
                trouble.breaks = None;
                return match how {
                    Break::Cut => Some(Err(Cut)),
                    Break::Gone => Some(Ok(gone())),
                    Break::Lost => None,
                };
            }
            None => {}
        }
        Some(Ok(match trouble.hides {
            Some(field) => without(&line, field),
            None => line,
        }))
    }

    fn hides(&self) -> Option<&'static str> {
        self.trouble.lock().expect("nobody panics in there").hides
    }

    fn has_trouble(&self) -> bool {
        !self.trouble.lock().expect("nobody panics in there").faults.is_empty()
    }
}

impl Trouble {
    fn choose(&mut self, request: &Request<Incoming>) -> Option<Fault> {
        let is_struck =
            |(method, path, _): &(&str, &str, _)| request.method() == *method && request.uri().path().contains(path);
        if self.strike.as_ref().is_some_and(is_struck) {
            return self.strike.take().map(|(.., fault)| fault);
        }
        fastrand::choice(self.faults.iter().copied()).filter(|_| fastrand::u32(..100) < self.percent)
    }
}

fn plain(address: SocketAddr, namespace: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "proxy",
        "clusters": [{"name": "proxy", "cluster": {"server": format!("http://{address}")}}],
        "users": [{"name": "proxy", "user": {}}],
        "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "proxy", "namespace": namespace}}],
    })
}

fn is_watch(request: &Request<Incoming>) -> bool {
    request.uri().query().is_some_and(|query| query.split('&').any(|pair| pair == "watch=true"))
}

async fn serve(listener: TcpListener, upstream: Client, shared: Arc<Shared>) {
    while let Ok((connection, _)) = listener.accept().await {
        tokio::spawn(connected(connection, upstream.clone(), Arc::clone(&shared)));
    }
}

async fn connected(connection: TcpStream, upstream: Client, shared: Arc<Shared>) {
    let pass = service_fn(|request| pass(request, upstream.clone(), Arc::clone(&shared)));
    // It ends with an error where a fault says so.
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(connection), pass).await;
}

/// Cut in the middle of an answer, or before it.
#[derive(Debug)]
struct Cut;

impl std::fmt::Display for Cut {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("cut")
    }
}

impl std::error::Error for Cut {}

async fn pass(request: Request<Incoming>, upstream: Client, shared: Arc<Shared>) -> Result<Response<Body>, Cut> {
    let fault = shared.note(&request);
    match fault {
        Some(Fault::Answer429) => return Ok(refusal(StatusCode::TOO_MANY_REQUESTS, "TooManyRequests")),
        Some(Fault::Answer500) => return Ok(refusal(StatusCode::INTERNAL_SERVER_ERROR, "InternalError")),
        Some(Fault::Answer503) => return Ok(refusal(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable")),
        Some(Fault::Answer409) => return Ok(refusal(StatusCode::CONFLICT, "Conflict")),
        Some(Fault::CutBefore) => return Err(Cut),
        Some(Fault::Silence) => std::future::pending().await,
        Some(Fault::CutAfter) | None => {}
    }
    let cuts = is_watch(&request).then(|| cut_watch(Arc::clone(&shared)));
    let hides = shared.hides().filter(|_| request.method() == "GET");
    let path = request.uri().path().to_owned();
    let (mut head, body) = request.into_parts();
    head.headers.remove("host");
    let body = axum::body::to_bytes(Body::new(body), usize::MAX).await.map_err(|_| Cut)?;
    let request = Request::from_parts(head, kube::client::Body::from(body.to_vec()));
    let mut answer = upstream.send(request).await.map_err(|_| Cut)?;
    if hides.is_some() {
        answer.headers_mut().remove("content-length");
    }
    if fault == Some(Fault::CutAfter) {
        return Err(Cut);
    }
    Ok(answer.map(|body| match (cuts, hides) {
        (Some(cut), _) => {
            let told = lines(Body::new(body)).filter_map(move |line| {
                ready(match line {
                    Ok(line) => shared.tells(&path, line),
                    Err(cut) => Some(Err(cut)),
                })
            });
            let told = told.take_until(cut);
            Body::from_stream(told.chain(stream::once(async { Err(Cut) })))
        }
        (None, Some(field)) => {
            Body::from_stream(stream::once(whole(body)).map(move |text| text.map(|text| without(&text, field))))
        }
        (None, None) => Body::new(body),
    }))
}

async fn whole(body: kube::client::Body) -> Result<Bytes, Cut> {
    axum::body::to_bytes(Body::new(body), usize::MAX).await.map_err(|_| Cut)
}

/// A watch tells an event a line.
fn lines(body: Body) -> impl Stream<Item = Result<Bytes, Cut>> {
    let frames = Box::pin(body.into_data_stream());
    stream::try_unfold((frames, Vec::new()), async |(mut frames, mut rest)| {
        loop {
            if let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let line = rest.drain(..=end).collect::<Vec<u8>>();
                return Ok(Some((Bytes::from(line), (frames, rest))));
            }
            match frames.next().await {
                Some(frame) => rest.extend_from_slice(&frame.map_err(|_| Cut)?),
                None => return Ok(None),
            }
        }
    })
}

/// What is said of a pool, or of several, without this field of the spec.
fn without(text: &Bytes, field: &str) -> Bytes {
    let Ok(mut said) = serde_json::from_slice::<Value>(text) else { return text.clone() };
    let items = said.get_mut("items").and_then(Value::as_array_mut).into_iter().flatten();
    items.for_each(|pool| drop_field(pool, field));
    said.get_mut("object").into_iter().for_each(|pool| drop_field(pool, field));
    format!("{said}\n").into()
}

fn drop_field(pool: &mut Value, field: &str) {
    if let Some(spec) = pool.get_mut("spec").and_then(Value::as_object_mut) {
        spec.remove(field);
    }
}

fn gone() -> Bytes {
    let status = json!({
        "apiVersion": "v1", "kind": "Status", "status": "Failure", "code": 410, "reason": "Expired",
        "message": "the tests say that it is too old", "metadata": {},
    });
    format!("{}\n", json!({"type": "ERROR", "object": status})).into()
}

/// Resolves when a watch that begins now is to be cut: at some moment of the trouble.
async fn cut_watch(shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(WATCH.mul_f64(fastrand::f64())).await;
        if shared.has_trouble() {
            return;
        }
    }
}

fn refusal(code: StatusCode, reason: &str) -> Response<Body> {
    let status = json!({
        "apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code.as_u16(), "reason": reason,
        "message": format!("the tests say {reason}"), "metadata": {},
    });
    let response = Response::builder().status(code).header("Content-Type", "application/json");
    response.body(Body::from(status.to_string())).unwrap_or_default()
}
