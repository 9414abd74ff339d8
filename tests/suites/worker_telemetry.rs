//! What leaves the worker beside results: traces, metrics, and no secret.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use async_nats::HeaderMap;
use axum::body::Bytes;
use axum::routing::post;
use base64::Engine;
use base64::prelude::BASE64_STANDARD as STANDARD;
use beamline_tests::rig::Rig;
use beamline_tests::router::{Key, Kind, assignment, json as json_of};
use beamline_tests::tool;
use beamline_tests::wait::SOON;
use futures::StreamExt;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Attribute;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

fn traced() -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert("traceparent", PARENT);
    headers.insert("tracestate", "router=1");
    headers
}

/// A collector that keeps what it is sent.
struct Collector {
    endpoint: String,
    bodies: Arc<Mutex<Vec<Bytes>>>,
}

impl Collector {
    async fn start() -> Self {
        let bodies: Arc<Mutex<Vec<Bytes>>> = Arc::default();
        let kept = Arc::clone(&bodies);
        let take = move |body: Bytes| async move { kept.lock().unwrap().push(body) };
        let router = axum::Router::new().route("/v1/traces", post(take));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { endpoint, bodies }
    }

    fn flag(&self) -> String {
        format!("--otlp-endpoint={}", self.endpoint)
    }

    fn requests(&self) -> Vec<ExportTraceServiceRequest> {
        let bodies = self.bodies.lock().unwrap();
        bodies.iter().map(|body| ExportTraceServiceRequest::decode(body.as_ref()).expect("OTLP")).collect()
    }
}

/// Ends the worker, which sends its last spans.
async fn end(rig: &mut Rig) {
    rig.router.settled(SOON).await;
    rig.worker.terminate();
    assert_eq!(rig.worker.ended().await, Some(0));
}

// Trace context.

/// `traceparent` and `tracestate` of everything that was said about an assignment.
fn contexts(rig: &Rig, key: impl Into<Key>) -> Vec<(Kind, Option<String>, Option<String>)> {
    let key = Some(key.into());
    let header = |headers: &HeaderMap, name: &str| headers.get(name).map(|value| value.to_string());
    let heard = rig.router.heard().into_iter().filter(|heard| heard.key == key);
    heard
        .map(|heard| (heard.kind, header(&heard.headers, "traceparent"), header(&heard.headers, "tracestate")))
        .collect()
}

#[tokio::test]
async fn a_trace_context_is_passed_on_with_all_that_is_said_and_to_the_peer() {
    let rig = Rig::start(&[]).await;
    let mut chunks = rig.router.client().subscribe("caf.exec.stream.v1.acme.fails").await.unwrap();
    let mut streams = rig.router.client().subscribe("caf.exec.stream.v1.acme.streams").await.unwrap();
    let fails = assignment("acme", "fails", rig.call("/status/404"));
    let mut streamed = assignment("acme", "streams", rig.call("/ok"));
    streamed["job"]["stream"] = json!(true);
    let mut refused = assignment("acme", "refused", rig.call("/ok"));
    refused["priority"] = json!(10);
    for payload in [&fails, &streamed, &refused] {
        rig.router.submit_with(payload, traced()).await;
    }
    let mut by_id = assignment("acme", "by-id", rig.call("/ok?by-id"));
    by_id["trace_id"] = json!(TRACE);
    rig.router.submit(&by_id).await;
    rig.router.submit(&assignment("acme", "none", rig.call("/ok?none"))).await;
    rig.router.settled(SOON).await;

    let (parent, state) = (Some(PARENT.to_owned()), Some("router=1".to_owned()));
    for (id, kinds) in [
        ("fails", &[Kind::Verdict, Kind::Letter, Kind::Result][..]),
        ("streams", &[Kind::Verdict, Kind::Result]),
        ("refused", &[Kind::Letter, Kind::Verdict]),
    ] {
        let expected: Vec<_> = kinds.iter().map(|kind| (*kind, parent.clone(), state.clone())).collect();
        assert_eq!(contexts(&rig, ("acme", id)), expected, "{id}");
    }
    let chunk = streams.next().await.unwrap();
    assert_eq!(chunk.headers.unwrap().get("traceparent").unwrap().as_str(), PARENT);
    let made = format!("00-{TRACE}-8448eb211c80319c-01");
    for (id, parent) in [("by-id", Some(made.clone())), ("none", None)] {
        let expected = [Kind::Verdict, Kind::Result].map(|kind| (kind, parent.clone(), None));
        assert_eq!(contexts(&rig, ("acme", id)), expected, "{id}");
    }
    let record = rig.router.record(("acme", "fails")).await.unwrap();
    assert_eq!(record.payload, rig.router.story(&fails).results[0]);

    let sent = |path: &str, name: &str| rig.peer.hits(path)[0].headers.get(name).cloned();
    assert_eq!((sent("/status/404", "traceparent"), sent("/status/404", "tracestate")), (parent, state));
    assert_eq!(sent("/ok?by-id", "traceparent"), Some(made));
    assert_eq!(sent("/ok?none", "traceparent"), None);
    assert!(futures::FutureExt::now_or_never(chunks.next()).is_none(), "an error is not streamed");
}

