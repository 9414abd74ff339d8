//! Consumers that somebody else has made or changed: what hands out nothing of use is named and waited for, what gives
//! little is asked for little.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use async_nats::datetime;
use async_nats::jetstream::consumer::{AckPolicy, PriorityPolicy, ReplayPolicy, pull, push};
use async_nats::jetstream::stream::Stream;
use beamline_tests::policy::Policy;
use beamline_tests::rig::Rig;
use beamline_tests::router::{ASSIGN, CANCEL, assignment, cancel, json as read};
use beamline_tests::wait::{SOON, until, within};
use beamline_tests::worker::Worker;
use futures::StreamExt;
use serde_json::{Value, json};

const INTAKE: &str = "caf-workers";

/// As a worker makes it.
fn good() -> pull::Config {
    pull::Config {
        durable_name: Some(INTAKE.to_owned()),
        filter_subject: ASSIGN.to_owned(),
        ack_policy: AckPolicy::Explicit,
        ack_wait: Duration::from_secs(10),
        max_deliver: -1,
        max_ack_pending: 50_000,
        max_waiting: 16_384,
        ..pull::Config::default()
    }
}

fn good_control() -> pull::Config {
    let durable_name = Some("caf-control".to_owned());
    pull::Config { durable_name, filter_subject: String::new(), max_ack_pending: 0, ..good() }
}

/// Of the tenant acme.
fn good_parked() -> pull::Config {
    pull::Config {
        durable_name: Some("acme".to_owned()),
        filter_subject: "caf.exec.parked.v1.acme".to_owned(),
        inactive_threshold: Duration::from_secs(3600),
        ..good()
    }
}

fn changed(mut config: pull::Config, change: fn(&mut pull::Config)) -> pull::Config {
    change(&mut config);
    config
}

async fn make_anew(stream: &Stream, config: pull::Config) {
    let _ = stream.delete_consumer(config.durable_name.as_ref().unwrap()).await;
    stream.create_consumer(config).await.unwrap();
}

/// The next worker of a rig, at consumers that it need not like.
fn join(rig: &Rig, name: &str) -> Worker {
    rig.another(name).flag(format!("--nats-url={}", rig.nats.url())).spawn()
}

/// Not ready for this setting, and the log says so too.
async fn names(worker: &Worker, stream: &str, consumer: &str, setting: &str) {
    let says = format!("consumer {consumer} of stream {stream} has {setting}");
    let reasons = worker.unready(&says).await;
    assert!(reasons.contains("change it, or delete it and it is made anew"), "{reasons}");
    until("the log says so", async || worker.lines().iter().any(|line| line.contains(&says))).await;
}

async fn is_done(rig: &Rig, payload: &Value) {
    let result = rig.router.result(payload).await;
    assert_eq!(result.get("status"), Some(&json!("success")), "{result}");
    let story = rig.router.story(payload);
    assert!(story.letters.is_empty() && story.verdicts.iter().all(|said| said["status"] == "accepted"), "{story:?}");
}

#[tokio::test]
async fn a_consumer_that_hands_out_nothing_of_use_is_named_and_waited_for() {
    let mut rig = Rig::start(&[]).await;
    rig.worker.kill();
    let stream = rig.router.stream("CAF_EXEC_ASSIGN").await;
    let change = |change| changed(good(), change);
    let cases = [
        ("headers_only true, but the contract needs false", change(|config| config.headers_only = true)),
        ("pause_until 2100-01-01T00:00:00Z, but the contract needs none", {
            change(|config| config.pause_until = datetime::parse_rfc3339("2100-01-01T00:00:00Z").ok())
        }),
        ("priority_policy Overflow, but the contract needs None", {
            change(|config| {
                (config.priority_policy, config.priority_groups) = (PriorityPolicy::Overflow, vec!["jobs".to_owned()]);
            })
        }),
        ("replay_policy Original, but", change(|config| config.replay_policy = ReplayPolicy::Original)),
        ("backoff [10s, 20s], but", { change(|config| config.backoff = [10, 20].map(Duration::from_secs).to_vec()) }),
    ];
    for (number, (setting, config)) in cases.into_iter().enumerate() {
        make_anew(&stream, config).await;
        let worker = join(&rig, &format!("waits-{number}"));
        names(&worker, "CAF_EXEC_ASSIGN", INTAKE, setting).await;
        let payload = assignment("acme", &format!("waits-{number}"), rig.put("waits", "x"));
        rig.router.submit(&payload).await;
        make_anew(&stream, good()).await;
        worker.ready().await;
        is_done(&rig, &payload).await;
    }
}

