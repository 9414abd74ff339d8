//! Bad input: each document of `tests/corpus` gets exactly the decided code, and the worker neither panics, hangs nor
//! grows. A line of a file is one case; each file says how to read it.
#![expect(clippy::indexing_slicing, clippy::expect_used, clippy::panic, reason = "tests")]

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use async_nats::HeaderMap;
use beamline_tests::rig::Rig;
use beamline_tests::router::{Heard, Key, Kind, assignment, json as read};
use beamline_tests::wait::within;
use jiff::Timestamp;
use rusqlite::Connection;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

/// Everything of one file, on a machine that is busy with others.
const LIMIT: Duration = Duration::from_secs(60);
/// What one case may take, beyond the time that it gives to others.
const HANGS: Duration = Duration::from_secs(1);
/// A case that took longer is sent again, alone: a busy machine may be slow, but not each time.
const AGAIN: usize = 3;
/// The largest message of a broker with its defaults.
const MAX_PAYLOAD: usize = 1024 * 1024;
/// What the worker may hold at its peak.
const MAX_MEMORY_MIB: u64 = 256;

/// One line of a file, or a document that is too large for one.
#[derive(Clone, Debug)]
struct Case {
    code: u64,
    /// What the refusal must name; empty for anything.
    pointer: String,
    payload: Vec<u8>,
    /// What a person recognises it by.
    name: String,
}

impl Case {
    /// With a real directory for `{root}`.
    fn below(mut self, root: &str) -> Self {
        if let Ok(text) = std::str::from_utf8(&self.payload) {
            self.payload = text.replace("{root}", root).into_bytes();
        }
        self
    }
}

/// What became of a publication.
#[derive(Debug)]
struct Outcome {
    code: u64,
    message: String,
    /// As the worker says: until it was judged, and in its block.
    took: Duration,
}

/// The lines of a file that are cases: a code and the rest.
fn lines(file: &str) -> Vec<(u64, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(file);
    let text = std::fs::read_to_string(&path).expect("a file of the corpus");
    let cases = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let split = |line: &str| {
        let (code, rest) = line.split_once(' ').unwrap_or_else(|| panic!("{file}: no code in {line:?}"));
        (code.parse().unwrap_or_else(|_| panic!("{file}: no code in {line:?}")), rest.to_owned())
    };
    cases.map(split).collect()
}

