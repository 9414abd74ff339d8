//! Where work goes that this worker has no slots for, and how a worker is told to take none.
#![expect(clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::time::Duration;

use async_nats::jetstream::Message;
use async_nats::jetstream::consumer::{AckPolicy, Consumer, pull};
use async_nats::{HeaderMap, Subscriber};
use beamline_tests::nats::NatsServer;
use beamline_tests::peer::Peer;
use beamline_tests::policy::Policy;
use beamline_tests::rig::Rig;
use beamline_tests::router::{CANCEL, Router, assignment, cancel, json as json_of, replay};
use beamline_tests::wait::{SOON, until, within};
use beamline_tests::worker::{Setup, Worker};
use futures::{StreamExt, TryStreamExt};
use serde_json::{Value, json};

const ROUTE: &str = "caf.exec.route.gpu.v1";
const STREAM: &str = "CAF_EXEC_ASSIGN";

// The GPU route.

/// Work for the gpu pool.
fn for_gpu(name: &str, job: Value) -> Value {
    let mut payload = assignment("acme", name, job);
    payload["resources"] = json!({ "pool": "gpu" });
    payload
}

/// Nothing but GPU slots.
fn only_gpu(setup: Setup) -> Setup {
    setup.flag("--cpu-pool-size=0").flag("--io-pool-size=0").flag("--gpu-pool-size=2")
}

/// The route's consumer, as an operator or a worker with GPU slots makes it, with another filter where one is given.
async fn make_route(router: &Router, filter: &str) {
    let config = pull::Config {
        durable_name: Some("caf-workers-gpu".to_owned()),
        filter_subject: filter.to_owned(),
        ack_policy: AckPolicy::Explicit,
        ack_wait: std::time::Duration::from_secs(10),
        max_deliver: -1,
        ..pull::Config::default()
    };
    router.stream(STREAM).await.create_consumer(config).await.expect("the route's consumer");
}

/// What waits on the route, as a worker with GPU slots gets it.
async fn waiting(router: &Router) -> Vec<Message> {
    let stream = router.stream(STREAM).await;
    let consumer: Consumer<pull::Config> = stream.get_consumer("caf-workers-gpu").await.expect("the route's consumer");
    let batch = consumer.fetch().max_messages(1000).messages().await.expect("messages");
    batch.try_collect().await.expect("messages")
}

/// Waits until the worker passes work on.
async fn passes_on(rig: &Rig, name: &str) {
    let mut number = 0;
    within(SOON, "work is passed on", async || {
        number += 1;
        rig.router.submit(&for_gpu(&format!("{name}-{number}"), rig.put("x", "x"))).await;
        rig.router.settled(SOON).await;
        (rig.worker.metric("worker_assignments_passed_on_total").await > 0.0).then_some(())
    })
    .await
}

#[tokio::test]
async fn work_for_gpu_slots_is_passed_on_and_run_where_they_are() {
    let rig = Rig::start(&[]).await;
    let gpu = only_gpu(rig.another("gpu-1")).start(&rig.nats).await;
    passes_on(&rig, "first").await;

    let payload = for_gpu("a1", rig.put("a1.txt", "from a GPU"));
    let sequence = rig.router.submit(&payload).await;
    let result = rig.router.result(&payload).await;
    assert_eq!((&result["status"], &result["metadata"]["worker_id"]), (&json!("success"), &json!("gpu-1")));
    assert_eq!(std::fs::read_to_string(rig.file_of("acme", "a1.txt")).unwrap(), "from a GPU");
    // One verdict, by the one who runs it; and the record answers what the Router published.
    let verdicts = rig.router.story(&payload).verdicts;
    assert_eq!(verdicts.len(), 1, "{verdicts:?}");
    assert_eq!((&verdicts[0]["status"], &verdicts[0]["worker_id"]), (&json!("accepted"), &json!("gpu-1")));
    let record = rig.router.record(&payload).await.expect("a record");
    let answers = record.headers.get("Beamline-Answers").expect("the publication").to_string();
    assert!(answers.starts_with("CAF_EXEC_ASSIGN,") && answers.ends_with(&format!(",{sequence}")), "{answers}");
    assert!(rig.worker.metric("worker_assignments_passed_on_total").await >= 1.0);
    assert_eq!(gpu.metric("worker_assignments_passed_on_total").await, 0.0);
}

