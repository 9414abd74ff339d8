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

#[test]
fn a_bad_job_is_refused_by_its_field() {
    let url = "http://h/";
    for (job, code, pointer) in [
        (json!({}), 1002, "/job/url"),
        (json!({"url": ""}), 1002, "/job/url"),
        (json!({"url": null}), 1002, "/job/url"),
        (json!({"url": 5}), 1003, "/job/url"),
        (json!({"url": "h/path"}), 1003, "/job/url"),
        (json!({"url": "http://"}), 1003, "/job/url"),
        (json!({"url": "ftp://h/"}), 1003, "/job/url"),
        (json!({"url": "file:///etc/passwd"}), 1003, "/job/url"),
        (json!({"url": "http://u:hunter2@h/"}), 1003, "/job/url"),
        (json!({"url": "http://u@h/"}), 1003, "/job/url"),
        (json!({"url": format!("http://h/{}", "a".repeat(70_000))}), 1003, "/job/url"),
        (json!({"url": url, "method": "BREW"}), 1001, "/job/method"),
        (json!({"url": url, "method": "CONNECT"}), 1001, "/job/method"),
        (json!({"url": url, "method": "TRACE"}), 1001, "/job/method"),
        (json!({"url": url, "method": 1}), 1003, "/job/method"),
        (json!({"url": url, "body": {}}), 1003, "/job/body"),
        (json!({"url": url, "body_base64": "%"}), 1003, "/job/body_base64"),
        (json!({"url": url, "body": "", "body_base64": ""}), 1003, "/job/body_base64"),
        (json!({"url": url, "stream": "yes"}), 1003, "/job/stream"),
        (json!({"url": url, "headers": []}), 1003, "/job/headers"),
        (json!({"url": url, "headers": {"A": 5}}), 1003, "/job/headers/A"),
        (json!({"url": url, "headers": {"A": ["x", null]}}), 1003, "/job/headers/A"),
        (json!({"url": url, "headers": {"A": "hunter2\r\nHost: evil"}}), 1003, "/job/headers/A"),
        (json!({"url": url, "headers": {"A": "hunter2\n x"}}), 1003, "/job/headers/A"),
        (json!({"url": url, "headers": {"A": "hunter2\u{0}"}}), 1003, "/job/headers/A"),
        (json!({"url": url, "headers": {"A\r\nB": "x"}}), 1003, "/job/headers/A\r\nB"),
        (json!({"url": url, "headers": {"": "x"}}), 1003, "/job/headers/"),
        (json!({"url": url, "headers": {":path": "x"}}), 1003, "/job/headers/:path"),
        (json!({"url": url, "headers": {"a/b~": "x"}}), 1003, "/job/headers/a~1b~0"),
        (json!({"url": url, "headers": {"Host": "x"}}), 1003, "/job/headers/Host"),
        (json!({"url": url, "headers": {"content-length": "0"}}), 1003, "/job/headers/content-length"),
        (json!({"url": url, "headers": {"Transfer-Encoding": "chunked"}}), 1003, "/job/headers/Transfer-Encoding"),
        (json!({"url": url, "headers": {"CONNECTION": "x"}}), 1003, "/job/headers/CONNECTION"),
        (json!({"url": url, "headers": {"Keep-Alive": "x"}}), 1003, "/job/headers/Keep-Alive"),
        (json!({"url": url, "headers": {"TE": "trailers"}}), 1003, "/job/headers/TE"),
        (json!({"url": url, "headers": {"Trailer": "x"}}), 1003, "/job/headers/Trailer"),
        (json!({"url": url, "headers": {"Upgrade": "h2c"}}), 1003, "/job/headers/Upgrade"),
        (json!({"url": url, "headers": {"HTTP2-Settings": "x"}}), 1003, "/job/headers/HTTP2-Settings"),
        (json!({"url": url, "headers": {"Proxy-Authorization": "x"}}), 1003, "/job/headers/Proxy-Authorization"),
        (json!({"url": url, "headers": {"Proxy-Connection": "x"}}), 1003, "/job/headers/Proxy-Connection"),
    ] {
        let invalid = parse(&job).expect_err(&job.to_string());
        assert_eq!((invalid.cause.code(), invalid.pointer.as_str()), (code, pointer), "{invalid}");
        assert!(!invalid.reason.contains("hunter2"), "{invalid}");
    }
}

#[test]
fn a_request_does_not_show_its_secrets() {
    let job = json!({"url": "https://h/p?key=hunter2#hunter2", "headers": {"A": "hunter2"}, "body": "hunter2"});
    assert_eq!(format!("{:?}", parse(&job).unwrap()), "Request(GET https://h/p)");
}

#[tokio::test]
async fn a_request_goes_out_as_it_was_asked_for() {
    let peer = Peer::new(|_| reply("200 OK", "done")).await;
    let job = json!({
        "type": "http.request", "method": "post", "url": peer.url("/p%20q?x=1#part"), "body": "grüße",
        "headers": {"X-One": "1", "X-Many": ["a", "b"], "User-Agent": "mine", "Content-Type": "text/plain"},
    });
    run(&http(), job).await.unwrap();
    let request = peer.requests().remove(0);
    let (head, body) = request.split_once("\r\n\r\n").unwrap();
    let mut lines: Vec<_> = head.split("\r\n").collect();
    assert_eq!(lines.remove(0), "POST /p%20q?x=1 HTTP/1.1");
    lines.sort_unstable();
    let host = format!("host: {}", peer.address);
    let expected = [
        "accept-encoding: gzip",
        "accept: */*",
        "content-length: 7",
        "content-type: text/plain",
        host.as_str(),
        "idempotency-key: acme.a1",
        "user-agent: mine",
        "x-many: a",
        "x-many: b",
        "x-one: 1",
    ];
    assert_eq!(lines, expected);
    assert_eq!(body, "grüße");
}