// Spans.

fn attributes(pairs: &[KeyValue]) -> BTreeMap<&str, &str> {
    let text = |pair: &KeyValue| match pair.value.as_ref().and_then(|value| value.value.as_ref()) {
        Some(Attribute::StringValue(text)) => text.clone(),
        other => panic!("{}: {other:?}", pair.key),
    };
    pairs.iter().map(|pair| (pair.key.as_str(), &*text(pair).leak())).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test]
async fn a_collector_gets_three_spans_of_each_assignment_in_the_routers_trace() {
    let collector = Collector::start().await;
    let mut rig = Rig::start(&[&collector.flag()]).await;
    for (id, path) in [("good", "/ok"), ("bad", "/status/404")] {
        let mut payload = assignment("acme", id, rig.call(path));
        (payload["trace_id"], payload["run_id"]) = (json!(id), json!("run-1"));
        rig.router.submit_with(&payload, traced()).await;
    }
    end(&mut rig).await;

    let requests = collector.requests();
    let mut spans: Vec<&Span> = Vec::new();
    for resource in requests.iter().flat_map(|request| &request.resource_spans) {
        let names = attributes(&resource.resource.as_ref().unwrap().attributes);
        assert_eq!((names["service.name"], names["service.instance.id"]), ("beamline-worker", "worker-1"));
        assert!(names.contains_key("service.version"));
        spans.extend(resource.scope_spans.iter().flat_map(|scope| &scope.spans));
    }
    assert_eq!(spans.len(), 6, "{spans:#?}");
    for (id, path, status) in [("good", "/ok", 0), ("bad", "/status/404", 2)] {
        let find = |name: &str| {
            let is_it = |span: &&&Span| span.name == name && attributes(&span.attributes)["trace_id"] == id;
            *spans.iter().find(is_it).unwrap_or_else(|| panic!("no span {name} of {id}"))
        };
        let receive = find("worker.assignment.receive");
        let (execute, publish) = (find("worker.block.execute"), find("worker.result.publish"));
        let expected = BTreeMap::from([
            ("tenant_id", "acme"),
            ("trace_id", id),
            ("run_id", "run-1"),
            ("block_type", "http.request"),
            ("worker_id", "worker-1"),
        ]);
        for span in [receive, execute, publish] {
            assert_eq!(attributes(&span.attributes), expected, "{}", span.name);
            assert_eq!((hex(&span.trace_id).as_str(), span.trace_state.as_str()), (TRACE, "router=1"));
            assert!(span.start_time_unix_nano > 0 && span.end_time_unix_nano >= span.start_time_unix_nano);
        }
        assert_eq!(hex(&receive.parent_span_id), "b7ad6b7169203331");
        assert_eq!((&execute.parent_span_id, &publish.parent_span_id), (&receive.span_id, &receive.span_id));
        assert!(receive.start_time_unix_nano <= execute.start_time_unix_nano);
        assert!(publish.end_time_unix_nano <= receive.end_time_unix_nano, "to its settlement");
        // Consumer, internal, producer.
        assert_eq!([receive.kind, execute.kind, publish.kind], [5, 1, 4]);
        let code = |span: &Span| span.status.as_ref().map_or(0, |status| status.code);
        assert_eq!([code(receive), code(execute), code(publish)], [status, status, 0], "{id}");
        let child = format!("00-{TRACE}-{}-01", hex(&execute.span_id));
        assert_eq!(rig.peer.hits(path)[0].headers["traceparent"], child, "the peer's parent is our span");
    }
    let said = rig.router.heard();
    let passed_on =
        |name: &str| said.iter().all(|heard| heard.headers.get("traceparent").is_some_and(|v| v.as_str() == name));
    assert!(passed_on(PARENT), "the Router gets its own context back");
}