/// `\xNN`, `\r`, `\n`, `\t` and `\\` as bytes; `-` alone is nothing at all.
fn unescaped(text: &str) -> Vec<u8> {
    if text == "-" {
        return Vec::new();
    }
    let (mut bytes, mut rest) = (Vec::new(), text.chars());
    while let Some(next) = rest.next() {
        match next {
            '\\' => match rest.next() {
                Some('x') => {
                    let digits: String = rest.by_ref().take(2).collect();
                    bytes.push(u8::from_str_radix(&digits, 16).unwrap_or_else(|_| panic!("\\x{digits} in {text:?}")));
                }
                Some('r') => bytes.push(b'\r'),
                Some('n') => bytes.push(b'\n'),
                Some('t') => bytes.push(b'\t'),
                Some('\\') => bytes.push(b'\\'),
                other => panic!("\\{other:?} in {text:?}"),
            },
            plain => bytes.extend(plain.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    bytes
}

fn text(escaped: &str) -> String {
    String::from_utf8(unescaped(escaped)).expect("UTF-8")
}

/// A case that is an assignment with this job.
fn with_job(file: &str, number: usize, code: u64, job: Value, name: &str) -> Case {
    let mut job = job;
    job["retry_config"] = json!({ "max_attempts": 1 });
    let payload = assignment("acme", &format!("{file}-{number}"), job).to_string().into_bytes();
    Case { code, pointer: String::new(), payload, name: name.to_owned() }
}

/// RFC 7396.
fn patch(target: &mut Value, changes: Value) {
    let Value::Object(changes) = changes else { return *target = changes };
    if !target.is_object() {
        *target = json!({});
    }
    for (field, change) in changes {
        match change {
            Value::Null => drop(target.as_object_mut().expect("an object").remove(&field)),
            change => patch(&mut target[field], change),
        }
    }
}

/// Publishes every case, and holds what is said about each to what is decided.
async fn check(rig: &Rig, cases: Vec<Case>) {
    let cases: Vec<_> = cases.into_iter().map(|case| case.below(&rig.files.path().to_string_lossy())).collect();
    let mut sent = Vec::new();
    for case in &cases {
        sent.push(send(rig, case, HeaderMap::new()).await);
    }
    let ends = ends_of(rig, &sent, &cases).await;
    let (mut wrong, mut slow) = (Vec::new(), Vec::new());
    for (case, sent) in cases.iter().zip(&sent) {
        let end = &ends[&sent.sequence];
        let names_it = case.pointer.is_empty() || end.message.starts_with(&format!("{} ", case.pointer));
        if end.code != case.code || !names_it {
            wrong.push(format!("{} {} {} – but: {end:?}", case.code, case.pointer, case.name));
        }
        if end.took > allowed(case, end.code) {
            slow.push(case);
        }
    }
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    let sent_again = slow.len() * AGAIN;
    for case in slow {
        assert!(ends_in_time(rig, case).await, "it hangs each time: {} {}", case.code, case.name);
    }

    let verdicts = rig.router.heard().iter().filter(|heard| heard.kind == Kind::Verdict).count();
    assert!(verdicts <= cases.len() + sent_again, "{verdicts} verdicts on {} publications", cases.len());
    let panics: Vec<_> = rig.worker.lines().into_iter().filter(|line| line.contains("panicked")).collect();
    assert!(panics.is_empty(), "{panics:#?}");
    let peak = rig.worker.peak_memory_mib();
    assert!(peak < MAX_MEMORY_MIB, "{peak} MiB at its peak");
    assert_eq!(rig.worker.get("/livez").await.map(|(code, _)| code), Some(200));
}

/// A publication of a case.
struct Sent {
    sequence: u64,
    at: Timestamp,
}

async fn send(rig: &Rig, case: &Case, headers: HeaderMap) -> Sent {
    let sequence = rig.router.submit_bytes_with(case.payload.clone(), headers).await;
    Sent { sequence, at: Timestamp::now() }
}

/// Whether one of several runs of a case, alone, takes no longer than it may.
async fn ends_in_time(rig: &Rig, case: &Case) -> bool {
    for _ in 0..AGAIN {
        let sent = send(rig, case, anew(case)).await;
        let ends = ends_of(rig, std::slice::from_ref(&sent), std::slice::from_ref(case)).await;
        if ends[&sent.sequence].took <= allowed(case, case.code) {
            return true;
        }
    }
    false
}

/// Has it run although it is recorded, where the broker takes a header with it.
fn anew(case: &Case) -> HeaderMap {
    let mut headers = HeaderMap::new();
    if case.payload.len() + 100 < MAX_PAYLOAD {
        headers.insert("Beamline-Replay", "true");
    }
    headers
}

/// A network that says nothing, and a deadline, are waited for as long as the case asks.
fn allowed(case: &Case, code: u64) -> Duration {
    let waits = matches!(code, 3001 | 3002 | 5002);
    let timeout = waits.then(|| serde_json::from_slice::<Value>(&case.payload).ok()?["job"]["timeout_ms"].as_u64());
    HANGS + Duration::from_millis(timeout.flatten().unwrap_or_default())
}

/// What becomes of publications, by sequence, when all has been said about them.
async fn ends_of(rig: &Rig, sent: &[Sent], cases: &[Case]) -> HashMap<u64, Outcome> {
    let all = async || (ends(&rig.router.heard(), sent, cases).len() == cases.len()).then_some(());
    within(LIMIT, "everything has an end", all).await;
    rig.router.settled(LIMIT).await;
    ends(&rig.router.heard(), sent, cases)
}

/// By sequence: the dead letter of a refusal, else the last result.
fn ends(heard: &[Heard], sent: &[Sent], cases: &[Case]) -> HashMap<u64, Outcome> {
    let mut letters = HashMap::new();
    for letter in heard.iter().filter(|heard| heard.kind == Kind::Letter) {
        let letter = read(&letter.payload);
        let id = letter["dlq_id"].as_str().expect("an id").split(',').nth(2).expect("a sequence");
        letters.insert(id.parse::<u64>().expect("a sequence"), letter);
    }
    let said = |kind: Kind| -> HashMap<_, _> {
        let said = heard.iter().filter(|heard| heard.kind == kind);
        said.filter_map(|heard| Some((heard.key.clone()?, &heard.payload))).collect()
    };
    let (verdicts, results) = (said(Kind::Verdict), said(Kind::Result));
    let end = |case: &Case, sent: &Sent| {
        let letter = letters.get(&sent.sequence);
        let key = Key::read(&case.payload);
        let Some(result) = key.as_ref().and_then(|key| results.get(key)).map(|result| read(result)) else {
            return letter.map(|letter| outcome(letter, since(sent, &letter["failed_at"])));
        };
        let verdict = verdicts.get(key.as_ref()?).map(|verdict| read(verdict))?;
        let took = since(sent, &verdict["acknowledged_at"]) + millis(&result["latency_ms"]);
        Some(outcome(letter.unwrap_or(&result), took))
    };
    cases.iter().zip(sent).filter_map(|(case, sent)| Some((sent.sequence, end(case, sent)?))).collect()
}

/// From a publication to what the worker says is the time of something.
fn since(sent: &Sent, time: &Value) -> Duration {
    let passed = time.as_i64().expect("a time") - sent.at.as_millisecond();
    Duration::from_millis(u64::try_from(passed).unwrap_or_default())
}

fn millis(value: &Value) -> Duration {
    Duration::from_millis(value.as_u64().expect("a number"))
}

fn outcome(said: &Value, took: Duration) -> Outcome {
    Outcome {
        code: said["error"]["code"].as_u64().unwrap_or(0),
        message: said["error"]["message"].as_str().unwrap_or_default().to_owned(),
        took,
    }
}

#[test]
fn there_are_five_hundred_documents() {
    let files = ["fields.txt", "documents.txt", "urls.txt", "paths.txt", "sql.txt", "responses.txt"];
    let count: usize = files.map(|file| lines(file).len()).iter().sum();
    assert!(count >= 500, "{count}");
}

#[tokio::test]
async fn every_field_is_held_to_its_rule() {
    let cases = lines("fields.txt").into_iter().enumerate().map(|(number, (code, rest))| {
        let at = rest.find(" {").expect("a patch");
        let (pointer, changes) = (&rest[..at], &rest[at + 1..]);
        let job = json!({"type": "http.request", "url": "http://peer.test/"});
        let mut payload = assignment("acme", &format!("fields-{number}"), job);
        patch(&mut payload, serde_json::from_str(changes).expect("a patch"));
        let pointer = pointer.trim_start_matches('-').to_owned();
        Case { code, pointer, payload: payload.to_string().into_bytes(), name: changes.to_owned() }
    });
    let rig = Rig::start(&["--sandbox-mode"]).await;
    check(&rig, cases.collect()).await;
}

#[tokio::test]
async fn every_payload_gets_one_answer_whatever_its_bytes() {
    let small = lines("documents.txt").into_iter().enumerate().map(|(number, (code, payload))| {
        let bytes = unescaped(&payload.replace("{id}", &format!("documents-{number}")));
        Case { code, pointer: String::new(), payload: bytes, name: payload }
    });
    let rig = Rig::start(&["--sandbox-mode"]).await;
    let large = large(&rig.files.path().to_string_lossy());
    check(&rig, small.chain(large).collect()).await;
}

/// What no line of a file should hold: deep, wide and long documents, up to the broker's limit.
fn large(root: &str) -> Vec<Case> {
    let path = format!("{root}/x");
    let good = |id: &str| {
        let mut payload = assignment("acme", id, json!({"type": "fs.get", "path": path}));
        payload["request_id"] = json!("r");
        payload.to_string()
    };
    let with = |id: &str, field: String| format!("{},{field}}}", good(id).strip_suffix('}').expect("an object"));
    let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    let objects = |depth: usize| format!("{}1{}", r#"{"a":"#.repeat(depth), "}".repeat(depth));
    let keys = |count: usize| (0..count).map(|key| format!(r#""k{key}":{key}"#)).collect::<Vec<_>>().join(",");
    let id = |length: usize| "i".repeat(length);
    let to_limit = |payload: &str, limit: usize| " ".repeat(limit - payload.len()) + payload;
    let documents: Vec<(u64, &str, String)> = vec![
        (0, "127 levels in an ignored field", with("deep-127", format!(r#""zz":{}"#, nested(127)))),
        (1001, "128 levels and the object's own", with("deep-128", format!(r#""zz":{}"#, nested(128)))),
        (1001, "10 000 levels", with("deep-10000", format!(r#""zz":{}"#, nested(10_000)))),
        (1001, "500 000 levels, never closed", "[".repeat(500_000)),
        (1001, "100 000 objects", objects(100_000)),
        (
            1001,
            "100 000 objects in job",
            format!(r#"{{"version":"1","assignment_id":"x","job":{}}}"#, objects(100_000)),
        ),
        (1001, "half a megabyte of braces", "}".repeat(500_000)),
        (1001, "half a megabyte of quotes", "\"".repeat(500_001)),
        (1001, "half a megabyte of backslashes", format!("{{\"{}", "\\".repeat(500_000))),
        (1001, "half a megabyte of digits", "9".repeat(500_000)),
        (1001, "half a megabyte of bytes", "\u{7f}".repeat(500_000)),
        (0, "60 000 unknown keys", with("wide", keys(60_000))),
        (1002, "60 000 unknown keys and nothing else", format!("{{{}}}", keys(60_000))),
        (1001, "a million opening brackets with commas", "[,".repeat(400_000)),
        (0, "as large as the broker takes", to_limit(&good("at-limit"), MAX_PAYLOAD)),
        (0, "one byte less", to_limit(&good("below-limit"), MAX_PAYLOAD - 1)),
        (
            1002,
            "a huge object that misses a field",
            to_limit(&good("huge-bad").replace(r#""version":"1""#, r#""v":"1""#), MAX_PAYLOAD),
        ),
        (1001, "huge and no JSON", "x".repeat(MAX_PAYLOAD)),
        (0, "an id of 256 bytes", good(&id(256))),
        (1003, "an id of 257 bytes", good(&id(257))),
        (1003, "an id of 100 000 bytes", good(&id(100_000))),
        (1003, "an id of 129 two-byte letters", good(&"é".repeat(129))),
        (0, "an id of 256 dots: 768 bytes when escaped", good(&".".repeat(256))),
    ];
    documents
        .into_iter()
        .map(|(code, name, payload)| Case {
            code,
            pointer: String::new(),
            payload: payload.into_bytes(),
            name: name.to_owned(),
        })
        .collect()
}

#[tokio::test]
async fn every_url_leads_where_it_may() {
    let cases = lines("urls.txt").into_iter().enumerate().map(|(number, (code, url))| {
        with_job("urls", number, code, json!({"type": "http.request", "url": text(&url), "timeout_ms": 5000}), &url)
    });
    let long = format!("http://no-such-name.invalid/{}", "x".repeat(60_000));
    let long = with_job("urls", usize::MAX, 3001, json!({"type": "http.request", "url": long}), "60 000 bytes");
    // An allowance for another port: what a rig allows would allow this machine.
    let rig = Rig::start(&["--egress-allow=127.0.0.1:1"]).await;
    check(&rig, cases.chain([long]).collect()).await;
    assert_eq!(rig.peer.hits("/").len(), 0);
}

#[tokio::test]
async fn every_path_stays_in_its_tenants_directory() {
    let rig = Rig::start(&[]).await;
    let own = rig.files.path().join("acme");
    let other = rig.files.path().join("other");
    for directory in [&own.join("dir"), &other] {
        std::fs::create_dir_all(directory).expect("a directory");
    }
    for file in [own.join("ok.txt"), own.join("dir/inner.txt"), other.join("secret.txt")] {
        std::fs::write(file, "content").expect("a file");
    }
    for (to, link) in [("/etc/passwd", "link"), ("..", "up"), ("/etc", "etc"), ("loop", "loop"), ("dir", "inner")] {
        std::os::unix::fs::symlink(to, own.join(link)).expect("a link");
    }
    let made = std::process::Command::new("mkfifo").arg(own.join("fifo")).status().expect("mkfifo runs");
    assert!(made.success());
    let cases = lines("paths.txt").into_iter().enumerate().map(|(number, (code, path))| {
        let job = json!({"type": "fs.get", "path": text(&path)});
        with_job("paths", number, code, job, &path)
    });
    let long = json!({"type": "fs.get", "path": rig.path(&"x".repeat(900_000))});
    let long = with_job("paths", usize::MAX, 2001, long, "a name of 900 000 bytes");
    check(&rig, cases.chain([long]).collect()).await;
}

#[tokio::test]
async fn every_statement_reads_or_is_refused() {
    let rig = Rig::start(&[]).await;
    std::fs::create_dir_all(rig.files.path().join("acme")).expect("a directory");
    let file = rig.file_of("acme", "app.db");
    let database = Connection::open(&file).expect("a database");
    database
        .execute_batch("CREATE TABLE users (id INTEGER, name TEXT); INSERT INTO users VALUES (1, 'Ada')")
        .expect("SQL");
    drop(database);
    let before = std::fs::read(&file).expect("a database");
    let cases = lines("sql.txt").into_iter().enumerate().map(|(number, (code, query))| {
        let connection = format!("sqlite://{}", rig.path("app.db"));
        let job =
            json!({"type": "sql.query", "connection_string": connection, "query": text(&query), "timeout_ms": 2000});
        with_job("sql", number, code, job, &query)
    });
    check(&rig, cases.collect()).await;
    assert_eq!(std::fs::read(&file).expect("a database"), before, "not one byte has changed");
    let files: Vec<_> = std::fs::read_dir(rig.files.path().join("acme")).expect("a directory").collect();
    assert_eq!(files.len(), 1, "{files:?}");
}

#[tokio::test]
async fn every_answer_of_a_peer_is_a_result_or_an_error() {
    let rig = Rig::start(&[]).await;
    let answers: Vec<_> = lines("responses.txt");
    let mut cases = Vec::new();
    for (number, (code, answer)) in answers.into_iter().enumerate() {
        let url = peer_that_answers(unescaped(&answer)).await;
        let job = json!({"type": "http.request", "url": url, "timeout_ms": 5000});
        cases.push(with_job("responses", number, code, job, &answer));
    }
    check(&rig, cases).await;
}

/// A peer that gives every request the same bytes, and closes.
async fn peer_that_answers(answer: Vec<u8>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let answer = answer.clone();
            tokio::spawn(async move {
                let mut request = [0; 4096];
                let _ = stream.read(&mut request).await;
                let _ = stream.write_all(&answer).await;
                let _ = stream.shutdown().await;
            });
        }
    });
    format!("http://{address}/")
}
