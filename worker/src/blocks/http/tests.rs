mod request; // what goes out
mod answer; // what comes back
mod stream; // what leaves as it comes
mod redirect; // where it is sent on to
mod connection; // to whom, and for how long

use std::io::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use serde_json::value::to_raw_value;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;
use crate::blocks::pieces::{Kept, Piece};
use crate::ids::TenantId;
use crate::trace_context::TraceContext;

/// A loopback server that keeps what it was sent, byte for byte, with the number of the connection.
struct Peer {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<(usize, String)>>>,
}

impl Peer {
    /// Answers each request with the bytes that `answer` makes of it. No bytes: the connection is dropped.
    async fn new(answer: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peer = Self { address: listener.local_addr().unwrap(), seen: Arc::default() };
        let (seen, answer) = (Arc::clone(&peer.seen), Arc::new(answer));
        tokio::spawn(async move {
            for connection in 0.. {
                let (stream, _) = listener.accept().await.unwrap();
                let (seen, answer) = (Arc::clone(&seen), Arc::clone(&answer));
                tokio::spawn(async move { serve(stream, connection, &seen, answer.as_ref()).await });
            }
        });
        peer
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    fn requests(&self) -> Vec<String> {
        self.seen.lock().unwrap().iter().map(|(_, text)| text.clone()).collect()
    }

    fn connections(&self) -> Vec<usize> {
        self.seen.lock().unwrap().iter().map(|(connection, _)| *connection).collect()
    }
}

async fn serve(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    connection: usize,
    seen: &Mutex<Vec<(usize, String)>>,
    answer: &(dyn Fn(&str) -> Vec<u8> + Send + Sync),
) {
    let mut bytes = Vec::new();
    while stream.read_buf(&mut bytes).await.is_ok_and(|count| count > 0) {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length =
            head.lines().find_map(|line| line.strip_prefix("content-length: ")).map_or(0, |n| n.parse().unwrap());
        if body.len() < length {
            continue;
        }
        seen.lock().unwrap().push((connection, text.clone()));
        let answer = answer(&text);
        if answer.is_empty() || stream.write_all(&answer).await.is_err() {
            return;
        }
        bytes.clear();
    }
}

/// The path of a request, without its query.
fn path(request: &str) -> &str {
    request.split([' ', '?']).nth(1).unwrap()
}

fn reply(head: &str, body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    [format!("HTTP/1.1 {head}\r\ncontent-length: {}\r\n\r\n", body.len()).as_bytes(), body].concat()
}

fn redirect(status: &str, location: &str) -> Vec<u8> {
    reply(&format!("{status}\r\nlocation: {location}"), "")
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn http_with(settings: Settings, allow: &[&str]) -> Http {
    let allow = allow.iter().map(|text| text.parse().unwrap()).collect();
    Http::new(settings, egress::Policy { allow, ..egress::Policy::default() }).unwrap()
}

fn http() -> Http {
    http_with(Settings::default(), &["127.0.0.0/8"])
}

fn parse(job: &Value) -> Result<Request, Invalid> {
    Request::parse(&to_raw_value(job).unwrap())
}

async fn run(http: &Http, job: Value) -> Result<Value, Fault> {
    let output = http.run(&parse(&job).unwrap(), &Scope::of("acme")).await?;
    Ok(serde_json::from_str(output.0.get()).unwrap())
}

async fn fault(http: &Http, job: Value) -> Fault {
    run(http, job).await.unwrap_err()
}

/// Runs a job whose body leaves as it comes: what came of it, and the pieces.
async fn stream(http: &Http, url: String, attempt: u32) -> (Result<Value, Fault>, Vec<Piece>) {
    let kept = Arc::new(Kept::default());
    let scope = Scope { attempt, sink: Some(Arc::<Kept>::clone(&kept)), ..Scope::of("acme") };
    let output = http.run(&parse(&json!({"url": url, "stream": true})).unwrap(), &scope).await;
    (output.map(|output| serde_json::from_str(output.0.get()).unwrap()), kept.pieces())
}
