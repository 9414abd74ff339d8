//! Core mode: each assignment at most once, through a queue group. What a worker has accepted is answered all the same.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_nats::Subscriber;
use beamline_tests::nats::NatsServer;
use beamline_tests::policy::Policy;
use beamline_tests::rig::Rig;
use beamline_tests::router::{self, CANCEL, Kind, Router, assignment, json as read, replay};
use beamline_tests::wait::{SOON, until, within};
use beamline_tests::worker::{Setup, Worker};
use futures::{FutureExt, StreamExt};
use serde_json::{Value, json};

const CORE: &str = "--nats-delivery=core";
/// One slot, and so a look-ahead of one.
const TINY: [&str; 3] = [CORE, "--cpu-pool-size=0", "--io-pool-size=1"];

async fn another(rig: &Rig, name: &str) -> Worker {
    rig.another(name).flag(CORE).start(&rig.nats).await
}

async fn health(worker: &Worker) -> Value {
    let (_, body) = worker.get("/_health").await.unwrap();
    read(body.as_bytes())
}

fn ask(id: &str, timeout_ms: u64) -> Value {
    let job = json!({"type": "human.approval", "prompt": "?", "approvers": ["ann", "bob"], "timeout_ms": timeout_ms});
    assignment("acme", id, job)
}

async fn say(router: &Router, of: &Value, approver: &str) {
    let id = &of["assignment_id"];
    let answer = json!({"assignment_id": id, "tenant_id": "acme", "approver": approver, "approved": true});
    router.client().publish("caf.human.response.v1", answer.to_string().into()).await.unwrap();
    router.client().flush().await.unwrap();
}

async fn hear(router: &Router, subject: &'static str) -> Subscriber {
    let heard = router.client().subscribe(subject).await.unwrap();
    router.client().flush().await.unwrap();
    heard
}

fn cancel(id: &str) -> String {
    router::cancel("acme", id).to_string()
}

#[track_caller]
fn is_overload(error: &Value) {
    assert_eq!((&error["code"], &error["retryable"]), (&json!(4002), &json!(true)), "{error}");
}

/// Everything that is said because of what has happened so far has been heard.
async fn silence(router: &Router) {
    router.client().flush().await.unwrap();
}

#[tokio::test]
async fn every_kind_of_block_works_and_no_record_is_kept() {
    let rig = Rig::start(&[CORE]).await;
    rig.database("acme", "CREATE TABLE t (x TEXT); INSERT INTO t VALUES ('1')");
    let connection = format!("sqlite://{}", rig.path("db.sqlite"));
    let put = assignment("acme", "put", rig.put("a.txt", "hello"));
    rig.router.send(&put).await;
    assert_eq!(rig.router.result(&put).await["status"], "success");
    let others = [
        assignment("acme", "get", json!({"type": "fs.get", "path": rig.path("a.txt")})),
        assignment("acme", "call", rig.call("/ok")),
        assignment(
            "acme",
            "sql",
            json!({"type": "sql.query", "connection_string": connection, "query": "SELECT x FROM t"}),
        ),
    ];
    for payload in &others {
        rig.router.send(payload).await;
        assert_eq!(rig.router.result(payload).await["status"], "success");
        assert_eq!(rig.router.verdict(payload).await["status"], "accepted");
    }
    let heard = rig.router.heard();
    let results = heard.iter().filter(|heard| heard.kind == Kind::Result);
    let ids: BTreeSet<_> = results.map(|heard| heard.headers.get("Nats-Msg-Id").expect("an id").to_string()).collect();
    assert_eq!(ids.len(), 4, "{ids:?}");
    assert!(ids.iter().all(|id| id.starts_with("core,")), "{ids:?}");
    for stream in ["CAF_EXEC_ASSIGN", "CAF_EXEC_RESULT"] {
        assert!(rig.router.jetstream().get_stream(stream).await.is_err(), "nobody needs {stream}");
    }
    assert_eq!(health(&rig.worker).await["delivery"], "core");
}