#[tokio::test]
async fn a_route_comes_and_goes_with_its_consumer() {
    let rig = Rig::start(&[]).await;
    let early = for_gpu("early", rig.put("x", "x"));
    rig.router.submit(&early).await;
    refused_for_lack_of_slots(&rig, &early).await;

    // A consumer of that name that hands out something else is no route.
    make_route(&rig.router, "caf.exec.route.other.v1").await;
    rig.router.stream(STREAM).await.delete_consumer("caf-workers-gpu").await.unwrap();
    make_route(&rig.router, ROUTE).await;
    passes_on(&rig, "later").await;

    rig.router.stream(STREAM).await.delete_consumer("caf-workers-gpu").await.unwrap();
    let mut number = 0;
    within(SOON, "work is refused again", async || {
        number += 1;
        let late = for_gpu(&format!("late-{number}"), rig.put("x", "x"));
        rig.router.submit(&late).await;
        rig.router.settled(SOON).await;
        rig.router.story(&late).verdicts.first().cloned()
    })
    .await;
}

async fn refused_for_lack_of_slots(rig: &Rig, payload: &Value) {
    let verdict = rig.router.verdict(payload).await;
    assert_eq!((&verdict["status"], &verdict["error"]["code"]), (&json!("rejected"), &json!(2002)));
    assert_eq!(verdict["error"]["retryable"], true);
    assert!(rig.router.refusal(payload).await.is_some(), "it is kept for redeliveries");
}