#[tokio::test]
async fn every_method_and_a_body_of_bytes_go_out() {
    let peer = Peer::new(|_| reply("200 OK", "")).await;
    let http = http();
    for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] {
        run(&http, json!({"method": method, "url": peer.url("/"), "body_base64": "AAEC"})).await.unwrap();
        let request = peer.requests().pop().unwrap();
        assert!(request.starts_with(method) && request.ends_with("\r\n\r\n\u{0}\u{1}\u{2}"), "{request}");
    }
    run(&http, json!({"url": peer.url("/")})).await.unwrap();
    assert!(peer.requests().pop().unwrap().starts_with("GET / "));
}

#[tokio::test]
async fn a_peer_can_recognise_a_repetition_and_join_the_trace() {
    let peer = Peer::new(|_| reply("200 OK", "")).await;
    let (http, job) = (http(), json!({"url": peer.url("/")}));
    let sent = async |scope: Scope, job: &Value, header: &str| {
        http.run(&parse(job).unwrap(), &scope).await.unwrap();
        let request = peer.requests().pop().unwrap();
        request.lines().find_map(|line| line.strip_prefix(&format!("{header}: "))).map(str::to_owned)
    };
    let long = Scope { idempotency_key: "k".repeat(256), ..Scope::of("acme") };
    let digest = "ce16fe78208a4e93f7158e62393680e025b2ad584f4e875ce903a654bb74cf93";
    assert_eq!(sent(long, &job, "idempotency-key").await.as_deref(), Some(digest));
    let longest = Scope { idempotency_key: "k".repeat(255), ..Scope::of("acme") };
    assert_eq!(sent(longest, &job, "idempotency-key").await, Some("k".repeat(255)));
    let own = json!({"url": peer.url("/"), "headers": {"Idempotency-Key": "mine", "traceparent": "own"}});
    assert_eq!(sent(Scope::of("acme"), &own, "idempotency-key").await.as_deref(), Some("mine"));

    let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let trace = TraceContext { parent: parent.to_owned(), state: Some("a=b".to_owned()) };
    let traced = || Scope { trace: Some(trace.clone()), ..Scope::of("acme") };
    assert_eq!(sent(traced(), &job, "traceparent").await.as_deref(), Some(parent));
    assert_eq!(sent(traced(), &job, "tracestate").await.as_deref(), Some("a=b"));
    assert_eq!(sent(traced(), &own, "traceparent").await.as_deref(), Some("own"));
    assert_eq!(sent(traced(), &own, "tracestate").await, None, "the job's own has none");
    assert_eq!(sent(Scope::of("acme"), &job, "traceparent").await, None);
}

#[tokio::test]
async fn a_result_holds_status_body_headers_and_latency() {
    let peer = Peer::new(|request| match path(request) {
        "/bytes" => reply("200 OK", [0xff, 0xfe]),
        "/none" => b"HTTP/1.1 204 No Content\r\n\r\n".to_vec(),
        "/kept" => b"HTTP/1.1 304 Not Modified\r\netag: x\r\n\r\n".to_vec(),
        "/nowhere" => reply("301 Moved", "no location"),
        _ => reply(
            "201 Created\r\ncontent-type: text/plain\r\nVARY: a\r\nvary: b\r\nSet-Cookie: p\r\nset-cookie: q",
            "hé",
        ),
    })
    .await;
    let http = http();
    let output = http.run(&parse(&json!({"url": peer.url("/")})).unwrap(), &Scope::of("acme")).await.unwrap();
    let (start, latency) = output.0.get().rsplit_once(':').unwrap();
    assert_eq!(
        start,
        r#"{"status_code":201,"body":"hé","headers":{"Content-Length":"3","Content-Type":"text/plain","Set-Cookie":"p\nq","Vary":"a, b"},"latency_ms""#
    );
    assert!(latency.trim_end_matches('}').parse::<u64>().is_ok(), "{latency}");
    let result = run(&http, json!({"url": peer.url("/bytes")})).await.unwrap();
    assert_eq!((&result["body_base64"], result.get("body")), (&json!("//4="), None));
    for (path, status, body) in [("/none", 204, ""), ("/kept", 304, ""), ("/nowhere", 301, "no location")] {
        let result = run(&http, json!({"url": peer.url(path)})).await.unwrap();
        assert_eq!((&result["status_code"], &result["body"]), (&json!(status), &json!(body)), "{path}");
    }
}