#[tokio::test]
async fn what_is_changed_under_a_running_worker_loses_nothing_until_it_is_mended() {
    let rig = Rig::start(&[]).await;
    let stream = rig.router.stream("CAF_EXEC_ASSIGN").await;

    stream.update_consumer(pull::Config { headers_only: true, ..good() }).await.unwrap();
    let bare = assignment("acme", "bare", rig.put("bare", "x"));
    rig.router.submit(&bare).await;
    names(&rig.worker, "CAF_EXEC_ASSIGN", INTAKE, "headers_only true").await;
    stream.update_consumer(good()).await.unwrap();
    rig.worker.ready().await;
    is_done(&rig, &bare).await;

    stream.pause_consumer(INTAKE, datetime::parse_rfc3339("2100-01-01T00:00:00Z").unwrap()).await.unwrap();
    let paused = assignment("acme", "paused", rig.put("paused", "x"));
    rig.router.submit(&paused).await;
    names(&rig.worker, "CAF_EXEC_ASSIGN", INTAKE, "pause_until 2100-01-01T00:00:00Z").await;
    stream.resume_consumer(INTAKE).await.unwrap();
    is_done(&rig, &paused).await;
    rig.worker.ready().await;

    stream.delete_consumer(INTAKE).await.unwrap();
    let pushes = push::Config {
        durable_name: good().durable_name,
        deliver_subject: "somewhere".to_owned(),
        filter_subject: ASSIGN.to_owned(),
        ack_policy: AckPolicy::Explicit,
        ack_wait: Duration::from_secs(10),
        max_deliver: -1,
        ..push::Config::default()
    };
    // The worker makes it anew, unless somebody else is faster.
    within(SOON, "somebody else is faster", async || {
        let made = stream.create_consumer(pushes.clone()).await;
        if made.is_err() {
            stream.delete_consumer(INTAKE).await.unwrap();
        }
        made.ok()
    })
    .await;
    rig.worker.unready("consumer caf-workers of stream CAF_EXEC_ASSIGN has deliver_subject Some(\"somewhere\")").await;
    stream.delete_consumer(INTAKE).await.unwrap();
    rig.worker.ready().await;
    let last = assignment("acme", "last", rig.put("last", "x"));
    rig.router.submit(&last).await;
    is_done(&rig, &last).await;
}

#[tokio::test]
async fn what_open_pulls_bring_while_their_consumer_is_closed_is_taken_up() {
    let rig = Rig::start(&["--sandbox-mode"]).await;
    let stream = rig.router.stream("CAF_EXEC_ASSIGN").await;
    stream.update_consumer(pull::Config { backoff: vec![Duration::from_secs(10)], ..good() }).await.unwrap();
    let job = json!({"type": "http.request", "method": "GET", "url": "http://peer.example/ok"});
    let mut submitted = 0;
    let is_closed = async || rig.worker.get("/readyz").await.is_some_and(|(_, reasons)| reasons.contains("backoff"));
    within(SOON, "it is closed", async || {
        for _ in 0..100 {
            let payload = assignment("acme", &format!("{submitted}"), job.clone());
            rig.router.client().publish(ASSIGN, payload.to_string().into()).await.unwrap();
            submitted += 1;
        }
        is_closed().await.then_some(())
    })
    .await;
    let all_is_settled = async || {
        let info = rig.router.consumer().await?;
        (info.num_ack_pending == 0 && info.num_redelivered == 0).then_some(())
    };
    within(Duration::from_secs(5), "what had come is done, before anybody holds it no more", all_is_settled).await;
    stream.update_consumer(good()).await.unwrap();
    rig.worker.ready().await;
    within(SOON * 4, "the rest is done", async || {
        (rig.router.stream("CAF_EXEC_ASSIGN").await.cached_info().state.messages == 0).then_some(())
    })
    .await;
    assert_eq!(rig.worker.metric("worker_redeliveries_total").await, 0.0);
    assert_eq!(rig.router.stream("CAF_EXEC_RESULT").await.cached_info().state.messages, submitted);
}