#[tokio::test]
async fn two_workers_share_the_work_and_each_assignment_runs_once() {
    let rig = Rig::start(&[CORE]).await;
    let _second = another(&rig, "worker-2").await;
    let payloads: Vec<_> = (0..40).map(|n| assignment("acme", &n.to_string(), rig.call("/ok"))).collect();
    for payload in &payloads {
        rig.router.send(payload).await;
    }
    let mut workers = BTreeSet::new();
    for payload in &payloads {
        let result = rig.router.result(payload).await;
        assert_eq!(result["status"], "success", "{result}");
        workers.insert(result["metadata"]["worker_id"].to_string());
    }
    silence(&rig.router).await;
    for payload in &payloads {
        let story = rig.router.story(payload);
        assert_eq!((story.verdicts.len(), story.results.len()), (1, 1), "{story:?}");
    }
    assert_eq!((rig.peer.hits("/ok").len(), workers.len()), (40, 2), "{workers:?}");
}

#[tokio::test]
async fn each_queue_group_is_given_all_that_is_published() {
    let rig = Rig::start(&[CORE]).await;
    let night_shift = rig.another("worker-2").flag(CORE).env("WORKER_NATS_QUEUE_GROUP", "night-shift");
    let _night_shift = night_shift.start(&rig.nats).await;
    let payload = assignment("acme", "both", rig.call("/ok"));
    rig.router.send(&payload).await;
    let results = rig.router.results(&payload, 2).await;
    let workers: BTreeSet<_> = results.iter().map(|result| read(result)["metadata"]["worker_id"].to_string()).collect();
    assert_eq!(workers.len(), 2, "{workers:?}");
}

#[tokio::test]
async fn a_worker_without_room_says_so_and_takes_work_again_when_it_has_some() {
    let rig = Rig::start(&TINY).await;
    let held = ["running", "waiting"].map(|id| assignment("acme", id, rig.call("/gate/room")));
    rig.router.send(&held[0]).await;
    rig.peer.arrived("/gate/room", 1).await;
    rig.router.send(&held[1]).await;
    assert_eq!(rig.router.verdict(&held[1]).await["status"], "accepted");
    let surplus = assignment("acme", "surplus", rig.call("/ok"));
    rig.router.send(&surplus).await;
    let verdict = rig.router.verdict(&surplus).await;
    assert_eq!(verdict["status"], "rejected");
    is_overload(&verdict["error"]);
    // What is wrong is wrong, also where there is no room for it.
    let invalid = assignment("acme", "invalid", json!({"type": "http.request"}));
    rig.router.send(&invalid).await;
    assert_eq!(rig.router.verdict(&invalid).await["error"]["code"], 1002);
    rig.peer.open("room");
    for payload in &held {
        assert_eq!(rig.router.result(payload).await["status"], "success");
    }
    rig.router.send(&surplus).await;
    assert_eq!(rig.router.result(&surplus).await["status"], "success");
    let story = rig.router.story(&surplus);
    assert_eq!((story.verdicts.len(), story.results.len(), story.letters.len()), (2, 1, 0), "{story:?}");
}

#[tokio::test]
async fn what_is_cancelled_before_it_comes_ends_so_where_there_is_no_room_for_it() {
    let rig = Rig::start(&TINY).await;
    let held = ["running", "waiting"].map(|id| assignment("acme", id, rig.call("/gate/full")));
    rig.router.send(&held[0]).await;
    rig.peer.arrived("/gate/full", 1).await;
    rig.router.send(&held[1]).await;
    rig.router.verdict(&held[1]).await;
    let surplus = assignment("acme", "surplus", rig.call("/ok"));
    rig.router.client().publish(CANCEL, cancel("surplus").into()).await.unwrap();
    rig.router.send(&surplus).await;
    let result = rig.router.result(&surplus).await;
    assert_eq!((&result["status"], &result["error"]["code"]), (&json!("cancelled"), &json!(5001)), "{result}");
    rig.peer.open("full");
    for payload in &held {
        assert_eq!(rig.router.result(payload).await["status"], "success");
    }
    assert!(rig.peer.hits("/ok").is_empty());
}

#[tokio::test]
async fn work_over_its_tenants_ceiling_is_answered_with_4002_and_others_go_on() {
    let policy = Policy::new("tenants: {named: [{id: acme, quotas: {concurrent: 1}}]}");
    let rig = Rig::start(&[CORE, &policy.flag()]).await;
    let running = assignment("acme", "running", rig.call("/gate/unit"));
    rig.router.send(&running).await;
    rig.peer.arrived("/gate/unit", 1).await;
    let (over, other) = (assignment("acme", "over", rig.call("/ok")), assignment("other", "other", rig.call("/ok")));
    rig.router.send(&over).await;
    rig.router.send(&other).await;
    is_overload(&rig.router.result(&over).await["error"]);
    assert_eq!(rig.router.result(&other).await["status"], "success");
    rig.peer.open("unit");
    assert_eq!(rig.router.result(&running).await["status"], "success");
    rig.router.send(&over).await;
    within(SOON, "it runs now", async || {
        let story = rig.router.story(&over);
        story.results.iter().any(|result| read(result)["status"] == "success").then_some(())
    })
    .await;
    assert_eq!(rig.peer.hits("/ok").len(), 2);
}

