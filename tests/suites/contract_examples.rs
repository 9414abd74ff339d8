//! Every JSON example of docs/contract.md, held against the code that reads or writes it: an example that drifts fails.

#![expect(clippy::expect_used, clippy::indexing_slicing, clippy::panic, reason = "a test says so when it cannot go on")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::consumer;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use beamline_worker::approval::answer::Answer;
use beamline_worker::approval::request::{Request, State};
use beamline_worker::assignment::{Addressee, Assignment};
use beamline_worker::blocks::cpu::CpuTime;
use beamline_worker::blocks::egress::Policy;
use beamline_worker::blocks::human::Approval;
use beamline_worker::blocks::pieces::{Piece, Sink};
use beamline_worker::blocks::{self, Block, BlockKind, Blocks, Output, http};
use beamline_worker::broker::Expected;
use beamline_worker::cancel::Cancel;
use beamline_worker::contract::{self, AttemptRecord, DeadLetter, Details, LetterError};
use beamline_worker::contract::{CancelAnswer, CancelError, CancelOutcome, Refused};
use beamline_worker::execute::{self, Ended, Engine, Execution, Limits, Links};
use beamline_worker::fault::{Cause, Fault};
use beamline_worker::message;
use beamline_worker::pool::ByPool;
use beamline_worker::publication::Publication;
use beamline_worker::report::{self, StepResult};
use futures::future::BoxFuture;
use jiff::Timestamp;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value, json};

const CONTRACT: &str = include_str!("../../docs/contract.md");
const MAX_PAYLOAD: usize = 1024 * 1024;

/// One JSON block, with the words of the comment before it.
struct Fixture {
    line: usize,
    kind: Vec<&'static str>,
    json: String,
}

impl Fixture {
    #[track_caller]
    fn value(&self) -> Value {
        serde_json::from_str(&self.json).unwrap_or_else(|error| panic!("{self}: {error}"))
    }
}

impl std::fmt::Display for Fixture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "docs/contract.md:{}: `{}`", self.line, self.kind.join(" "))
    }
}

/// All JSON blocks. One without a comment, or a comment without one, is a mistake.
#[track_caller]
fn fixtures() -> Vec<Fixture> {
    let mut found = Vec::new();
    let mut comment = None;
    let mut lines = CONTRACT.lines().enumerate();
    while let Some((index, line)) = lines.next() {
        let kind = line.strip_prefix("<!-- fixture: ").and_then(|rest| rest.strip_suffix(" -->"));
        if let Some(kind) = kind {
            comment = Some(kind.split(' ').collect());
        } else if line == "```json" {
            let kind = comment.take().unwrap_or_else(|| panic!("docs/contract.md:{index}: JSON that is no fixture"));
            let json = lines.by_ref().map(|(_, line)| line).take_while(|line| *line != "```").collect::<Vec<_>>();
            found.push(Fixture { line: index + 1, kind, json: json.join("\n") });
        } else {
            assert!(comment.is_none(), "docs/contract.md:{index}: a fixture without JSON");
        }
    }
    found
}