#[tokio::test]
async fn a_compressed_body_is_unpacked_and_counted_unpacked() {
    let bomb = gzip(&vec![b'0'; 8 * 1024 * 1024]);
    assert!(bomb.len() < 10_000);
    let peer = Peer::new(move |request| match path(request) {
        "/head" => b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 50\r\n\r\n".to_vec(),
        "/broken" => reply("200 OK\r\ncontent-encoding: gzip", &gzip(b"text")[..12]),
        "/empty" => reply("200 OK\r\ncontent-encoding: gzip", b""),
        "/bomb" => reply("200 OK\r\ncontent-encoding: gzip", &bomb),
        _ => reply("200 OK\r\ncontent-encoding: gzip", gzip(b"text")),
    })
    .await;
    let http = http();
    let result = run(&http, json!({"url": peer.url("/")})).await.unwrap();
    assert_eq!((&result["body"], result["headers"].get("Content-Encoding")), (&json!("text"), None));
    let result = run(&http, json!({"method": "HEAD", "url": peer.url("/head")})).await.unwrap();
    assert_eq!((&result["status_code"], &result["body"]), (&json!(200), &json!("")));
    assert_eq!(fault(&http, json!({"url": peer.url("/bomb")})).await.cause, Cause::OverCap);
    assert_eq!(fault(&http, json!({"url": peer.url("/broken")})).await.cause, Cause::Network);
    assert_eq!(run(&http, json!({"url": peer.url("/empty")})).await.unwrap()["body"], "");
}

#[tokio::test]
async fn a_method_that_has_a_body_says_its_length_when_that_is_none() {
    let peer = Peer::new(|_| reply("200 OK", "")).await;
    let http = http();
    for method in ["POST", "put", "PATCH", "GET", "HEAD", "DELETE", "OPTIONS"] {
        for job in [json!({"method": method}), json!({"method": method, "body": ""})] {
            let job = json!({"url": peer.url("/"), "method": job["method"], "body": job["body"]});
            assert!(run(&http, job).await.is_ok(), "{method}");
        }
    }
    let requests = peer.requests();
    let lengths = requests.iter().map(|request| request.matches("content-length: 0\r\n").count());
    assert_eq!(lengths.collect::<Vec<_>>(), [[1; 6].as_slice(), &[0; 8]].concat());
}

#[tokio::test]
async fn w28_every_member_of_a_gzip_file_is_unpacked_and_none_is_cut() {
    let members = [gzip(b"first;"), gzip(b""), gzip(&[b'x'; 9000]), gzip(b"last;")].concat();
    let (length, text) = (members.len(), format!("first;{}last;", "x".repeat(9000)));
    let chunked = |bytes: &[u8], size: usize| {
        let chunks = bytes.chunks(size).flat_map(|chunk| {
            let head = format!("{:x}\r\n", chunk.len());
            [head.as_bytes(), chunk, b"\r\n"].concat()
        });
        let head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n";
        head.iter().copied().chain(chunks).chain(*b"0\r\n\r\n").collect::<Vec<_>>()
    };
    let peer = Peer::new(move |request| {
        let (how, number) = path(request)[1..].split_once('/').unwrap();
        let number = number.parse().unwrap();
        match how {
            "chunks" => chunked(&members, number),
            "cut" => reply("200 OK\r\ncontent-encoding: gzip", &members[..number]),
            _ => reply("200 OK\r\ncontent-encoding: gzip", [&members[..], &vec![b'!'; number]].concat()),
        }
    })
    .await;
    let http = http();
    for path in ["/whole/0", "/chunks/1", "/chunks/7", "/chunks/1000"] {
        let result = run(&http, json!({"url": peer.url(path)})).await;
        assert_eq!(result.map(|result| result["body"].clone()), Ok(json!(text)), "{path}");
        let (result, pieces) = stream(&http, peer.url(path), 1).await;
        assert_eq!(result.map(|result| result["size_bytes"].clone()), Ok(json!(text.len())), "{path}");
        let body: Vec<u8> = pieces.iter().flat_map(|piece| piece.data.clone()).collect();
        assert!(body == text.as_bytes(), "{path}");
    }
    for path in ["/trailing/1", "/trailing/30", &format!("/cut/{}", length - 1), &format!("/cut/{}", length - 24)] {
        assert_eq!(fault(&http, json!({"url": peer.url(path)})).await.cause, Cause::Network, "{path}");
        let (result, _) = stream(&http, peer.url(path), 1).await;
        assert_eq!(result.unwrap_err().cause, Cause::Network, "{path}");
    }
}

