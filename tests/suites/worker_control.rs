//! What reaches a worker besides assignments, and where it keeps what it knows about them.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::BTreeMap;
use std::time::Duration;

use async_nats::HeaderMap;
use beamline_tests::audit::{Allowed, audit};
use beamline_tests::nats::NatsServer;
use beamline_tests::policy::Policy;
use beamline_tests::rig::Rig;
use beamline_tests::router::{ASSIGN, CANCEL, Router, assignment, json as read, replay};
use beamline_tests::wait::{SOON, until, within};
use beamline_worker::broker::kv::{Bucket, Change, Entry};
use beamline_worker::broker::streams::ANSWER_BUCKET;
use beamline_worker::broker::{Address, Broker, Stored};
use beamline_worker::health::Health;
use bytes::Bytes;
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::sync::mpsc;

// Buckets.

/// The worker's own access to a bucket that a worker has made and looks after.
async fn bucket(nats: &NatsServer) -> Bucket {
    let address = Address {
        servers: vec![nats.url().parse().expect("an address")],
        creds: None,
        tls_ca: None,
        tls_identity: None,
        name: "test".to_owned(),
        intake: ASSIGN.to_owned(),
    };
    Bucket::new(Broker::connect(&address, &Health::new()).await.expect("a connection"), ANSWER_BUCKET)
}

fn value(entry: Option<Entry>) -> Option<Bytes> {
    entry.map(|entry| entry.value)
}

#[tokio::test]
async fn of_two_writers_who_know_the_same_one_is_refused() {
    let rig = Rig::start(&[]).await;
    let bucket = bucket(&rig.nats).await;
    let key = "acme.a=2E1";
    assert_eq!(bucket.get(key).await.unwrap(), None);
    let first = made(&bucket, key).await;
    assert_eq!(bucket.create(key, "2".into()).await.unwrap(), Stored::Refused);
    let Stored::At(second) = bucket.update(key, "3".into(), first).await.unwrap() else { panic!("nobody wrote") };
    assert_eq!(bucket.update(key, "4".into(), first).await.unwrap(), Stored::Refused);
    assert_eq!(bucket.delete(key, first).await.unwrap(), Stored::Refused);
    let entry = bucket.get(key).await.unwrap().expect("a value");
    assert_eq!((entry.revision, entry.value.as_ref(), entry.key.as_str()), (second, b"3".as_slice(), key));
    assert!(matches!(bucket.delete(key, second).await.unwrap(), Stored::At(_)));
    assert_eq!(bucket.get(key).await.unwrap(), None);
    assert_eq!(bucket.update(key, "5".into(), second).await.unwrap(), Stored::Refused);
    assert!(matches!(bucket.create(key, "6".into()).await.unwrap(), Stored::At(_)), "a removed key can be made anew");
    assert_eq!(bucket.create(key, "7".into()).await.unwrap(), Stored::Refused);
    assert_eq!(value(bucket.get(key).await.unwrap()), Some("6".into()));
}

/// The revision of a new key's value, `1`.
async fn made(bucket: &Bucket, key: &str) -> u64 {
    assert!(matches!(bucket.create(key, "1".into()).await.unwrap(), Stored::At(_)), "{key} is there already");
    bucket.get(key).await.unwrap().expect("a value").revision
}

/// What a watcher knows when it has been told everything.
struct Known {
    changes: mpsc::Receiver<Change>,
    values: BTreeMap<String, Bytes>,
    is_current: bool,
}

impl Known {
    fn of(bucket: &Bucket) -> Self {
        Self { changes: bucket.watch(Health::new()), values: BTreeMap::new(), is_current: false }
    }