#[tokio::test]
async fn a_tenant_at_its_share_of_the_slots_has_no_more_waiting_than_there_is_room_for() {
    let policy = Policy::new("tenants: {}");
    // Three of the slots are for one tenant, and four may wait.
    let rig = Rig::start(&[CORE, "--cpu-pool-size=0", "--io-pool-size=4", &policy.flag()]).await;
    let job = |tenant: &str, number: usize| assignment(tenant, &format!("{tenant}-{number}"), rig.call("/gate/share"));
    let mut accepted = Vec::new();
    for number in 0..20 {
        let payload = job("acme", number);
        rig.router.send(&payload).await;
        let verdict = rig.router.verdict(&payload).await;
        match verdict["status"].as_str() {
            Some("accepted") => accepted.push(payload),
            _ => is_overload(&verdict["error"]),
        }
    }
    assert_eq!(accepted.len(), 7);
    let other = job("globex", 1);
    rig.router.send(&other).await;
    rig.peer.arrived("/gate/share", 4).await;
    assert_eq!(rig.router.verdict(&other).await["status"], "accepted", "it takes no room of others");
    accepted.push(other);

    let burst: Vec<_> = (100..200).map(|number| job("initech", number)).collect();
    for payload in &burst {
        rig.router.send(payload).await;
    }
    for payload in burst {
        let verdict = rig.router.verdict(&payload).await;
        if verdict["status"] == "accepted" {
            accepted.push(payload);
        } else {
            is_overload(&verdict["error"]);
        }
    }
    assert!(
        accepted.len() <= 8 + 12,
        "{} are accepted: slots and look-ahead, and a tenant's look-ahead",
        accepted.len()
    );
    rig.peer.open("share");
    for payload in &accepted {
        assert_eq!(rig.router.result(payload).await["status"], "success");
    }
}

#[tokio::test]
async fn no_burst_oversteps_a_ceiling_or_a_budget() {
    let policy = Policy::new(
        "tenants: {named: [{id: acme, quotas: {concurrent: 3}}, {id: globex, quotas: {executions: 5, window: 31days}}]}",
    );
    let rig = Rig::start(&[CORE, "--io-pool-size=16", &policy.flag()]).await;
    let _second =
        rig.another("worker-2").flag(CORE).flag("--io-pool-size=16").flag(policy.flag()).start(&rig.nats).await;
    let of = |tenant: &str, path: &str| -> Vec<_> {
        (0..100).map(|number| assignment(tenant, &format!("{tenant}-{number}"), rig.call(path))).collect()
    };
    let (bounded, budgeted) = (of("acme", "/gate/ceiling"), of("globex", "/ok"));
    for payload in bounded.iter().chain(&budgeted) {
        rig.router.send(payload).await;
    }
    rig.peer.arrived("/gate/ceiling", 3).await;
    let is_open = |payload: &Value| {
        let story = rig.router.story(payload);
        story.results.is_empty() && !story.verdicts.iter().any(|verdict| verdict["status"] == "rejected")
    };
    until("all but three are answered", async || {
        bounded.iter().chain(&budgeted).filter(|payload| is_open(payload)).count() == 3
    })
    .await;
    assert_eq!(rig.peer.hits("/gate/ceiling").len(), 3);
    let code = |payload: &Value| rig.router.story(payload).verdicts.first().unwrap()["error"]["code"].as_u64();
    let codes: BTreeSet<_> = budgeted.iter().map(code).collect();
    assert!(codes.contains(&Some(2004)), "{codes:?}");
    assert_eq!(rig.peer.hits("/ok").len(), 5);
    rig.peer.open("ceiling");
    until("all are answered", async || !bounded.iter().any(is_open)).await;
}

