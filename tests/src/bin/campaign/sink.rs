//! Whom the assignments of a campaign call. It writes down under which key it was asked, and whether whoever asked was
//! gone before it answered. It keeps nothing else, so that millions of requests fit.
//!
//! `/ok`, `/status/<code>`, `/flaky` (503 for the first request of a key), `/slow/<ms>`.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use beamline_tests::journal::{Fact, Journal, now};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// A server that lives as long as the program.
pub(crate) struct Sink {
    address: SocketAddr,
}

struct State {
    effects: Journal,
    flaky: Mutex<HashSet<String>>,
}

struct Request {
    path: String,
    key: String,
}

impl Sink {
    /// A server on a loopback port.
    pub(crate) async fn start(effects: Journal) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let state = Arc::new(State { effects, flaky: Mutex::default() });
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                tokio::spawn(converse(stream, Arc::clone(&state)));
            }
        });
        Ok(Self { address })
    }

    /// The URL of a path.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }
}

/// One connection, request by request.
async fn converse(stream: TcpStream, state: Arc<State>) {
    let mut stream = BufReader::new(stream);
    while let Some(request) = read(&mut stream).await {
        state.effects.note(&request.key, Fact::Effect { at: now() });
        let status = tokio::select! {
            status = answer(&state, &request) => status,
            // It asks one thing after the other, so whatever there is to read now is its end.
            _ = stream.fill_buf() => {
                state.effects.note(&request.key, Fact::Orphaned { at: now() });
                return;
            }
        };
        let answer = format!("HTTP/1.1 {status} Answer\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\nok");
        if stream.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

async fn read(stream: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut line = String::new();
    stream.read_line(&mut line).await.ok()?;
    let path = line.split(' ').nth(1)?.to_owned();
    let (mut key, mut length) = (String::new(), 0);
    loop {
        line.clear();
        stream.read_line(&mut line).await.ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        match name.to_ascii_lowercase().as_str() {
            "idempotency-key" => key = value.trim().to_owned(),
            "content-length" => length = value.trim().parse().ok()?,
            _ => {}
        }
    }
    stream.read_exact(&mut vec![0; length]).await.ok()?;
    Some(Request { path, key })
}

/// A status code, when it is time.
async fn answer(state: &State, request: &Request) -> u16 {
    let mut words = request.path.trim_start_matches('/').split('/');
    let (word, number) = (words.next().unwrap_or_default(), words.next().and_then(|number| number.parse().ok()));
    match (word, number) {
        ("status", Some(status)) => status,
        ("slow", Some(millis)) => {
            tokio::time::sleep(Duration::from_millis(millis.into())).await;
            200
        }
        ("flaky", _) => {
            let is_first = state.flaky.lock().is_ok_and(|mut seen| seen.insert(request.key.clone()));
            if is_first { 503 } else { 200 }
        }
        ("ok", _) => 200,
        _ => 404,
    }
}