/// The ids of a span, its own and its parent's, and its attributes.
fn described(span: &Span) -> (String, String, BTreeMap<&str, &str>) {
    (hex(&span.trace_id), hex(&span.parent_span_id), attributes(&span.attributes))
}

/// All spans that came.
fn spans(requests: &[ExportTraceServiceRequest]) -> Vec<&Span> {
    let resources = requests.iter().flat_map(|request| &request.resource_spans);
    resources.flat_map(|resource| &resource.scope_spans).flat_map(|scope| &scope.spans).collect()
}

#[tokio::test]
async fn what_is_said_and_done_about_an_approval_belongs_to_its_trace() {
    let collector = Collector::start().await;
    let mut rig = Rig::start(&[]).await;
    rig.worker.kill();
    let hook = format!("--approval-webhook={}", rig.peer.url("/ok/hook"));
    rig.worker = rig.another("worker-2").flag(hook).flag(collector.flag()).start(&rig.nats).await;
    let mut announced = rig.router.client().subscribe("caf.human.request.v1").await.unwrap();
    let job = json!({"type": "human.approval", "prompt": "May it?", "approvers": ["ann"]});
    rig.router.submit_with(&assignment("acme", "asks", job), traced()).await;
    let announcement = announced.next().await.unwrap().headers.unwrap();
    let hit = &rig.peer.arrived("/ok/hook", 1).await[0];
    for (name, value) in [("traceparent", PARENT), ("tracestate", "router=1")] {
        assert_eq!((announcement.get(name).unwrap().as_str(), hit.headers[name].as_str()), (value, value));
    }
    let answer = json!({"assignment_id": "asks", "tenant_id": "acme", "approver": "ann", "approved": true});
    rig.router.client().publish("caf.human.response.v1", answer.to_string().into()).await.unwrap();
    rig.router.result(("acme", "asks")).await;
    end(&mut rig).await;

    let said = [Kind::Verdict, Kind::Result].map(|kind| (kind, Some(PARENT.to_owned()), Some("router=1".to_owned())));
    assert_eq!(contexts(&rig, ("acme", "asks")), said);
    let requests = collector.requests();
    let spans: BTreeMap<_, _> = spans(&requests).into_iter().map(|span| (span.name.as_str(), span)).collect();
    let execute = spans["worker.block.execute"];
    let expected = BTreeMap::from([("tenant_id", "acme"), ("block_type", "human.approval"), ("worker_id", "worker-2")]);
    let router = "b7ad6b7169203331".to_owned();
    let parents = [
        ("worker.assignment.receive", &router),
        ("worker.block.execute", &router),
        ("worker.result.publish", &hex(&execute.span_id)),
    ];
    for (name, parent) in parents {
        assert_eq!(described(spans[name]), (TRACE.to_owned(), parent.clone(), expected.clone()), "{name}");
    }
}

#[tokio::test]
async fn what_is_refused_has_the_span_of_its_arrival_marked_as_failed() {
    let collector = Collector::start().await;
    let mut rig = Rig::start(&[&collector.flag()]).await;
    let mut payload = assignment("acme", "gpu", rig.call("/ok"));
    (payload["resources"], payload["run_id"]) = (json!({"pool": "gpu"}), json!("run-1"));
    rig.router.submit_with(&payload, traced()).await;
    rig.router.submit_bytes("nonsense").await;
    end(&mut rig).await;

    let requests = collector.requests();
    let spans = spans(&requests);
    assert_eq!(spans.len(), 2, "{spans:#?}");
    for span in &spans {
        assert_eq!(
            (span.name.as_str(), span.status.as_ref().map(|status| status.code)),
            ("worker.assignment.receive", Some(2))
        );
    }
    let known = BTreeMap::from([
        ("tenant_id", "acme"),
        ("run_id", "run-1"),
        ("block_type", "http.request"),
        ("worker_id", "worker-1"),
    ]);
    let refused = spans.iter().find(|span| hex(&span.trace_id) == TRACE).unwrap();
    assert_eq!(described(refused), (TRACE.to_owned(), "b7ad6b7169203331".to_owned(), known));
    let nonsense = spans.iter().find(|span| hex(&span.trace_id) != TRACE).unwrap();
    assert_eq!(attributes(&nonsense.attributes), BTreeMap::from([("worker_id", "worker-1")]));
}