#[tokio::test]
async fn what_is_passed_on_keeps_its_bytes_its_headers_and_its_first_identity() {
    let rig = Rig::start(&[]).await;
    make_route(&rig.router, ROUTE).await;
    passes_on(&rig, "first").await;

    let payload = for_gpu("a1", rig.put("x", "x"));
    let mut headers = HeaderMap::new();
    headers.insert("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
    headers.insert("Beamline-Replay", "true");
    headers.append("X-Router", "one");
    headers.append("X-Router", "two");
    // What the Router told the broker about its own publish would make the broker refuse or drop this one.
    headers.insert("Nats-Msg-Id", "router-1");
    headers.insert("Nats-Expected-Stream", STREAM);
    let expected = rig.router.stream(STREAM).await.cached_info().state.last_sequence;
    headers.insert("Nats-Expected-Last-Sequence", expected.to_string());
    let sequence = rig.router.submit_with(&payload, headers).await;
    rig.router.settled(SOON).await;

    let passed_on = waiting(&rig.router).await;
    let passed_on = passed_on.iter().find(|message| message.payload == payload.to_string());
    let passed_on = passed_on.expect("it was passed on, byte for byte");
    let headers = passed_on.headers.as_ref().expect("headers");
    let header = |name: &str| headers.get(name).map(ToString::to_string);
    assert_eq!(header("traceparent").as_deref(), Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"));
    assert_eq!(header("Beamline-Replay").as_deref(), Some("true"));
    assert_eq!(headers.get_all("X-Router").map(ToString::to_string).collect::<Vec<_>>(), ["one", "two"]);
    let publication = header("Beamline-Publication").expect("the first identity");
    assert!(publication.starts_with("CAF_EXEC_ASSIGN,") && publication.ends_with(&format!(",{sequence}")));
    assert_eq!((header("Nats-Expected-Last-Sequence"), header("Nats-Expected-Stream")), (None, None));
    // Once more under the same id, as after a death between the publish and the settlement: the stream keeps one.
    let mut again = HeaderMap::new();
    again.insert("Nats-Msg-Id", header("Nats-Msg-Id").expect("an id for the stream"));
    let sent = rig.router.jetstream().publish_with_headers(ROUTE, again, passed_on.payload.clone()).await.unwrap();
    assert!(sent.await.unwrap().duplicate);
    assert_eq!(rig.router.story(&payload).verdicts.len(), 0, "nobody has run it yet");
}

#[tokio::test]
async fn passed_on_twice_it_runs_once() {
    let rig = Rig::start(&[]).await;
    let _gpu = only_gpu(rig.another("gpu-1")).start(&rig.nats).await;
    passes_on(&rig, "first").await;
    let payload = for_gpu("a1", rig.call("/ok/once"));
    rig.router.submit(&payload).await;
    let first = rig.router.results(&payload, 1).await;

    // The second copy comes when the stream has forgotten the id of the first.
    let mut config = rig.router.stream(STREAM).await.cached_info().config.clone();
    config.duplicate_window = Duration::from_millis(100);
    rig.router.jetstream().update_stream(&config).await.expect("a stream that forgets soon");
    let mut headers = first_identity(&rig.router, &payload).await;
    let id = headers.get("Beamline-Publication").map(|publication| format!("{publication},gpu"));
    headers.insert("Nats-Msg-Id", id.expect("a publication"));
    until("the stream keeps the copy", async || {
        let copy = payload.to_string().into();
        let sent = rig.router.jetstream().publish_with_headers(ROUTE, headers.clone(), copy).await.unwrap();
        !sent.await.unwrap().duplicate
    })
    .await;
    let results = rig.router.results(&payload, 2).await;
    assert_eq!(results[1], first[0], "the recorded bytes");
    assert_eq!(rig.peer.hits("/ok/once").len(), 1);
}

/// What a worker that passed it on would tell of its first identity.
async fn first_identity(router: &Router, payload: &Value) -> HeaderMap {
    let record = router.record(payload).await.expect("a record");
    let mut headers = HeaderMap::new();
    headers.insert("Beamline-Publication", record.headers.get("Beamline-Answers").expect("a publication").clone());
    headers.insert("Beamline-Published", "2026-11-26T01:02:03Z");
    headers
}

#[tokio::test]
async fn an_identity_that_a_router_has_copied_means_nothing() {
    let rig = Rig::start(&[]).await;
    let _gpu = only_gpu(rig.another("gpu-1")).start(&rig.nats).await;
    passes_on(&rig, "first").await;
    let original = for_gpu("original", rig.call("/ok/original"));
    rig.router.submit(&original).await;
    rig.router.results(&original, 1).await;
    let mut copied = first_identity(&rig.router, &original).await;

    let other = for_gpu("other", rig.call("/ok/other"));
    let sequence = rig.router.submit_with(&other, copied.clone()).await;
    assert_eq!(rig.router.result(&other).await["status"], "success");
    let answers = rig.router.record(&other).await.expect("a record").headers.get("Beamline-Answers").cloned();
    assert!(answers.expect("a publication").as_str().ends_with(&format!(",{sequence}")));

    // The same one once more, in the intake and on the route: a new publication each time.
    copied.insert("Beamline-Replay", "true");
    rig.router.submit_with(&original, copied.clone()).await;
    rig.router.results(&original, 2).await;
    let sent = rig.router.jetstream().publish_with_headers(ROUTE, copied, original.to_string().into()).await;
    sent.unwrap().await.unwrap();
    rig.router.results(&original, 3).await;
    assert_eq!((rig.peer.hits("/ok/original").len(), rig.peer.hits("/ok/other").len()), (3, 1));
}

#[tokio::test]
async fn a_replay_of_passed_on_work_runs_again() {
    let rig = Rig::start(&[]).await;
    let _gpu = only_gpu(rig.another("gpu-1")).start(&rig.nats).await;
    passes_on(&rig, "first").await;
    let payload = for_gpu("a1", rig.call("/ok/again"));
    rig.router.submit(&payload).await;
    rig.router.results(&payload, 1).await;
    let headers = replay();
    rig.router.submit_with(&payload, headers).await;
    rig.router.results(&payload, 2).await;
    assert_eq!(rig.peer.hits("/ok/again").len(), 2);
}

#[tokio::test]
async fn a_cancel_from_before_it_was_passed_on_meets_what_was_published_earlier() {
    let mut rig = Rig::start(&[]).await;
    let mut gpu = only_gpu(rig.another("gpu-1")).start(&rig.nats).await;
    passes_on(&rig, "first").await;
    let payload = for_gpu("a1", rig.call("/ok/again"));
    rig.router.submit(&payload).await;
    rig.router.results(&payload, 1).await;
    rig.worker.kill();
    gpu.kill();
    let headers = replay();
    rig.router.submit_with(&payload, headers).await;
    // So far apart that the broker's times tell which came first.
    tokio::time::sleep(Duration::from_millis(100)).await;
    let cancel = cancel("acme", "a1");
    rig.router.client().publish(CANCEL, cancel.to_string().into()).await.unwrap();
    rig.router.client().flush().await.unwrap();
    let _gpu = only_gpu(rig.another("gpu-2")).start(&rig.nats).await;
    let _general = rig.another("worker-2").start(&rig.nats).await;
    let again = json_of(&rig.router.results(&payload, 2).await[1]);
    assert_eq!(again["error"]["code"], 5001, "{again}");
    assert_eq!(rig.peer.hits("/ok/again").len(), 1);
}

#[tokio::test]
async fn a_worker_with_only_gpu_slots_leaves_other_work_alone() {
    let nats = NatsServer::start();
    let files = tempfile::tempdir().unwrap();
    let roots = format!("--fs-roots={}", files.path().display());
    let gpu = only_gpu(Worker::named("gpu-1")).flag(&roots).start(&nats).await;
    let router = Router::connect(&nats.url()).await;
    let path = files.path().join("x.txt");
    let payload = assignment("acme", "a1", json!({"type": "fs.put", "path": path, "content": "x"}));
    router.submit(&payload).await;
    // It works for the route meanwhile.
    let routed = for_gpu("a2", json!({"type": "fs.put", "path": path, "content": "x"}));
    router.jetstream().publish(ROUTE, routed.to_string().into()).await.unwrap().await.unwrap();
    assert_eq!(router.result(&routed).await["metadata"]["worker_id"], "gpu-1");
    let consumer = router.consumer().await.expect("the intake's consumer");
    assert_eq!((consumer.num_pending, consumer.num_waiting), (1, 0), "nobody pulls from the intake");

    // What names no GPU pool has no place on the route either.
    let misled = assignment("acme", "a3", json!({"type": "fs.put", "path": path, "content": "x"}));
    router.jetstream().publish(ROUTE, misled.to_string().into()).await.unwrap().await.unwrap();
    assert_eq!(router.verdict(&misled).await["error"]["code"], 2002);

    let _general = Worker::named("general-1").flag(&roots).start(&nats).await;
    assert_eq!(router.result(&payload).await["metadata"]["worker_id"], "general-1");
    assert_eq!(gpu.metric("worker_assignments_passed_on_total").await, 0.0);
}

#[tokio::test]
async fn a_worker_with_all_kinds_of_slots_runs_gpu_work_from_both_places() {
    let rig = Rig::start(&["--gpu-pool-size=1"]).await;
    let direct = for_gpu("direct", rig.put("x", "x"));
    rig.router.submit(&direct).await;
    let routed = for_gpu("routed", rig.put("y", "y"));
    rig.router.jetstream().publish(ROUTE, routed.to_string().into()).await.unwrap().await.unwrap();
    for payload in [direct, routed] {
        assert_eq!(rig.router.result(&payload).await["status"], "success");
    }
    assert_eq!(rig.worker.metric("worker_assignments_passed_on_total").await, 0.0);
}

#[tokio::test]
async fn a_full_gpu_pool_does_not_hold_up_the_intake() {
    let rig = Rig::start(&["--gpu-pool-size=1"]).await;
    for number in 0..200 {
        let slow = for_gpu(&format!("slow-{number}"), rig.call("/gate/never"));
        rig.router.jetstream().publish(ROUTE, slow.to_string().into()).await.unwrap().await.unwrap();
    }
    until("the GPU pool is busy", async || rig.worker.metric(r#"worker_slots_busy{pool="gpu"}"#).await == 1.0).await;
    for number in 0..50 {
        let quick = assignment("acme", &format!("quick-{number}"), rig.put("x", "x"));
        rig.router.submit(&quick).await;
        assert_eq!(rig.router.result(&quick).await["status"], "success");
    }
    let waiting = rig.worker.metric(r#"worker_pool_queue_depth{pool="gpu"}"#).await;
    assert!(waiting <= 4.0, "{waiting} wait here for one slot: the rest belongs to other workers");
}

#[tokio::test]
async fn a_pool_of_another_subject_has_a_route_of_its_own() {
    let nats = NatsServer::start();
    let files = tempfile::tempdir().unwrap();
    let setup = |name: &str| {
        Worker::named(name).flag("--nats-subject=orders.assign").flag(format!("--fs-roots={}", files.path().display()))
    };
    let general = setup("general-1").start(&nats).await;
    let _gpu = only_gpu(setup("gpu-1")).start(&nats).await;
    let router = Router::on(&nats.url(), "orders.assign").await;
    let job = || json!({"type": "fs.put", "path": files.path().join("x.txt"), "content": "x"});
    let mut number = 0;
    let payload = within(SOON, "work is passed on", async || {
        number += 1;
        let payload = for_gpu(&format!("a{number}"), job());
        router.submit(&payload).await;
        router.settled(SOON).await;
        (general.metric("worker_assignments_passed_on_total").await > 0.0).then_some(payload)
    })
    .await;
    let result = router.result(&payload).await;
    assert_eq!((&result["status"], &result["metadata"]["worker_id"]), (&json!("success"), &json!("gpu-1")));
    let stream = router.stream("CAF_POOL_orders=2Eassign").await;
    let consumer = stream.consumer_info("caf-workers-gpu").await.expect("the route's consumer");
    assert_eq!(consumer.config.filter_subject, "orders.assign.route.gpu");
    assert_eq!(router.verdict(&payload).await["worker_id"], "gpu-1");
}

#[tokio::test]
async fn a_route_that_is_not_as_it_must_be_stops_those_who_pull_from_it() {
    let rig = Rig::start(&[]).await;
    make_route(&rig.router, "caf.exec.route.other.v1").await;
    let setup = only_gpu(Worker::named("gpu-1")).flag(format!("--nats-url={}", rig.nats.url()));
    let ending = setup.end().await;
    assert_eq!(ending.code, Some(1), "{}", ending.said);
    let expected = "consumer caf-workers-gpu of stream CAF_EXEC_ASSIGN has filter_subject caf.exec.route.other.v1";
    assert!(ending.said.contains(expected), "{}", ending.said);
}

#[tokio::test]
async fn without_a_route_a_worker_with_only_gpu_slots_waits_and_others_do_not() {
    let rig = Rig::start(&[]).await;
    let as_told = |setup: Setup| setup.flag("--nats-create-streams=false");
    let nats_url = format!("--nats-url={}", rig.nats.url());
    let gpu = as_told(only_gpu(Worker::named("gpu-1"))).flag(&nats_url).spawn();
    gpu.unready("consumer caf-workers-gpu of stream CAF_EXEC_ASSIGN does not exist").await;
    let _both = as_told(rig.another("both-1")).flag("--gpu-pool-size=1").start(&rig.nats).await;
    make_route(&rig.router, ROUTE).await;
    gpu.ready().await;
}

#[tokio::test]
async fn what_leaves_no_room_for_the_headers_is_refused_with_a_way_out() {
    let rig = Rig::at(NatsServer::with("max_payload: 65536"), &[]).await;
    make_route(&rig.router, ROUTE).await;
    passes_on(&rig, "first").await;
    let mut payload = for_gpu("large", rig.put("x", ""));
    let room = 65_536 - payload.to_string().len();
    payload["job"]["content"] = json!("x".repeat(room));
    rig.router.submit(&payload).await;
    let verdict = rig.router.verdict(&payload).await;
    assert_eq!((&verdict["status"], &verdict["error"]["code"]), (&json!("rejected"), &json!(2002)));
    assert_eq!(verdict["error"]["retryable"], false);
    assert!(verdict["message"].as_str().unwrap().ends_with("publish it on caf.exec.route.gpu.v1"), "{verdict}");
    assert_eq!(rig.router.letter(&payload).await["stage"], "admit");
    rig.worker.ready().await;
}

// What a worker says of itself, and what it is told.

/// What workers say of themselves, under this token.
async fn reports(rig: &Rig, token: &str) -> Subscriber {
    let reports = rig.router.client().subscribe(format!("caf.worker.report.v1.{token}")).await.expect("a subscription");
    rig.router.client().flush().await.expect("the broker answers");
    reports
}

/// The next report that is so.
async fn reported(reports: &mut Subscriber, what: &str, is_it: impl Fn(&Value) -> bool) -> Value {
    let found = async {
        loop {
            let report = json_of(&reports.next().await.expect("reports go on").payload);
            if is_it(&report) {
                return report;
            }
        }
    };
    tokio::time::timeout(SOON, found).await.unwrap_or_else(|_| panic!("no report: {what}"))
}

/// Tells a worker something, and returns its answer.
async fn tell(rig: &Rig, token: &str, words: &str) -> Value {
    let subject = format!("caf.worker.control.v1.{token}");
    let answer = rig.router.client().request(subject, words.to_owned().into()).await.expect("an answer");
    json_of(&answer.payload)
}

#[tokio::test]
async fn a_worker_says_what_it_does_every_second_and_when_that_changes() {
    let nats = NatsServer::start();
    let worker = Worker::named("w.1").flag("--pool=flows/default").flag("--egress-allow=127.0.0.0/8");
    let worker = worker.start(&nats).await;
    let router = Router::connect(&nats.url()).await;
    let rig = Rig { worker, router, peer: Peer::start().await, nats, files: tempfile::tempdir().unwrap() };
    let mut reports = reports(&rig, "w=2E1").await;
    let idle = reported(&mut reports, "the first", |_| true).await;
    let expected = json!({
        "version": "1", "worker": "w.1", "pool": "flows/default", "class": "general",
        "slots": {"cpu": 8, "gpu": 0, "io": 16}, "busy": {"cpu": 0, "gpu": 0, "io": 0},
        "running": 0, "waiting": 0, "pulling": true, "paused": false, "finished": 0, "work_ms": 0,
        "started_at": idle["started_at"], "reported_at": idle["reported_at"], "build": idle["build"],
    });
    assert_eq!(idle, expected);
    assert!(idle["reported_at"].as_i64() >= idle["started_at"].as_i64() && idle["build"].is_string(), "{idle}");
    let again = reported(&mut reports, "the second, with no change", |_| true).await;
    let apart = again["reported_at"].as_i64().unwrap() - idle["reported_at"].as_i64().unwrap();
    assert!(apart >= 900, "{apart} ms between two reports of an idle worker");

    let payload = assignment("acme", "a1", rig.call("/gate/one"));
    rig.router.submit(&payload).await;
    let busy = reported(&mut reports, "it runs", |report| report["running"] == 1).await;
    assert_eq!(busy["busy"], json!({"cpu": 0, "gpu": 0, "io": 1}));
    assert_eq!(busy["tenants"], json!([{"id": "acme", "running": 1, "queued": 0, "refused": 0}]));
    rig.peer.open("one");
    let done = reported(&mut reports, "it is done", |report| report["finished"] == 1 && report["running"] == 0).await;
    assert!(done["work_ms"].as_i64().is_some_and(|millis| millis > 0), "{done}");

    // However much happens, there are no more than ten in a second.
    for number in 0..300 {
        rig.router.submit(&assignment("acme", &format!("many-{number}"), rig.call("/ok"))).await;
    }
    let mut times = vec![done["reported_at"].as_i64().unwrap()];
    loop {
        let report = reported(&mut reports, "all is done", |_| true).await;
        times.push(report["reported_at"].as_i64().unwrap());
        if report["finished"] == 301 {
            break;
        }
    }
    assert!(times.windows(2).all(|pair| pair[1] - pair[0] >= 95), "{times:?}");
}

#[tokio::test]
async fn a_worker_that_is_told_to_stop_says_what_still_runs_and_hands_the_rest_back() {
    let rig = Rig::start(&["--io-pool-size=1", "--cpu-pool-size=0"]).await;
    let running = assignment("acme", "running", rig.call("/gate/one"));
    rig.router.submit(&running).await;
    rig.peer.arrived("/gate/one", 1).await;
    let waiting = assignment("acme", "waiting", rig.put("x", "x"));
    rig.router.submit(&waiting).await;
    rig.router.verdict(&waiting).await;

    let answer = tell(&rig, "worker-1", r#"{"pull": false}"#).await;
    assert_eq!(
        (&answer["worker"], &answer["pulling"], &answer["paused"]),
        (&json!("worker-1"), &json!(false), &json!(false))
    );
    assert_eq!((&answer["running"], &answer["waiting"]), (&json!(1), &json!(0)), "{answer}");
    rig.worker.ready().await;
    // Another worker has what was handed back, and all that comes.
    let other = rig.another("worker-2").start(&rig.nats).await;
    assert_eq!(rig.router.result(&waiting).await["metadata"]["worker_id"], "worker-2");
    let new = assignment("acme", "new", rig.put("x", "x"));
    rig.router.submit(&new).await;
    assert_eq!(rig.router.result(&new).await["metadata"]["worker_id"], "worker-2");
    drop(other);
    nobody_pulls(&rig).await;
    rig.peer.open("one");
    assert_eq!(rig.router.result(&running).await["metadata"]["worker_id"], "worker-1");
    let left = assignment("acme", "left", rig.put("x", "x"));
    rig.router.submit(&left).await;
    let consumer = rig.router.consumer().await.expect("the intake's consumer");
    assert_eq!((consumer.num_pending, consumer.num_waiting), (1, 0), "nobody pulls");

    let answer = tell(&rig, "worker-1", r#"{"pull": true}"#).await;
    assert_eq!(answer["pulling"], true);
    assert_eq!(rig.router.result(&left).await["metadata"]["worker_id"], "worker-1");
}

#[tokio::test]
async fn what_a_worker_is_told_must_be_understood() {
    let rig = Rig::start(&[]).await;
    for (words, code, message) in [
        ("{}", 1002, "/pull is missing or empty"),
        (r#"{"pull": null}"#, 1002, "/pull is missing or empty"),
        (r#"{"pull": "no"}"#, 1003, "/pull has the wrong type or range: expected a boolean"),
        ("[]", 1001, "the request is not a JSON object"),
        ("", 1001, "the request is not JSON"),
        ("\u{0}", 1001, "the request is not JSON"),
    ] {
        let answer = tell(&rig, "worker-1", words).await;
        let expected = json!({"worker": "worker-1", "error": {"code": code, "message": message, "retryable": false}});
        assert_eq!(answer, expected, "{words}");
    }
    // A word without a reply subject is heard all the same; a broken one changes nothing.
    let mut reports = reports(&rig, "worker-1").await;
    rig.router.client().publish("caf.worker.control.v1.worker-1", "nonsense".into()).await.unwrap();
    assert_eq!(reported(&mut reports, "any", |_| true).await["pulling"], true);
    rig.router.client().publish("caf.worker.control.v1.worker-1", r#"{"pull":false}"#.into()).await.unwrap();
    reported(&mut reports, "it has stopped", |report| report["pulling"] == false).await;
}

#[tokio::test]
async fn a_worker_that_drains_says_that_it_takes_no_work() {
    let rig = Rig::start(&[]).await;
    let mut reports = reports(&rig, "worker-1").await;
    rig.router.submit(&assignment("acme", "a1", rig.call("/gate/one"))).await;
    rig.peer.arrived("/gate/one", 1).await;
    rig.worker.terminate();
    let report = reported(&mut reports, "it drains", |report| report["pulling"] == false).await;
    assert_eq!(report["running"], 1);
    rig.peer.open("one");
}

// What the policy file says.

/// Nobody asks the intake for work.
async fn nobody_pulls(rig: &Rig) {
    until("nobody pulls", async || rig.router.consumer().await.is_some_and(|consumer| consumer.num_waiting == 0)).await;
}

#[tokio::test]
async fn a_paused_worker_pulls_nothing_stays_ready_and_goes_on_without_a_restart() {
    let mut policy = Policy::new("paused: true");
    let rig = Rig::start(&[&policy.flag()]).await;
    let first = assignment("acme", "first", rig.put("x", "x"));
    rig.router.submit(&first).await;
    nobody_pulls(&rig).await;
    assert_eq!(rig.router.consumer().await.unwrap().num_pending, 1);
    let answer = tell(&rig, "worker-1", r#"{"pull": true}"#).await;
    assert_eq!((&answer["pulling"], &answer["paused"]), (&json!(false), &json!(true)), "the policy stands");

    policy.say("paused: false");
    assert_eq!(rig.router.result(&first).await["status"], "success");

    let running = assignment("acme", "running", rig.call("/gate/one"));
    rig.router.submit(&running).await;
    rig.peer.arrived("/gate/one", 1).await;
    // Between two pulls nobody pulls either.
    let mut reports = reports(&rig, "worker-1").await;
    policy.say("paused: true");
    reported(&mut reports, "it is paused", |report| report["paused"] == true).await;
    nobody_pulls(&rig).await;
    let second = assignment("acme", "second", rig.put("x", "x"));
    rig.router.submit(&second).await;
    rig.worker.ready().await;
    rig.peer.open("one");
    assert_eq!(rig.router.result(&running).await["status"], "success", "what runs is finished");
    assert_eq!(rig.router.consumer().await.unwrap().num_pending, 1);
    policy.say("");
    assert_eq!(rig.router.result(&second).await["status"], "success");
}

#[tokio::test]
async fn a_broken_policy_changes_nothing_and_is_noticed() {
    let mut policy = Policy::new("paused: true");
    let rig = Rig::start(&[&policy.flag()]).await;
    policy.say("paused: false\ntenants: {defaults: {weight: heavy}}");
    let broken = async || rig.worker.metric("worker_tenants_file_broken").await;
    until("the broken file is noticed", async || broken().await == 1.0).await;
    let line = rig.worker.says("the tenants file cannot be used: what it said last holds").await;
    assert!(line["fields"]["reason"].as_str().unwrap().starts_with("tenants.defaults.weight: "), "{line}");
    assert_eq!(tell(&rig, "worker-1", r#"{"pull": true}"#).await["paused"], true);
    std::fs::remove_file(policy.path()).unwrap();
    policy.say("paused: false");
    std::os::unix::fs::symlink("..data/policy.yaml", policy.path()).unwrap();
    until("the good file is used", async || broken().await == 0.0).await;
    let payload = assignment("acme", "a1", rig.put("x", "x"));
    rig.router.submit(&payload).await;
    assert_eq!(rig.router.result(&payload).await["status"], "success");
}

#[tokio::test]
async fn a_worker_does_not_start_with_a_policy_that_cannot_be_used() {
    for (text, reason) in [
        ("tenants: {named: [{id: acme, priority: 11}]}", "tenants.named[0].priority: is not between 0 and 9"),
        ("pause: true", "pause: unknown field"),
    ] {
        let policy = Policy::new(text);
        let ending = Worker::named("w").flag(policy.flag()).end().await;
        assert_eq!(ending.code, Some(2), "{}", ending.said);
        assert!(ending.said.contains("--tenants-file: ") && ending.said.contains(reason), "{}", ending.said);
    }
    let ending = Worker::named("w").flag("--tenants-file=/nowhere/policy.yaml").end().await;
    assert_eq!(ending.code, Some(2), "{}", ending.said);
    let named = r#"--tenants-file: "/nowhere/policy.yaml" is not allowed: expected a file of tenants that can be used (No such"#;
    assert!(ending.said.contains(named), "{}", ending.said);
}

#[tokio::test]
async fn tenants_that_are_named_have_series_and_the_busiest_are_reported() {
    let policy = Policy::new("tenants: {named: [{id: acme}, {id: quiet}]}");
    let rig = Rig::start(&[&policy.flag(), "--io-pool-size=4", "--cpu-pool-size=0"]).await;
    let mut reports = reports(&rig, "worker-1").await;
    for number in 0..5 {
        rig.router.submit(&assignment("acme", &format!("acme-{number}"), rig.call("/gate/all"))).await;
    }
    rig.router.submit(&assignment("stranger", "one", rig.call("/gate/all"))).await;
    rig.peer.arrived("/gate/all", 4).await;
    let series = async |name: &str, tenant: &str| {
        rig.worker.metric(&format!(r#"worker_tenant_{name}{{tenant="{tenant}"}}"#)).await
    };
    until("acme waits", async || series("tasks_queued", "acme").await == 2.0).await;
    assert_eq!((series("tasks_running", "acme").await, series("tasks_running", "other").await), (3.0, 1.0));
    let held = json!([
        {"id": "acme", "running": 3, "queued": 2, "refused": 0},
        {"id": "stranger", "running": 1, "queued": 0, "refused": 0},
    ]);
    reported(&mut reports, "what each holds", |report| report["tenants"] == held).await;
    rig.peer.open("all");
    until("all is done", async || {
        series("executions_total", "acme").await == 5.0 && series("executions_total", "other").await == 1.0
    })
    .await;
    until("none runs", async || series("tasks_running", "acme").await == 0.0).await;
    assert_eq!((series("executions_total", "quiet").await, series("refused_total", "acme").await), (0.0, 0.0));
    let lately = |report: &Value| report["tenants"].as_array().is_some_and(|tenants| tenants.len() == 2);
    reported(&mut reports, "who was here of late", |report| report["running"] == 0 && lately(report)).await;

    // However long their ids are, a report stays short.
    for number in 0..20 {
        let tenant = format!("{number}-{}", "\u{e9}\"".repeat(80));
        let payload = assignment(&tenant, "one", rig.put("x", "x"));
        rig.router.submit(&payload).await;
        assert_eq!(rig.router.result(&payload).await["status"], "success");
    }
    let many = reported(&mut reports, "many tenants", |report| {
        report["tenants"].as_array().is_some_and(|tenants| tenants.len() > 8)
    })
    .await;
    assert!(many.to_string().len() < 4096, "{} bytes", many.to_string().len());
}

#[tokio::test]
async fn refusals_for_a_budget_are_counted_by_tenant_and_reported() {
    let policy = Policy::new("tenants: {named: [{id: acme, quotas: {executions: 1, window: 744h}}]}");
    let rig = Rig::start(&[&policy.flag()]).await;
    let mut reports = reports(&rig, "worker-1").await;
    for (name, code) in [("one", Value::Null), ("two", json!(2004)), ("three", json!(2004))] {
        let payload = assignment("acme", name, rig.put("x", "x"));
        rig.router.submit(&payload).await;
        assert_eq!(rig.router.verdict(&payload).await["error"]["code"], code, "{name}");
    }
    let refused = async || rig.worker.metric(r#"worker_tenant_refused_total{tenant="acme"}"#).await;
    until("both are counted", async || refused().await == 2.0).await;
    let told = |report: &Value| report["tenants"][0]["id"] == "acme" && report["tenants"][0]["refused"] == 2;
    reported(&mut reports, "both are told", told).await;
}

#[tokio::test]
async fn a_tenant_of_four_times_the_weight_has_four_times_the_slots() {
    let policy = Policy::new("tenants: {named: [{id: heavy, weight: 4}, {id: light, weight: 1}]}");
    // The slots for CPU work only widen the look-ahead, so that all of it waits in this worker.
    let rig = Rig::start(&[&policy.flag(), "--io-pool-size=1", "--cpu-pool-size=64"]).await;
    rig.router.submit(&assignment("other", "blocks", rig.call("/gate/one"))).await;
    rig.peer.arrived("/gate/one", 1).await;
    for number in 0..60 {
        let tenant = if number % 2 == 0 { "light" } else { "heavy" };
        let call = rig.call(&format!("/slow/40?{tenant}"));
        rig.router.submit(&assignment(tenant, &format!("{tenant}-{number}"), call)).await;
    }
    until("all wait", async || rig.worker.metric(r#"worker_pool_queue_depth{pool="io"}"#).await == 60.0).await;
    rig.peer.open("one");
    let hits = rig.peer.arrived("/slow", 31).await;
    // What counts is the time that each took, which on a busy machine is not the same.
    let (mut heavy, mut light, mut longest) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
    for pair in hits.windows(2).take(30) {
        let took = pair[1].at - pair[0].at;
        *(if pair[0].path.ends_with("?heavy") { &mut heavy } else { &mut light }) += took;
        longest = longest.max(took);
    }
    let apart = (heavy / 4).abs_diff(light);
    assert!(apart <= 2 * longest, "heavy {heavy:?}, light {light:?}, longest {longest:?}");
}

#[tokio::test]
async fn an_assignment_without_a_priority_has_its_tenants() {
    let policy = Policy::new("tenants: {defaults: {priority: 2}, named: [{id: vip, priority: 8}]}");
    let rig = Rig::start(&[&policy.flag(), "--io-pool-size=1"]).await;
    rig.router.submit(&assignment("other", "blocks", rig.call("/gate/one"))).await;
    rig.peer.arrived("/gate/one", 1).await;
    let (low, vip) = (assignment("other", "low", rig.call("/ok/low")), assignment("vip", "vip", rig.call("/ok/vip")));
    for payload in [&low, &vip] {
        rig.router.submit(payload).await;
    }
    until("both wait", async || rig.worker.metric(r#"worker_pool_queue_depth{pool="io"}"#).await == 2.0).await;
    rig.peer.open("one");
    for payload in [&low, &vip] {
        rig.router.result(payload).await;
    }
    let order: Vec<_> = rig.peer.hits("/ok").into_iter().map(|hit| hit.path).collect();
    assert_eq!(order, ["/ok/vip", "/ok/low"]);
}