#[tokio::test]
async fn every_example_is_what_the_code_reads_and_writes() {
    let fixtures = fixtures();
    assert!(fixtures.len() > 20, "only {} examples were found", fixtures.len());
    let mut job = None;
    for fixture in &fixtures {
        match fixture.kind.as_slice() {
            ["assignment", "accepted", kind] => is_accepted(fixture, fixture.value(), kind),
            ["assignment", "rejected", code, pointer] => is_rejected(fixture, fixture.value(), code, pointer),
            ["job", "accepted", kind] => {
                is_accepted(fixture, around(fixture.value()), kind);
                job = Some(fixture.value());
            }
            ["job", "rejected", code, pointer] => is_rejected(fixture, around(fixture.value()), code, pointer),
            ["output", "sandbox"] => {
                let job = job.take().unwrap_or_else(|| panic!("{fixture}: no job before it"));
                let produced = run(fixture, Engine::Sandbox(blocks("/data")), job).await;
                assert_eq!(fixture.value(), Value::from(produced), "{fixture}");
            }
            ["output", "human.approval"] => decided(fixture, job.take().unwrap_or_default()),
            ["approval", "request"] => announced(fixture),
            ["approval", "answer"] => drop(answer(fixture)),
            ["output", kind] => {
                let job = job.take().unwrap_or_else(|| panic!("{fixture}: no job before it"));
                is_produced(fixture, kind, job).await;
            }
            ["verdict", "accepted"] => verdict_accepted(fixture),
            ["verdict", "rejected", code] => verdict_rejected(fixture, code),
            ["result", "success", kind] => result(fixture, kind, None),
            ["cancel"] => {
                drop(Cancel::decode(fixture.json.as_bytes()).unwrap_or_else(|error| panic!("{fixture}: {error}")))
            }
            ["cancel", "answer", outcome] => cancel_answer(fixture, outcome),
            ["cancel", "refused", code] => cancel_refused(fixture, code),
            ["result", "error" | "timeout" | "cancelled", code] => result(fixture, "http.request", Some(code)),
            ["dead", "letter", stage] => dead_letter(fixture, stage),
            ["consumer"] => consumer_config(fixture),
            ["worker", "report"] => worker_report(fixture),
            ["worker", "control", "refused"] => control_refused(fixture),
            ["worker", "control", pull] => {
                let control: contract::WorkerControl = message::read_part(&fixture.json, "").expect("it can be read");
                assert_eq!(control.pull.map(|pull| pull.to_string()).as_deref(), Some(*pull), "{fixture}");
            }
            ["chunk"] => chunk(fixture),
            _ => panic!("{fixture} is no kind of fixture"),
        }
    }
}

#[track_caller]
fn worker_report(fixture: &Fixture) {
    let said = fixture.value();
    let number = |pointer: &str| said.pointer(pointer).and_then(Value::as_u64).expect("a number");
    let count = |pointer: &str| usize::try_from(number(pointer)).expect("a count");
    let by_pool = |name: &str| ByPool {
        cpu: count(&format!("/{name}/cpu")),
        gpu: count(&format!("/{name}/gpu")),
        io: count(&format!("/{name}/io")),
    };
    let tenant = |said: &'_ Value| contract::TenantReport {
        id: "acme",
        running: said["running"].as_u64().expect("a number") as usize,
        queued: said["queued"].as_u64().expect("a number") as usize,
        refused: said["refused"].as_u64().expect("a number"),
    };
    let written = contract::WorkerReport {
        version: contract::VERSION,
        worker: said["worker"].as_str().expect("text"),
        pool: said["pool"].as_str(),
        class: "general",
        slots: by_pool("slots"),
        busy: by_pool("busy"),
        running: count("/running"),
        waiting: count("/waiting"),
        pulling: said["pulling"] == true,
        paused: said["paused"] == true,
        finished: number("/finished"),
        work_ms: number("/work_ms"),
        tenants: said["tenants"].as_array().expect("a list").iter().map(tenant).collect(),
        started_at: said["started_at"].as_i64().expect("a time"),
        reported_at: said["reported_at"].as_i64().expect("a time"),
        build: env!("CARGO_PKG_VERSION"),
    };
    assert_eq!(serde_json::to_value(&written).expect("plain data"), said, "{fixture}");
}

#[track_caller]
fn control_refused(fixture: &Fixture) {
    let said = fixture.value();
    let error = Refused {
        code: Cause::MissingField.code(),
        message: said["error"]["message"].as_str().expect("text"),
        retryable: false,
    };
    let written = contract::ControlRefused { worker: said["worker"].as_str().expect("text"), error };
    assert_eq!(serde_json::to_value(&written).expect("plain data"), said, "{fixture}");
}

#[track_caller]
fn is_accepted(fixture: &Fixture, assignment: Value, kind: &str) {
    let assignment = Assignment::decode(assignment.to_string().as_bytes())
        .unwrap_or_else(|refused| panic!("{fixture} is refused: {}", refused.invalid));
    assert_eq!(assignment.block.kind().as_str(), kind, "{fixture}");
}

#[track_caller]
fn is_rejected(fixture: &Fixture, assignment: Value, code: &str, pointer: &str) {
    let Err(refused) = Assignment::decode(assignment.to_string().as_bytes()) else {
        panic!("{fixture} is accepted");
    };
    assert_eq!(
        (refused.invalid.cause.code().to_string().as_str(), refused.invalid.pointer.as_str()),
        (code, pointer),
        "{fixture}"
    );
}