#[tokio::test]
async fn a_consumer_of_parked_work_that_is_not_as_it_must_be_is_named_and_holds_up_its_tenant_alone() {
    let at_one = "quotas: {concurrent: 1}";
    let policy = Policy::new(&format!("tenants: {{named: [{{id: acme, {at_one}}}, {{id: other, {at_one}}}]}}"));
    let rig = Rig::start(&[&policy.flag()]).await;
    let stream = rig.router.stream("CAF_EXEC_PARKED").await;
    let change = |change| changed(good_parked(), change);
    let cases = [
        // Whoever has just looked would not notice for some seconds.
        ("ack_wait 2s", change(|config| config.ack_wait = Duration::from_secs(2))),
        ("headers_only true", change(|config| config.headers_only = true)),
        ("pause_until 2100", {
            change(|config| config.pause_until = datetime::parse_rfc3339("2100-01-01T00:00:00Z").ok())
        }),
    ];
    for (number, (setting, config)) in cases.into_iter().enumerate() {
        let gate = format!("unit-{number}");
        let of = |tenant: &str, what: &str| {
            let path = if what == "runs" { format!("/gate/{gate}") } else { "/ok".to_owned() };
            assignment(tenant, &format!("{what}-{number}"), rig.call(&path))
        };
        for tenant in ["acme", "other"] {
            rig.router.submit(&of(tenant, "runs")).await;
        }
        rig.peer.arrived(&format!("/gate/{gate}"), 2).await;
        make_anew(&stream, config).await;
        for tenant in ["acme", "other"] {
            rig.router.submit(&of(tenant, "waits")).await;
        }
        until("both are parked", async || rig.router.parked().await == 2).await;
        rig.peer.open(&gate);
        names(&rig.worker, "CAF_EXEC_PARKED", "acme", setting).await;
        is_done(&rig, &of("other", "waits")).await;
        assert!(rig.router.story(&of("acme", "waits")).results.is_empty(), "{setting}");
        make_anew(&stream, good_parked()).await;
        is_done(&rig, &of("acme", "waits")).await;
        rig.worker.ready().await;
    }
}

#[tokio::test]
async fn parked_work_that_comes_without_its_payload_is_judged_when_it_comes_whole() {
    let policy = Policy::new("tenants: {named: [{id: acme, quotas: {concurrent: 1}}]}");
    let rig = Rig::start(&[&policy.flag()]).await;
    let stream = rig.router.stream("CAF_EXEC_PARKED").await;
    let running = assignment("acme", "running", rig.call("/gate/unit"));
    rig.router.submit(&running).await;
    rig.peer.arrived("/gate/unit", 1).await;
    let parked = ["one", "two"].map(|id| assignment("acme", id, rig.call(&format!("/gate/{id}"))));
    for payload in &parked {
        rig.router.submit(payload).await;
    }
    until("both are parked", async || rig.router.parked().await == 2).await;
    // The worker has looked at it and found nothing wrong.
    rig.peer.open("unit");
    rig.peer.arrived("/gate/one", 1).await;
    rig.peer.open("two");
    stream.update_consumer(pull::Config { headers_only: true, ..good_parked() }).await.unwrap();
    rig.peer.open("one");
    names(&rig.worker, "CAF_EXEC_PARKED", "acme", "headers_only true").await;
    stream.update_consumer(good_parked()).await.unwrap();
    for payload in &parked {
        is_done(&rig, payload).await;
    }
    rig.worker.ready().await;
}

#[tokio::test]
async fn control_messages_without_their_payloads_are_kept_until_they_come_whole() {
    let rig = Rig::start(&[]).await;
    let stream = rig.router.stream("CAF_EXEC_CONTROL").await;
    stream.update_consumer(pull::Config { headers_only: true, ..good_control() }).await.unwrap();
    let payload = assignment("acme", "early", rig.call("/ok"));
    rig.router.client().publish(CANCEL, cancel("acme", "early").to_string().into()).await.unwrap();
    names(&rig.worker, "CAF_EXEC_CONTROL", "caf-control", "headers_only true").await;
    assert_eq!(rig.router.stream("CAF_EXEC_CONTROL").await.cached_info().state.messages, 1, "it is not settled");
    stream.update_consumer(good_control()).await.unwrap();
    until("the cancel is kept", async || rig.router.last("KV_caf-cancel", "$KV.caf-cancel.acme.early").await.is_some())
        .await;
    rig.router.submit(&payload).await;
    assert_eq!(rig.router.result(&payload).await["error"]["code"], 5001);
    rig.worker.ready().await;
}

