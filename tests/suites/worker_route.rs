//! Where work goes that this worker has no slots for, and how a worker is told to take none.
#![expect(clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use async_nats::HeaderMap;
use async_nats::jetstream::Message;
use async_nats::jetstream::consumer::{AckPolicy, Consumer, pull};
use beamline_tests::nats::NatsServer;
use beamline_tests::rig::Rig;
use beamline_tests::router::{Router, assignment};
use beamline_tests::wait::{SOON, until, within};
use beamline_tests::worker::{Setup, Worker};
use futures::TryStreamExt;
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
    let record = rig.router.record(&payload).await.expect("a record");
    let mut headers = HeaderMap::new();
    headers.insert("Beamline-Publication", record.headers.get("Beamline-Answers").unwrap().clone());
    rig.router
        .jetstream()
        .publish_with_headers(ROUTE, headers, payload.to_string().into())
        .await
        .unwrap()
        .await
        .unwrap();
    let results = rig.router.results(&payload, 2).await;
    assert_eq!(results[1], first[0], "the recorded bytes");
    assert_eq!(rig.peer.hits("/ok/once").len(), 1);
}

#[tokio::test]
async fn a_replay_of_passed_on_work_runs_again() {
    let rig = Rig::start(&[]).await;
    let _gpu = only_gpu(rig.another("gpu-1")).start(&rig.nats).await;
    passes_on(&rig, "first").await;
    let payload = for_gpu("a1", rig.call("/ok/again"));
    rig.router.submit(&payload).await;
    rig.router.results(&payload, 1).await;
    let mut headers = HeaderMap::new();
    headers.insert("Beamline-Replay", "true");
    rig.router.submit_with(&payload, headers).await;
    rig.router.results(&payload, 2).await;
    assert_eq!(rig.peer.hits("/ok/again").len(), 2);
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