/// An assignment with this job.
fn around(job: Value) -> Value {
    json!({
        "version": "1",
        "assignment_id": "assign-123",
        "request_id": "req-456",
        "tenant_id": "tenant-789",
        "executor": { "provider_id": "openai" },
        "job": job,
    })
}

/// An assignment with the ids of what is said about it.
#[track_caller]
fn behind(message: &Value) -> Assignment {
    let mut assignment = around(json!({ "type": "http.request", "url": "https://api.example.com/process" }));
    for (from, id) in [("", "assignment_id"), ("", "request_id"), ("", "tenant_id"), ("", "trace_id")]
        .into_iter()
        .chain([("/metadata", "run_id"), ("/metadata", "flow_id"), ("/metadata", "step_id")])
    {
        if let Some(value) = message.pointer(&format!("{from}/{id}")) {
            assignment[id] = value.clone();
        }
    }
    decode(&assignment)
}

#[track_caller]
fn decode(assignment: &Value) -> Assignment {
    Assignment::decode(assignment.to_string().as_bytes())
        .unwrap_or_else(|refused| panic!("{assignment}: {}", refused.invalid))
}

#[track_caller]
fn is_written(fixture: &Fixture, written: &[u8], clock: &str) {
    let mut written: Value = serde_json::from_slice(written).expect("what we write is JSON");
    let mut example = fixture.value();
    for message in [&mut written, &mut example] {
        let time = message.as_object_mut().and_then(|message| message.remove(clock));
        assert!(time.is_some_and(|time| time.is_i64()), "{fixture}: {clock} is no Unix time");
    }
    assert_eq!(example, written, "{fixture}: the example is left, what the code writes is right");
}

fn verdict_accepted(fixture: &Fixture) {
    let example = fixture.value();
    let written = report::accepted(&behind(&example), text(&example, "/worker_id"), 0);
    is_written(fixture, &written, "acknowledged_at");
}

fn verdict_rejected(fixture: &Fixture, code: &str) {
    let example = fixture.value();
    let fault = fault(fixture, &example["error"]);
    assert_eq!(fault.cause.code().to_string(), code, "{fixture}");
    let id = |field: &str| example[field].as_str().filter(|id| !id.is_empty()).map(Box::from);
    let addressee = Addressee {
        assignment_id: id("assignment_id"),
        request_id: id("request_id"),
        tenant_id: id("tenant_id"),
        trace_id: id("trace_id"),
        run_id: None,
    };
    let written = report::rejected(&addressee, fault.cause, &fault.message, text(&example, "/worker_id"));
    is_written(fixture, &written.expect("a verdict with an addressee"), "acknowledged_at");
}

fn result(fixture: &Fixture, kind: &str, code: Option<&str>) {
    let example = fixture.value();
    let kind = BlockKind::parse(kind).unwrap_or_else(|| panic!("{fixture}: {kind} is no block"));
    let outcome = match code {
        None => Ok(Output(to_raw_value(&example["result"]).expect("JSON"))),
        Some(code) => {
            let fault = fault(fixture, &example["error"]);
            assert_eq!(fault.cause.code().to_string(), code, "{fixture}");
            Err(fault)
        }
    };
    let execution = Execution {
        outcome,
        failed: Vec::new(),
        attempts: number(&example, "/metadata/attempts").try_into().expect("a number of attempts"),
        latency: millis(&example, "/latency_ms"),
        cpu_time: millis(&example, "/metadata/cpu_time_ms"),
    };
    let mut step = StepResult::of(execution, kind, millis(&example, "/metadata/queue_ms"));
    let written = step.encode(&behind(&example), text(&example, "/metadata/worker_id"), MAX_PAYLOAD);
    is_written(fixture, &written, "completed_at");
}

fn cancel_answer(fixture: &Fixture, outcome: &str) {
    let example = fixture.value();
    let mut known = [CancelOutcome::Cancelled, CancelOutcome::Recorded, CancelOutcome::Finished].into_iter();
    let outcome = known.find(|known| json!(known) == outcome).expect("an outcome");
    let written = json!(CancelAnswer { assignment_id: text(&example, "/assignment_id"), outcome });
    assert_eq!(example, written, "{fixture}");
}