#[tokio::test]
async fn an_empty_message_that_says_it_has_a_size_is_refused_like_any_other() {
    let rig = Rig::start(&[]).await;
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Nats-Msg-Size", "100");
    rig.router.submit_bytes_with("", headers).await;
    until("it is settled", async || rig.router.stream("CAF_EXEC_ASSIGN").await.cached_info().state.messages == 0).await;
    assert_eq!(rig.router.all("CAF_EXEC_DLQ", ">").await.len(), 1);
    rig.worker.ready().await;
}

#[tokio::test]
async fn a_consumer_that_gives_little_for_each_pull_is_asked_for_no_more() {
    let mut rig = Rig::start(&[]).await;
    let (intake, control) = (rig.router.stream("CAF_EXEC_ASSIGN").await, rig.router.stream("CAF_EXEC_CONTROL").await);
    let little = |config| pull::Config { max_batch: 1, max_expires: Duration::from_millis(700), ..config };
    let jobs = async |rig: &Rig, round: &str| {
        let payloads: Vec<_> =
            (0..60).map(|number| assignment("acme", &format!("{round}-{number}"), rig.call("/ok"))).collect();
        for payload in &payloads {
            rig.router.submit(payload).await;
        }
        for payload in &payloads {
            is_done(rig, payload).await;
        }
    };
    // It is told by the pulls that are refused.
    intake.update_consumer(little(good())).await.unwrap();
    control.update_consumer(little(good_control())).await.unwrap();
    jobs(&rig, "changed").await;
    rig.worker.ready().await;

    // And looks at what is there when it joins.
    rig.worker.kill();
    let asked = "$JS.API.CONSUMER.MSG.NEXT.*.*";
    let pulls = rig.router.client().subscribe(asked).await.unwrap();
    rig.router.client().flush().await.unwrap();
    let second = rig.another("worker-2").start(&rig.nats).await;
    jobs(&rig, "joined").await;
    let running = assignment("acme", "running", rig.call("/gate/never"));
    rig.router.submit(&running).await;
    rig.peer.arrived("/gate/never", 1).await;
    rig.router.client().publish(CANCEL, cancel("acme", "running").to_string().into()).await.unwrap();
    assert_eq!(rig.router.result(&running).await["error"]["code"], 5001);
    until("the cancel is settled", async || {
        rig.router.stream("CAF_EXEC_CONTROL").await.cached_info().state.messages == 0
    })
    .await;
    let pulls: Vec<Value> = pulls.take(60).map(|pull| read(&pull.payload)).collect().await;
    for pull in &pulls {
        let expires = Duration::from_nanos(pull["expires"].as_u64().unwrap_or_default());
        assert!(pull["batch"] == json!(1) && expires <= Duration::from_millis(700), "{pull}");
    }
    second.ready().await;
}

#[tokio::test]
async fn workers_that_a_consumer_has_no_room_for_say_so_and_take_their_turn() {
    let mut rig = Rig::start(&[]).await;
    rig.worker.kill();
    make_anew(&rig.router.stream("CAF_EXEC_ASSIGN").await, pull::Config { max_waiting: 1, ..good() }).await;
    let workers = [join(&rig, "worker-2"), join(&rig, "worker-3")];
    for worker in &workers {
        worker.ready().await;
    }
    let says = "pulls found no room: raise max_waiting of the consumer";
    until("one of them says so", async || {
        workers.iter().any(|worker| worker.lines().iter().any(|line| line.contains(says)))
    })
    .await;
    let payloads: Vec<_> = (0..20).map(|number| assignment("acme", &format!("{number}"), rig.call("/ok"))).collect();
    for payload in &payloads {
        rig.router.submit(payload).await;
    }
    for payload in &payloads {
        is_done(&rig, payload).await;
    }
}