// Metrics.

#[tokio::test]
async fn metrics_keep_the_rules_of_prometheus_but_for_the_published_name() {
    let rig = Rig::start(&[]).await;
    rig.database("acme", "CREATE TABLE t (a)");
    let database = format!("sqlite://{}", rig.path("db.sqlite"));
    let jobs = [
        rig.call("/ok"),
        rig.call("/status/404"),
        rig.put("x", "x"),
        json!({"type": "fs.get", "path": rig.path("x")}),
        json!({"type": "sql.query", "connection_string": database, "query": "SELECT 1"}),
        json!({"type": "fs.get"}),
    ];
    for (id, job) in jobs.into_iter().enumerate() {
        rig.router.submit(&assignment("acme", &id.to_string(), job)).await;
    }
    rig.router.settled(SOON).await;
    let (_, metrics) = rig.worker.get("/metrics").await.unwrap();
    let mut lint = Command::new(tool::program("promtool"));
    let mut lint = lint.args(["check", "metrics"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    lint.stdin.take().unwrap().write_all(metrics.as_bytes()).unwrap();
    let said = String::from_utf8(lint.wait_with_output().unwrap().stderr).unwrap();
    // The description has given this one its name.
    let known = "worker_task_latency_ms metric names should not contain abbreviated units";
    let problems: BTreeSet<&str> = said.lines().filter(|line| *line != known).collect();
    assert_eq!(problems, BTreeSet::new());
}

// Secrets.

/// In places that hold credentials: nobody ever sees it again.
const CREDENTIAL: &str = "hunter2-credential";
/// In what an assignment carries: only a dead letter, which can be replayed, repeats it.
const CONTENT: &str = "hunter2-content";

fn with_secrets(rig: &Rig, path: &str) -> Value {
    let mut job = rig.call(&format!("{path}?token={CREDENTIAL}#{CREDENTIAL}"));
    let names = [
        "Authorization",
        "Cookie",
        "X-Vault-Token",
        "apikey",
        "api-key",
        "X-Auth-Key",
        "X-Auth-User",
        "Ocp-Apim-Subscription-Key",
        "X-Amz-Security-Token",
        "X-Functions-Key",
        "X-Hub-Signature",
    ];
    job["headers"] =
        names.iter().map(|name| ((*name).to_owned(), json!(CREDENTIAL))).collect::<serde_json::Map<_, _>>().into();
    job["body"] = json!(CONTENT);
    job["retry_config"] = json!({"max_attempts": 2, "base_delay_ms": 1});
    job
}

/// Jobs of every kind and with every end, each with secrets wherever it may have some.
fn jobs_with_secrets(rig: &Rig) -> Vec<(&'static str, Value)> {
    let own = json!({"type": "http.request", "url": rig.peer.url("/ok"), "headers": {"Authorization": CREDENTIAL}});
    let mut broken = own.clone();
    broken["headers"]["Authorization"] = json!(format!("{CREDENTIAL}\r\nx: y"));
    let mut listed = own.clone();
    listed["headers"] = json!([format!("Authorization: {CREDENTIAL}")]);
    let mut in_bytes = with_secrets(rig, "/status/404");
    in_bytes.as_object_mut().unwrap().remove("body");
    in_bytes["body_base64"] = json!(STANDARD.encode(CONTENT));
    let mut in_both = in_bytes.clone();
    in_both["body"] = json!(CONTENT);
    let mut bad_base64 = in_bytes.clone();
    bad_base64["body_base64"] = json!(format!("{CONTENT}!"));
    let request = |url: String| json!({"type": "http.request", "url": url, "timeout_ms": 3000});
    let put = |path: &str, field: &str, content: Value| json!({"type": "fs.put", "path": path, field: content});
    let sql = |url: &str, query: &str, parameters: Value| {
        json!({
            "type": "sql.query", "connection_string": url, "query": query, "parameters": parameters, "timeout_ms": 3000,
        })
    };
    let login = |scheme: &str, rest: &str| format!("{scheme}://me:{CREDENTIAL}@{rest}");
    let approval = json!({"type": "human.approval", "prompt": CONTENT, "approvers": [CONTENT], "timeout_ms": 200});
    let missing = format!("sqlite://{}", rig.path("no.db"));
    vec![
        ("succeeds", with_secrets(rig, "/ok")),
        ("fails", with_secrets(rig, "/status/404")),
        ("exhausted", with_secrets(rig, "/status/503")),
        ("breaks", with_secrets(rig, "/reset")),
        ("redirected", with_secrets(rig, "/redirect/9")),
        ("bytes", in_bytes),
        ("both-bodies", in_both),
        ("bad-bytes", bad_base64),
        ("nowhere", request(format!("http://no-such-name.invalid/?k={CREDENTIAL}#{CREDENTIAL}"))),
        ("userinfo", request(format!("http://u:{CREDENTIAL}@127.0.0.1/?k={CREDENTIAL}"))),
        ("user", request(format!("https://{CREDENTIAL}@127.0.0.1/"))),
        ("no-url", request(format!("{CREDENTIAL}@nowhere"))),
        ("no-port", request(format!("http://u:{CREDENTIAL}@127.0.0.1:99999/"))),
        ("refused-address", request(format!("http://169.254.169.254/?k={CREDENTIAL}"))),
        ("broken-header", broken),
        ("listed-header", listed),
        ("put", put("/etc/passwd", "content", json!(CONTENT))),
        ("put-bytes", put("/etc/passwd", "content_base64", json!(STANDARD.encode(CONTENT)))),
        ("put-bad-bytes", put(&rig.path("x"), "content_base64", json!(format!("{CONTENT}!")))),
        ("put-number", put(&rig.path("x"), "content", json!({"secret": CONTENT}))),
        ("put-well", put(&rig.path("x"), "content", json!(CONTENT))),
        ("missing", sql(&missing, "SELECT ?", json!([CONTENT, {"base64": STANDARD.encode(CONTENT)}]))),
        ("by-name", sql(&missing, "SELECT :a", json!({"a": CONTENT}))),
        ("bad-parameters", sql(&missing, "SELECT ?", json!(CONTENT))),
        (
            "database",
            sql(&login("postgres", &format!("127.0.0.1:1/db?sslpassword={CREDENTIAL}")), "SELECT 1", json!([CONTENT])),
        ),
        ("closed", sql(&login("postgres", "127.0.0.1:1/db"), "SELECT $1", json!([CONTENT]))),
        ("closed-mysql", sql(&login("mysql", "127.0.0.1:1/db"), "SELECT ?", json!([CONTENT]))),
        ("bad-scheme", sql(&login("oracle", "127.0.0.1/db"), "SELECT 1", json!([]))),
        ("bad-login", sql(&format!("postgres://me:{CREDENTIAL}%zz@127.0.0.1:x/db"), "SELECT 1", json!([]))),
        ("no-scheme", sql(CREDENTIAL, "SELECT 1", json!([]))),
        ("writes", sql(&login("mysql", "127.0.0.1:1/db"), "DELETE FROM t", json!([CONTENT]))),
        ("approval", approval),
    ]
}

/// Submits all of them, with secrets in what surrounds a job too, and a payload that is no JSON.
async fn submit_secrets(rig: &Rig) {
    for (id, job) in jobs_with_secrets(rig) {
        let mut payload = assignment("acme", id, job);
        payload["executor"]["endpoint"] = json!(format!("https://u:{CREDENTIAL}@h/v1?k={CREDENTIAL}#{CREDENTIAL}"));
        payload["unknown"] = json!({"note": CONTENT});
        let mut headers = HeaderMap::new();
        headers.insert("X-Router", CONTENT);
        rig.router.submit_with(&payload, headers).await;
    }
    let cut = format!(r#"{{"assignment_id":"raw","request_id":"r","tenant_id":"acme","job":{{"url":"{CREDENTIAL}"#);
    rig.router.submit_bytes(cut).await;
    rig.router.settled(SOON * 4).await;
    rig.router.result(("acme", "approval")).await;
}

/// Whether a text holds one of the secrets, whatever it is encoded in.
fn tells(text: &str) -> bool {
    text.contains("hunter2") || text.contains(&STANDARD.encode(CONTENT)) || text.contains(&STANDARD.encode(CREDENTIAL))
}

/// Ends the worker, and holds all that it has said but messages to having told nothing.
async fn told_nobody_else(mut rig: Rig, collector: &Collector) -> Rig {
    let (_, metrics) = rig.worker.get("/metrics").await.unwrap();
    let (_, health) = rig.worker.get("/_health").await.unwrap();
    end(&mut rig).await;
    let spans = collector.bodies.lock().unwrap().concat();
    let spans = String::from_utf8_lossy(&spans).into_owned();
    assert!(spans.contains("worker.block.execute"));
    let lines = rig.worker.lines();
    assert!(lines.len() > 20, "there are lines at all");
    for place in lines.iter().chain([&metrics, &health, &spans]) {
        assert!(!tells(place), "{place}");
    }
    let kept = rig.router.all("CAF_EXEC_RESULT", ">").await;
    assert!(kept.iter().all(|kept| !tells(&format!("{} {:?}", String::from_utf8_lossy(&kept.payload), kept.headers))));
    rig
}

/// Where credentials stand in what the administrator sets.
fn secret_flags(directory: &TempDir) -> Vec<String> {
    let list = directory.path().join("connections.yaml");
    let closed = format!("postgres://me:{CREDENTIAL}@127.0.0.1:1/db");
    std::fs::write(&list, format!("[{{name: closed, url: '{closed}'}}]")).unwrap();
    vec![
        format!("--sql-connections-file={}", list.display()),
        format!("--approval-webhook=http://127.0.0.1:1/hook/{CREDENTIAL}"),
        "--log-level=trace".to_owned(),
        "--dlq-exhausted".to_owned(),
    ]
}

#[tokio::test]
async fn s14_no_secret_leaves_but_where_it_is_meant_to() {
    let (collector, directory) = (Collector::start().await, tempfile::tempdir().unwrap());
    let mut flags = secret_flags(&directory);
    flags.extend(["--dlq-redact".to_owned(), collector.flag()]);
    let rig = Rig::start(&flags.iter().map(String::as_str).collect::<Vec<_>>()).await;
    submit_secrets(&rig).await;
    let named = json!({"type": "sql.query", "connection": "closed", "query": "SELECT $1", "parameters": [CONTENT]});
    let named = assignment("acme", "named", named);
    rig.router.submit(&named).await;
    rig.router.result(&named).await;
    let letters = rig.router.heard().iter().filter(|heard| heard.kind == Kind::Letter).count();
    assert!(letters >= 25, "{letters} dead letters");
    let raw = rig.router.find(Kind::Letter, "what is no JSON", |letter| letter["error"]["code"] == 1001).await;
    assert_eq!((&raw["redacted"], raw.get("raw_base64")), (&json!(true), None));
    let rig = told_nobody_else(rig, &collector).await;
    for heard in rig.router.heard() {
        let said = format!("{} {:?}", String::from_utf8_lossy(&heard.payload), heard.headers);
        let is_letter = matches!(heard.kind, Kind::Letter | Kind::Original);
        let told = if is_letter { said.contains(CREDENTIAL) } else { tells(&said) };
        assert!(!told, "{:?}: {said}", heard.kind);
    }
}

#[tokio::test]
async fn s14_without_redaction_a_letter_repeats_secrets_only_in_its_original() {
    let (collector, directory) = (Collector::start().await, tempfile::tempdir().unwrap());
    let mut flags = secret_flags(&directory);
    flags.push(collector.flag());
    let rig = Rig::start(&flags.iter().map(String::as_str).collect::<Vec<_>>()).await;
    submit_secrets(&rig).await;
    let rig = told_nobody_else(rig, &collector).await;
    let mut originals = 0;
    for heard in rig.router.heard() {
        let mut said = json_of(&heard.payload);
        if heard.kind == Kind::Letter {
            let letter = said.as_object_mut().unwrap();
            let original = letter.remove("assignment").or_else(|| letter.remove("raw_base64"));
            originals += usize::from(original.is_some());
        }
        let said = format!("{said} {:?}", heard.headers);
        assert!(!tells(&said), "{:?}: {said}", heard.kind);
    }
    assert!(originals >= 25, "{originals} dead letters with their originals");
}