#[tokio::test]
async fn a_body_over_its_cap_is_an_error_found_while_reading() {
    let peer = Peer::new(|request| match path(request) {
        // Announced and never sent: only the announcement can be refused.
        "/announced" => b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n".to_vec(),
        // Never ends: only what was read can be refused.
        "/streamed" => {
            [&b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n7d0\r\n"[..], &[b'x'; 2000], b"\r\n"].concat()
        }
        "/edge" => reply("200 OK", [b'x'; 800]),
        _ => reply("200 OK", [b'\n'; 800]),
    })
    .await;
    let http = http();
    let run = async |path: &str| {
        let scope = Scope { max_output_bytes: 1000, ..Scope::of("acme") };
        http.run(&parse(&json!({"url": peer.url(path)})).unwrap(), &scope).await
    };
    for path in ["/announced", "/streamed"] {
        let fault = run(path).await.unwrap_err();
        assert_eq!((fault.cause, fault.message.as_str()), (Cause::OverCap, "the response has more than 1000 bytes"));
    }
    assert!(run("/edge").await.is_ok());
    // Small enough as bytes, too large as JSON.
    assert_eq!(run("/escaped").await.unwrap_err().cause, Cause::OverCap);
}

#[tokio::test]
async fn a_status_of_400_or_above_is_a_fault_that_tells_what_the_peer_said() {
    let peer = Peer::new(|request| match path(request) {
        "/busy" => reply("429 Too Many Requests\r\nretry-after: 7", "slow down"),
        "/long" => reply("500 Oops", "é".repeat(1024) + "tail"),
        "/cut" => reply("500 Oops", "x".to_owned() + &"é".repeat(4096)),
        "/stalled" => b"HTTP/1.1 404 Not Found\r\ncontent-length: 50\r\n\r\npart".to_vec(),
        _ => reply("503 Busy\r\nretry-after: soon", [0xff, b'x']),
    })
    .await;
    let http = http();
    let busy = fault(&http, json!({"url": peer.url("/busy?key=hunter2#hunter2")})).await;
    assert_eq!((busy.cause, busy.retry_after), (Cause::HttpStatus(429), Some(Duration::from_secs(7))));
    let details = Details {
        url: Some(peer.url("/busy")),
        http_status: Some(429),
        body: Some("slow down".to_owned()),
        ..Details::default()
    };
    assert_eq!(busy.details, details);
    assert_eq!(busy.message, "the peer answered 429 Too Many Requests");
    for (path, status, body) in [
        ("/long", 500, "é".repeat(1024)),
        ("/cut", 500, "x".to_owned() + &"é".repeat(1023)),
        ("/stalled", 404, "part".to_owned()),
        ("/bytes", 503, "\u{fffd}x".to_owned()),
    ] {
        let fault = fault(&http, json!({"url": peer.url(path)})).await;
        assert_eq!((fault.cause, fault.retry_after), (Cause::HttpStatus(status), None), "{path}");
        assert_eq!(fault.details.body, Some(body), "{path}");
    }
}

/// Runs a job whose body leaves as it comes: what came of it, and the pieces.
async fn stream(http: &Http, url: String, attempt: u32) -> (Result<Value, Fault>, Vec<Piece>) {
    let kept = Arc::new(Kept::default());
    let scope = Scope { attempt, sink: Some(Arc::<Kept>::clone(&kept)), ..Scope::of("acme") };
    let output = http.run(&parse(&json!({"url": url, "stream": true})).unwrap(), &scope).await;
    (output.map(|output| serde_json::from_str(output.0.get()).unwrap()), kept.pieces())
}

#[tokio::test]
async fn a_streamed_body_leaves_in_pieces_and_is_not_in_the_result() {
    let peer = Peer::new(|request| match path(request) {
        "/events" => reply("200 OK\r\ncontent-type: Text/Event-Stream; charset=utf-8", "data: a\n\ndata: b\n\ndata: c"),
        "/gzip" => reply("200 OK\r\ncontent-encoding: gzip", gzip("é".repeat(50_000).as_bytes())),
        "/none" => b"HTTP/1.1 204 No Content\r\n\r\n".to_vec(),
        _ => reply("201 Created\r\nx-a: b", "héllo"),
    })
    .await;
    let http = http();
    let (result, pieces) = stream(&http, peer.url("/"), 2).await;
    let mut result = result.unwrap();
    assert!(result["latency_ms"].take().is_u64());
    let expected = json!({
        "status_code": 201, "headers": {"Content-Length": "6", "X-A": "b"}, "latency_ms": null,
        "streamed": true, "chunks": 2, "size_bytes": 6,
    });
    assert_eq!(result, expected);
    let piece = |seq, data: &'static str, is_last| Piece { attempt: 2, seq, data: data.into(), is_last };
    assert_eq!(pieces, [piece(0, "héllo", false), piece(1, "", true)]);

    let (_, pieces) = stream(&http, peer.url("/events"), 2).await;
    let events = [piece(0, "data: a\n\n", false), piece(1, "data: b\n\n", false), piece(2, "data: c", false)];
    assert_eq!(pieces, [&events[..], &[piece(3, "", true)]].concat());
    let (result, pieces) = stream(&http, peer.url("/gzip"), 2).await;
    assert_eq!(result.unwrap()["size_bytes"], 100_000);
    let body: Vec<u8> = pieces.iter().flat_map(|piece| piece.data.clone()).collect();
    assert!(body == "é".repeat(50_000).as_bytes(), "unpacked on the way");
    assert!(pieces.iter().all(|piece| piece.data.len() <= 64 * 1024 && std::str::from_utf8(&piece.data).is_ok()));
    let (result, pieces) = stream(&http, peer.url("/none"), 2).await;
    assert_eq!((result.unwrap()["chunks"].as_u64(), pieces), (Some(1), vec![piece(0, "", true)]));
}

#[tokio::test]
async fn an_attempt_is_not_repeated_once_a_piece_has_left() {
    let peer = Peer::new(|request| match path(request) {
        "/status" => reply("503 Busy", "no"),
        "/early" => b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n".to_vec(),
        _ => b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\npart\r\nzz\r\n".to_vec(),
    })
    .await;
    let http = http();
    for (path, cause, sent, may_repeat) in [
        ("/status", Cause::HttpStatus(503), 0, true),
        ("/early", Cause::Network, 0, true),
        ("/late", Cause::Network, 1, false),
    ] {
        let (result, pieces) = stream(&http, peer.url(path), 1).await;
        let fault = result.unwrap_err();
        assert_eq!((fault.cause, pieces.len(), fault.may_repeat), (cause, sent, may_repeat), "{path}");
        assert!(fault.cause.is_retryable() && pieces.iter().all(|piece| !piece.is_last), "{path}");
    }
}

#[tokio::test]
async fn a_redirect_is_taken_as_browsers_take_it() {
    let peer = Peer::new(|request| match path(request) {
        "/end" => reply("200 OK", "end"),
        path => redirect(&path[1..4], "end"),
    })
    .await;
    let http = http();
    for (status, method, becomes) in [
        (301, "POST", "GET"),
        (302, "POST", "GET"),
        (303, "POST", "GET"),
        (303, "PUT", "GET"),
        (303, "HEAD", "HEAD"),
        (301, "PUT", "PUT"),
        (302, "DELETE", "DELETE"),
        (307, "POST", "POST"),
        (308, "POST", "POST"),
        (302, "GET", "GET"),
    ] {
        let headers = json!({"Content-Type": "text/x", "Authorization": "mine"});
        let job = json!({"method": method, "url": peer.url(&format!("/{status}")), "body": "form", "headers": headers});
        if method != "HEAD" {
            assert_eq!(run(&http, job).await.unwrap()["body"], "end");
        } else {
            run(&http, job).await.unwrap();
        }
        let request = peer.requests().pop().unwrap();
        assert!(request.starts_with(&format!("{becomes} /end ")), "{status} {method}: {request}");
        let keeps_body = becomes == method && method != "GET" || status == 302 && method == "GET";
        assert_eq!(request.contains("content-type: text/x"), keeps_body, "{status} {method}: {request}");
        assert_eq!(request.ends_with("\r\n\r\nform"), keeps_body, "{status} {method}: {request}");
        // The same origin keeps its credentials.
        assert!(request.contains("authorization: mine"), "{request}");
    }
}

#[tokio::test]
async fn credentials_do_not_cross_origins() {
    let other = Peer::new(|_| reply("200 OK", "")).await;
    let location = other.url("/");
    let peer = Peer::new(move |_| redirect("307 Elsewhere", &location)).await;
    let headers = json!({
        "Authorization": "hunter2", "Cookie": "hunter2", "X-Api-Key": "hunter2", "X-Auth-Token": "hunter2",
        "X-Vault-Token": "hunter2", "X-Amz-Security-Token": "hunter2", "X-Plain": "plain",
    });
    run(&http(), json!({"method": "POST", "url": peer.url("/"), "headers": headers, "body": "b"})).await.unwrap();
    assert_eq!(peer.requests()[0].matches("hunter2").count(), 6);
    let request = other.requests().remove(0);
    assert!(!request.contains("hunter2") && request.contains("x-plain: plain"), "{request}");
    assert!(request.contains("idempotency-key: acme.a1"), "{request}");
}

#[tokio::test]
async fn the_sixth_redirect_is_one_too_many() {
    let peer = Peer::new(|request| match path(request)[1..].parse::<u32>().unwrap() {
        0 => reply("200 OK", "end"),
        left => redirect("302 Found", &format!("/{}?key=hunter2", left - 1)),
    })
    .await;
    let http = http();
    assert_eq!(run(&http, json!({"url": peer.url("/5")})).await.unwrap()["body"], "end");
    assert_eq!(peer.requests().len(), 6);
    let fault = fault(&http, json!({"url": peer.url("/6")})).await;
    assert_eq!((fault.cause, fault.details.url), (Cause::TooManyRedirects, Some(peer.url("/1"))));
    assert!(!fault.message.contains("hunter2"), "{}", fault.message);
    assert_eq!(peer.requests().len(), 12);
}

#[tokio::test]
async fn a_redirect_to_a_forbidden_place_is_not_followed() {
    let canary = Peer::new(|_| reply("200 OK", "secret")).await;
    let port = canary.address.port();
    let places = [
        format!("http://127.0.0.2:{port}/"),
        format!("http://localhost:{port}/"),
        format!("http://2130706434:{port}/"),
        format!("http://[::ffff:127.0.0.2]:{port}/"),
        "http://169.254.169.254/latest/meta-data/".to_owned(),
        "http://[::1]/".to_owned(),
        "file:///etc/passwd".to_owned(),
        "gopher://h/".to_owned(),
        "http://u:hunter2@h/".to_owned(),
    ];
    let http = http_with(Settings::default(), &["127.0.0.1/32"]);
    for place in places {
        let peer = Peer::new({
            let place = place.clone();
            move |_| redirect("302 Found", &place)
        })
        .await;
        let fault = fault(&http, json!({"url": peer.url("/")})).await;
        assert_eq!(fault.cause, Cause::NotAllowed, "{place}: {}", fault.message);
        assert!(!format!("{fault:?}").contains("hunter2"), "{fault:?}");
    }
    assert!(canary.requests().is_empty());
    let peer = Peer::new(|_| redirect("302 Found", "http://[broken/")).await;
    assert_eq!(fault(&http, json!({"url": peer.url("/")})).await.cause, Cause::HttpStatus(302));
}

#[tokio::test]
async fn a_forbidden_address_is_refused_at_the_door_and_at_the_call() {
    let canary = Peer::new(|_| reply("200 OK", "secret")).await;
    let port = canary.address.port();
    let strict = http_with(Settings::default(), &[]);
    for host in ["127.0.0.1", "0x7f.1", "127.1", "0", "[::ffff:7f00:1]", "１２７.0.0.1"] {
        let job = json!({"url": format!("http://{host}:{port}/?key=hunter2")});
        let invalid = strict.refuses(&parse(&job).unwrap()).expect(host);
        assert_eq!((invalid.cause, invalid.pointer.as_str()), (Cause::NotAllowed, "/job/url"), "{host}");
        let fault = fault(&strict, job).await;
        assert_eq!(fault.cause, Cause::NotAllowed, "{host}");
        assert!(!fault.message.contains("hunter2") && !invalid.reason.contains("hunter2"), "{}", fault.message);
    }
    // A name is not judged before it is resolved.
    let named = json!({"url": format!("http://localhost:{port}/")});
    assert!(strict.refuses(&parse(&named).unwrap()).is_none());
    let refused = fault(&strict, named.clone()).await;
    assert_eq!(refused.cause, Cause::NotAllowed);
    assert_eq!(refused.message, "the host localhost is not allowed: it is a loopback address");
    assert!(canary.requests().is_empty());
    // The port counts although the client's resolver hook is told none.
    let other = http_with(Settings::default(), &["localhost:1"]);
    assert_eq!(fault(&other, named.clone()).await.cause, Cause::NotAllowed);
    let lifted = http_with(Settings::default(), &[&format!("localhost:{port}")]);
    assert_eq!(run(&lifted, named).await.unwrap()["body"], "secret");
}

#[tokio::test]
async fn the_address_that_was_checked_is_the_one_that_is_dialled() {
    let peer = Peer::new(|_| reply("200 OK\r\nconnection: close", "")).await;
    let port = peer.address.port();
    let canary = TcpListener::bind(("127.0.0.2", port)).await.unwrap();
    // The name changes its mind after its first two queries, one for each family.
    let mut queries = 0;
    let policy = egress::Policy { allow: vec!["127.0.0.1".parse().unwrap()], ..egress::Policy::default() };
    let guard = egress::tests::guard(policy, move |_| {
        queries += 1;
        Some(if queries <= 2 { &["127.0.0.1"] } else { &["127.0.0.2"] })
    });
    let client = Client::new(guard.await, client::tls(None).unwrap(), Duration::from_secs(2)).unwrap();
    let request = parse(&json!({"url": format!("http://flip.test:{port}/")})).unwrap();
    assert_eq!(client.send(&request).await.unwrap().status(), 200);
    assert_eq!(client.send(&request).await.unwrap_err().cause, Cause::NotAllowed);
    assert_eq!(peer.requests().len(), 1);
    assert!(tokio::time::timeout(Duration::from_millis(50), canary.accept()).await.is_err());
}

#[tokio::test]
async fn a_broken_connection_is_a_network_fault() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let peer = Peer::new(|request| match path(request) {
        "/dropped" => Vec::new(),
        "/garbage" => b"220 smtp ready\r\n\r\n".to_vec(),
        "/chunks" => b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n".to_vec(),
        _ => b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\nconnection: close\r\n\r\n".to_vec(),
    })
    .await;
    let http = http();
    let urls = ["/dropped", "/garbage", "/chunks"].map(|path| peer.url(path));
    for url in urls.into_iter().chain([format!("http://{closed}/"), "http://name.invalid/".to_owned()]) {
        let fault = fault(&http, json!({"url": format!("{url}?key=hunter2")})).await;
        assert_eq!((fault.cause, fault.details.url), (Cause::Network, Some(url)), "{}", fault.message);
        assert!(!fault.message.contains("hunter2") && !fault.message.contains("http://"), "{}", fault.message);
    }
}

