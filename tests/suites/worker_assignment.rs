//! What a worker does with what it is given, before and after it runs it: rules, verdicts, dead letters, same ids, and
//! the streams that all of it stands on.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::BTreeSet;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::consumer::{AckPolicy, pull};
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use beamline_tests::failpoint::{self, Trap};
use beamline_tests::nats::NatsServer;
use beamline_tests::rig::{LAPSE, Rig, kept_its_promise};
use beamline_tests::router::{
    ASSIGN, CANCEL, DLQ, DLQ_RAW, Key, Kind, Router, Story, assignment, cancel, escape, json as read, replay,
};
use beamline_tests::wait::{SOON, until, within};
use beamline_tests::worker::Worker;
use futures::{StreamExt, TryStreamExt};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

// Rules, codes, pointers.

/// A good assignment with one field changed, or removed where there is no value.
fn changed(rig: &Rig, name: &str, pointer: &str, value: Option<Value>) -> Value {
    let mut changed = assignment("acme", name, rig.put(name, "x"));
    let (parent, field) = pointer.rsplit_once('/').expect("a pointer has a field");
    let parent = changed.pointer_mut(parent).and_then(Value::as_object_mut).expect("the parent is an object");
    match value {
        Some(value) => parent.insert(field.to_owned(), value),
        None => parent.remove(field),
    };
    changed
}

#[tokio::test]
async fn a_broken_rule_is_refused_with_its_code_and_names_the_field() {
    let rig = Rig::start(&[]).await;
    let long = "x".repeat(257);
    let some = |value: Value| Some(value);
    let cases = [
        (1002, "/version", None),
        (1002, "/version", some(json!(""))),
        (1002, "/assignment_id", None),
        (1002, "/assignment_id", some(json!(""))),
        (1002, "/request_id", None),
        (1002, "/tenant_id", None),
        (1002, "/tenant_id", some(json!(null))),
        (1002, "/executor/provider_id", None),
        (1002, "/executor/provider_id", some(json!(""))),
        (1002, "/job", None),
        (1002, "/job/type", None),
        (1002, "/job/type", some(json!(""))),
        (1002, "/job/path", None),
        (1002, "/job/content", None),
        (1001, "/job/type", some(json!("http.requests"))),
        (1003, "/version", some(json!("2"))),
        (1003, "/version", some(json!(1))),
        (1003, "/assignment_id", some(json!(5))),
        (1003, "/assignment_id", some(json!(long))),
        (1003, "/tenant_id", some(json!("a\r\nb"))),
        (1003, "/request_id", some(json!("\u{0}"))),
        (1003, "/trace_id", some(json!(["x"]))),
        (1003, "/run_id", some(json!("\u{7f}"))),
        (1003, "/executor/provider_id", some(json!(long))),
        (1003, "/executor", some(json!("openai"))),
        (1003, "/priority", some(json!(10))),
        (1003, "/priority", some(json!(-1))),
        (1003, "/priority", some(json!("high"))),
        (1003, "/priority", some(json!(4.5))),
        (1003, "/job", some(json!([]))),
        (1003, "/job/path", some(json!(7))),
        (1003, "/job/timeout_ms", some(json!(-1))),
        (1003, "/job/timeout_ms", some(json!(0))),
        (1003, "/job/timeout_ms", some(json!("5000"))),
        (1003, "/job/content_base64", some(json!("eA=="))),
        (1003, "/job/retry_config", some(json!(3))),
        (1003, "/retry_config", some(json!("often"))),
        (1003, "/resources", some(json!("gpu"))),
        (2003, "/job/path", some(json!("/etc/passwd"))),
        (2003, "/job/path", some(json!(rig.path("../outside")))),
        (2003, "/job/path", some(json!("relative"))),
    ];
    for (number, (code, pointer, value)) in cases.into_iter().enumerate() {
        let payload = changed(&rig, &format!("rule-{number}"), pointer, value);
        refused(&rig.router, &payload, code, pointer).await;
    }
    // Fields of parts that a good assignment does not have.
    let cases = [
        (1003, "/retry_config/max_attempts", json!({"retry_config": {"max_attempts": 0}})),
        (1003, "/retry_config/base_delay_ms", json!({"retry_config": {"base_delay_ms": -1}})),
        (1003, "/retry_config/multiplier", json!({"retry_config": {"multiplier": 0.5}})),
        (1003, "/retry_config/jitter", json!({"retry_config": {"jitter": 2}})),
        (1003, "/retry_config/max_delay_ms", json!({"retry_config": {"max_delay_ms": "1s"}})),
        (1003, "/resources/pool", json!({"resources": {"pool": "tpu"}})),
        (1003, "/resources/memory_mb", json!({"resources": {"memory_mb": -5}})),
        (1001, "/job/method", json!({"job": {"type": "http.request", "url": "http://peer/", "method": "BREW"}})),
        (1002, "/job/url", json!({"job": {"type": "http.request"}})),
        (1003, "/job/url", json!({"job": {"type": "http.request", "url": "not a url"}})),
        (1003, "/job/url", json!({"job": {"type": "http.request", "url": "ftp://peer/"}})),
        (1003, "/job/url", json!({"job": {"type": "http.request", "url": "http://me:secret@peer/"}})),
        (
            1003,
            "/job/headers/Host",
            json!({"job": {"type": "http.request", "url": "http://peer/", "headers": {"Host": "x"}}}),
        ),
        (2003, "/job/url", json!({"job": {"type": "http.request", "url": "http://169.254.169.254/latest"}})),
        (2003, "/job/url", json!({"job": {"type": "http.request", "url": "http://0x7f.1:4222/"}})),
    ];
    for (number, (code, pointer, fields)) in cases.into_iter().enumerate() {
        let mut payload = assignment("acme", &format!("part-{number}"), rig.put("x", "x"));
        payload.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        if pointer == "/job/url" && code == 2003 && payload["job"]["url"].as_str().unwrap().contains("0x7f") {
            // Loopback is allowed to this worker, the broker is not, however it is spelled.
            payload["job"]["url"] = json!(format!("http://0x7f.1:{}/", rig.nats.port()));
        }
        refused(&rig.router, &payload, code, pointer).await;
    }
    assert!(rig.router.heard().iter().all(|heard| heard.kind != Kind::Result), "nothing was executed");
}

#[tokio::test]
async fn a_field_whose_name_is_nearly_the_whole_message_is_refused_as_well() {
    let rig = Rig::start(&[]).await;
    let mut job = rig.call("/never");
    // A verdict says its message twice: whole, this name would make it larger than the broker takes.
    job["headers"] = json!({"x".repeat(900_000): 5});
    let payload = assignment("acme", "long-name", job);
    rig.router.submit(&payload).await;
    let verdict = rig.router.verdict(&payload).await;
    assert_eq!((&verdict["status"], &verdict["error"]["code"]), (&json!("rejected"), &json!(1003)));
    assert!(verdict["message"].as_str().unwrap().starts_with("/job/headers/xxx"), "{verdict}");
    assert_eq!(rig.router.letter(&payload).await["stage"], "decode");
}

/// Rejected, not retryable, kept whole as a dead letter of stage `decode`, all with the same code and words.
async fn refused(router: &Router, payload: &Value, code: u16, pointer: &str) {
    let (id, request) = (payload["assignment_id"].clone(), payload["request_id"].clone());
    let is_it = |json: &Value| {
        (json["assignment_id"] == id && id.is_string()) || (json["request_id"] == request && request.is_string())
    };
    router.submit(payload).await;
    let verdict = router.find(Kind::Verdict, pointer, is_it).await;
    let context = format!("{payload} → {verdict}");
    assert_eq!(verdict["status"], "rejected", "{context}");
    assert_eq!(verdict["error"]["code"], code, "{context}");
    assert_eq!(verdict["error"]["retryable"], false, "{context}");
    let message = verdict["message"].as_str().unwrap();
    assert!(message.starts_with(&format!("{pointer} ")), "{context}");
    assert!(!message.contains("secret"), "{context}");
    let letter = router.find(Kind::Letter, pointer, is_it).await;
    assert_eq!((&letter["stage"], &letter["assignment"]), (&json!("decode"), payload), "{context}");
    assert_eq!((&letter["error"]["code"], &letter["error"]["message"]), (&json!(code), &json!(message)));
}

#[tokio::test]
async fn the_bounds_themselves_are_allowed() {
    let rig = Rig::start(&["--cpu-pool-size=1"]).await;
    let id = "x".repeat(256);
    let mut widest = assignment("acme", &id, rig.put("bounds", "x"));
    let fields = json!({
        "priority": 9, "trace_id": id, "run_id": id, "flow_id": id, "step_id": id, "request_id": id,
        "resources": {"pool": "cpu", "memory_mb": 2048, "gpu": 0},
        "retry_config": {"max_attempts": 100, "base_delay_ms": 0, "multiplier": 1.0, "max_delay_ms": 0, "jitter": 1.0},
        "a field of tomorrow": [{"deep": null}],
    });
    widest.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let mut narrowest = assignment("acme", "y", rig.put("bounds", ""));
    narrowest["priority"] = json!(0);
    narrowest["job"]["timeout_ms"] = json!(5_000);
    for payload in [widest, narrowest] {
        rig.router.submit(&payload).await;
        assert_eq!(rig.router.result(&payload).await["status"], "success");
    }
}

// What cannot be read.