fn cancel_refused(fixture: &Fixture, code: &str) {
    let example = fixture.value();
    let error = &example["error"];
    let written = json!(CancelError {
        error: Refused { code: code.parse().expect("a code"), message: text(error, "/message"), retryable: false },
    });
    assert_eq!(example, written, "{fixture}");
}

fn chunk(fixture: &Fixture) {
    let example = fixture.value();
    let data = match example["data"].as_str() {
        Some(text) => text.to_owned().into(),
        None => STANDARD.decode(text(&example, "/data_base64")).expect("base64").into(),
    };
    let piece = Piece {
        attempt: number(&example, "/attempt").try_into().expect("an attempt"),
        seq: number(&example, "/seq"),
        data,
        is_last: example["last"].as_bool().expect("true or false"),
    };
    let written = report::stream::encode(&piece, &behind(&example).key, example["trace_id"].as_str());
    let written: Value = serde_json::from_slice(&written).expect("what we write is JSON");
    assert_eq!(example, written, "{fixture}: the example is left, what the code writes is right");
}

fn dead_letter(fixture: &Fixture, stage: &str) {
    let example = fixture.value();
    let id = |field: &str| example[field].as_str();
    let error = fault(fixture, &example["error"]);
    let attempts: Vec<_> = example["attempts"].as_array().expect("attempts").iter().collect();
    let faults: Vec<_> = attempts.iter().map(|attempt| fault(fixture, &attempt["error"])).collect();
    let assignment = example.get("assignment").map(|assignment| to_raw_value(assignment).expect("JSON"));
    if let Some(assignment) = &assignment {
        decode(&serde_json::from_str(assignment.get()).expect("JSON"));
    }
    let letter = DeadLetter {
        version: contract::VERSION,
        dlq_id: text(&example, "/dlq_id"),
        stage: contract::Stage::ALL
            .into_iter()
            .map(contract::Stage::as_str)
            .find(|known| *known == stage)
            .unwrap_or_else(|| panic!("{fixture}: {stage} is no stage")),
        error: LetterError::New(report::public_error(&error)),
        assignment: assignment.as_deref(),
        raw_base64: id("raw_base64").map(str::to_owned),
        omitted: id("omitted").map(str::to_owned),
        redacted: example["redacted"].as_bool(),
        attempts: std::iter::zip(attempts, &faults)
            .map(|(attempt, fault)| AttemptRecord {
                started_at: attempt["started_at"].as_i64().expect("a Unix time"),
                latency_ms: number(attempt, "/latency_ms"),
                error: report::public_error(fault),
            })
            .collect(),
        attempts_omitted: example["attempts_omitted"].as_u64().and_then(|omitted| usize::try_from(omitted).ok()),
        deliveries: number(&example, "/deliveries").try_into().expect("a number of deliveries"),
        assignment_id: id("assignment_id"),
        request_id: id("request_id"),
        tenant_id: id("tenant_id"),
        trace_id: id("trace_id"),
        run_id: id("run_id"),
        worker_id: text(&example, "/worker_id"),
        pool: id("pool"),
        failed_at: 0,
    };
    assert!(letter.dlq_id.ends_with(&format!(",{stage}")), "{fixture}");
    is_written(fixture, &serde_json::to_vec(&letter).expect("JSON"), "failed_at");
}

/// The fault that an example shows: its row of the table is found by number and retryability.
#[track_caller]
fn fault(fixture: &Fixture, error: &Value) -> Fault {
    let details = &error["details"];
    let status = details["http_status"].as_u64().and_then(|status| u16::try_from(status).ok());
    let is_it = |cause: &Cause| {
        u64::from(cause.code()) == number(error, "/code") && Some(cause.is_retryable()) == error["retryable"].as_bool()
    };
    let cause = status.map_or_else(|| CAUSES.into_iter().find(is_it), |status| Some(Cause::HttpStatus(status)));
    let cause = cause.unwrap_or_else(|| panic!("{fixture}: no cause is {} with this retryability", error["code"]));
    let word = |field: &str| details[field].as_str().map(str::to_owned);
    Fault::new(cause, text(error, "/message")).with(Details {
        block_type: word("block_type").and_then(|name| BlockKind::parse(&name)).map(BlockKind::as_str),
        url: word("url"),
        path: word("path"),
        http_status: status,
        body: word("body"),
        sandbox: details["sandbox"].as_bool(),
    })
}