#[tokio::test]
async fn w26_headers_over_a_cap_are_a_final_error() {
    let peer = Peer::new(|request| match path(request) {
        "/line" => [&b"HTTP/1.1 200 OK\r\nx: "[..], &[b'x'; 1_000_000], b"\r\n\r\n"].concat(),
        "/many" => [&b"HTTP/1.1 200 OK\r\n"[..], "x: x\r\n".repeat(100_000).as_bytes(), b"\r\n"].concat(),
        "/endless" => [&b"HTTP/1.1 200 OK\r\n"[..], "x: x\r\n".repeat(200_000).as_bytes()].concat(),
        _ => reply(&("200 OK".to_owned() + &format!("\r\nx: {}", "x".repeat(30_000)).repeat(10)), ""),
    })
    .await;
    let http = http();
    for path in ["/line", "/many", "/endless", "/sum"] {
        let fault = fault(&http, json!({"url": peer.url(path)})).await;
        assert_eq!(fault.cause, Cause::OverCap, "{path}: {}", fault.message);
        assert!(!fault.cause.is_retryable() && fault.details.url == Some(peer.url(path)));
    }
}

/// Sends its bytes over and over, slowly or as fast as they go; says when the client has hung up.
async fn drip(
    head: &'static [u8],
    bytes: &'static [u8],
    pause: Duration,
) -> (String, tokio::sync::oneshot::Receiver<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let (hung_up, waits) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        assert!(stream.read(&mut [0; 4096]).await.unwrap() > 0);
        stream.write_all(head).await.unwrap();
        while stream.write_all(bytes).await.is_ok() {
            tokio::time::sleep(pause).await;
        }
        let _ = hung_up.send(());
    });
    (url, waits)
}