#[tokio::test]
async fn what_runs_for_longer_than_a_lease_keeps_its_place_below_a_ceiling_and_leaves_it_when_it_ends() {
    let policy = Policy::new("tenants: {named: [{id: acme, quotas: {concurrent: 1}}]}");
    let rig = Rig::start(&[CORE, &policy.flag()]).await;
    let _second = rig.another("worker-2").flag(CORE).flag(policy.flag()).start(&rig.nats).await;
    let mut job = rig.call("/gate/lease");
    job["timeout_ms"] = json!(300_000);
    let long = assignment("acme", "long", job);
    rig.router.send(&long).await;
    let holder = rig.router.verdict(&long).await["worker_id"].clone();
    rig.peer.arrived("/gate/lease", 1).await;

    let mut sent = 0;
    let mut probe = async || {
        sent += 1;
        let probe = assignment("acme", &format!("{sent}"), rig.call("/ok"));
        rig.router.send(&probe).await;
        (rig.router.verdict(&probe).await["worker_id"].clone(), rig.router.result(&probe).await)
    };
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(40) {
        let (_, result) = probe().await;
        assert_eq!(result["status"], "error", "after {:?}: {result}", began.elapsed());
        is_overload(&result["error"]);
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    rig.peer.open("lease");
    assert_eq!(rig.router.result(&long).await["status"], "success");
    // It is given back by a worker that has not used it for a while; with every other probe it is used again.
    within(Duration::from_secs(30), "the other worker has the place", async || {
        tokio::time::sleep(Duration::from_millis(2500)).await;
        let (worker, result) = probe().await;
        (worker != holder && result["status"] == "success").then_some(())
    })
    .await;
}

#[tokio::test]
async fn told_to_stop_a_worker_does_what_it_has_accepted() {
    let mut rig = Rig::start(&TINY).await;
    let held = ["running", "waiting"].map(|id| assignment("acme", id, rig.call("/gate/drain")));
    rig.router.send(&held[0]).await;
    rig.peer.arrived("/gate/drain", 1).await;
    rig.router.send(&held[1]).await;
    rig.router.verdict(&held[1]).await;
    rig.worker.terminate();
    rig.worker.unready("draining").await;
    rig.peer.open("drain");
    for payload in &held {
        assert_eq!(rig.router.result(payload).await["status"], "success");
    }
    assert_eq!(rig.worker.ended().await, Some(0));
}

#[tokio::test]
async fn what_a_stopping_worker_cannot_end_is_answered_with_4002() {
    let mut rig = Rig::start(&[&TINY[..], &["--drain-timeout=500ms"]].concat()).await;
    let held = ["running", "waiting"].map(|id| assignment("acme", id, rig.call("/gate/never")));
    rig.router.send(&held[0]).await;
    rig.peer.arrived("/gate/never", 1).await;
    rig.router.send(&held[1]).await;
    rig.router.verdict(&held[1]).await;
    rig.worker.terminate();
    for (payload, attempts) in held.iter().zip([1, 0]) {
        let result = rig.router.result(payload).await;
        assert_eq!((&result["status"], &result["metadata"]["attempts"]), (&json!("error"), &json!(attempts)));
        is_overload(&result["error"]);
    }
    assert_eq!(rig.worker.ended().await, Some(0));
    assert!(rig.router.heard().iter().all(|heard| heard.kind != Kind::Letter));
}

/// The group gives a leaving worker its part until the broker has heard that it leaves.
#[tokio::test]
async fn a_worker_that_leaves_under_load_loses_nothing() {
    const PACE: Duration = Duration::from_millis(1);
    let mut rig = Rig::at(NatsServer::without_jetstream(), &[CORE]).await;
    let _second = another(&rig, "worker-2").await;
    let (client, stop) = (rig.router.client().clone(), Arc::new(AtomicBool::new(false)));
    let stopped = Arc::clone(&stop);
    let publishing = tokio::spawn(async move {
        let mut n = 0;
        while !stopped.load(Ordering::Relaxed) {
            // Refused at the door: what is answered costs next to nothing.
            let payload = assignment("acme", &n.to_string(), json!({"type": "http.request"}));
            client.publish("caf.exec.assign.v1", payload.to_string().into()).await.unwrap();
            n += 1;
            if n % 10 == 0 {
                tokio::time::sleep(PACE).await;
            }
        }
        n
    });
    for pull in [false, true].repeat(6) {
        let word = json!({"pull": pull}).to_string();
        rig.router.client().request("caf.worker.control.v1.worker-1", word.into()).await.expect("a report");
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    rig.worker.terminate();
    assert_eq!(rig.worker.ended().await, Some(0));
    stop.store(true, Ordering::Relaxed);
    let published = publishing.await.unwrap();
    within(SOON * 2, "a verdict on each", async || {
        let heard = rig.router.heard();
        let verdicts = heard.iter().filter(|heard| heard.kind == Kind::Verdict);
        let known: BTreeSet<_> = verdicts.filter_map(|heard| heard.key.clone()).collect();
        tokio::time::sleep(Duration::from_millis(200)).await;
        (known.len() == published).then_some(())
    })
    .await;
}

#[tokio::test]
async fn without_jetstream_all_but_approvals_works() {
    let rig = Rig::at(NatsServer::without_jetstream(), &[CORE]).await;
    let call = assignment("acme", "call", rig.call("/ok"));
    rig.router.send(&call).await;
    assert_eq!(rig.router.result(&call).await["status"], "success");

    let approval = ask("approval", 60_000);
    rig.router.send(&approval).await;
    let verdict = rig.router.verdict(&approval).await;
    assert_eq!((&verdict["status"], &verdict["error"]["code"]), (&json!("rejected"), &json!(2002)), "{verdict}");
    assert!(verdict["message"].as_str().unwrap().contains("JetStream"), "{verdict}");
    assert_eq!(verdict["error"]["retryable"], false);
    assert_eq!(rig.router.letter(&approval).await["stage"], "admit");

    let missing = assignment("acme", "missing", json!({"type": "fs.get", "path": rig.path("missing")}));
    rig.router.send(&missing).await;
    assert_eq!(rig.router.result(&missing).await["error"]["code"], 2001);
    let letter = rig.router.letter(&missing).await;
    assert_eq!((&letter["stage"], &letter["assignment"]), (&json!("execute"), &missing));

    let running = assignment("acme", "running", rig.call("/gate/cancel"));
    rig.router.send(&running).await;
    rig.peer.arrived("/gate/cancel", 1).await;
    for id in ["running", "later"] {
        let answer = rig.router.client().request(CANCEL, cancel(id).into()).await.expect("an answer");
        assert_eq!(read(&answer.payload)["outcome"], "recorded");
    }
    assert_eq!(rig.router.result(&running).await["error"]["code"], 5001);
    let later = assignment("acme", "later", rig.call("/ok"));
    rig.router.send(&later).await;
    assert_eq!(rig.router.result(&later).await["error"]["code"], 5001);
    assert_eq!(rig.worker.get("/readyz").await.unwrap().0, 200);
    assert_eq!(rig.peer.hits("/ok").len(), 1);
}

#[tokio::test]
async fn when_the_broker_has_got_jetstream_approvals_work_without_a_restart() {
    let mut rig = Rig::at(NatsServer::without_jetstream(), &[CORE]).await;
    rig.nats.restart_with("");
    let router = Router::connect(&rig.nats.url()).await;
    let approval = ask("approval", 60_000);
    within(SOON, "the approval is accepted", async || {
        router.send(&approval).await;
        let story = router.story(&approval);
        story.verdicts.iter().any(|verdict| verdict["status"] == "accepted").then_some(())
    })
    .await;
    say(&router, &approval, "ann").await;
    assert_eq!(router.result(&approval).await["result"]["approver"], "ann");
}

#[tokio::test]
async fn an_approval_is_answered_once_whoever_heard_its_answer() {
    let mut rig = Rig::start(&[CORE]).await;
    let _second = another(&rig, "worker-2").await;
    let mut announced = hear(&rig.router, "caf.human.request.v1").await;
    let payloads: Vec<_> = (0..20).map(|n| ask(&format!("a{n}"), 60_000)).collect();
    for payload in &payloads {
        rig.router.send(payload).await;
    }
    for _ in &payloads {
        tokio::time::timeout(SOON, announced.next()).await.expect("somebody is asked");
    }
    // Both answer each, so both workers look at each; and one of them dies of something else.
    for payload in &payloads {
        say(&rig.router, payload, "ann").await;
        say(&rig.router, payload, "bob").await;
    }
    rig.worker.kill();
    for payload in &payloads {
        let result = within(Duration::from_secs(60), "a result", async || {
            rig.router.story(payload).results.first().map(|result| read(result))
        })
        .await;
        assert_eq!(result["status"], "success", "{result}");
    }
    within(Duration::from_secs(60), "no request is left", async || {
        let kept = rig.router.all("KV_caf-approvals", "$KV.caf-approvals.>").await;
        kept.iter().all(|kept| kept.payload.is_empty()).then_some(())
    })
    .await;
    silence(&rig.router).await;
    for payload in &payloads {
        let results: BTreeSet<_> = rig.router.story(payload).results.into_iter().collect();
        assert_eq!(results.len(), 1, "{results:?}");
    }
}

#[tokio::test]
async fn another_job_under_the_id_of_an_open_approval_is_answered_by_it_and_never_runs() {
    let rig = Rig::start(&[CORE]).await;
    let _second = another(&rig, "worker-2").await;
    let approval = ask("taken", 60_000);
    let mut announced = rig.router.client().subscribe("caf.human.request.v1").await.unwrap();
    rig.router.send(&approval).await;
    announced.next().await.expect("somebody is asked");
    let job = assignment("acme", "taken", rig.call("/ok"));
    for _ in 0..10 {
        rig.router.send(&job).await;
    }
    rig.router.learn(&job, "11 verdicts", |story| story.verdicts.get(10).cloned()).await;
    say(&rig.router, &approval, "ann").await;
    assert_eq!(rig.router.result(&approval).await["result"]["approver"], "ann");
    assert!(rig.peer.hits("/").is_empty());
}

#[tokio::test]
async fn an_approval_ends_at_its_deadline() {
    let rig = Rig::start(&[CORE]).await;
    let payload = ask("late", 500);
    rig.router.send(&payload).await;
    let result = rig.router.result(&payload).await;
    assert_eq!((&result["status"], &result["error"]["code"]), (&json!("timeout"), &json!(5002)), "{result}");
}

#[tokio::test]
async fn a_cancel_is_answered_by_one_worker_and_stops_the_work() {
    let rig = Rig::start(&[CORE]).await;
    let _second = another(&rig, "worker-2").await;
    let payload = assignment("acme", "running", rig.call("/gate/cancel"));
    rig.router.send(&payload).await;
    rig.peer.arrived("/gate/cancel", 1).await;
    let inbox = rig.router.client().new_inbox();
    let mut answers = rig.router.client().subscribe(inbox.clone()).await.unwrap();
    rig.router.client().publish_with_reply(CANCEL, inbox, cancel("running").into()).await.unwrap();
    let result = rig.router.result(&payload).await;
    assert_eq!((&result["status"], &result["error"]["code"]), (&json!("cancelled"), &json!(5001)), "{result}");
    let answer = tokio::time::timeout(SOON, answers.next()).await.expect("an answer").unwrap();
    assert_eq!(read(&answer.payload), json!({"assignment_id": "running", "outcome": "recorded"}));
    // A second one would come at the same time as the first.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(answers.next().now_or_never().is_none(), "two workers have answered");
    // It stands for what is published later.
    rig.router.send(&payload).await;
    assert_eq!(read(&rig.router.results(&payload, 2).await[1])["metadata"]["attempts"], 0);
    let headers = replay();
    rig.peer.open("cancel");
    rig.router.send_with(&payload, headers).await;
    assert_eq!(read(&rig.router.results(&payload, 3).await[2])["status"], "success");
}

#[tokio::test]
async fn after_a_restart_of_the_broker_a_worker_works_on() {
    for mut nats in [NatsServer::start(), NatsServer::without_jetstream()] {
        nats.kill();
        nats.restart();
        let mut rig = Rig::at(nats, &[CORE]).await;
        let held = assignment("acme", "held", rig.call("/gate/restart"));
        rig.router.send(&held).await;
        rig.peer.arrived("/gate/restart", 1).await;
        rig.nats.kill();
        rig.worker.unready("NATS disconnected").await;
        rig.peer.open("restart");
        rig.nats.restart();
        rig.worker.ready().await;
        let router = Router::connect(&rig.nats.url()).await;
        let after = assignment("acme", "after", rig.call("/ok"));
        router.send(&after).await;
        assert_eq!(router.result(&after).await["status"], "success");
    }
}

#[tokio::test]
async fn an_outcome_waits_for_the_broker_with_a_directory_over_a_restart_too() {
    let spool = tempfile::tempdir().unwrap();
    let outbox = format!("--outbox-dir={}", spool.path().display());
    let mut rig = Rig::start(&[CORE, &outbox]).await;
    let held = assignment("acme", "held", rig.call("/gate/outbox"));
    rig.router.send(&held).await;
    rig.peer.arrived("/gate/outbox", 1).await;
    rig.nats.kill();
    rig.worker.unready("NATS disconnected").await;
    rig.peer.open("outbox");
    until("the outcome lies on the disk", async || {
        let files = std::fs::read_dir(spool.path()).unwrap().flatten();
        files.map(|file| file.path()).any(|path| path.extension().is_some_and(|extension| extension == "json"))
    })
    .await;
    rig.worker.kill();
    rig.nats.restart();
    let router = Router::connect(&rig.nats.url()).await;
    let again: Setup = rig.another("worker-1").flag(CORE).flag(outbox);
    let _again = again.start(&rig.nats).await;
    assert_eq!(router.result(&held).await["status"], "success");
    let is_empty = || std::fs::read_dir(spool.path()).unwrap().flatten().next().is_none();
    until("the directory is empty", async || is_empty()).await;
}

#[tokio::test]
async fn what_is_wrong_is_refused_as_in_jetstream_mode() {
    let rig = Rig::start(&[CORE]).await;
    let good = || assignment("acme", "x", rig.call("/ok"));
    let with = |id: &str, field: &str, value: Value| {
        let mut payload = good();
        payload["assignment_id"] = json!(id);
        match field.split_once('/') {
            Some((outer, inner)) => payload[outer][inner] = value,
            None => payload[field] = value,
        }
        payload
    };
    for (payload, code, field) in [
        (with("type", "job/type", json!("fs.delete")), 1001, "/job/type"),
        (with("url", "job/url", Value::Null), 1002, "/job/url"),
        (with("request", "request_id", json!("")), 1002, "/request_id"),
        (with("priority", "priority", json!(10)), 1003, "/priority"),
        (with("address", "job/url", json!("http://169.254.169.254/")), 2003, "/job/url"),
        (with("memory", "resources", json!({"memory_mb": 1_000_000})), 2002, "/resources/memory_mb"),
    ] {
        rig.router.send(&payload).await;
        let verdict = rig.router.verdict(&payload).await;
        assert_eq!((&verdict["status"], &verdict["error"]["code"]), (&json!("rejected"), &json!(code)), "{verdict}");
        assert!(verdict["message"].as_str().unwrap().starts_with(field), "{verdict}");
        assert_eq!(rig.router.letter(&payload).await["assignment"], payload);
    }
    for nonsense in [&b"nonsense"[..], b"", b"\xff", b"[]"] {
        rig.router.client().publish("caf.exec.assign.v1", nonsense.to_vec().into()).await.unwrap();
    }
    within(SOON, "every letter is kept", async || {
        (rig.router.all("CAF_EXEC_DLQ", "caf.exec.dlq.v1").await.len() == 10).then_some(())
    })
    .await;
    rig.router.send(&good()).await;
    assert_eq!(rig.router.result(&good()).await["status"], "success");
}

#[tokio::test]
async fn a_copy_of_running_work_is_answered_with_its_result_and_after_the_end_it_runs_again() {
    let rig = Rig::start(&[CORE]).await;
    let payload = assignment("acme", "same", rig.call("/gate/same"));
    for _ in 0..3 {
        rig.router.send(&payload).await;
    }
    rig.peer.arrived("/gate/same", 1).await;
    rig.router.learn(&payload, "three verdicts", |story| (story.verdicts.len() == 3).then_some(())).await;
    let held = async || rig.worker.metric(r#"worker_resource_usage{type="memory_mb"}"#).await;
    until("the worker has all of it", async || held().await > 0.0).await;
    rig.peer.open("same");
    let results = rig.router.results(&payload, 3).await;
    assert!(results.iter().all(|result| *result == results[0]), "{results:?}");
    assert_eq!(rig.peer.hits("/gate/same").len(), 1);
    // A copy that comes before the last of them is done is answered with it too.
    until("the worker is done with all of it", async || held().await == 0.0).await;
    rig.router.send(&payload).await;
    rig.router.results(&payload, 4).await;
    assert_eq!(rig.peer.hits("/gate/same").len(), 2);
}

#[tokio::test]
async fn gpu_work_is_refused_where_there_are_no_gpu_slots_and_runs_from_its_route() {
    let rig = Rig::start(&[CORE]).await;
    let gpu = |id: &str| {
        let mut payload = assignment("acme", id, rig.call("/ok"));
        payload["resources"] = json!({"pool": "gpu"});
        payload
    };
    rig.router.send(&gpu("refused")).await;
    let verdict = rig.router.verdict(&gpu("refused")).await;
    assert_eq!((&verdict["error"]["code"], &verdict["error"]["retryable"]), (&json!(2002), &json!(true)), "{verdict}");
    let slots = ["--cpu-pool-size=0", "--io-pool-size=0", "--gpu-pool-size=1"];
    let setup = slots.iter().fold(rig.another("worker-gpu").flag(CORE), |setup, slot| setup.flag(*slot));
    let _gpu = setup.start(&rig.nats).await;
    rig.router.client().publish("caf.exec.route.gpu.v1", gpu("routed").to_string().into()).await.unwrap();
    let result = rig.router.result(&gpu("routed")).await;
    assert_eq!((&result["status"], &result["metadata"]["worker_id"]), (&json!("success"), &json!("worker-gpu")));
    // Who has only GPU slots is given nothing else.
    for n in 0..20 {
        let payload = assignment("acme", &n.to_string(), rig.call("/ok"));
        rig.router.send(&payload).await;
        assert_eq!(rig.router.result(&payload).await["metadata"]["worker_id"], "worker-1");
    }
}

#[tokio::test]
async fn a_worker_that_is_told_not_to_pull_leaves_the_group_and_comes_back() {
    let rig = Rig::start(&[CORE]).await;
    let second = another(&rig, "worker-2").await;
    let tell = async |pull: bool| {
        let word = json!({"pull": pull}).to_string();
        let told = rig.router.client().request("caf.worker.control.v1.worker-1", word.into()).await.expect("a report");
        assert_eq!(read(&told.payload)["pulling"], pull);
    };
    let run = async |id: String| {
        let payload = assignment("acme", &id, rig.call("/ok"));
        rig.router.send(&payload).await;
        rig.router.result(&payload).await["metadata"]["worker_id"].clone()
    };
    tell(false).await;
    for n in 0..30 {
        assert_eq!(run(format!("away-{n}")).await, "worker-2");
    }
    assert_eq!(rig.worker.get("/readyz").await.unwrap().0, 200);
    tell(true).await;
    // The only member now: what is published after the answer must find it.
    drop(second);
    for n in 0..20 {
        tell(false).await;
        tell(true).await;
        assert_eq!(run(format!("back-{n}")).await, "worker-1");
    }
}

#[tokio::test]
async fn a_dead_letter_that_is_due_survives_its_worker_with_its_outcome() {
    let spool = tempfile::tempdir().unwrap();
    let outbox = format!("--outbox-dir={}", spool.path().display());
    for nats in [NatsServer::start(), NatsServer::without_jetstream()] {
        let mut rig = Rig::at(nats, &[CORE, "--sandbox-mode", &outbox]).await;
        let mut job = rig.call("/ok");
        job["sandbox"] = json!({"code": 2003, "delay_ms": 3000});
        job["headers"] = json!({"Authorization": "Bearer s3cret"});
        let payload = assignment("acme", "final", job);
        rig.router.send(&payload).await;
        rig.router.verdict(&payload).await;
        rig.nats.kill();
        let file = within(SOON, "the outcome lies on the disk", async || {
            let files = std::fs::read_dir(spool.path()).unwrap().flatten();
            files.map(|file| file.path()).find(|path| path.extension().is_some_and(|extension| extension == "json"))
        })
        .await;
        assert_eq!(std::fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
        rig.worker.kill();
        rig.nats.restart();
        let router = Router::connect(&rig.nats.url()).await;
        let _again = rig.another("worker-1").flag(CORE).flag(&outbox).start(&rig.nats).await;
        assert_eq!(router.result(&payload).await["error"]["code"], 2003);
        let letter = router.letter(&payload).await;
        assert_eq!((&letter["stage"], &letter["error"]["code"]), (&json!("execute"), &json!(2003)));
        assert_eq!(letter["assignment"], payload, "{letter}");
        let is_empty = || std::fs::read_dir(spool.path()).unwrap().flatten().next().is_none();
        until("the directory is empty", async || is_empty()).await;
    }
}

#[tokio::test]
async fn a_stream_that_breaks_the_contract_ends_the_worker_in_core_mode_too() {
    let nats = NatsServer::start();
    let router = Router::connect(&nats.url()).await;
    let config = async_nats::jetstream::stream::Config {
        name: "CAF_EXEC_DLQ".to_owned(),
        subjects: vec!["caf.exec.dlq.v1".to_owned()],
        ..Default::default()
    };
    router.jetstream().create_stream(config).await.unwrap();
    let ending = Worker::named("core").flag(CORE).flag(format!("--nats-url={}", nats.url())).end().await;
    assert_eq!(ending.code, Some(1), "{}", ending.said);
    assert!(ending.said.contains("stream CAF_EXEC_DLQ has subjects"), "{}", ending.said);
}