#[track_caller]
fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_else(|| panic!("{pointer} is no text in {value}"))
}

#[track_caller]
fn number(value: &Value, pointer: &str) -> u64 {
    value.pointer(pointer).and_then(Value::as_u64).unwrap_or_else(|| panic!("{pointer} is no number in {value}"))
}

#[track_caller]
fn millis(value: &Value, pointer: &str) -> Duration {
    Duration::from_millis(number(value, pointer))
}

/// A request for the approval that a job asks for.
fn requested(job: &Value, requested_at: Timestamp, expires_at: Timestamp) -> (Request, Assignment, Approval) {
    let mut assignment = around(job.clone());
    (assignment["trace_id"], assignment["run_id"]) = (json!("trace-abc"), json!("run-def"));
    let state = State::Open(to_raw_value(&assignment).expect("JSON"));
    let assignment = decode(&assignment);
    let Block::Human(approval) = &*assignment.block else { panic!("{job} is no approval") };
    let approval = approval.clone();
    let request = Request {
        key: assignment.key.clone(),
        publication: Publication::parse("CAF_EXEC_ASSIGN,2026-11-23T09:00:00Z,42").expect("a publication"),
        pool: None,
        requested_at,
        expires_at,
        queued: Duration::ZERO,
        replaces: Expected::NOTHING,
        since: None,
        trace: None,
        state,
    };
    (request, assignment, approval)
}

/// The job that the examples of approvals are about.
fn example_of(kind: &[&str]) -> Fixture {
    fixtures().into_iter().find(|fixture| fixture.kind == kind).unwrap_or_else(|| panic!("no example {kind:?}"))
}

fn announced(fixture: &Fixture) {
    let example = fixture.value();
    let time =
        |field: &str| Timestamp::from_millisecond(example[field].as_i64().expect("a Unix time")).expect("a time");
    let job = example_of(&["job", "accepted", "human.approval"]).value();
    let (request, assignment, approval) = requested(&job, time("requested_at"), time("expires_at"));
    let lasts = request.expires_at.duration_since(request.requested_at).as_millis();
    assert_eq!(u64::try_from(lasts).ok(), job["timeout_ms"].as_u64(), "{fixture}");
    let written: Value = serde_json::from_slice(&request.announcement(&assignment, &approval)).expect("JSON");
    assert_eq!(example, written, "{fixture}: the example is left, what the code writes is right");
}

fn answer(fixture: &Fixture) -> Answer {
    let answered_at = Timestamp::from_millisecond(1_640_995_200_000).expect("a time");
    Answer::decode(fixture.json.as_bytes(), answered_at, 1).unwrap_or_else(|invalid| panic!("{fixture}: {invalid}"))
}

/// The answer of the examples decides the request of the examples.
fn decided(fixture: &Fixture, job: Value) {
    let answer = answer(&example_of(&["approval", "answer"]));
    let (request, _, approval) = requested(&job, answer.at(), answer.at());
    let outcome =
        request.outcome(&approval, vec![answer], None, request.requested_at, request.expires_at).expect("an outcome");
    let output = request.execution(outcome, request.expires_at).outcome.expect("a decision");
    let written: Value = serde_json::from_str(output.0.get()).expect("JSON");
    assert_eq!(fixture.value(), written, "{fixture}: the example is left, what the code writes is right");
}

/// Names that the client library does not know vanish when it reads them.
fn consumer_config(fixture: &Fixture) {
    let example = fixture.value();
    let config: consumer::Config = serde_json::from_value(example.clone()).expect("a consumer");
    let read = serde_json::to_value(&config).expect("a consumer is plain data");
    for (field, value) in example.as_object().expect("an object") {
        assert_eq!(Some(value), read.get(field), "{fixture}: {field}");
    }
    let subjects = [contract::LEDGER, contract::REFUSED].map(|subject| format!("{subject}.*.*"));
    assert_eq!(config.filter_subjects, subjects, "{fixture}");
}