#[tokio::test]
async fn w26_a_peer_that_never_finishes_is_left_at_the_deadline() {
    for (what, head, bytes, pause) in [
        ("a header, byte by byte", &b"HTTP/1.1 200 OK\r\nx: "[..], &b"x"[..], 20),
        ("header by header", b"HTTP/1.1 200 OK\r\n", b"x: x\r\n", 20),
        ("endless 100, at full speed", b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0),
        ("endless 103, slowly", b"", b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n", 5),
        ("a body, byte by byte", b"HTTP/1.1 200 OK\r\n\r\n", b"x", 20),
    ] {
        let (url, hung_up) = drip(head, bytes, Duration::from_millis(pause)).await;
        let request = parse(&json!({"url": url})).unwrap();
        let scope = Scope { max_output_bytes: 1 << 30, ..Scope::of("acme") };
        let http = http();
        let ended = tokio::time::timeout(Duration::from_millis(300), http.run(&request, &scope)).await;
        // Whoever keeps the deadline drops the attempt.
        assert!(ended.is_err(), "{what}: {ended:?}");
        let left = tokio::time::timeout(Duration::from_secs(10), hung_up).await;
        assert!(left.is_ok(), "{what}: the connection stays open");
    }
}

#[tokio::test]
async fn a_status_that_is_none_counts_as_the_rules_of_http_say() {
    let peer = Peer::new(|request| match path(request) {
        "/101" => b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n".to_vec(),
        path => reply(&format!("{} What", &path[1..]), "what"),
    })
    .await;
    let http = http();
    for status in [600, 700, 999] {
        let fault = fault(&http, json!({"url": peer.url(&format!("/{status}"))})).await;
        assert_eq!((fault.cause, fault.cause.is_retryable()), (Cause::HttpStatus(status), true));
    }
    for path in ["/101", "/099", "/1000", "/-1", "/abc"] {
        let fault = fault(&http, json!({"url": peer.url(path)})).await;
        assert_eq!(fault.cause, Cause::Network, "{path}: {}", fault.message);
    }
}

#[tokio::test]
async fn w27_an_encoding_that_nobody_asked_for_is_refused() {
    let peer = Peer::new(|request| {
        let encoding = path(request)[1..].replace('+', ", ");
        reply(&format!("200 OK\r\ncontent-encoding: {encoding}"), gzip(&gzip(b"text")))
    })
    .await;
    let http = http();
    for encoding in ["br", "zstd", "deflate", "gzip+gzip", "compress"] {
        let fault = fault(&http, json!({"url": peer.url(&format!("/{encoding}"))})).await;
        assert_eq!(fault.cause, Cause::ExecutionFailed, "{encoding}");
        assert!(fault.message.ends_with("only gzip was asked for"), "{}", fault.message);
    }
    // Unpacked once: what is inside is nobody's business.
    let result = run(&http, json!({"url": peer.url("/gzip")})).await.unwrap();
    assert_eq!(result["body_base64"], base64::engine::general_purpose::STANDARD.encode(gzip(b"text")));
    for encoding in ["identity", "Identity", ""] {
        let result = run(&http, json!({"url": peer.url(&format!("/{encoding}"))})).await.unwrap();
        assert_eq!(result["body_base64"], base64::engine::general_purpose::STANDARD.encode(gzip(&gzip(b"text"))));
    }
    for encoding in ["GZIP", "x-gzip"] {
        let result = run(&http, json!({"url": peer.url(&format!("/{encoding}"))})).await.unwrap();
        assert_eq!(result["body_base64"], base64::engine::general_purpose::STANDARD.encode(gzip(b"text")));
    }
    let own = json!({"url": peer.url("/br"), "headers": {"Accept-Encoding": "br"}});
    assert_eq!(
        run(&http, own).await.unwrap()["headers"]["Content-Encoding"],
        "br",
        "as it came, for whoever asks for it"
    );
    let head = json!({"method": "HEAD", "url": peer.url("/br")});
    assert_eq!(run(&http, head).await.unwrap()["status_code"], 200);
}

#[tokio::test]
async fn w28_a_body_is_as_long_as_it_says_or_an_error() {
    let peer = Peer::new(|request| match path(request) {
        "/more" => b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nfirstHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil"
            .to_vec(),
        "/twice" => b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nfirst!".to_vec(),
        "/list" => b"HTTP/1.1 200 OK\r\ncontent-length: 5, 6\r\n\r\nfirst!".to_vec(),
        "/minus" => b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\nfirst".to_vec(),
        "/huge" => b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999999\r\n\r\nfirst".to_vec(),
        "/chunk-size" => b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\nfirst".to_vec(),
        "/chunk-end" => b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirstXX0\r\n\r\n".to_vec(),
        "/chunk-word" => b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfive\r\nfirst\r\n0\r\n\r\n".to_vec(),
        "/codings" => b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\ncontent-length: 5\r\n\r\nfirst".to_vec(),
        _ => reply("200 OK", "mine"),
    })
    .await;
    let http = http();
    let job = |path: &str| json!({"url": peer.url(path)});
    assert_eq!(run(&http, job("/more")).await.unwrap()["body"], "first");
    assert_eq!(run(&http, job("/next")).await.unwrap()["body"], "mine", "what was left over answers nobody");
    for path in ["/twice", "/list", "/minus", "/huge", "/chunk-size", "/chunk-end", "/chunk-word"] {
        let fault = fault(&http, job(path)).await;
        assert_eq!(fault.cause, Cause::Network, "{path}: {}", fault.message);
        assert_eq!(run(&http, job("/next")).await.unwrap()["body"], "mine", "{path}");
    }
}

/// Cuts a valid answer at every byte, by an end and by a reset: no cut is ever passed off as a whole one.
#[tokio::test]
async fn w28_a_cut_answer_is_never_a_whole_one() {
    let body = "0123456789".repeat(50);
    let whole = reply(&format!("200 OK\r\nx-a: {}", "b".repeat(70)), &body);
    let length = whole.len();
    assert!(length >= 600);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    tokio::spawn(async move {
        for cut in 0..=length {
            for is_reset in [true, false] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = [0; 1024];
                assert!(stream.read(&mut request).await.unwrap() > 0);
                stream.write_all(&whole[..cut]).await.unwrap();
                if is_reset && cut < length {
                    stream.set_zero_linger().unwrap();
                }
            }
        }
    });
    let http = http();
    for cut in 0..length {
        for how in ["reset", "ended"] {
            assert_eq!(fault(&http, json!({"url": url})).await.cause, Cause::Network, "{how} at {cut}");
        }
    }
    assert_eq!(run(&http, json!({"url": url})).await.unwrap()["body"], body);
}