    /// Hears changes until it is current and knows exactly these.
    #[track_caller]
    fn knows(&mut self, expected: &[(&str, &str)]) -> impl Future<Output = ()> {
        let place = std::panic::Location::caller();
        let expected: BTreeMap<String, Bytes> =
            expected.iter().map(|(key, value)| ((*key).to_owned(), Bytes::from((*value).to_owned()))).collect();
        async move {
            let known = async {
                while !self.is_current || self.values != expected {
                    match self.changes.recv().await.expect("it goes on") {
                        Change::Anew => (self.values, self.is_current) = (BTreeMap::new(), false),
                        Change::Put(entry) => drop(self.values.insert(entry.key, entry.value)),
                        Change::Removed(key) => drop(self.values.remove(&key)),
                        Change::Current => self.is_current = true,
                    }
                }
            };
            let in_time = tokio::time::timeout(SOON * 3, known).await.is_ok();
            assert!(in_time, "{place}: knows {:?}, current: {}", self.values, self.is_current);
        }
    }
}

#[tokio::test]
async fn a_watcher_knows_what_there_is_whatever_happens_to_broker_and_bucket() {
    let mut rig = Rig::start(&[]).await;
    let bucket = bucket(&rig.nats).await;
    let mut known = Known::of(&bucket);
    known.knows(&[]).await;
    let first = made(&bucket, "a.1").await;
    let second = made(&bucket, "a.2").await;
    known.knows(&[("a.1", "1"), ("a.2", "1")]).await;
    bucket.delete("a.1", first).await.unwrap();
    bucket.update("a.2", "2".into(), second).await.unwrap();
    known.knows(&[("a.2", "2")]).await;
    // Who comes later knows the same.
    Known::of(&bucket).knows(&[("a.2", "2")]).await;

    rig.nats.kill();
    rig.nats.restart();
    let router = Router::connect(&rig.nats.url()).await;
    // Another connection writes before ours may be back.
    router.jetstream().publish("$KV.caf-answers.a.3", "3".into()).await.unwrap().await.unwrap();
    known.knows(&[("a.2", "2"), ("a.3", "3")]).await;

    // The worker makes the bucket anew; it counts from 1 again.
    router.jetstream().delete_stream("KV_caf-answers").await.unwrap();
    known.knows(&[]).await;
    tokio::time::timeout(SOON * 2, async {
        while bucket.create("a.4", "4".into()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .expect("the bucket is there again");
    known.knows(&[("a.4", "4")]).await;
}

#[tokio::test]
async fn a_watcher_of_many_values_is_told_all_of_them() {
    let rig = Rig::start(&[]).await;
    let bucket = bucket(&rig.nats).await;
    let total = 3_000;
    for number in 0..total {
        rig.router.client().publish(format!("$KV.caf-answers.many.{number}"), "x".repeat(1000).into()).await.unwrap();
    }
    // The last one of the same connection is kept: so are those before it.
    rig.router.jetstream().publish("$KV.caf-answers.many.last", "x".into()).await.unwrap().await.unwrap();
    let value = "x".repeat(1000);
    let mut expected: Vec<_> = (0..total).map(|number| (format!("many.{number}"), value.as_str())).collect();
    expected.push(("many.last".to_owned(), "x"));
    let expected: Vec<_> = expected.iter().map(|(key, value)| (key.as_str(), *value)).collect();
    Known::of(&bucket).knows(&expected).await;
}

// Cancels.

fn cancel(tenant: &str, id: &str) -> Value {
    json!({
        "version": "1", "assignment_id": id, "tenant_id": tenant, "reason": "not needed", "requested_by": "ops@example.com",
    })
}

/// Sends a cancel and waits for nothing.
async fn send(router: &Router, cancel: &Value) {
    router.client().publish(CANCEL, cancel.to_string().into()).await.unwrap();
    router.client().flush().await.unwrap();
}

/// Sends a cancel and returns what a worker answers.
async fn ask(router: &Router, cancel: &Value) -> Value {
    let answer = router.client().request(CANCEL, cancel.to_string().into()).await.expect("a worker answers");
    read(&answer.payload)
}

async fn outcome(router: &Router, tenant: &str, id: &str) -> String {
    let answer = ask(router, &cancel(tenant, id)).await;
    assert_eq!(answer["assignment_id"], id);
    answer["outcome"].as_str().expect("an outcome").to_owned()
}

#[track_caller]
fn is_cancelled(result: &Value, attempts: u64) {
    let error = &result["error"];
    assert_eq!((&result["status"], &error["code"]), (&json!("cancelled"), &json!(5001)), "{result}");
    assert_eq!(error["message"], "cancelled by ops@example.com: not needed");
    assert_eq!((&error["retryable"], &result["metadata"]["attempts"]), (&json!(false), &json!(attempts)), "{result}");
}

/// Everything is settled, control messages too, and all invariants hold.
async fn kept_its_promise(rig: &Rig) {
    rig.router.settled(SOON * 3).await;
    nothing_waits(&rig.router).await;
    let found = audit(&rig.router, &rig.peer.hits("/"), Allowed { attempts: 3 }).await;
    assert!(found.is_empty(), "{found:#?}");
}

async fn nothing_waits(router: &Router) {
    until("every control message is settled", async || {
        router.stream("CAF_EXEC_CONTROL").await.cached_info().state.messages == 0
    })
    .await;
}

#[tokio::test]
async fn running_work_is_stopped_before_it_would_have_ended() {
    let rig = Rig::start(&[]).await;
    let payload = assignment("acme", "running", rig.call("/gate/never"));
    rig.router.submit(&payload).await;
    rig.peer.arrived("/gate/never", 1).await;
    assert_eq!(outcome(&rig.router, "acme", "running").await, "cancelled");
    is_cancelled(&rig.router.result(&payload).await, 1);
    until("the slot is free", async || rig.worker.metric(r#"worker_slots_busy{pool="io"}"#).await == 0.0).await;
    let series = r#"worker_tasks_total{type="http.request",status="cancelled"}"#;
    assert_eq!(rig.worker.metric(series).await, 1.0);
    assert!(rig.router.all("CAF_EXEC_DLQ", ">").await.is_empty(), "no dead letter");
    kept_its_promise(&rig).await;
}

#[tokio::test]
async fn a_query_on_a_thread_is_stopped() {
    let rig = Rig::start(&[]).await;
    rig.database("acme", "CREATE TABLE t (x)");
    let endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c";
    let source = format!("sqlite://{}", rig.path("db.sqlite"));
    let job = json!({"type": "sql.query", "connection_string": source, "query": endless, "timeout_ms": 600_000});
    let payload = assignment("acme", "query", job);
    rig.router.submit(&payload).await;
    let busy = async || rig.worker.metric(r#"worker_slots_busy{pool="io"}"#).await;
    until("the query runs", async || busy().await == 1.0).await;
    assert_eq!(outcome(&rig.router, "acme", "query").await, "cancelled");
    is_cancelled(&rig.router.result(&payload).await, 1);
    until("nothing computes", async || {
        let used = async || rig.worker.metric("process_cpu_seconds_total").await;
        let before = used().await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        used().await - before < 0.25
    })
    .await;
    kept_its_promise(&rig).await;
}

#[tokio::test]
async fn work_that_waits_for_a_slot_is_cancelled_without_being_begun() {
    let rig = Rig::start(&["--io-pool-size=1"]).await;
    let running = assignment("acme", "running", rig.call("/gate/slot"));
    let waiting = assignment("acme", "waiting", rig.call("/ok"));
    rig.router.submit(&running).await;
    rig.peer.arrived("/gate/slot", 1).await;
    rig.router.submit(&waiting).await;
    rig.router.verdict(&waiting).await;
    assert_eq!(outcome(&rig.router, "acme", "waiting").await, "cancelled");
    is_cancelled(&rig.router.result(&waiting).await, 0);
    rig.peer.open("slot");
    assert_eq!(rig.router.result(&running).await["status"], "success");
    kept_its_promise(&rig).await;
    assert!(rig.peer.hits("/ok").is_empty());
}

#[tokio::test]
async fn between_two_attempts_nothing_is_waited_for() {
    let rig = Rig::start(&[]).await;
    let mut payload = assignment("acme", "patient", rig.call("/status/503"));
    payload["job"]["timeout_ms"] = json!(600_000);
    payload["retry_config"] = json!({"base_delay_ms": 300_000, "max_delay_ms": 300_000});
    rig.router.submit(&payload).await;
    rig.peer.arrived("/status", 1).await;
    // Nothing outside shows when the answer has been read.
    tokio::time::sleep(Duration::from_millis(500)).await;
    send(&rig.router, &cancel("acme", "patient")).await;
    is_cancelled(&rig.router.result(&payload).await, 1);
    kept_its_promise(&rig).await;
    assert_eq!(rig.peer.hits("/status").len(), 1);
}

#[tokio::test]
async fn what_is_cancelled_while_no_worker_runs_is_never_begun() {
    let mut rig = Rig::start(&[]).await;
    rig.worker.kill();
    let payloads = ["asked", "told", "wanted"].map(|id| assignment("acme", id, rig.call("/ok")));
    for payload in &payloads {
        rig.router.submit(payload).await;
    }
    send(&rig.router, &cancel("acme", "told")).await;
    let request = rig.router.client().request(CANCEL, cancel("acme", "asked").to_string().into());
    let answer = tokio::time::timeout(Duration::from_secs(1), request).await;
    assert!(!matches!(answer, Ok(Ok(_))), "nobody is there to answer");
    rig.nats.kill();
    rig.nats.restart();
    let _second = rig.another("worker-2").start(&rig.nats).await;
    let router = Router::connect(&rig.nats.url()).await;
    let record = async |payload: &Value| {
        let record = within(SOON, "a record", async || router.record(payload).await).await;
        read(&record.payload)
    };
    is_cancelled(&record(&payloads[0]).await, 0);
    is_cancelled(&record(&payloads[1]).await, 0);
    assert_eq!(record(&payloads[2]).await["status"], "success");
    assert_eq!(rig.peer.hits("/ok").len(), 1);
    nothing_waits(&router).await;
}

#[tokio::test]
async fn another_tenants_work_of_the_same_id_is_not_met() {
    let rig = Rig::start(&[]).await;
    let payloads = ["a", "b"].map(|tenant| assignment(tenant, "same", rig.call("/gate/same")));
    for payload in &payloads {
        rig.router.submit(payload).await;
    }
    rig.peer.arrived("/gate/same", 2).await;
    assert_eq!(outcome(&rig.router, "a", "same").await, "cancelled");
    rig.peer.open("same");
    is_cancelled(&rig.router.result(&payloads[0]).await, 1);
    assert_eq!(rig.router.result(&payloads[1]).await["status"], "success");
    kept_its_promise(&rig).await;
}

#[tokio::test]
async fn finished_work_is_left_alone() {
    let rig = Rig::start(&[]).await;
    let payload = assignment("acme", "done", rig.call("/ok"));
    rig.router.submit(&payload).await;
    let result = rig.router.results(&payload, 1).await[0].clone();
    assert_eq!(outcome(&rig.router, "acme", "done").await, "finished");
    rig.router.submit(&payload).await;
    assert_eq!(rig.router.results(&payload, 2).await, [result.clone(), result]);
    kept_its_promise(&rig).await;
    assert_eq!(rig.peer.hits("/ok").len(), 1);
}

#[tokio::test]
async fn a_cancel_that_comes_before_its_assignment_stands() {
    let rig = Rig::start(&[]).await;
    assert_eq!(outcome(&rig.router, "acme", "early").await, "recorded");
    let payload = assignment("acme", "early", rig.call("/ok"));
    rig.router.submit(&payload).await;
    is_cancelled(&rig.router.result(&payload).await, 0);
    assert_eq!(outcome(&rig.router, "acme", "early").await, "cancelled");
    kept_its_promise(&rig).await;
    assert!(rig.peer.hits("/ok").is_empty());
}

#[tokio::test]
async fn what_is_cancelled_before_it_comes_ends_so_where_it_would_be_refused_for_now() {
    let policy = Policy::new("tenants: {named: [{id: acme, quotas: {executions: 1, window: 31days}}]}");
    let rig = Rig::start(&[&policy.flag()]).await;
    let spends = assignment("acme", "spends", rig.call("/ok"));
    rig.router.submit(&spends).await;
    assert_eq!(rig.router.result(&spends).await["status"], "success");

    let over_budget = assignment("acme", "over", rig.call("/ok"));
    let mut without_slots = assignment("acme", "render", rig.call("/ok"));
    without_slots["resources"] = json!({"pool": "gpu"});
    for payload in [&over_budget, &without_slots] {
        send(&rig.router, &cancel("acme", payload["assignment_id"].as_str().unwrap())).await;
        rig.router.submit(payload).await;
        is_cancelled(&rig.router.result(payload).await, 0);
        assert_eq!(rig.router.verdict(payload).await["status"], "accepted");
        assert!(rig.router.refusal(payload).await.is_none());
    }

    let of_another = assignment("acme", "same", rig.call("/ok"));
    send(&rig.router, &cancel("globex", "same")).await;
    rig.router.submit(&of_another).await;
    assert_eq!(rig.router.verdict(&of_another).await["error"]["code"], 2004);
    kept_its_promise(&rig).await;
    assert_eq!(rig.peer.hits("/ok").len(), 1);
}

#[tokio::test]
async fn copies_that_wait_for_cancelled_work_are_answered_by_its_record() {
    let rig = Rig::start(&[]).await;
    let payload = assignment("acme", "twice", rig.call("/gate/never"));
    rig.router.submit(&payload).await;
    rig.peer.arrived("/gate/never", 1).await;
    rig.router.submit(&payload).await;
    rig.router.learn(&payload, "second verdict", |story| story.verdicts.get(1).cloned()).await;
    send(&rig.router, &cancel("acme", "twice")).await;
    let results = rig.router.results(&payload, 2).await;
    assert_eq!(results[0], results[1]);
    is_cancelled(&read(&results[0]), 1);
    kept_its_promise(&rig).await;
}

#[tokio::test]
async fn what_is_asked_for_anew_is_not_met_by_the_old_cancel() {
    let rig = Rig::start(&[]).await;
    // An error that may be tried again, then a cancel, then a new publication.
    let mut flaky = assignment("acme", "flaky", rig.call("/flaky/1"));
    flaky["retry_config"] = json!({"max_attempts": 1});
    rig.router.submit(&flaky).await;
    assert_eq!(rig.router.result(&flaky).await["status"], "error");
    assert_eq!(outcome(&rig.router, "acme", "flaky").await, "finished");
    rig.router.submit(&flaky).await;
    assert_eq!(read(&rig.router.results(&flaky, 2).await[1])["status"], "success");

    // A cancelled one that is wanted again after all, and then no more.
    assert_eq!(outcome(&rig.router, "acme", "replayed").await, "recorded");
    let mut replayed = assignment("acme", "replayed", rig.call("/ok"));
    rig.router.submit(&replayed).await;
    is_cancelled(&rig.router.result(&replayed).await, 0);
    rig.router.submit_with(&replayed, replay()).await;
    assert_eq!(read(&rig.router.results(&replayed, 2).await[1])["status"], "success");
    replayed["job"] = rig.call("/gate/never");
    rig.router.submit_with(&replayed, replay()).await;
    rig.peer.arrived("/gate/never", 1).await;
    assert_eq!(outcome(&rig.router, "acme", "replayed").await, "cancelled");
    is_cancelled(&read(&rig.router.results(&replayed, 3).await[2]), 1);
    rig.router.settled(SOON).await;
}

#[tokio::test]
async fn what_is_asked_for_anew_right_behind_a_cancel_runs() {
    const ROUNDS: usize = 60;
    let rig = Rig::start(&[]).await;
    let _second = rig.another("worker-2").start(&rig.nats).await;
    let client = rig.router.client();
    for round in 0..ROUNDS {
        let id = format!("again-{round}");
        // What has failed for now is run anew without being called a replay.
        let (job, headers) = match round % 3 {
            0 => (rig.call(&format!("/flaky/1?{round}")), HeaderMap::new()),
            _ => (rig.call("/ok"), replay()),
        };
        let mut payload = assignment("acme", &id, job);
        payload["retry_config"] = json!({"max_attempts": 1});
        rig.router.submit(&payload).await;
        rig.router.result(&payload).await;
        let cancel = cancel("acme", &id).to_string().into();
        if round % 2 == 0 {
            client.publish(CANCEL, cancel).await.unwrap();
        } else {
            client.publish_with_reply(CANCEL, client.new_inbox(), cancel).await.unwrap();
        }
        client.publish_with_headers(ASSIGN, headers, payload.to_string().into()).await.unwrap();
        client.flush().await.unwrap();
        let again = read(&rig.router.results(&payload, 2).await[1]);
        assert_eq!(again["status"], "success", "{again}");
    }
    nothing_waits(&rig.router).await;
}

#[tokio::test]
async fn a_cancel_on_the_verdict_of_a_new_run_stops_it() {
    const ROUNDS: usize = 30;
    let rig = Rig::start(&["--io-pool-size=4"]).await;
    for round in 0..ROUNDS {
        let mut payload = assignment("acme", &format!("stopped-{round}"), rig.call("/ok"));
        rig.router.submit(&payload).await;
        rig.router.result(&payload).await;
        payload["job"] = rig.call("/gate/never");
        rig.router.submit_with(&payload, replay()).await;
        rig.router.learn(&payload, "second verdict", |story| story.verdicts.get(1).cloned()).await;
        send(&rig.router, &cancel("acme", &format!("stopped-{round}"))).await;
        let stopped = read(&rig.router.results(&payload, 2).await[1]);
        assert_eq!(stopped["error"]["code"], 5001, "{stopped}");
    }
}

#[tokio::test]
async fn a_cancel_meets_a_new_run_that_nobody_has_taken_if_it_was_sent_after_it() {
    let mut rig = Rig::start(&[]).await;
    let [before, after] = ["before", "after"].map(|id| assignment("acme", id, rig.call("/ok")));
    for payload in [&before, &after] {
        rig.router.submit(payload).await;
        rig.router.result(payload).await;
    }
    rig.worker.kill();
    send(&rig.router, &cancel("acme", "before")).await;
    for payload in [&before, &after] {
        rig.router.submit_with(payload, replay()).await;
    }
    // So far apart that the broker's times tell which came first.
    tokio::time::sleep(Duration::from_millis(100)).await;
    send(&rig.router, &cancel("acme", "after")).await;
    let _next = rig.another("worker-2").start(&rig.nats).await;
    assert_eq!(read(&rig.router.results(&before, 2).await[1])["status"], "success");
    is_cancelled(&read(&rig.router.results(&after, 2).await[1]), 0);
}

#[tokio::test]
async fn a_message_that_is_no_cancel_is_refused_and_holds_nothing_up() {
    let mut rig = Rig::start(&[]).await;
    let mut good = cancel("acme", "good");
    let change = |field: &str, value: Value| {
        let mut changed = good.clone();
        changed[field] = value;
        changed.to_string()
    };
    let cases = [
        (1001, "the cancel is not JSON", "{".to_owned()),
        (1001, "the cancel is not a JSON object", "[]".to_owned()),
        (1002, "/version is missing or empty", change("version", json!(null))),
        (1003, "/version is not understood: only \"1\" is", change("version", json!("2"))),
        (1002, "/tenant_id is missing or empty", change("tenant_id", json!(""))),
        (
            1003,
            "/assignment_id is no id: at most 256 bytes and no control characters",
            change("assignment_id", json!("a\n")),
        ),
        (1003, "/reason has more than 1024 bytes", change("reason", json!("x".repeat(1025)))),
        (1003, "/requested_by has the wrong type or range: expected a string", change("requested_by", json!(5))),
    ];
    for (code, message, payload) in cases.clone() {
        let answer = rig.router.client().request(CANCEL, payload.clone().into()).await.expect("an answer");
        let expected = json!({"error": {"code": code, "message": message, "retryable": false}});
        assert_eq!(read(&answer.payload), expected, "{payload}");
    }
    let dropped = rig.worker.says("dropped control messages").await;
    assert_eq!(dropped["fields"]["subject"], CANCEL);
    nothing_waits(&rig.router).await;

    // Nor do they keep a worker from starting.
    rig.worker.kill();
    for (_, _, payload) in cases {
        rig.router.client().publish(CANCEL, payload.into()).await.unwrap();
    }
    rig.router.client().publish("caf.human.response.v1", "{}".into()).await.unwrap();
    good["reason"] = json!("x".repeat(1024));
    send(&rig.router, &good).await;
    let _second = rig.another("worker-2").start(&rig.nats).await;
    nothing_waits(&rig.router).await;
    let payload = assignment("acme", "good", rig.call("/ok"));
    rig.router.submit(&payload).await;
    assert_eq!(rig.router.result(&payload).await["status"], "cancelled");
}

#[tokio::test]
async fn much_nonsense_is_counted_and_told_in_few_lines() {
    const MANY: usize = 600;
    let rig = Rig::start(&[]).await;
    for number in 0..MANY {
        let subject = if number % 2 == 0 { CANCEL } else { "caf.human.response.v1" };
        rig.router.client().publish(subject, "nonsense".into()).await.unwrap();
    }
    let counted = async || rig.worker.metric("worker_control_messages_dropped_total").await;
    until("all of it is counted", async || counted().await == MANY as f64).await;
    let lines = within(SOON * 2, "the log has told of all", async || {
        let lines = rig.worker.lines().into_iter().filter_map(|line| serde_json::from_str::<Value>(&line).ok());
        let told =
            lines.filter(|line| line["level"] == "WARN" && line["message"].as_str().unwrap().contains("dropped"));
        let counts: Vec<u64> = told.map(|line| line["fields"]["count"].as_u64().unwrap()).collect();
        (counts.iter().sum::<u64>() == MANY as u64).then_some(counts.len())
    })
    .await;
    assert!(lines <= 4, "{lines} lines");
}

#[tokio::test]
async fn two_workers_cancel_what_each_of_them_runs() {
    let rig = Rig::start(&["--io-pool-size=20"]).await;
    let second = rig.another("worker-2").flag("--io-pool-size=20").start(&rig.nats).await;
    let payloads: Vec<Value> =
        (0..20).map(|number| assignment("acme", &format!("both-{number}"), rig.call("/gate/both"))).collect();
    for payload in &payloads {
        rig.router.submit(payload).await;
    }
    rig.peer.arrived("/gate/both", 20).await;
    for worker in [&rig.worker, &second] {
        let busy = async || worker.metric(r#"worker_slots_busy{pool="io"}"#).await > 0.0;
        until("both have work", busy).await;
    }
    let outcomes = payloads.iter().step_by(2).map(|payload| {
        let id = payload["assignment_id"].as_str().expect("an id");
        outcome(&rig.router, "acme", id)
    });
    let outcomes = futures::future::join_all(outcomes).await;
    assert!(outcomes.iter().all(|outcome| outcome == "cancelled"), "{outcomes:?}");
    rig.peer.open("both");
    for (number, payload) in payloads.iter().enumerate() {
        let result = rig.router.result(payload).await;
        match number % 2 {
            0 => is_cancelled(&result, 1),
            _ => assert_eq!(result["status"], "success"),
        }
    }
    kept_its_promise(&rig).await;
    drop(second);
}

#[tokio::test]
async fn a_worker_that_drains_still_hears_cancels() {
    let mut rig = Rig::start(&[]).await;
    let payload = assignment("acme", "draining", rig.call("/gate/never"));
    rig.router.submit(&payload).await;
    rig.peer.arrived("/gate/never", 1).await;
    rig.worker.terminate();
    rig.worker.unready("draining").await;
    assert_eq!(outcome(&rig.router, "acme", "draining").await, "cancelled");
    is_cancelled(&rig.router.result(&payload).await, 1);
    assert_eq!(rig.worker.ended().await, Some(0));
    kept_its_promise(&rig).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w40_of_a_cancel_and_a_completion_that_race_exactly_one_is_recorded() {
    const RACES: usize = 1_000;
    let rig = Rig::start(&["--io-pool-size=64"]).await;
    let second = rig.another("worker-2").flag("--io-pool-size=64").start(&rig.nats).await;
    let ids: Vec<String> = (0..RACES).map(|number| format!("w40-{number}")).collect();
    let race = async |number: usize, id: &str| {
        // The cancel is sent at some time around the end of the work.
        let payload = assignment("acme", id, rig.call(&format!("/slow/{}", number % 10)));
        rig.router.submit(&payload).await;
        tokio::time::sleep(Duration::from_millis(number as u64 * 7 % 60)).await;
        let sent = cancel("acme", id).to_string();
        rig.router.client().publish(CANCEL, sent.into()).await.unwrap();
    };
    let races = ids.iter().enumerate().map(|(number, id)| race(number, id));
    futures::stream::iter(races).buffer_unordered(50).collect::<Vec<_>>().await;
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for id in &ids {
        let result = rig.router.result(("acme", id.as_str())).await;
        *seen.entry(result["status"].as_str().unwrap().to_owned()).or_default() += 1;
    }
    kept_its_promise(&rig).await;
    for id in &ids {
        let key = ("acme", id.as_str());
        let (story, record) = (rig.router.story(key), rig.router.record(key).await.expect("a record"));
        assert!(story.results.iter().all(|result| *result == record.payload), "{id}: {story:#?}");
        assert!(story.letters.is_empty(), "{id}");
    }
    let both = ["cancelled", "success"].map(|status| seen.get(status).copied().unwrap_or(0));
    assert!(both.iter().all(|count| *count > RACES / 50) && both.iter().sum::<usize>() == RACES, "no race: {seen:?}");
    drop(second);
}

#[tokio::test]
async fn what_others_write_among_the_cancels_is_called_what_it_is_and_ignored() {
    let rig = Rig::start(&[]).await;
    let write = async |key: &str, value: String| {
        rig.router.client().publish(format!("$KV.caf-cancel.{key}"), value.into()).await.unwrap();
    };
    write("no-cancel", "nonsense".to_owned()).await;
    write("acme.odd", json!({"version": "1", "tenant_id": "acme", "assignment_id": 7}).to_string()).await;
    write("acme.other", cancel("acme", "meant").to_string()).await;
    let ignored = within(SOON, "all three are reported", async || {
        let lines = rig.worker.lines().into_iter().filter_map(|line| serde_json::from_str::<Value>(&line).ok());
        let fields = lines.filter(|line| line["message"] == "ignored what stands under this key: it is no cancel");
        let said: Vec<_> = fields.map(|line| line["fields"].clone()).collect();
        (said.len() == 3).then_some(said)
    })
    .await;
    for (said, (key, field, reason)) in ignored.iter().zip([
        ("no-cancel", "", "is not JSON"),
        ("acme.odd", "/assignment_id", "has the wrong type or range: expected a string"),
        ("acme.other", "", "is the cancel of another assignment than its key names"),
    ]) {
        assert_eq!(*said, json!({"bucket": "caf-cancel", "key": key, "field": field, "reason": reason}));
    }
    let payload = assignment("acme", "meant", rig.call("/ok"));
    rig.router.submit(&payload).await;
    assert_eq!(rig.router.result(&payload).await["status"], "success");
}