/// Executes the job before an output, against a world that answers as the example says.
async fn is_produced(fixture: &Fixture, kind: &str, mut job: Value) {
    let example = fixture.value();
    let root = tempfile::tempdir().expect("a directory");
    let data = root.path().to_str().expect("a path").to_owned();
    match kind {
        "http.request" => job["url"] = format!("{}/endpoint", peer(&example).await).into(),
        "fs.put" | "fs.get" => job["path"] = text(&job, "/path").replace("/data", &data).into(),
        "sql.query" => database(&root.path().join("tenant-789"), &example["rows"]),
        other => panic!("{fixture}: {other} produces nothing"),
    }
    if kind == "fs.get" {
        let put = json!({ "type": "fs.put", "path": job["path"], "content": example["content"], "content_type": example["content_type"] });
        run(fixture, Engine::Real(blocks(&data)), put).await;
    }
    let mut produced = run(fixture, Engine::Real(blocks(&data)), job).await;
    if let Some(path) = produced.get_mut("path") {
        *path = text(path, "").replace(&data, "/data").into();
    }
    // What differs from run to run, or with the peer, is compared by its type.
    let example = example.as_object().expect("an object").clone();
    let by_type = |mut output: Map<String, Value>| {
        if let Some(latency) = output.get_mut("latency_ms") {
            *latency = latency.is_u64().into();
        }
        if let Some(headers) = output.get_mut("headers").and_then(Value::as_object_mut) {
            headers.retain(|name, value| value.is_string() && name == "Content-Type");
        }
        output
    };
    assert_eq!(by_type(example), by_type(produced), "{fixture}: the example is left, what the block returns is right");
}

fn blocks(root: &str) -> Arc<Blocks> {
    let blocks = Blocks::new(blocks::Settings {
        runtime: tokio::runtime::Handle::current(),
        egress: Policy { allow: vec!["127.0.0.1".parse().expect("an entry")], ..Policy::default() },
        http: http::Settings::default(),
        sql: blocks::sql::Settings::default(),
        fs_roots: vec![root.into()],
        approval_webhook: None,
    });
    blocks.expect("blocks")
}

/// Takes the pieces of a streamed body and keeps none.
#[derive(Debug)]
struct Nowhere;

impl Sink for Nowhere {
    fn take(&self, _: Piece) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }
}

async fn run(fixture: &Fixture, engine: Engine, job: Value) -> Map<String, Value> {
    let assignment = decode(&around(job));
    let limits = Limits { cpu_time: CpuTime::new(Duration::from_secs(60)), max_output_bytes: MAX_PAYLOAD };
    let sink = assignment.block.is_streamed().then(|| -> Arc<dyn Sink> { Arc::new(Nowhere) });
    let links = Links { trace: None, sink };
    let ended = execute::execute(&engine, &assignment, limits, links, || true, std::future::pending()).await;
    let Ended::Executed(execution) = ended else {
        panic!("{fixture}: it was not executed");
    };
    let output: Box<RawValue> = execution.outcome.unwrap_or_else(|fault| panic!("{fixture}: {fault:?}")).0;
    serde_json::from_str(output.get()).expect("an output is an object")
}

/// A peer on this machine that answers as the example says; returns its URL.
async fn peer(example: &Value) -> String {
    let status = u16::try_from(number(example, "/status_code")).expect("a status");
    let status = axum::http::StatusCode::from_u16(status).expect("a status");
    let streamed = || "x".repeat(example["size_bytes"].as_u64().and_then(|size| size.try_into().ok()).unwrap_or(0));
    let body = example["body"].as_str().map_or_else(streamed, str::to_owned);
    let content_type = text(example, "/headers/Content-Type").to_owned();
    let answer = move || async move { (status, [(axum::http::header::CONTENT_TYPE, content_type)], body) };
    let router = axum::Router::new().route("/endpoint", axum::routing::post(answer));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move { axum::serve(listener, router).await });
    format!("http://{address}")
}