#[tokio::test]
async fn a_peer_that_does_not_finish_the_handshake_is_a_connect_timeout() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}/", silent.local_addr().unwrap());
    let settings = Settings { connect_timeout: Duration::from_millis(100), ..Settings::default() };
    let fault = fault(&http_with(settings, &["127.0.0.0/8"]), json!({"url": url})).await;
    assert_eq!(fault.cause, Cause::ConnectTimeout, "{}", fault.message);
}

/// A TLS server for `localhost` that speaks HTTP/1.1, and the file that vouches for it.
async fn tls_peer(dir: &std::path::Path) -> (SocketAddr, PathBuf) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let file = dir.join("ca.pem");
    std::fs::write(&file, made.cert.pem()).unwrap();
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()).into();
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                if let Ok(stream) = acceptor.accept(stream).await {
                    serve(stream, 0, &Mutex::default(), &|_| reply("200 OK", "secret")).await;
                }
            });
        }
    });
    (address, file)
}

#[tokio::test]
async fn a_certificate_counts_only_if_an_authority_is_known_and_the_name_fits() {
    let dir = tempfile::tempdir().unwrap();
    let (address, file) = tls_peer(dir.path()).await;
    let allow = ["127.0.0.0/8", "localhost"];
    let trusting = http_with(Settings { ca_file: Some(file), ..Settings::default() }, &allow);
    let by_name = json!({"url": format!("https://localhost:{}/", address.port())});
    assert_eq!(run(&trusting, by_name.clone()).await.unwrap()["body"], "secret");
    let by_address = json!({"url": format!("https://{address}/?key=hunter2")});
    let wary = http_with(Settings::default(), &allow);
    for (http, job) in [(&wary, by_name), (&trusting, by_address)] {
        let fault = fault(http, job).await;
        assert_eq!(fault.cause, Cause::Tls, "{}", fault.message);
        assert!(!fault.message.contains("hunter2"), "{}", fault.message);
    }
    // TLS to a peer that speaks none.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}/", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        stream.read_to_end(&mut Vec::new()).await.unwrap();
    });
    assert_eq!(fault(&wary, json!({"url": url})).await.cause, Cause::Tls);
}