#[tokio::test]
async fn what_cannot_be_read_is_refused_by_the_ids_that_can() {
    let rig = Rig::start(&[]).await;
    let deep = format!("{}{}", "[".repeat(128), "]".repeat(128));
    for (id, field, code) in [("deep", deep.as_str(), 1001), ("half", r#""\ud800""#, 1001), ("huge", "1e400", 1003)] {
        let ids = format!(r#""tenant_id":"acme","assignment_id":"{id}","request_id":"r""#);
        let field = if id == "huge" { format!(r#""priority":{field}"#) } else { format!(r#""trace_id":{field}"#) };
        rig.router.submit_bytes(format!("{{{ids},{field}}}")).await;
        let verdict = rig.router.verdict(("acme", id)).await;
        assert_eq!((&verdict["status"], &verdict["error"]["code"]), (&json!("rejected"), &json!(code)), "{id}");
    }
}

#[tokio::test]
async fn what_is_no_assignment_becomes_a_dead_letter_that_keeps_its_bytes() {
    let rig = Rig::start(&[]).await;
    let too_deep = format!("{{\"x\":{}{}}}", "[".repeat(128), "]".repeat(128));
    let payloads: Vec<Vec<u8>> = vec![
        b"".to_vec(),
        b"nonsense".to_vec(),
        b"\0".to_vec(),
        b"[]".to_vec(),
        b"null".to_vec(),
        b"\"text\"".to_vec(),
        b"{\"version\":\"1\"".to_vec(),
        b"{\"version\":\"1\"}}".to_vec(),
        b"\xef\xbb\xbf{}".to_vec(),
        b"{\"assignment_id\":\"\xff\xfe\"}".to_vec(),
        b"{\"assignment_id\":\"\xc0\xae\"}".to_vec(),
        br#"{"assignment_id":"\ud800"}"#.to_vec(),
        too_deep.into_bytes(),
        "[".repeat(1_000_000).into_bytes(),
        "{\"a\":".repeat(150_000).into_bytes(),
    ];
    let mut sequences = Vec::new();
    for payload in &payloads {
        sequences.push(rig.router.submit_bytes(payload.clone()).await);
    }
    for (payload, sequence) in payloads.iter().zip(sequences) {
        let what = String::from_utf8_lossy(&payload[..payload.len().min(40)]).into_owned();
        let letter = rig.router.find(Kind::Letter, &what, |letter| sequence_of(letter) == sequence).await;
        assert_eq!((&letter["stage"], &letter["error"]["code"]), (&json!("decode"), &json!(1001)), "{what}");
        let kept = letter["raw_base64"].as_str().map(|base64| STANDARD.decode(base64).unwrap());
        match kept {
            Some(kept) => assert!(kept == *payload, "{what} → {letter}"),
            None => assert!(payload.len() > 700_000, "only what is too large for the letter travels beside it: {what}"),
        }
    }
    rig.router.settled(SOON).await;
    assert!(rig.router.heard().iter().all(|heard| matches!(heard.kind, Kind::Letter | Kind::Original)));

    let good = assignment("acme", "after", rig.put("after", "x"));
    rig.router.submit(&good).await;
    assert_eq!(rig.router.result(&good).await["status"], "success");
}

/// The third part of a dead letter's id is the place of its publication in the stream.
fn sequence_of(letter: &Value) -> u64 {
    letter["dlq_id"].as_str().and_then(|id| id.split(',').nth(2)?.parse().ok()).expect("a dlq_id has a sequence")
}

/// Not on a subject that the Router of a test hears: its client could read them no better.
const OUT_OF_EARSHOT: &str = "jobs.night.v1";

async fn rig_out_of_earshot(flags: &[&str]) -> Rig {
    let subject = format!("--nats-subject={OUT_OF_EARSHOT}");
    let mut rig = Rig::start(&[&[subject.as_str()], flags].concat()).await;
    rig.router = Router::on(&rig.nats.url(), OUT_OF_EARSHOT).await;
    rig
}

#[tokio::test]
async fn headers_that_nobody_can_read_are_refused_and_cost_one_connection_each() {
    let rig = rig_out_of_earshot(&[]).await;
    let running = assignment("acme", "running", rig.call("/gate/running"));
    rig.router.submit(&running).await;
    rig.peer.arrived("/gate/running", 1).await;
    for (number, headers) in BROKEN.into_iter().enumerate() {
        let payload = assignment("acme", &format!("broken-{number}"), rig.call("/ok"));
        rig.nats.publish_with_headers(OUT_OF_EARSHOT, headers, &payload).await;
        let verdict = rig.router.verdict(&payload).await;
        assert_eq!((&verdict["status"], &verdict["error"]["code"]), (&json!("rejected"), &json!(1001)), "{verdict}");
        let letter = rig.router.letter(&payload).await;
        assert_eq!((&letter["stage"], &letter["assignment"]), (&json!("decode"), &payload), "{letter}");
    }
    for headers in BROKEN {
        rig.nats.publish_with_headers("caf.human.response.v1", headers, &json!({})).await;
        control_is_done(&rig).await;
    }
    let payload = assignment("acme", "after", rig.call("/ok"));
    rig.router.submit(&payload).await;
    assert_eq!(rig.router.result(&payload).await["status"], "success");
    let other = assignment("acme", "other", rig.call("/gate/other"));
    rig.router.submit(&other).await;
    rig.peer.arrived("/gate/other", 1).await;
    rig.router.client().publish(CANCEL, cancel("acme", "other").to_string().into()).await.unwrap();
    assert_eq!(rig.router.result(&other).await["status"], "cancelled", "cancels are heard again");
    rig.peer.open("running");
    assert_eq!(rig.router.result(&running).await["status"], "success", "what ran went on");
    rig.router.settled(SOON).await;
    assert_eq!(rig.peer.hits("/").len(), 3, "nothing that was refused ran, and nothing twice");
    rig.worker.ready().await;
}

/// Headers that the client of the workers cannot read; over the last ones it panics.
const BROKEN: [&[u8]; 5] = [
    b"NATS/1.0\r\nX-Name: Jos\xe9\r\n\r\n",
    b"NATS/1.0\r\nno colon\r\n\r\n",
    b"nonsense",
    b"NATS/1.0\r\nX-Name: Jos\re\r\n\r\n",
    b"NATS/1.0\r\nX-Name: Jos\r\n \re\r\n\r\n",
];

async fn control_is_done(rig: &Rig) {
    let control = rig.router.stream("CAF_EXEC_CONTROL").await;
    until("nothing waits", async || control.get_info().await.is_ok_and(|it| it.state.messages == 0)).await;
}

#[tokio::test]
async fn in_core_mode_headers_that_nobody_can_read_cost_their_own_message() {
    let rig = rig_out_of_earshot(&["--nats-delivery=core"]).await;
    let running = assignment("acme", "running", rig.call("/gate/running"));
    rig.router.send(&running).await;
    rig.peer.arrived("/gate/running", 1).await;
    for (number, headers) in BROKEN.into_iter().enumerate() {
        rig.nats.publish_with_headers(OUT_OF_EARSHOT, headers, &assignment("acme", "lost", rig.call("/lost"))).await;
        within(SOON, "work is taken again", async || {
            let payload = assignment("acme", &format!("after-{number}-{}", Timestamp::now()), rig.call("/ok"));
            rig.router.send(&payload).await;
            let verdict = tokio::time::timeout(Duration::from_secs(1), rig.router.verdict(&payload)).await;
            verdict.is_ok_and(|verdict| verdict["status"] == "accepted").then_some(())
        })
        .await;
    }
    rig.peer.open("running");
    assert_eq!(rig.router.result(&running).await["status"], "success");
    assert!(rig.peer.hits("/lost").is_empty());
    rig.worker.ready().await;
}

#[tokio::test]
async fn a_status_that_a_publisher_has_put_on_a_message_means_nothing() {
    let rig = Rig::start(&[]).await;
    let statuses = ["100", "200", "404 No Messages", "408 Request Timeout", "409 Consumer Deleted", "503"];
    for (number, status) in statuses.into_iter().enumerate() {
        let headers = format!("NATS/1.0 {status}\r\n\r\n");
        let payload = assignment("acme", &format!("status-{number}"), rig.call("/ok"));
        rig.nats.publish_with_headers(ASSIGN, headers.as_bytes(), &payload).await;
        assert_eq!(rig.router.result(&payload).await["status"], "success", "{status}");
        let unwanted = format!("unwanted-{number}");
        rig.nats.publish_with_headers(CANCEL, headers.as_bytes(), &cancel("acme", &unwanted)).await;
        let key = format!("$KV.caf-cancel.acme.{unwanted}");
        until("the cancel stands", async || rig.router.last("KV_caf-cancel", &key).await.is_some()).await;
        control_is_done(&rig).await;
    }
    rig.router.settled(SOON).await;
    assert_eq!(rig.worker.metric("worker_redeliveries_total").await, 0.0);
}

#[tokio::test]
async fn where_neither_id_can_be_read_nobody_gets_a_verdict() {
    let rig = Rig::start(&[]).await;
    for payload in [json!({}), json!({"assignment_id": 5, "request_id": null, "tenant_id": "acme"})] {
        let sequence = rig.router.submit(&payload).await;
        let letter = rig.router.find(Kind::Letter, "ids", |letter| sequence_of(letter) == sequence).await;
        assert_eq!(letter["assignment"], payload);
        assert!(letter.get("assignment_id").is_none() && letter.get("request_id").is_none(), "{letter}");
    }
    rig.router.settled(SOON).await;
    assert!(rig.router.heard().iter().all(|heard| heard.kind == Kind::Letter));
}

#[tokio::test]
async fn where_one_id_can_be_read_the_verdict_says_the_other_as_nothing() {
    let rig = Rig::start(&[]).await;
    rig.router.submit(&json!({"assignment_id": "only-a"})).await;
    let verdict = rig.router.find(Kind::Verdict, "only-a", |verdict| verdict["assignment_id"] == "only-a").await;
    assert_eq!((&verdict["request_id"], &verdict["tenant_id"]), (&json!(""), &json!("")));
    rig.router.submit(&json!({"request_id": "only-r", "assignment_id": {"no": "id"}})).await;
    let verdict = rig.router.find(Kind::Verdict, "only-r", |verdict| verdict["request_id"] == "only-r").await;
    assert_eq!((&verdict["assignment_id"], &verdict["error"]["code"]), (&json!(""), &json!(1003)));
}

// The published shapes.

fn fields(object: &Value) -> BTreeSet<&str> {
    object.as_object().expect("an object").keys().map(String::as_str).collect()
}

#[track_caller]
fn is_now(millis: &Value) {
    let distance = Timestamp::now().as_millisecond() - millis.as_i64().expect("a time is a number");
    assert!((0..60_000).contains(&distance), "{millis} is {distance} ms ago");
}

#[tokio::test]
async fn verdict_and_result_have_the_published_fields() {
    let rig = Rig::start(&[]).await;
    let mut payload = assignment("tenant-789", "assign-123", rig.put("shape", "x"));
    let ids = json!({
        "request_id": "req-456", "trace_id": "trace-abc", "run_id": "run-def", "flow_id": "flow-1", "step_id": "step-2",
        "executor": {"provider_id": "openai", "endpoint": "https://api.openai.com/v1/chat/completions"},
    });
    payload.as_object_mut().unwrap().extend(ids.as_object().unwrap().clone());
    rig.router.submit(&payload).await;

    let mut verdict = rig.router.verdict(&payload).await;
    is_now(&verdict["acknowledged_at"].take());
    let expected = json!({
        "assignment_id": "assign-123", "status": "accepted", "message": "Assignment accepted for execution",
        "request_id": "req-456", "trace_id": "trace-abc", "tenant_id": "tenant-789", "worker_id": "worker-1",
        "acknowledged_at": null,
    });
    assert_eq!(verdict, expected);

    let mut result = rig.router.result(&payload).await;
    is_now(&result["completed_at"].take());
    for measured in ["/latency_ms", "/metadata/cpu_time_ms", "/metadata/queue_ms"] {
        assert!(result.pointer_mut(measured).unwrap().take().is_u64(), "{measured}");
    }
    let expected = json!({
        "assignment_id": "assign-123", "status": "success",
        "result": {"path": rig.path("shape"), "size_bytes": 1, "content_type": "application/octet-stream"},
        "latency_ms": null,
        "metadata": {
            "block_type": "fs.put", "provider_id": "openai", "run_id": "run-def", "flow_id": "flow-1",
            "step_id": "step-2", "worker_id": "worker-1", "attempts": 1, "retries_used": 0, "cpu_time_ms": null,
            "queue_ms": null,
        },
        "request_id": "req-456", "trace_id": "trace-abc", "tenant_id": "tenant-789", "completed_at": null,
    });
    assert_eq!(result, expected);
}

#[tokio::test]
async fn a_refusal_and_its_dead_letter_have_the_published_fields() {
    let rig = Rig::start(&["--pool=flows/main"]).await;
    let mut payload = assignment("acme", "bad", rig.put("x", "x"));
    (payload["priority"], payload["run_id"]) = (json!(10), json!("run-1"));
    let sequence = rig.router.submit(&payload).await;

    let verdict = rig.router.verdict(&payload).await;
    let expected =
        ["assignment_id", "status", "message", "request_id", "tenant_id", "worker_id", "error", "acknowledged_at"];
    assert_eq!(fields(&verdict), BTreeSet::from(expected));
    assert_eq!(fields(&verdict["error"]), BTreeSet::from(["code", "message", "retryable"]));

    let mut letter = rig.router.letter(&payload).await;
    is_now(&letter["failed_at"].take());
    let created = rfc3339_of_stream(&rig.router, "CAF_EXEC_ASSIGN").await;
    let dlq_id = format!("CAF_EXEC_ASSIGN,{created},{sequence},decode");
    let expected = json!({
        "version": "1", "dlq_id": dlq_id, "stage": "decode",
        "error": {"code": 1003, "message": "/priority is not between 0 and 9", "retryable": false, "details": {}},
        "assignment": payload, "attempts": [], "deliveries": 1, "assignment_id": "bad", "request_id": "req-bad",
        "tenant_id": "acme", "run_id": "run-1", "worker_id": "worker-1", "pool": "flows/main", "failed_at": null,
    });
    assert_eq!(letter, expected);
    // What is said live may be heard before it is kept.
    let kept = within(SOON, "the letter is kept", async || rig.router.last("CAF_EXEC_DLQ", DLQ).await).await;
    assert_eq!(kept.headers.get("Nats-Msg-Id").map(|id| id.as_str()), Some(dlq_id.as_str()));
}

async fn rfc3339_of_stream(router: &Router, stream: &str) -> String {
    let created = router.stream(stream).await.cached_info().created;
    Timestamp::from_nanosecond(created.unix_timestamp_nanos()).unwrap().to_string()
}

#[tokio::test]
async fn a_dead_letter_keeps_the_original_to_the_letter() {
    let rig = Rig::start(&[]).await;
    let original = r#"{ "version":"2", "tenant_id":"acme","assignment_id":"odd", "n":1e3, "n":-0, "big":18446744073709551616,
        "job":{"type":"http.request","headers":{"Authorization":"Bearer s3cret"}},  "later":{"\u0061":[1.0,2]} }"#;
    rig.router.submit_bytes(original).await;
    // What is said live may be heard before it is kept.
    let kept = within(SOON, "the letter is kept", async || rig.router.last("CAF_EXEC_DLQ", DLQ).await).await;
    let letter = String::from_utf8(kept.payload.to_vec()).unwrap();
    assert!(letter.contains(&format!(r#""assignment":{original}"#)), "{letter}");

    // JSON by its grammar, but most readers would choke on it, and so on a letter that has it inside.
    let original = r#"{"version":"2","tenant_id":"acme","assignment_id":"odder","n":1e400}"#;
    rig.router.submit_bytes(original).await;
    let letter = rig.router.letter(("acme", "odder")).await;
    assert_eq!(letter["raw_base64"], STANDARD.encode(original));
}

#[tokio::test]
async fn a_redacted_dead_letter_holds_no_secret_and_says_so() {
    let rig = Rig::start(&["--dlq-redact"]).await;
    let headers = json!({"Authorization": "Bearer s3cret", "Accept": "text/plain"});
    let job = json!({"type": "http.request", "url": rig.peer.url("/status/404"), "headers": headers});
    let payload = assignment("acme", "redacted", job);
    rig.router.submit(&payload).await;
    let letter = rig.router.letter(&payload).await;
    assert!(!letter.to_string().contains("s3cret"), "{letter}");
    assert_eq!((&letter["redacted"], &letter["stage"]), (&json!(true), &json!("execute")));
    assert_eq!(letter["assignment"]["job"]["headers"]["Accept"], "text/plain");
    assert_eq!(rig.peer.hits("/status/404")[0].headers["authorization"], "Bearer s3cret", "the peer is asked as ever");
}

// The largest message.

/// The same assignment with a field that makes it exactly so many bytes long.
fn padded(mut payload: Value, bytes: usize) -> Value {
    payload["padding"] = json!("");
    payload["padding"] = json!("p".repeat(bytes - payload.to_string().len()));
    payload
}

#[tokio::test]
async fn an_assignment_as_large_as_the_broker_takes_is_executed() {
    let rig = Rig::start(&[]).await;
    let payload = padded(assignment("acme", "large", rig.put("large", "x")), 1024 * 1024);
    rig.router.submit(&payload).await;
    assert_eq!(rig.router.result(&payload).await["status"], "success");
}

#[tokio::test]
async fn an_original_too_large_for_its_letter_is_kept_beside_it() {
    let rig = Rig::start(&[]).await;
    let whole = 1024 * 1024;
    for (id, bytes, has_headers) in [("largest", whole, false), ("large", whole - 1100, true)] {
        let mut payload = assignment("acme", id, rig.put("x", "x"));
        payload["priority"] = json!(99);
        let payload = padded(payload, bytes);
        rig.router.submit(&payload).await;
        let letter = rig.router.letter(&payload).await;
        assert!(letter.get("assignment").is_none() && letter.get("raw_base64").is_none(), "{id}");
        assert_eq!(letter["error"]["code"], 1003, "{id}");

        let letters = rig.router.all("CAF_EXEC_DLQ", DLQ).await;
        let envelope = letters.iter().find(|kept| read(&kept.payload)["dlq_id"] == letter["dlq_id"]).expect("kept");
        let originals = rig.router.all("CAF_EXEC_DLQ", DLQ_RAW).await;
        let original = originals.iter().find(|kept| kept.sequence + 1 == envelope.sequence).expect("right before it");
        assert!(original.payload == payload.to_string(), "{id} is kept whole");
        let ties = original.headers.get("Beamline-Dlq-Id").map(|id| json!(id.as_str()));
        assert_eq!(ties, has_headers.then(|| letter["dlq_id"].clone()), "{id}");
    }
}

// The same id again.

#[tokio::test]
async fn a_new_publication_of_a_success_is_answered_with_the_same_bytes_and_not_executed() {
    let rig = Rig::start(&[]).await;
    let payload = assignment("acme", "again", rig.call("/ok"));
    rig.router.submit(&payload).await;
    rig.router.result(&payload).await;
    // Contents are not compared: the id is the identity.
    let mut other = payload.clone();
    other["job"] = rig.call("/ok?other");
    for again in [&payload, &other] {
        rig.router.submit(again).await;
    }
    let results = rig.router.results(&payload, 3).await;
    assert!(results.iter().all(|result| *result == results[0]), "{results:?}");
    assert_eq!(rig.router.record(&payload).await.expect("a record").payload, results[0]);
    assert_eq!(rig.peer.hits("/ok").len(), 1);
    assert_eq!(rig.router.story(&payload).verdicts.len(), 3, "each publication has its verdict");
    assert_eq!(rig.worker.metric("worker_results_replayed_total").await, 2.0);
}

#[tokio::test]
async fn a_final_error_is_answered_again_and_has_one_dead_letter_for_each_execution() {
    let rig = Rig::start(&[]).await;
    let payload = assignment("acme", "gone", rig.call("/status/404"));
    for count in [1, 2] {
        rig.router.submit(&payload).await;
        rig.router.results(&payload, count).await;
    }
    rig.router.settled(SOON).await;
    assert_eq!(rig.peer.hits("/status/404").len(), 1);
    assert_eq!(rig.router.all("CAF_EXEC_DLQ", DLQ).await.len(), 1);
}

#[tokio::test]
async fn a_delivery_that_is_recorded_already_is_answered_with_the_stored_bytes() {
    let nats = NatsServer::start();
    // A first worker makes the streams and goes.
    let mut rig = Rig::at(nats, &[]).await;
    rig.worker.kill();
    // Then everything stands as after the death of a worker between record and settlement.
    let payload = assignment("acme", "recorded", rig.call("/ok"));
    let sequence = rig.router.submit(&payload).await;
    let created = rfc3339_of_stream(&rig.router, "CAF_EXEC_ASSIGN").await;
    let mut headers = HeaderMap::new();
    headers.insert("Beamline-Answers", format!("CAF_EXEC_ASSIGN,{created},{sequence}"));
    let stored = json!({"assignment_id": "recorded", "tenant_id": "acme", "status": "success", "by": "another worker"});
    let subject = "caf.exec.ledger.acme.recorded";
    let record = rig.router.jetstream().publish_with_headers(subject, headers, stored.to_string().into());
    record.await.unwrap().await.unwrap();

    let worker = rig.another("worker-2").start(&rig.nats).await;
    assert_eq!(rig.router.result(&payload).await, stored);
    rig.router.settled(SOON).await;
    assert_eq!(rig.peer.hits("/ok").len(), 0);
    assert_eq!(rig.router.verdict(&payload).await["status"], "accepted");
    assert_eq!(worker.metric("worker_results_replayed_total").await, 1.0);
}

#[tokio::test]
async fn a_recorded_final_error_gets_the_dead_letter_that_its_worker_did_not_come_to_write() {
    let mut rig = Rig::start(&[]).await;
    rig.worker.kill();
    let payload = assignment("acme", "half", rig.call("/ok"));
    let sequence = rig.router.submit(&payload).await;
    let created = rfc3339_of_stream(&rig.router, "CAF_EXEC_ASSIGN").await;
    let mut headers = HeaderMap::new();
    headers.insert("Beamline-Answers", format!("CAF_EXEC_ASSIGN,{created},{sequence}"));
    let error = json!({"code": 2001, "message": "no such file", "retryable": false, "details": {"path": "/data/x"}});
    let stored = json!({"assignment_id": "half", "tenant_id": "acme", "status": "error", "error": error});
    let record =
        rig.router.jetstream().publish_with_headers("caf.exec.ledger.acme.half", headers, stored.to_string().into());
    record.await.unwrap().await.unwrap();

    let _worker = rig.another("worker-2").start(&rig.nats).await;
    assert_eq!(rig.router.result(&payload).await, stored);
    let letter = rig.router.letter(&payload).await;
    assert_eq!((&letter["error"], &letter["assignment"], &letter["stage"]), (&error, &payload, &json!("execute")));
}

#[tokio::test]
async fn a_new_publication_of_a_retryable_error_is_executed_and_replaces_it() {
    let rig = Rig::start(&[]).await;
    let mut payload = assignment("acme", "flaky", rig.call("/flaky/1"));
    payload["retry_config"] = json!({"max_attempts": 1});
    rig.router.submit(&payload).await;
    let first = rig.router.result(&payload).await;
    assert_eq!((&first["status"], &first["error"]["retryable"]), (&json!("error"), &json!(true)), "{first}");

    rig.router.submit(&payload).await;
    let results = rig.router.results(&payload, 2).await;
    assert_eq!(read(&results[1])["status"], "success");
    assert_eq!(rig.router.record(&payload).await.expect("a record").payload, results[1]);

    rig.router.submit(&payload).await;
    assert_eq!(rig.router.results(&payload, 3).await[2], results[1], "a success stands");
    assert_eq!(rig.peer.hits("/flaky/1").len(), 2);
}

#[tokio::test]
async fn a_replay_is_executed_whatever_is_recorded() {
    let rig = Rig::start(&[]).await;
    let payload = assignment("acme", "replayed", rig.call("/ok"));
    rig.router.submit(&payload).await;
    rig.router.result(&payload).await;
    let headers = replay();
    let sequence = rig.router.submit_with(&payload, headers).await;
    let results = rig.router.results(&payload, 2).await;
    assert_eq!(rig.peer.hits("/ok").len(), 2);
    let record = rig.router.record(&payload).await.expect("a record");
    assert_eq!(record.payload, results[1]);
    let answers = record.headers.get("Beamline-Answers").expect("a record names its publication").as_str();
    assert!(answers.ends_with(&format!(",{sequence}")), "{answers}");
}

#[tokio::test]
async fn of_two_replays_that_run_at_once_the_later_gives_way_to_a_final_outcome_and_replaces_a_retryable_one() {
    let rig = Rig::start(&[]).await;
    let replay = replay();
    let at_gate = |id: &str, gate: &str| assignment("acme", id, rig.call(&format!("/gate/{gate}")));
    let (good, mut late) = (at_gate("good", "good"), at_gate("late", "never"));
    late["job"]["timeout_ms"] = json!(2000);
    for payload in [&good, &late] {
        let before = assignment("acme", Key::from(payload).id.as_str(), rig.call("/ok"));
        rig.router.submit(&before).await;
        rig.router.result(&before).await;
        rig.router.submit_with(payload, replay.clone()).await;
    }
    rig.peer.arrived("/gate", 2).await;
    let stop = r#"{"pull":false}"#.into();
    rig.router.client().request("caf.worker.control.v1.worker-1", stop).await.expect("it obeys");
    let _second = rig.another("worker-2").start(&rig.nats).await;
    for id in ["good", "late"] {
        rig.router.submit_with(&at_gate(id, "second"), replay.clone()).await;
    }
    rig.peer.arrived("/gate/second", 2).await;
    rig.peer.open("good");
    for payload in [&good, &late] {
        rig.router.results(payload, 2).await;
    }
    rig.peer.open("second");
    let (good, late) = (rig.router.results(&good, 3).await, rig.router.results(&late, 3).await);
    assert_eq!(good[2], good[1], "the stored bytes, and not its own");
    let ends = late.iter().map(|result| read(result)["status"].clone()).collect::<Vec<_>>();
    assert_eq!(ends, ["success", "timeout", "success"]);
    for (id, results) in [("good", good), ("late", late)] {
        assert_eq!(rig.router.record(("acme", id)).await.expect("a record").payload, results[2]);
    }
}

#[tokio::test]
async fn copies_in_flight_execute_once() {
    let rig = Rig::start(&[]).await;
    let payload = assignment("acme", "copied", rig.call("/gate/copies"));
    rig.router.submit(&payload).await;
    rig.peer.arrived("/gate/copies", 1).await;
    for _ in 0..3 {
        rig.router.submit(&payload).await;
    }
    rig.router.learn(&payload, "four verdicts", |story| (story.verdicts.len() == 4).then_some(())).await;
    rig.peer.open("copies");
    let results = rig.router.results(&payload, 4).await;
    assert!(results.iter().all(|result| *result == results[0]), "{results:?}");
    assert_eq!(rig.peer.hits("/gate/copies").len(), 1);
}

#[tokio::test]
async fn the_same_id_of_two_tenants_is_two_assignments() {
    let rig = Rig::start(&[]).await;
    for tenant in ["acme", "other"] {
        rig.router.submit(&assignment(tenant, "same", rig.put("own.txt", tenant))).await;
    }
    for tenant in ["acme", "other"] {
        let result = rig.router.result((tenant, "same")).await;
        assert_eq!((&result["status"], &result["tenant_id"]), (&json!("success"), &json!(tenant)));
        assert_eq!(std::fs::read_to_string(rig.file_of(tenant, "own.txt")).unwrap(), tenant);
    }
    assert_eq!(rig.router.all("CAF_EXEC_RESULT", "caf.exec.ledger.>").await.len(), 2);
}

#[tokio::test]
async fn ids_are_escaped_wherever_they_become_a_name() {
    let rig = Rig::start(&[]).await;
    for (tenant, id) in [("a.b", "x.*.>"), ("a b", "é✓"), ("=", "../.."), ("$JS.API", "caf.exec.ledger")] {
        let payload = assignment(tenant, id, rig.call("/ok"));
        rig.router.submit(&payload).await;
        let result = rig.router.result(&payload).await;
        assert_eq!((&result["status"], &result["assignment_id"]), (&json!("success"), &json!(id)));
        let record = rig.router.record(&payload).await.expect("a record");
        assert_eq!(record.subject, format!("caf.exec.ledger.{}.{}", escape(tenant), escape(id)));
        let token = Key::from(&payload).token();
        assert!(rig.peer.hits("/ok").iter().any(|hit| hit.key() == token), "{token}");
    }
}

/// A name that means something to a broker or a file system, and what stands for it.
const NAME: (&str, &str) = ("a.*>/$é", "a=2E=2A=3E=2F=24=C3=A9");

#[tokio::test]
async fn a_tenants_directory_has_its_escaped_name() {
    let rig = Rig::start(&[]).await;
    let (tenant, escaped) = NAME;
    let payload = assignment(tenant, "put", rig.put("own.txt", "x"));
    rig.router.submit(&payload).await;
    assert_eq!(rig.router.result(&payload).await["status"], "success");
    assert_eq!(std::fs::read_to_string(rig.file_of(escaped, "own.txt")).unwrap(), "x");
}

#[tokio::test]
async fn a_streams_subject_has_the_escaped_ids() {
    let rig = Rig::start(&[]).await;
    let (id, escaped) = NAME;
    let mut chunks = rig.router.client().subscribe("caf.exec.stream.v1.>").await.unwrap();
    rig.router.client().flush().await.unwrap();
    let mut job = rig.call("/ok");
    job["stream"] = json!(true);
    let payload = assignment(id, id, job);
    rig.router.submit(&payload).await;
    let chunk = tokio::time::timeout(SOON, chunks.next()).await.expect("a chunk").expect("a chunk");
    assert_eq!(chunk.subject.as_str(), format!("caf.exec.stream.v1.{escaped}.{escaped}"));
}

#[tokio::test]
async fn refusals_cancels_and_requests_for_approval_are_kept_under_the_escaped_ids() {
    let rig = Rig::start(&[]).await;
    let (id, escaped) = NAME;
    let mut refused = assignment(id, id, rig.call("/ok"));
    refused["resources"] = json!({"pool": "gpu"});
    let asks = json!({"type": "human.approval", "prompt": "?", "approvers": ["a@example.com"]});
    for payload in [refused, assignment(id, id, asks)] {
        rig.router.submit(&payload).await;
    }
    let kept = async |stream: &str, subject: &str| {
        let subject = format!("{subject}.{escaped}.{escaped}");
        until(&format!("{stream} has {subject}"), async || rig.router.last(stream, &subject).await.is_some()).await;
    };
    kept("CAF_EXEC_RESULT", "caf.exec.refused").await;
    kept("KV_caf-approvals", "$KV.caf-approvals").await;
    let cancel = cancel(id, id).to_string();
    rig.router.client().publish(CANCEL, cancel.into()).await.unwrap();
    kept("KV_caf-cancel", "$KV.caf-cancel").await;
    // The cancel meets what is kept under these names.
    let cancelled = |story: &Story| story.results.iter().any(|result| read(result)["status"] == "cancelled");
    rig.router.learn((id, id), "a cancelled result", |story| cancelled(story).then_some(())).await;
}

#[tokio::test]
async fn a_workers_subjects_have_its_escaped_id() {
    let rig = Rig::start(&[]).await;
    let (id, escaped) = ("w.1 > *", "w=2E1=20=3E=20=2A");
    let client = rig.router.client();
    let mut reports = client.subscribe(format!("caf.worker.report.v1.{escaped}")).await.unwrap();
    client.flush().await.unwrap();
    let _worker = rig.another(id).start(&rig.nats).await;
    let report = tokio::time::timeout(SOON, reports.next()).await.expect("a report").expect("a report");
    assert_eq!(read(&report.payload)["worker"], id);
    let told = client.request(format!("caf.worker.control.v1.{escaped}"), r#"{"pull":true}"#.into()).await;
    assert_eq!(read(&told.expect("an answer").payload)["worker"], id);
}

// Whether it may run here.

#[tokio::test]
async fn without_gpu_slots_gpu_work_is_refused_for_now_and_the_refusal_is_kept() {
    let rig = Rig::start(&[]).await;
    let mut payload = assignment("acme", "render", rig.call("/ok"));
    payload["resources"] = json!({"pool": "gpu"});
    for count in [1, 2] {
        let sequence = rig.router.submit(&payload).await;
        let verdicts = rig
            .router
            .learn(&payload, "verdict", |story| (story.verdicts.len() == count).then(|| story.verdicts.clone()));
        let verdict = verdicts.await.pop().unwrap();
        assert_eq!(verdict["status"], "rejected");
        assert_eq!((&verdict["error"]["code"], &verdict["error"]["retryable"]), (&json!(2002), &json!(true)));
        let stored = rig.router.refusal(&payload).await.expect("the refusal was kept before it was said");
        assert_eq!((stored.subject.as_str(), read(&stored.payload)), ("caf.exec.refused.acme.render", verdict));
        let answers = stored.headers.get("Beamline-Answers").expect("it names its publication").as_str();
        assert!(answers.ends_with(&format!(",{sequence}")), "{answers}");
    }
    rig.router.settled(SOON).await;
    let story = rig.router.story(&payload);
    assert!(story.results.is_empty() && story.letters.is_empty(), "{story:?}");
    assert!(rig.router.record(&payload).await.is_none());
    assert_eq!(rig.worker.metric(r#"worker_assignments_rejected_total{code="2002"}"#).await, 2.0);
}

#[tokio::test]
async fn with_gpu_slots_gpu_work_runs() {
    let rig = Rig::start(&["--gpu-pool-size=1"]).await;
    let mut payload = assignment("acme", "render", rig.call("/ok"));
    payload["resources"] = json!({"pool": "gpu"});
    rig.router.submit(&payload).await;
    assert_eq!(rig.router.result(&payload).await["status"], "success");
}

/// No work for a worker that has [`LITTLE`] memory.
fn roomy(id: &str, job: Value) -> Value {
    let mut payload = assignment("acme", id, job);
    payload["resources"] = json!({"memory_mb": 128});
    payload
}

const LITTLE: &str = "--max-memory-mb=64";

#[tokio::test]
async fn what_was_accepted_and_may_not_run_at_the_next_worker_ends_as_an_error() {
    let rig = Rig::start(&["--io-pool-size=1", "--cpu-pool-size=0"]).await;
    let running = assignment("acme", "running", rig.call("/gate/slot"));
    rig.router.submit(&running).await;
    rig.peer.arrived("/gate/slot", 1).await;
    let waiting = roomy("waiting", rig.call("/ok"));
    rig.router.submit(&waiting).await;
    assert_eq!(rig.router.verdict(&waiting).await["status"], "accepted");
    rig.worker.terminate();
    let _next = rig.another("worker-2").flag(LITTLE).start(&rig.nats).await;
    let result = rig.router.result(&waiting).await;
    assert_eq!((&result["status"], &result["error"]["code"]), (&json!("error"), &json!(2002)), "{result}");
    assert_eq!(result["error"]["retryable"], false);
    rig.peer.open("slot");
    rig.router.settled(SOON).await;
    let Story { verdicts, results, letters } = rig.router.story(&waiting);
    assert!(verdicts.iter().all(|verdict| verdict["status"] == "accepted"), "{verdicts:?}");
    assert_eq!((results.len(), letters.len()), (1, 1));
    assert!(rig.peer.hits("/ok").is_empty());
}

#[tokio::test]
async fn what_was_accepted_by_a_worker_that_was_killed_is_rejected_by_none() {
    let mut rig = Rig::start(&[]).await;
    let mut classed = assignment("acme", "classed", rig.call("/gate/never"));
    classed["resources"] = json!({"pool": "cpu"});
    let elsewhere = assignment("acme", "elsewhere", rig.put("x", "x"));
    let cases = [(roomy("roomy", rig.call("/gate/never")), 2002, 1), (classed, 2002, 0)];
    for (payload, ..) in &cases {
        rig.router.submit(payload).await;
        assert_eq!(rig.router.verdict(payload).await["status"], "accepted");
    }
    rig.peer.arrived("/gate/never", 2).await;
    rig.worker.kill();
    let _next = rig.another("worker-2").flag(LITTLE).flag("--cpu-pool-size=0").start(&rig.nats).await;
    rig.router.submit(&elsewhere).await;
    assert_eq!(rig.router.result(&elsewhere).await["status"], "success");
    rig.router.settled(LAPSE).await;
    for (payload, code, count) in &cases {
        let Story { verdicts, results, letters } = rig.router.story(payload);
        assert!(verdicts.iter().all(|verdict| verdict["status"] == "accepted"), "{verdicts:?}");
        assert_eq!((results.len(), letters.len()), (1, *count), "{payload}");
        let record = rig.router.record(payload).await.expect("a record").payload;
        assert_eq!((&record, &read(&record)["error"]["code"]), (&results[0], &json!(code)));
    }
}

#[tokio::test]
async fn what_was_rejected_by_a_worker_that_was_killed_is_run_by_none() {
    let mut rig = Rig::start(&[]).await;
    rig.worker.kill();
    let sockets = tempfile::tempdir().unwrap();
    let mut trap = Trap::at("after-result", sockets.path());
    let setup = rig.another("worker-2").flag(LITTLE).env(failpoint::VARIABLE, &trap.socket(0));
    let mut first = setup.start(&rig.nats).await;
    let payload = roomy("rejected", rig.call("/ok"));
    rig.router.submit(&payload).await;
    let caught = trap.caught().await;
    assert_eq!(rig.router.verdict(&payload).await["error"]["code"], 2002);
    first.kill();
    drop(caught);
    let _next = rig.another("worker-3").start(&rig.nats).await;
    rig.router.settled(LAPSE).await;
    let Story { verdicts, results, letters } = rig.router.story(&payload);
    assert_eq!((verdicts.len(), results.len(), letters.len()), (2, 0, 1));
    assert_eq!(verdicts[0], verdicts[1], "in the same words");
    assert!(rig.peer.hits("/ok").is_empty());
}

#[tokio::test]
async fn what_is_recorded_is_said_by_a_worker_that_would_not_run_it() {
    let mut rig = Rig::start(&[]).await;
    rig.worker.kill();
    let sockets = tempfile::tempdir().unwrap();
    let mut trap = Trap::at("after-record", sockets.path());
    let mut first = rig.another("worker-2").env(failpoint::VARIABLE, &trap.socket(0)).start(&rig.nats).await;
    let payload = roomy("recorded", rig.call("/ok"));
    rig.router.submit(&payload).await;
    let _caught = trap.caught().await;
    first.kill();
    let _next = rig.another("worker-3").flag(LITTLE).start(&rig.nats).await;
    assert_eq!(rig.router.result(&payload).await["status"], "success");
    rig.router.settled(LAPSE).await;
    let Story { verdicts, results, letters } = rig.router.story(&payload);
    assert!(verdicts.iter().all(|verdict| verdict["status"] == "accepted"), "{verdicts:?}");
    assert_eq!((results.len(), letters.len(), rig.peer.hits("/ok").len()), (1, 0, 1));
}

#[tokio::test]
async fn a_panic_is_an_internal_error_that_says_nothing_of_what_it_was_about() {
    let mut rig = Rig::start(&[]).await;
    rig.worker.kill();
    let sockets = tempfile::tempdir().unwrap();
    let mut trap = Trap::at("before-effect", sockets.path());
    let _worker = rig.another("worker-2").env(failpoint::VARIABLE, &trap.socket(0)).start(&rig.nats).await;
    let payload = assignment("acme", "panics", rig.call("/ok"));
    rig.router.submit(&payload).await;
    trap.caught().await.panics("cannot log in with hunter2").await;
    let result = rig.router.result(&payload).await;
    let error = &result["error"];
    assert_eq!((&error["code"], &error["retryable"]), (&json!(4001), &json!(true)), "{result}");
    assert_eq!(result["metadata"]["attempts"], 1);
    let Story { results, letters, .. } = rig.router.story(&payload);
    assert!(letters.is_empty() && !String::from_utf8_lossy(&results[0]).contains("hunter2"), "{result}");
    let next = assignment("acme", "next", rig.call("/ok"));
    rig.router.submit(&next).await;
    assert_eq!(rig.router.result(&next).await["status"], "success");
}

#[tokio::test]
async fn what_would_never_fit_is_refused_for_good() {
    let rig = Rig::start(&["--max-memory-mb=64"]).await;
    let mut payload = assignment("acme", "huge", rig.call("/ok"));
    payload["resources"] = json!({"memory_mb": 65});
    rig.router.submit(&payload).await;
    let verdict = rig.router.verdict(&payload).await;
    assert_eq!((&verdict["error"]["code"], &verdict["error"]["retryable"]), (&json!(2002), &json!(false)));
    let letter = rig.router.letter(&payload).await;
    assert_eq!((&letter["stage"], &letter["assignment"]), (&json!("admit"), &payload));
    assert_eq!(rig.peer.hits("/ok").len(), 0);
}

#[tokio::test]
async fn memory_that_an_assignment_asks_for_is_reserved_while_it_runs() {
    const HELD: &str = r#"worker_resource_usage{type="memory_mb"}"#;
    let rig = Rig::start(&["--max-memory-mb=64"]).await;
    let mut large = assignment("acme", "large", rig.call("/gate/large/1048000"));
    large["resources"] = json!({"memory_mb": 64});
    rig.router.submit(&large).await;
    rig.peer.arrived("/gate/large", 1).await;
    until("nobody asks for more", async || rig.router.consumer().await.is_some_and(|info| info.num_waiting == 0)).await;
    let small = assignment("acme", "small", rig.call("/ok"));
    rig.router.submit(&small).await;
    until("it counts", async || rig.worker.metric(HELD).await >= 64.0).await;
    let _second = rig.another("worker-2").start(&rig.nats).await;
    assert_eq!(rig.router.result(&small).await["metadata"]["worker_id"], "worker-2", "the first one has no room");
    rig.peer.open("large");
    rig.router.result(&large).await;
    until("nothing counts any more", async || rig.worker.metric(HELD).await < 1.0).await;
    until("it asks for more", async || rig.router.consumer().await.is_some_and(|info| info.num_waiting >= 2)).await;
}

// Streams.

#[tokio::test]
async fn missing_streams_are_made_as_the_contract_says() {
    let rig = Rig::start(&[]).await;
    let common = Config { storage: StorageType::File, num_replicas: 1, ..Config::default() };
    let expected = [
        Config {
            name: "CAF_EXEC_ASSIGN".to_owned(),
            subjects: vec![ASSIGN.to_owned(), "caf.exec.route.*.v1".to_owned()],
            retention: RetentionPolicy::WorkQueue,
            discard: DiscardPolicy::New,
            ..common.clone()
        },
        Config {
            name: "CAF_EXEC_PARKED".to_owned(),
            subjects: vec!["caf.exec.parked.v1.*".to_owned(), "caf.exec.parked.gpu.v1.*".to_owned()],
            retention: RetentionPolicy::WorkQueue,
            discard: DiscardPolicy::New,
            ..common.clone()
        },
        Config {
            name: "CAF_EXEC_RESULT".to_owned(),
            subjects: vec!["caf.exec.ledger.*.*".to_owned(), "caf.exec.refused.*.*".to_owned()],
            retention: RetentionPolicy::Limits,
            discard: DiscardPolicy::Old,
            max_messages_per_subject: 1,
            max_messages: 2_000_000,
            max_age: std::time::Duration::from_secs(3600),
            allow_direct: true,
            ..common.clone()
        },
        Config {
            name: "CAF_EXEC_DLQ".to_owned(),
            subjects: vec![DLQ.to_owned(), DLQ_RAW.to_owned()],
            retention: RetentionPolicy::Limits,
            discard: DiscardPolicy::New,
            max_age: std::time::Duration::from_secs(30 * 24 * 3600),
            ..common.clone()
        },
        Config {
            name: "CAF_EXEC_CONTROL".to_owned(),
            subjects: vec!["caf.exec.cancel.v1".to_owned(), "caf.human.response.v1".to_owned()],
            retention: RetentionPolicy::WorkQueue,
            discard: DiscardPolicy::New,
            max_age: std::time::Duration::from_secs(30 * 24 * 3600),
            no_ack: true,
            ..common.clone()
        },
        bucket("caf-cancel", 24, &common),
        bucket("caf-approvals", 0, &common),
        bucket("caf-answers", 24, &common),
        bucket("caf-deliveries", 24, &common),
        bucket("caf-quota", 62 * 24, &common),
    ];
    let names: BTreeSet<String> = {
        use futures::TryStreamExt;
        rig.router.jetstream().stream_names().try_collect().await.unwrap()
    };
    assert_eq!(names, expected.iter().map(|config| config.name.clone()).collect());
    for wanted in expected {
        let name = wanted.name.clone();
        let found = rig.router.stream(&name).await.cached_info().config.clone();
        let limits = |config: &Config| {
            let or_none = |limit: i64| if limit == 0 { -1 } else { limit };
            [config.max_messages, config.max_bytes, config.max_messages_per_subject].map(or_none)
        };
        assert_eq!(limits(&found), limits(&wanted), "{name}");
        let settings = |config: &Config| {
            let Config { subjects, retention, discard, storage, max_age, num_replicas, no_ack, .. } = config.clone();
            let subjects: BTreeSet<String> = subjects.into_iter().collect();
            let allow_message_ttl = config.allow_message_ttl;
            let ages = format!("{max_age:?} {allow_message_ttl}");
            format!("{subjects:?} {retention:?} {discard:?} {storage:?} {ages} {num_replicas} {no_ack}")
        };
        assert_eq!(settings(&found), settings(&wanted), "{name}");
        assert!(found.allow_direct || !wanted.allow_direct, "{name}");
    }
    let consumer = rig.router.consumer().await.expect("the workers' consumer").config;
    assert_eq!((consumer.durable_name.as_deref(), consumer.filter_subject.as_str()), (Some("caf-workers"), ASSIGN));
    assert_eq!((consumer.ack_policy, consumer.ack_wait), (AckPolicy::Explicit, std::time::Duration::from_secs(10)));
    assert_eq!((consumer.max_deliver, consumer.deliver_subject), (-1, None));
    let control = rig.router.stream("CAF_EXEC_CONTROL").await.consumer_info("caf-control").await.unwrap().config;
    assert_eq!((control.ack_policy, control.ack_wait), (AckPolicy::Explicit, std::time::Duration::from_secs(10)));
    assert_eq!((control.max_deliver, control.filter_subject.as_str()), (-1, ""));
}

fn bucket(name: &str, hours: u64, common: &Config) -> Config {
    Config {
        name: format!("KV_{name}"),
        subjects: vec![format!("$KV.{name}.>")],
        retention: RetentionPolicy::Limits,
        discard: DiscardPolicy::New,
        max_messages_per_subject: 1,
        max_age: std::time::Duration::from_secs(hours * 3600),
        allow_direct: true,
        allow_message_ttl: true,
        ..common.clone()
    }
}

const MADE: [&str; 10] = [
    "CAF_EXEC_ASSIGN",
    "CAF_EXEC_RESULT",
    "CAF_EXEC_DLQ",
    "CAF_EXEC_CONTROL",
    "CAF_EXEC_PARKED",
    "KV_caf-cancel",
    "KV_caf-approvals",
    "KV_caf-answers",
    "KV_caf-deliveries",
    "KV_caf-quota",
];

/// The streams and the consumer that another worker has made, so that a test can make them anew with a change.
async fn made_by_a_worker() -> (Rig, Vec<Config>, pull::Config) {
    let mut rig = Rig::start(&[]).await;
    rig.worker.kill();
    let mut configs = Vec::new();
    for name in MADE {
        configs.push(rig.router.stream(name).await.cached_info().config.clone());
    }
    let consumer = pull::Config {
        durable_name: Some("caf-workers".to_owned()),
        filter_subject: ASSIGN.to_owned(),
        ack_policy: AckPolicy::Explicit,
        ack_wait: std::time::Duration::from_secs(10),
        max_deliver: -1,
        max_ack_pending: 50_000,
        ..pull::Config::default()
    };
    (rig, configs, consumer)
}

fn named(name: &str, consumer: &pull::Config) -> pull::Config {
    pull::Config { durable_name: Some(name.to_owned()), ..consumer.clone() }
}

async fn make_anew(router: &Router, config: &Config) {
    let _ = router.jetstream().delete_stream(&config.name).await;
    router.jetstream().create_stream(config.clone()).await.expect("a stream as the test wants it");
}

#[tokio::test]
async fn a_stream_that_breaks_the_contract_ends_the_worker_and_stays_as_it_is() {
    let (rig, good, _) = made_by_a_worker().await;
    let find = |stream: &str| good.iter().find(|good| good.name == stream).unwrap();
    let change = |stream: &str, change: fn(&mut Config)| {
        let mut config = find(stream).clone();
        change(&mut config);
        config
    };
    let mut cases = vec![
        ("subjects", change("CAF_EXEC_ASSIGN", |config| config.subjects = vec!["caf.exec.assign.*".to_owned()])),
        ("retention", change("CAF_EXEC_ASSIGN", |config| config.retention = RetentionPolicy::Limits)),
        ("storage", change("CAF_EXEC_ASSIGN", |config| config.storage = StorageType::Memory)),
        ("discard", change("CAF_EXEC_ASSIGN", |config| config.discard = DiscardPolicy::Old)),
        ("no_ack", change("CAF_EXEC_ASSIGN", |config| config.no_ack = true)),
        ("max_msgs_per_subject", change("CAF_EXEC_RESULT", |config| config.max_messages_per_subject = 2)),
        ("allow_direct", change("CAF_EXEC_RESULT", |config| config.allow_direct = false)),
        ("storage", change("CAF_EXEC_RESULT", |config| config.storage = StorageType::Memory)),
        ("subjects", change("CAF_EXEC_DLQ", |config| config.subjects = vec![DLQ.to_owned()])),
        ("discard", change("CAF_EXEC_DLQ", |config| config.discard = DiscardPolicy::Old)),
        ("no_ack", change("CAF_EXEC_CONTROL", |config| config.no_ack = false)),
        ("retention", change("CAF_EXEC_CONTROL", |config| config.retention = RetentionPolicy::Limits)),
        ("storage", change("CAF_EXEC_CONTROL", |config| config.storage = StorageType::Memory)),
        ("subjects", change("CAF_EXEC_CONTROL", |config| config.subjects = vec!["caf.exec.cancel.v1".to_owned()])),
        ("discard", change("CAF_EXEC_PARKED", |config| config.discard = DiscardPolicy::Old)),
        ("retention", change("CAF_EXEC_PARKED", |config| config.retention = RetentionPolicy::Interest)),
        ("storage", change("CAF_EXEC_PARKED", |config| config.storage = StorageType::Memory)),
        ("subjects", change("CAF_EXEC_PARKED", |config| config.subjects = vec!["caf.exec.parked.>".to_owned()])),
    ];
    for bucket in MADE.into_iter().filter(|name| name.starts_with("KV_")) {
        cases.extend([
            ("max_msgs_per_subject", change(bucket, |config| config.max_messages_per_subject = 2)),
            ("allow_msg_ttl", change(bucket, |config| config.allow_message_ttl = false)),
        ]);
    }
    let two = change("CAF_EXEC_ASSIGN", |config| {
        (config.retention, config.discard) = (RetentionPolicy::Limits, DiscardPolicy::Old);
    });
    make_anew(&rig.router, &two).await;
    let ending = rig.another("refuses").flag(format!("--nats-url={}", rig.nats.url())).end().await;
    for says in ["retention Limits, but the contract needs WorkQueue", "discard Old, but the contract needs New"] {
        assert!(ending.said.contains(says), "{says}: {}", ending.said);
    }
    make_anew(&rig.router, find("CAF_EXEC_ASSIGN")).await;
    for (field, config) in cases {
        make_anew(&rig.router, &config).await;
        let before = rig.router.stream(&config.name).await.cached_info().config.clone();
        let ending = rig.another("refuses").flag(format!("--nats-url={}", rig.nats.url())).end().await;
        assert_eq!(ending.code, Some(1), "{field}: {}", ending.said);
        let says = format!("stream {} has {field} ", config.name);
        assert!(ending.said.contains(&says), "{says}: {}", ending.said);
        assert_eq!(rig.router.stream(&config.name).await.cached_info().config, before);
        make_anew(&rig.router, find(&config.name)).await;
    }
}

#[tokio::test]
async fn a_consumer_that_breaks_the_contract_ends_the_worker() {
    let (rig, _, assign) = made_by_a_worker().await;
    let control = pull::Config { filter_subject: String::new(), ..named("caf-control", &assign) };
    let change = |good: &pull::Config, change: fn(&mut pull::Config)| {
        let mut config = good.clone();
        change(&mut config);
        config
    };
    let ack_wait = |config: &mut pull::Config| config.ack_wait = std::time::Duration::from_secs(30);
    let cases = [
        ("filter_subject", change(&assign, |config| config.filter_subject = String::new())),
        ("ack_wait", change(&assign, ack_wait)),
        ("max_deliver", change(&assign, |config| config.max_deliver = 5)),
        ("filter_subject", change(&control, |config| config.filter_subject = "caf.exec.cancel.v1".to_owned())),
        ("ack_wait", change(&control, ack_wait)),
        ("max_deliver", change(&control, |config| config.max_deliver = 5)),
    ];
    for (field, config) in cases {
        let name = config.durable_name.clone().unwrap();
        let good = if name == "caf-control" { &control } else { &assign };
        let stream = if name == "caf-control" { "CAF_EXEC_CONTROL" } else { "CAF_EXEC_ASSIGN" };
        let stream = rig.router.stream(stream).await;
        let _ = stream.delete_consumer(&name).await;
        stream.create_consumer(config).await.unwrap();
        let before = stream.consumer_info(&name).await.unwrap().config;
        let ending = rig.another("refuses").flag(format!("--nats-url={}", rig.nats.url())).end().await;
        assert_eq!(ending.code, Some(1), "{field}: {}", ending.said);
        let says = format!("consumer {name} of stream {} has {field} ", stream.cached_info().config.name);
        assert!(ending.said.contains(&says), "{says}: {}", ending.said);
        assert_eq!(stream.consumer_info(&name).await.unwrap().config, before, "it stays as it is");
        stream.delete_consumer(&name).await.unwrap();
        stream.create_consumer(good.clone()).await.unwrap();
    }
}

#[tokio::test]
async fn a_setting_that_is_changed_under_a_running_worker_is_told_until_it_is_mended() {
    let rig = Rig::start(&[]).await;
    let stream = rig.router.stream("CAF_EXEC_CONTROL").await;
    let good = pull::Config {
        durable_name: Some("caf-control".to_owned()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: std::time::Duration::from_secs(10),
        max_deliver: -1,
        max_waiting: 16_384,
        ..pull::Config::default()
    };
    stream.update_consumer(pull::Config { max_deliver: 5, ..good.clone() }).await.unwrap();
    let reasons = rig.worker.unready("streams unavailable").await;
    let says = "consumer caf-control of stream CAF_EXEC_CONTROL has max_deliver 5, but the contract needs -1";
    assert!(reasons.contains(says), "{reasons}");
    assert_eq!(stream.consumer_info("caf-control").await.unwrap().config.max_deliver, 5, "it is left as it is");
    let payload = assignment("acme", "works", rig.put("works", "x"));
    rig.router.submit(&payload).await;
    assert_eq!(rig.router.result(&payload).await["status"], "success", "what can be done is done");
    stream.update_consumer(good).await.unwrap();
    rig.worker.ready().await;
}

#[tokio::test]
async fn what_is_the_administrators_may_differ() {
    let (rig, good, _) = made_by_a_worker().await;
    for mut config in good {
        config.max_bytes = 64 << 20;
        config.max_age = std::time::Duration::from_secs(600);
        config.description = Some("ours".to_owned());
        make_anew(&rig.router, &config).await;
    }
    let _worker = rig.another("worker-2").start(&rig.nats).await;
    let payload = assignment("acme", "works", rig.put("works", "x"));
    rig.router.submit(&payload).await;
    assert_eq!(rig.router.result(&payload).await["status"], "success");
    let config = rig.router.stream("CAF_EXEC_RESULT").await.cached_info().config.clone();
    assert_eq!((config.max_bytes, config.description.as_deref()), (64 << 20, Some("ours")));
}

#[tokio::test]
async fn told_not_to_create_streams_a_worker_waits_for_them() {
    let (rig, good, consumer) = made_by_a_worker().await;
    for config in &good {
        rig.router.jetstream().delete_stream(&config.name).await.unwrap();
    }
    let setup = rig.another("waits").flag("--nats-create-streams=false");
    let worker = setup.flag(format!("--nats-url={}", rig.nats.url())).spawn();
    let reasons = worker.unready("streams unavailable").await;
    assert!(reasons.contains("CAF_EXEC_RESULT") && reasons.contains("does not exist"), "{reasons}");
    for config in &good {
        make_anew(&rig.router, config).await;
    }
    let reasons = worker.unready("consumer").await;
    assert!(reasons.contains("caf-control"), "{reasons}");
    let control = pull::Config { filter_subject: String::new(), ..named("caf-control", &consumer) };
    rig.router.stream("CAF_EXEC_CONTROL").await.create_consumer(control).await.unwrap();
    let stream = rig.router.stream("CAF_EXEC_ASSIGN").await;
    let reasons = worker.unready("caf-workers").await;
    assert!(reasons.contains("caf-workers"), "{reasons}");
    stream.create_consumer(consumer).await.unwrap();
    worker.ready().await;
    let payload = assignment("acme", "works", rig.put("works", "x"));
    rig.router.submit(&payload).await;
    assert_eq!(rig.router.result(&payload).await["status"], "success");
}

#[tokio::test]
async fn another_subject_has_a_stream_and_verdicts_of_its_own() {
    let rig = Rig::start(&["--nats-subject=jobs.night.v1"]).await;
    let router = Router::on(&rig.nats.url(), "jobs.night.v1").await;
    let payload = assignment("acme", "elsewhere", rig.put("elsewhere", "x"));
    router.submit(&payload).await;
    assert_eq!(router.verdict(&payload).await["status"], "accepted");
    assert_eq!(router.result(&payload).await["status"], "success");
    let config = router.stream("CAF_POOL_jobs=2Enight=2Ev1").await.cached_info().config.clone();
    let subjects: BTreeSet<&str> = config.subjects.iter().map(String::as_str).collect();
    assert_eq!(subjects, BTreeSet::from(["jobs.night.v1", "jobs.night.v1.route.*"]));
    assert!(router.jetstream().get_stream("CAF_EXEC_ASSIGN").await.is_err(), "the usual stream is not needed");
    assert!(router.heard().iter().any(|heard| heard.kind == Kind::Verdict));
    assert!(rig.router.heard().iter().all(|heard| heard.kind != Kind::Verdict), "nothing on {ASSIGN}.ack");
}

#[tokio::test]
async fn workers_of_another_queue_group_share_the_work_under_its_name() {
    let nats = NatsServer::start();
    let night_shift = |name: &str| Worker::named(name).env("WORKER_NATS_QUEUE_GROUP", "night-shift");
    let workers = ["worker-1", "worker-2"].map(|name| night_shift(name).flag("--gpu-pool-size=1"));
    let [first, second] = workers.map(|setup| setup.flag("--sandbox-mode"));
    let _workers = [first.start(&nats).await, second.start(&nats).await];
    let router = Router::connect(&nats.url()).await;
    let job = json!({"type": "http.request", "url": "http://peer.test/", "sandbox": {"delay_ms": 20}});
    let payloads: Vec<_> = (0..100).map(|number| assignment("acme", &number.to_string(), job.clone())).collect();
    for payload in &payloads {
        router.submit(payload).await;
    }
    let mut workers = BTreeSet::new();
    for payload in &payloads {
        workers.insert(router.result(payload).await["metadata"]["worker_id"].to_string());
    }
    assert_eq!(workers.len(), 2, "{workers:?}");
    let stream = router.stream("CAF_EXEC_ASSIGN").await;
    let consumers: BTreeSet<String> = stream.consumer_names().try_collect().await.unwrap();
    assert_eq!(consumers, ["night-shift", "night-shift-gpu"].map(str::to_owned).into());
}

/// Where this server says that it is of another version.
async fn claiming(nats: &NatsServer, version: &'static str) -> String {
    let (listener, port) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), nats.port());
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from_client, mut to_client) = client.into_split();
                let (from_server, mut to_server) = TcpStream::connect(("127.0.0.1", port)).await.unwrap().into_split();
                tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
                let (mut from_server, mut line) = (BufReader::new(from_server), Vec::new());
                while from_server.read_until(b'\n', &mut line).await.is_ok_and(|bytes| bytes > 0) {
                    if let Some(info) = line.strip_prefix(b"INFO ") {
                        let mut info = read(info);
                        info["version"] = json!(version);
                        line = format!("INFO {info}\r\n").into_bytes();
                    }
                    if to_client.write_all(&line).await.is_err() {
                        return;
                    }
                    line.clear();
                }
            });
        }
    });
    format!("--nats-url=nats://{address}")
}

#[tokio::test]
async fn a_server_that_is_too_old_is_named_at_once() {
    const OLD: &str = "nats-server 2.10.29 is too old: JetStream of nats-server 2.11.0 or later is needed";
    let nats = NatsServer::start();
    for mode in ["jetstream", "core"] {
        let flag = format!("--nats-delivery={mode}");
        let ending = Worker::named("w").flag(claiming(&nats, "2.10.29").await).flag(flag).end().await;
        assert_eq!(ending.code, Some(1), "{mode}: {}", ending.said);
        assert!(ending.said.contains(OLD), "{mode}: {}", ending.said);
    }
    let keeps_nothing = NatsServer::without_jetstream();
    let old = Worker::named("w").flag("--nats-delivery=core").flag(claiming(&keeps_nothing, "2.9.10").await).spawn();
    old.ready().await;
}

#[tokio::test]
async fn s12_a_server_with_known_faults_is_used_and_warned_of() {
    let nats = NatsServer::start();
    let worker = Worker::named("w").flag(claiming(&nats, "2.11.3").await).spawn();
    worker.ready().await;
    let said = worker.says("this nats-server has known security faults").await;
    assert_eq!((&said["level"], &said["fields"]["version"]), (&json!("WARN"), &json!("2.11.3")));
}

#[tokio::test]
async fn a_stream_that_is_lost_and_comes_back_stops_the_worker_only_that_long() {
    let mut rig = Rig::start(&[]).await;
    rig.worker.kill();
    let worker = rig.another("worker-2").flag("--nats-create-streams=false").start(&rig.nats).await;
    let payload = assignment("acme", "patient", rig.call("/gate/patient"));
    rig.router.submit(&payload).await;
    rig.peer.arrived("/gate", 1).await;
    for name in ["CAF_EXEC_RESULT", "CAF_EXEC_DLQ", "CAF_EXEC_CONTROL", "KV_caf-answers", "KV_caf-deliveries"] {
        let stream = rig.router.stream(name).await;
        let consumers: Vec<_> = stream.consumers().try_collect().await.unwrap();
        let config = stream.cached_info().config.clone();
        rig.router.jetstream().delete_stream(name).await.unwrap();
        worker.unready(&format!("stream {name} does not exist")).await;
        if name == "CAF_EXEC_RESULT" {
            rig.peer.open("patient");
            worker.says("writing again").await;
        }
        let stream = rig.router.jetstream().create_stream(config).await.unwrap();
        for consumer in consumers.into_iter().filter(|consumer| consumer.config.durable_name.is_some()) {
            stream.create_consumer(consumer.config).await.unwrap();
        }
        worker.ready().await;
        if name == "CAF_EXEC_RESULT" {
            assert_eq!(rig.router.result(&payload).await["status"], "success");
        }
    }
    kept_its_promise(&rig.router, &rig.peer).await;
}

// The command line.

#[tokio::test]
async fn all_bad_flags_are_named_at_once_with_exit_code_2() {
    let setup = Worker::named("w").flag("--io-pool-size=-1").flag("--no-such-flag=1").flag("--drain-timeout=35");
    let ending = setup.env("WORKER_MAX_MEMORY_MB", "lots").env("NATS_URL", "http://me:s3cret@broker").end().await;
    assert_eq!(ending.code, Some(2), "{}", ending.said);
    for named in ["--io-pool-size", "--no-such-flag", "--drain-timeout", "WORKER_MAX_MEMORY_MB", "NATS_URL"] {
        assert!(ending.said.contains(named), "{named}: {}", ending.said);
    }
    assert!(!ending.said.contains("s3cret"), "{}", ending.said);
}

#[tokio::test]
async fn files_that_cannot_be_used_are_named_at_once_with_exit_code_2() {
    let files = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str| {
        let path = files.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.display().to_string()
    };
    let made = || rcgen::generate_simple_self_signed(["worker".to_owned()]).unwrap();
    let (one, other) = (made(), made());
    let cert = file("cert.pem", &one.cert.pem());
    let key = file("key.pem", &one.signing_key.serialize_pem());
    let other_key = file("other.pem", &other.signing_key.serialize_pem());
    let (missing, broken) = (files.path().join("missing").display().to_string(), file("broken", "no PEM"));
    let (within_a_file, proc) = (format!("{broken}/outbox"), "/proc/outbox".to_owned());
    let cases = [
        vec![("--nats-creds", &missing), ("--nats-tls-ca", &missing), ("--http-ca-file", &missing)],
        vec![("--nats-creds", &broken), ("--nats-tls-ca", &broken), ("--http-ca-file", &broken)],
        vec![("--tenants-file", &missing), ("--sql-connections-file", &missing), ("--outbox-dir", &within_a_file)],
        vec![("--tenants-file", &broken), ("--sql-connections-file", &broken), ("--outbox-dir", &proc)],
        vec![("--nats-tls-cert", &missing), ("--nats-tls-key", &missing)],
        vec![("--nats-tls-cert", &key), ("--nats-tls-key", &broken)],
    ];
    // Nobody listens there: a worker that tries to connect does not end.
    let nobody = || Worker::named("w").flag("--nats-url=nats://127.0.0.1:1");
    for flags in cases {
        let given = flags.iter().fold(nobody(), |setup, (flag, path)| setup.flag(format!("{flag}={path}")));
        let ending = given.end().await;
        assert_eq!(ending.code, Some(2), "{flags:?}: {}", ending.said);
        for (flag, path) in flags {
            let named = format!("{flag}: {path:?} is not allowed: expected ");
            assert!(ending.said.lines().any(|line| line.starts_with(&named)), "{named}: {}", ending.said);
        }
    }
    let ending = nobody().env("NATS_TLS_CERT", &cert).env("NATS_TLS_KEY", &other_key).end().await;
    assert_eq!(ending.code, Some(2), "{}", ending.said);
    assert!(ending.said.starts_with(&format!("NATS_TLS_KEY: {other_key:?} is not allowed")), "{}", ending.said);
}

#[tokio::test]
async fn a_client_certificate_is_for_tls_and_never_goes_without() {
    let files = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["worker".to_owned()]).unwrap();
    let (cert, key) = (files.path().join("cert.pem"), files.path().join("key.pem"));
    std::fs::write(&cert, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let nats = NatsServer::start();
    let worker = Worker::named("w")
        .flag(format!("--nats-url={}", nats.url()))
        .flag(format!("--nats-tls-cert={}", cert.display()))
        .flag(format!("--nats-tls-key={}", key.display()))
        .spawn();
    worker.says("cannot reach NATS yet").await;
    worker.unready("NATS disconnected").await;
}

#[tokio::test]
async fn a_safe_root_that_is_missing_is_said_at_the_start() {
    let nats = NatsServer::start();
    let worker = Worker::named("w").flag("--fs-roots=/nowhere/data").start(&nats).await;
    let said = worker.says("--fs-roots: a safe directory cannot be used").await;
    assert_eq!((&said["level"], &said["fields"]["reason"]), (&json!("WARN"), &json!("/nowhere/data does not exist")));
}