/// A table `users` with these rows, all of them texts, in the tenant's own directory.
fn database(directory: &Path, rows: &Value) {
    std::fs::create_dir_all(directory).expect("a directory");
    let database = rusqlite::Connection::open(directory.join("db.sqlite")).expect("a database");
    database.execute_batch("CREATE TABLE users (id TEXT, name TEXT, email TEXT)").expect("a table");
    for row in rows.as_array().expect("rows") {
        let values = ["/id", "/name", "/email"].map(|field| text(row, field));
        database.execute("INSERT INTO users VALUES (?1, ?2, ?3)", values).expect("a row");
    }
}

/// Every row of the code's table; a status for each of the two kinds of HTTP errors.
const CAUSES: [Cause; 23] = [
    Cause::InvalidInput,
    Cause::MissingField,
    Cause::InvalidFormat,
    Cause::NoSuchPool,
    Cause::NeverFits,
    Cause::NoJetStream,
    Cause::OverBudget,
    Cause::Overloaded,
    Cause::ExecutionFailed,
    Cause::ResourceUnavailable,
    Cause::OverCap,
    Cause::NotAllowed,
    Cause::Network,
    Cause::Tls,
    Cause::ConnectTimeout,
    Cause::HttpStatus(503),
    Cause::HttpStatus(404),
    Cause::TooManyRedirects,
    Cause::Internal,
    Cause::Poison,
    Cause::DeadlinePassed,
    Cause::Cancelled,
    Cause::NotAnswered,
];

/// What the page calls it. A new cause does not compile until it has its row, here and there.
const fn outcome(cause: Cause) -> &'static str {
    match cause {
        Cause::InvalidInput => {
            "not JSON, not an object, nested too deep, NATS headers that cannot be read, unknown block type or method"
        }
        Cause::MissingField => "a required field is missing or empty",
        Cause::InvalidFormat => "a field has the wrong type, is out of range or cannot be parsed",
        Cause::NoSuchPool => "no slots of the pool that it asks for",
        Cause::NeverFits => "more `memory_mb` than the worker may ever hold",
        Cause::NoJetStream => "`human.approval` where the broker has no JetStream",
        Cause::OverBudget => "its tenant has used up [its budget](tenancy.md#budgets)",
        Cause::Overloaded => "a worker in [core mode](#core-mode) that is full, or stops before it has done it",
        Cause::ExecutionFailed => "a missing file, an SQL error",
        Cause::ResourceUnavailable => "database busy, its connections used up, disk full",
        Cause::OverCap => "over a cap (bytes, headers, rows, CPU time), or more than the broker takes",
        Cause::NotAllowed => "a path, host or statement that is not allowed",
        Cause::Network => "the peer refuses or resets, the name does not resolve",
        Cause::Tls => "TLS or certificate failure",
        Cause::ConnectTimeout => "the peer does not accept the connection in time",
        Cause::HttpStatus(408 | 425 | 429 | 500..) => "HTTP 408, 425, 429, 5xx",
        Cause::HttpStatus(_) => "any other HTTP 4xx",
        Cause::TooManyRedirects => "more than 5 redirects",
        Cause::Internal => "a bug of the worker",
        Cause::Poison => "it has killed its workers four times",
        Cause::DeadlinePassed => "the deadline passed",
        Cause::Cancelled => "cancelled by a user",
        Cause::NotAnswered => "nobody answered a request for approval in time",
    }
}

#[test]
fn the_error_table_is_the_codes_table() {
    for cause in CAUSES {
        let begins = format!("| {} | ", outcome(cause));
        let row = CONTRACT.lines().find_map(|line| line.strip_prefix(&begins));
        let row = row.unwrap_or_else(|| panic!("docs/contract.md has no row `{}`", outcome(cause)));
        let yes = |yes: bool| if yes { "yes" } else { "no" };
        let expected =
            format!("| {} | {} | {} |", cause.code(), yes(cause.is_retryable()), yes(cause.is_dead_letter()));
        assert!(row.ends_with(&expected), "`{}` is {row}, the code says {expected}", outcome(cause));
        assert!(
            row.starts_with("rejected") || row.starts_with(cause.status().as_str()),
            "`{}` is {row}",
            outcome(cause)
        );
    }
}