#[test]
fn a_bad_ca_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ca.pem");
    let new = || {
        let settings = Settings { ca_file: Some(path.clone()), ..Settings::default() };
        Http::new(settings, egress::Policy::default()).unwrap_err()
    };
    let start = format!("--http-ca-file {}: ", path.display());
    assert!(new().starts_with(&(start.clone() + "No such file")), "{}", new());
    for (content, expected) in [
        ("", "holds no PEM certificate"),
        ("-----BEGIN CERTIFICATE-----\n%%\n-----END CERTIFICATE-----\n", "is no PEM"),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "holds a certificate that cannot be used"),
    ] {
        std::fs::write(&path, content).unwrap();
        assert!(new().starts_with(&(start.clone() + expected)), "{}", new());
    }
}

#[tokio::test]
async fn tenants_share_no_connection_and_each_keeps_its_own() {
    let peer = Peer::new(|_| reply("200 OK", "")).await;
    let http = http();
    let request = parse(&json!({"url": peer.url("/")})).unwrap();
    for tenant in ["a", "b", "a", "b", "a"] {
        http.run(&request, &Scope::of(tenant)).await.unwrap();
    }
    assert_eq!(peer.connections(), [0, 1, 0, 1, 0]);
}

#[tokio::test]
async fn quiet_tenants_are_forgotten_and_their_number_is_bounded() {
    let clients = Clients::new(&Settings::default(), egress::Policy::default()).unwrap();
    let start = Instant::now();
    for tenant in 0..300_u64 {
        let tenant_id = TenantId::parse(&tenant.to_string()).unwrap();
        clients.of(&tenant_id, start + Duration::from_millis(tenant)).unwrap();
    }
    assert_eq!(clients.len(), 256);
    clients.of(&TenantId::parse("late").unwrap(), start + Duration::from_secs(3600)).unwrap();
    assert_eq!(clients.len(), 1);
}
