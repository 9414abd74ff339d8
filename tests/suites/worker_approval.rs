//! human.approval: work that waits for people. Whatever dies meanwhile, each ends once, and nobody holds a slot for it.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::time::Duration;

use async_nats::Subscriber;
use beamline_tests::audit::{Allowed, audit};
use beamline_tests::rig::Rig;
use beamline_tests::router::{CANCEL, Router, assignment, json as read, replay};
use beamline_tests::wait::{SOON, until, within};
use beamline_tests::worker::Worker;
use futures::{FutureExt, StreamExt};
use serde_json::{Value, json};

/// A hold on a delivery, or on an answer, lapses after 10 s; then the next worker needs a moment.
const LAPSE: Duration = Duration::from_secs(40);
const ANNOUNCED: &str = "caf.human.request.v1";
const ANSWER: &str = "caf.human.response.v1";
const MINUTES: u64 = 600_000;

/// Asks Ann and Bob.
fn ask(tenant: &str, id: &str, timeout_ms: u64) -> Value {
    let job = json!({
        "type": "human.approval",
        "prompt": format!("May {id} go on?"),
        "approvers": ["ann@example.com", "bob@example.com"],
        "timeout_ms": timeout_ms,
    });
    assignment(tenant, id, job)
}

/// Somebody says yes or no, without a broker's word that anybody heard it.
async fn say(router: &Router, of: &Value, approver: &str, approved: bool) {
    let answer = json!({
        "assignment_id": of["assignment_id"],
        "tenant_id": of["tenant_id"],
        "approver": approver,
        "approved": approved,
        "comment": format!("{approver} says so"),
    });
    router.client().publish(ANSWER, answer.to_string().into()).await.unwrap();
    router.client().flush().await.unwrap();
}

/// Hears what approvers are told from now on.
async fn announcements(router: &Router) -> Subscriber {
    let heard = router.client().subscribe(ANNOUNCED).await.unwrap();
    router.client().flush().await.unwrap();
    heard
}

async fn next(announced: &mut Subscriber) -> Value {
    let message = tokio::time::timeout(SOON * 2, announced.next()).await.expect("somebody is asked").unwrap();
    read(&message.payload)
}

/// Keys of the requests that are kept.
async fn waiting(router: &Router) -> Vec<String> {
    let kept = router.all("KV_caf-approvals", "$KV.caf-approvals.>").await;
    let values = kept.into_iter().filter(|kept| !kept.payload.is_empty());
    values.map(|kept| kept.subject.trim_start_matches("$KV.caf-approvals.").to_owned()).collect()
}

/// Returns when so many requests are kept.
async fn are_waiting(router: &Router, count: usize) {
    within(LAPSE, &format!("{count} approvals wait"), async || (waiting(router).await.len() == count).then_some(()))
        .await;
}

/// What people decided: approved, by whom.
fn decision(result: &Value) -> (bool, &str) {
    assert_eq!(result["status"], "success", "{result}");
    (result["result"]["approved"].as_bool().unwrap(), result["result"]["approver"].as_str().unwrap())
}

/// Everything is settled, no request is left, and all invariants hold.
async fn kept_its_promise(router: &Router) {
    router.settled(LAPSE).await;
    within(LAPSE, "no approval waits", async || waiting(router).await.is_empty().then_some(())).await;
    let control = async || router.stream("CAF_EXEC_CONTROL").await.cached_info().state.messages;
    within(LAPSE, "every answer was heard", async || (control().await == 0).then_some(())).await;
    let found = audit(router, &[], Allowed { attempts: 1 }).await;
    assert!(found.is_empty(), "{found:#?}");
}

async fn open_approvals(worker: &Worker) -> f64 {
    worker.metric("worker_approvals_open").await
}

#[tokio::test]
async fn a_person_who_was_asked_decides_and_nothing_is_held_meanwhile() {
    let rig = Rig::start(&[]).await;
    let mut announced = announcements(&rig.router).await;
    let mut payload = ask("acme", "granted", MINUTES);
    (payload["trace_id"], payload["run_id"], payload["flow_id"]) = (json!("trace-1"), json!("run-1"), json!("flow-1"));
    rig.router.submit(&payload).await;
    let told = next(&mut announced).await;
    let lasts = told["expires_at"].as_i64().unwrap() - told["requested_at"].as_i64().unwrap();
    assert_eq!(lasts, i64::try_from(MINUTES).unwrap());
    assert_eq!(
        told,
        json!({
            "version": "1",
            "assignment_id": "granted",
            "request_id": "req-granted",
            "tenant_id": "acme",
            "trace_id": "trace-1",
            "run_id": "run-1",
            "prompt": "May granted go on?",
            "approvers": ["ann@example.com", "bob@example.com"],
            "requested_at": told["requested_at"],
            "expires_at": told["expires_at"],
        })
    );
    // No delivery, no slot: the broker and the worker are done with it.
    rig.router.settled(SOON).await;
    assert_eq!(rig.router.verdict(&payload).await["status"], "accepted");
    assert_eq!(rig.worker.metric(r#"worker_slots_busy{pool="io"}"#).await, 0.0);
    until("the worker knows it", async || open_approvals(&rig.worker).await == 1.0).await;
    assert_eq!(waiting(&rig.router).await, ["acme.granted"]);

    say(&rig.router, &payload, "bob@example.com", true).await;
    let result = rig.router.result(&payload).await;
    assert_eq!(decision(&result), (true, "bob@example.com"));
    assert_eq!(result["result"]["comment"], "bob@example.com says so");
    assert!(result["result"]["approved_at"].as_i64() >= told["requested_at"].as_i64(), "{result}");
    assert_eq!((&result["trace_id"], &result["metadata"]["flow_id"]), (&json!("trace-1"), &json!("flow-1")));
    assert_eq!(
        (&result["metadata"]["block_type"], &result["metadata"]["attempts"]),
        (&json!("human.approval"), &json!(1))
    );
    kept_its_promise(&rig.router).await;
    until("the worker has forgotten it", async || open_approvals(&rig.worker).await == 0.0).await;
    assert_eq!(rig.worker.metric(r#"worker_tasks_total{type="human.approval",status="success"}"#).await, 1.0);
    assert_eq!(rig.worker.says("Step execution completed").await["fields"]["block_type"], "human.approval");
    assert_eq!(rig.router.story(&payload).results.len(), 1);
}

#[tokio::test]
async fn a_request_that_names_no_time_waits_for_a_day() {
    let rig = Rig::start(&[]).await;
    let mut announced = announcements(&rig.router).await;
    let mut payload = ask("acme", "patient", MINUTES);
    payload["job"].as_object_mut().unwrap().remove("timeout_ms");
    rig.router.submit(&payload).await;
    let told = next(&mut announced).await;
    assert_eq!(told["expires_at"].as_i64().unwrap() - told["requested_at"].as_i64().unwrap(), 86_400_000);
}

#[tokio::test]
async fn a_refusal_is_a_decision_too() {
    let rig = Rig::start(&[]).await;
    let payload = ask("acme", "refused", MINUTES);
    rig.router.submit(&payload).await;
    are_waiting(&rig.router, 1).await;
    say(&rig.router, &payload, "ann@example.com", false).await;
    assert_eq!(decision(&rig.router.result(&payload).await), (false, "ann@example.com"));
    kept_its_promise(&rig.router).await;
    assert!(rig.router.story(&payload).letters.is_empty());
}

#[tokio::test]
async fn w38_only_those_who_were_asked_count_and_nonsense_hurts_nobody() {
    let rig = Rig::start(&[]).await;
    let payload = ask("acme", "strangers", MINUTES);
    rig.router.submit(&payload).await;
    are_waiting(&rig.router, 1).await;
    say(&rig.router, &payload, "eve@example.com", true).await;
    let of_another = ask("other", "strangers", MINUTES);
    say(&rig.router, &of_another, "ann@example.com", true).await;
    for nonsense in
        ["nonsense", "[]", r#"{"assignment_id":"strangers","tenant_id":"acme","approver":"ann@example.com"}"#]
    {
        rig.router.client().publish(ANSWER, nonsense.into()).await.unwrap();
    }
    let ignored = |reason: &str| format!(r#"worker_approval_answers_ignored_total{{reason="{reason}"}}"#);
    until("strangers are counted", async || rig.worker.metric(&ignored("unlisted")).await == 1.0).await;
    until("nonsense is counted", async || rig.worker.metric(&ignored("malformed")).await == 3.0).await;
    assert_eq!(waiting(&rig.router).await, ["acme.strangers"], "it still waits");
    say(&rig.router, &payload, "ann@example.com", true).await;
    assert_eq!(decision(&rig.router.result(&payload).await), (true, "ann@example.com"));
    kept_its_promise(&rig.router).await;
}

#[tokio::test]
async fn w38_an_answer_that_comes_before_its_request_is_kept() {
    let rig = Rig::start(&[]).await;
    let mut announced = announcements(&rig.router).await;
    let payload = ask("acme.eu", "early/1", MINUTES);
    for (approver, approved) in [("eve@example.com", true), ("ann@example.com", false), ("ann@example.com", true)] {
        say(&rig.router, &payload, approver, approved).await;
    }
    until("the answers are kept", async || {
        rig.router.all("KV_caf-answers", "$KV.caf-answers.acme=2Eeu.early=2F1.*").await.len() == 2
    })
    .await;
    rig.router.submit(&payload).await;
    assert_eq!(decision(&rig.router.result(&payload).await), (false, "ann@example.com"), "her first one");
    kept_its_promise(&rig.router).await;
    assert!(announced.next().now_or_never().is_none(), "nobody needs to be asked");
}

#[tokio::test]
async fn w38_of_two_who_disagree_the_first_decides_and_late_and_repeated_answers_change_nothing() {
    let rig = Rig::start(&[]).await;
    let _second = rig.another("worker-2").start(&rig.nats).await;
    let payloads: Vec<Value> = (0..40).map(|number| ask("acme", &format!("two-{number}"), MINUTES)).collect();
    for payload in &payloads {
        rig.router.submit(payload).await;
    }
    are_waiting(&rig.router, payloads.len()).await;
    for payload in &payloads {
        for (approver, approved) in [("ann@example.com", true), ("bob@example.com", false), ("ann@example.com", true)] {
            say(&rig.router, payload, approver, approved).await;
        }
    }
    let mut first = Vec::new();
    for payload in &payloads {
        first.push(rig.router.results(payload, 1).await.remove(0));
    }
    for payload in &payloads {
        say(&rig.router, payload, "bob@example.com", false).await;
    }
    kept_its_promise(&rig.router).await;
    for (payload, first) in payloads.iter().zip(&first) {
        assert_eq!(rig.router.story(payload).results, std::slice::from_ref(first), "once, whoever was first");
        assert_eq!(rig.router.record(payload).await.unwrap().payload, *first);
    }
}

#[tokio::test]
async fn w38_a_deadline_passes_once_whoever_watches_it() {
    let rig = Rig::start(&[]).await;
    let second = rig.another("worker-2").start(&rig.nats).await;
    let payloads: Vec<Value> = (0..50).map(|number| ask("acme", &format!("late-{number}"), 1500)).collect();
    for payload in &payloads {
        rig.router.submit(payload).await;
    }
    for payload in &payloads {
        let result = rig.router.result(payload).await;
        assert_eq!((&result["status"], &result["error"]["code"]), (&json!("timeout"), &json!(5002)), "{result}");
        assert_eq!(
            (&result["error"]["retryable"], &result["error"]["message"]),
            (&json!(false), &json!("nobody answered within 1500 ms"))
        );
        assert!(result["latency_ms"].as_u64() >= Some(1500), "{result}");
        say(&rig.router, payload, "ann@example.com", true).await;
    }
    kept_its_promise(&rig.router).await;
    for payload in &payloads {
        let story = rig.router.story(payload);
        assert_eq!((story.results.len(), story.letters.len()), (1, 0), "the late answer changed nothing");
    }
    let series = r#"worker_tasks_total{type="human.approval",status="timeout"}"#;
    assert_eq!(rig.worker.metric(series).await + second.metric(series).await, 50.0, "each counted once");
}

#[tokio::test]
async fn w38_a_deadline_survives_the_death_of_every_worker() {
    let mut rig = Rig::start(&[]).await;
    let (short, long) = (ask("acme", "short", 4000), ask("acme", "long", MINUTES));
    rig.router.submit(&long).await;
    are_waiting(&rig.router, 1).await;
    rig.router.submit(&short).await;
    until("both are stored", async || rig.router.all("KV_caf-approvals", "$KV.caf-approvals.*.*").await.len() == 2)
        .await;
    rig.worker.kill();
    // The deadline itself is what passes.
    tokio::time::sleep(Duration::from_millis(4200)).await;
    assert!(rig.router.story(&short).results.is_empty());
    let _next = rig.another("worker-2").start(&rig.nats).await;
    let result = rig.router.result(&short).await;
    assert_eq!((&result["status"], &result["error"]["code"]), (&json!("timeout"), &json!(5002)));
    say(&rig.router, &long, "ann@example.com", true).await;
    assert_eq!(decision(&rig.router.result(&long).await), (true, "ann@example.com"));
    kept_its_promise(&rig.router).await;
}

#[tokio::test]
async fn w38_an_answer_sent_while_no_worker_runs_counts_if_it_came_in_time() {
    let mut rig = Rig::start(&[]).await;
    let (timely, late) = (ask("acme", "timely", 6000), ask("acme", "late", 4000));
    for payload in [&timely, &late] {
        rig.router.submit(payload).await;
    }
    are_waiting(&rig.router, 2).await;
    rig.worker.kill();
    say(&rig.router, &timely, "bob@example.com", true).await;
    tokio::time::sleep(Duration::from_millis(6100)).await;
    say(&rig.router, &late, "bob@example.com", true).await;
    let _next = rig.another("worker-2").start(&rig.nats).await;
    assert_eq!(decision(&rig.router.result(&timely).await), (true, "bob@example.com"));
    assert_eq!(rig.router.result(&late).await["error"]["code"], 5002);
    kept_its_promise(&rig.router).await;
}

#[tokio::test]
async fn an_id_that_comes_twice_is_asked_once_and_answered_twice() {
    let rig = Rig::start(&[]).await;
    let _second = rig.another("worker-2").start(&rig.nats).await;
    let mut announced = announcements(&rig.router).await;
    let payload = ask("acme", "twice", MINUTES);
    rig.router.submit(&payload).await;
    are_waiting(&rig.router, 1).await;
    rig.router.submit(&payload).await;
    rig.router.settled(SOON).await;
    assert_eq!(waiting(&rig.router).await.len(), 1);
    next(&mut announced).await;
    say(&rig.router, &payload, "ann@example.com", true).await;
    rig.router.result(&payload).await;
    kept_its_promise(&rig.router).await;
    // The record answers both: a third one is answered without asking anybody.
    let record = rig.router.record(&payload).await.unwrap();
    assert!(record.headers.get("Beamline-Answers").unwrap().as_str().ends_with(",2"), "{:?}", record.headers);
    rig.router.submit(&payload).await;
    let results = rig.router.results(&payload, 2).await;
    assert!(results.iter().all(|result| *result == record.payload));
    kept_its_promise(&rig.router).await;
    assert!(announced.next().now_or_never().is_none(), "nobody was asked again");
}

/// Something else that is published under the id of an approval.
fn another_job(rig: &Rig, of: &Value) -> Value {
    let mut payload = of.clone();
    payload["job"] = rig.call("/ok");
    payload
}

#[tokio::test]
async fn another_job_under_the_id_of_an_open_approval_is_answered_by_it_and_never_runs() {
    let rig = Rig::start(&[]).await;
    let _second = rig.another("worker-2").start(&rig.nats).await;
    let mut announced = announcements(&rig.router).await;
    let payload = ask("acme", "taken", MINUTES);
    rig.router.submit(&payload).await;
    next(&mut announced).await;
    let job = another_job(&rig, &payload);
    let headers = replay();
    for _ in 0..10 {
        rig.router.submit(&job).await;
        rig.router.submit_with(&job, headers.clone()).await;
    }
    // Nor by a worker that has just begun, and that nobody has told what waits.
    let _third = rig.another("worker-3").start(&rig.nats).await;
    let mut last = 0;
    for _ in 0..10 {
        last = rig.router.submit(&job).await;
    }
    rig.router.settled(SOON).await;
    let story = rig.router.story(&payload);
    assert_eq!((story.verdicts.len(), story.results.len()), (31, 0), "accepted, and nothing is held for them");
    assert!(story.verdicts.iter().all(|verdict| verdict["status"] == "accepted"), "{story:?}");
    say(&rig.router, &payload, "ann@example.com", true).await;
    assert_eq!(decision(&rig.router.result(&payload).await), (true, "ann@example.com"));
    router_is_done(&rig.router).await;
    let record = rig.router.record(&payload).await.unwrap();
    let answers = record.headers.get("Beamline-Answers").unwrap().as_str();
    assert!(answers.ends_with(&format!(",{last}")), "{answers}: it answers all of them");
    rig.router.submit(&job).await;
    let results = rig.router.results(&payload, 2).await;
    assert!(results.iter().all(|result| *result == record.payload));
    assert!(rig.peer.hits("/").is_empty() && announced.next().now_or_never().is_none());
}

#[tokio::test]
async fn another_job_that_comes_with_its_approval_waits_for_it_too() {
    const EACH: usize = 20;
    let rig = Rig::start(&[]).await;
    let client = rig.router.client();
    let payloads: Vec<_> = (0..EACH).map(|number| ask("acme", &format!("pair-{number}"), MINUTES)).collect();
    for payload in &payloads {
        for published in [payload.clone(), another_job(&rig, payload)] {
            client.publish("caf.exec.assign.v1", published.to_string().into()).await.unwrap();
        }
    }
    are_waiting(&rig.router, EACH).await;
    rig.router.settled(SOON).await;
    for payload in &payloads {
        cancel(&rig.router, payload).await;
        is_cancelled(&rig.router.result(payload).await);
    }
    router_is_done(&rig.router).await;
    assert!(rig.peer.hits("/").is_empty());
}

#[tokio::test]
async fn a_replay_asks_anew_and_is_not_answered_by_what_was_said_before() {
    let rig = Rig::start(&[]).await;
    let payload = ask("acme", "replay", MINUTES);
    rig.router.submit(&payload).await;
    are_waiting(&rig.router, 1).await;
    say(&rig.router, &payload, "ann@example.com", false).await;
    assert_eq!(decision(&rig.router.result(&payload).await), (false, "ann@example.com"));
    kept_its_promise(&rig.router).await;

    let headers = replay();
    rig.router.submit_with(&payload, headers).await;
    are_waiting(&rig.router, 1).await;
    say(&rig.router, &payload, "ann@example.com", true).await;
    let results = rig.router.results(&payload, 2).await;
    assert_eq!(decision(&read(&results[1])), (true, "ann@example.com"), "she may change her mind");
    router_is_done(&rig.router).await;
    assert_eq!(rig.router.record(&payload).await.unwrap().payload, results[1]);
}

#[tokio::test]
async fn a_replay_right_behind_a_cancel_is_asked_and_a_cancel_of_that_ends_it() {
    const ROUNDS: usize = 20;
    let rig = Rig::start(&[]).await;
    let client = rig.router.client();
    let headers = replay();
    for round in 0..ROUNDS {
        let payload = ask("acme", &format!("anew-{round}"), MINUTES);
        say(&rig.router, &payload, "ann@example.com", true).await;
        rig.router.submit(&payload).await;
        rig.router.result(&payload).await;
        let mut announced = announcements(&rig.router).await;
        client.publish(CANCEL, cancel_of(&payload).to_string().into()).await.unwrap();
        let again = payload.to_string().into();
        client.publish_with_headers("caf.exec.assign.v1", headers.clone(), again).await.unwrap();
        next(&mut announced).await;
        assert_eq!(rig.router.story(&payload).results.len(), 1, "it waits for an answer to this");
        cancel(&rig.router, &payload).await;
        is_cancelled(&read(&rig.router.results(&payload, 2).await[1]));
    }
    router_is_done(&rig.router).await;
}

/// As after every test, but for the audit, which knows no replay.
async fn router_is_done(router: &Router) {
    router.settled(LAPSE).await;
    are_waiting(router, 0).await;
}

#[tokio::test]
async fn a_cancel_ends_what_waits_and_what_has_not_arrived() {
    let mut rig = Rig::start(&[]).await;
    let [told, asked, away, early] = ["told", "asked", "away", "early"].map(|id| ask("acme", id, MINUTES));
    for payload in [&told, &asked, &away] {
        rig.router.submit(payload).await;
    }
    are_waiting(&rig.router, 3).await;
    // Somebody else's cancel of the same id meets nothing.
    cancel(&rig.router, &ask("other", "told", MINUTES)).await;
    cancel(&rig.router, &told).await;
    let request = rig.router.client().request(CANCEL, cancel_of(&asked).to_string().into()).await.unwrap();
    assert_eq!(read(&request.payload), json!({"assignment_id": "asked", "outcome": "cancelled"}));
    for payload in [&told, &asked] {
        is_cancelled(&rig.router.result(payload).await);
    }
    cancel(&rig.router, &early).await;
    rig.router.submit(&early).await;
    is_cancelled(&rig.router.result(&early).await);
    rig.router.settled(SOON).await;

    rig.worker.kill();
    cancel(&rig.router, &away).await;
    let next = rig.another("worker-2").start(&rig.nats).await;
    is_cancelled(&rig.router.result(&away).await);
    assert_eq!(next.metric(r#"worker_tasks_total{type="human.approval",status="cancelled"}"#).await, 1.0);
    kept_its_promise(&rig.router).await;
    let heard = [&told, &asked, &early].map(|payload| rig.router.story(payload));
    assert!(heard.iter().all(|story| story.letters.is_empty() && story.results.len() == 1), "{heard:?}");
}

fn cancel_of(of: &Value) -> Value {
    json!({
        "version": "1",
        "assignment_id": of["assignment_id"],
        "tenant_id": of["tenant_id"],
        "reason": "no longer needed",
        "requested_by": "operations",
    })
}

async fn cancel(router: &Router, of: &Value) {
    router.client().publish(CANCEL, cancel_of(of).to_string().into()).await.unwrap();
    router.client().flush().await.unwrap();
}

fn is_cancelled(result: &Value) {
    let error = json!({
        "code": 5001,
        "message": "cancelled by operations: no longer needed",
        "retryable": false,
        "details": {"block_type": "human.approval"},
    });
    assert_eq!((&result["status"], &result["error"]), (&json!("cancelled"), &error));
}

#[tokio::test]
async fn tenants_with_the_same_id_are_asked_and_answered_apart() {
    let rig = Rig::start(&[]).await;
    let (ours, theirs) = (ask("acme", "same", MINUTES), ask("acme.same", "same", MINUTES));
    for payload in [&ours, &theirs] {
        rig.router.submit(payload).await;
    }
    are_waiting(&rig.router, 2).await;
    say(&rig.router, &ours, "ann@example.com", true).await;
    assert_eq!(decision(&rig.router.result(&ours).await), (true, "ann@example.com"));
    are_waiting(&rig.router, 1).await;
    assert!(rig.router.story(&theirs).results.is_empty());
    say(&rig.router, &theirs, "ann@example.com", false).await;
    assert_eq!(decision(&rig.router.result(&theirs).await), (false, "ann@example.com"));
    kept_its_promise(&rig.router).await;
}

#[tokio::test]
async fn what_waits_survives_the_broker() {
    let mut rig = Rig::start(&[]).await;
    let payloads: Vec<Value> = (0..30).map(|number| ask("acme", &format!("broker-{number}"), MINUTES)).collect();
    let expiring = ask("acme", "broker-expires", 8000);
    for payload in payloads.iter().chain([&expiring]) {
        rig.router.submit(payload).await;
    }
    are_waiting(&rig.router, 31).await;
    rig.nats.restart();
    rig.worker.ready().await;
    for payload in &payloads {
        say(&rig.router, payload, "ann@example.com", true).await;
    }
    let record = async |payload| within(LAPSE, "a record", async || rig.router.record(payload).await).await;
    for payload in &payloads {
        assert_eq!(decision(&read(&record(payload).await.payload)), (true, "ann@example.com"));
    }
    assert_eq!(read(&record(&expiring).await.payload)["status"], "timeout");
    kept_its_promise(&rig.router).await;
}

#[tokio::test]
async fn the_webhook_is_told_and_tried_again() {
    let mut rig = Rig::start(&[]).await;
    rig.worker.kill();
    let hook = format!("--approval-webhook={}", rig.peer.url("/flaky/2/hook"));
    let worker = rig.another("worker-2").flag(hook).start(&rig.nats).await;
    let mut announced = announcements(&rig.router).await;
    let payload = ask("acme", "hook", MINUTES);
    rig.router.submit(&payload).await;
    let told = next(&mut announced).await;
    for hit in rig.peer.arrived("/flaky/2/hook", 3).await {
        assert_eq!((hit.method.as_str(), hit.headers["content-type"].as_str()), ("POST", "application/json"));
        assert_eq!(read(&hit.body), told, "what everybody is told");
    }
    say(&rig.router, &payload, "ann@example.com", true).await;
    rig.router.result(&payload).await;
    kept_its_promise(&rig.router).await;
    assert_eq!(worker.metric("worker_approval_webhook_failures_total").await, 0.0);
}

#[tokio::test]
async fn a_webhook_that_fails_or_is_forbidden_is_counted_and_holds_up_nothing() {
    let mut rig = Rig::start(&[]).await;
    rig.worker.kill();
    for (number, url) in
        [rig.peer.url("/status/404?s3cret"), "http://169.254.169.254/s3cret".to_owned()].iter().enumerate()
    {
        let setup = rig.another(&format!("worker-{number}")).flag(format!("--approval-webhook={url}"));
        let mut worker = setup.start(&rig.nats).await;
        let mut announced = announcements(&rig.router).await;
        let payload = ask("acme", &format!("deaf-{number}"), MINUTES);
        rig.router.submit(&payload).await;
        // Of a request that is answered as soon as it is stored nobody is told.
        next(&mut announced).await;
        say(&rig.router, &payload, "ann@example.com", true).await;
        assert_eq!(decision(&rig.router.result(&payload).await), (true, "ann@example.com"));
        let failed = async || worker.metric("worker_approval_webhook_failures_total").await == 1.0;
        until("the failure is counted", failed).await;
        worker.says("cannot tell the approval webhook").await;
        assert!(!worker.lines().join("").contains("s3cret"), "a path may be a secret");
        worker.kill();
    }
}

#[tokio::test]
async fn a_request_that_the_broker_does_not_take_is_a_final_error() {
    let mut rig = Rig::start(&[]).await;
    rig.worker.kill();
    rig.nats.restart_with("max_payload: 65536");
    let _worker = rig.another("worker-2").start(&rig.nats).await;
    let router = Router::connect(&rig.nats.url()).await;
    let mut payload = ask("acme", "large", MINUTES);
    payload["job"]["prompt"] = json!("p".repeat(64_000));
    router.submit(&payload).await;
    let result = router.result(&payload).await;
    let expected = (&json!("error"), &json!(2002), &json!(false));
    assert_eq!((&result["status"], &result["error"]["code"], &result["error"]["retryable"]), expected);
    router.letter(&payload).await;
    kept_its_promise(&router).await;
}

#[tokio::test]
async fn a_request_that_its_bucket_does_not_take_is_a_final_error() {
    let rig = Rig::start(&[]).await;
    let mut config = rig.router.stream("KV_caf-approvals").await.cached_info().config.clone();
    config.max_message_size = 2048;
    rig.router.jetstream().update_stream(&config).await.unwrap();
    let mut payload = ask("acme", "large", MINUTES);
    payload["job"]["prompt"] = json!("p".repeat(4_000));
    rig.router.submit(&payload).await;
    let error = rig.router.result(&payload).await["error"].clone();
    assert_eq!((&error["code"], &error["retryable"]), (&json!(2002), &json!(false)));
    let message = error["message"].as_str().unwrap();
    assert!(message.ends_with("more than max_msg_size of stream KV_caf-approvals"), "{message}");
    rig.router.letter(&payload).await;
    rig.worker.ready().await;
    kept_its_promise(&rig.router).await;
}

#[tokio::test]
async fn a_decision_that_the_ledger_does_not_take_is_a_final_error() {
    let rig = Rig::start(&[]).await;
    let payload = ask("acme", "wordy", MINUTES);
    rig.router.submit(&payload).await;
    are_waiting(&rig.router, 1).await;
    let mut config = rig.router.stream("CAF_EXEC_RESULT").await.cached_info().config.clone();
    config.max_message_size = 2048;
    rig.router.jetstream().update_stream(&config).await.unwrap();
    let answer = json!({
        "assignment_id": "wordy",
        "tenant_id": "acme",
        "approver": "ann@example.com",
        "approved": true,
        "comment": "c".repeat(4_000),
    });
    rig.router.client().publish(ANSWER, answer.to_string().into()).await.unwrap();
    let result = rig.router.result(&payload).await;
    assert_eq!((&result["status"], &result["metadata"]["block_type"]), (&json!("error"), &json!("human.approval")));
    assert_eq!((&result["error"]["code"], &result["error"]["retryable"]), (&json!(2002), &json!(false)));
    let letter = rig.router.letter(&payload).await;
    assert_eq!((&letter["stage"], &letter["request_id"]), (&json!("execute"), &payload["request_id"]));
    assert_eq!(letter["omitted"], "the original: nobody has it any more");
    rig.worker.ready().await;
    kept_its_promise(&rig.router).await;
}

#[tokio::test]
async fn in_the_sandbox_every_approval_is_granted_after_its_delay() {
    let rig = Rig::start(&["--sandbox-mode"]).await;
    let mut announced = announcements(&rig.router).await;
    let mut payload = ask("acme", "sandbox", MINUTES);
    payload["job"]["sandbox"] = json!({"delay_ms": 50});
    rig.router.submit(&payload).await;
    let result = rig.router.result(&payload).await;
    let expected =
        json!({"approved": true, "approver": "ann@example.com", "comment": "", "approved_at": 0, "sandbox": true});
    assert_eq!(result["result"], expected);
    assert!(result["latency_ms"].as_u64() >= Some(50));
    kept_its_promise(&rig.router).await;
    assert!(announced.next().now_or_never().is_none(), "nobody is asked");
}

/// Approvals of every fate, while the only worker is killed at a random moment and started again, over and over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w38_each_approval_ends_once_wherever_its_worker_dies() {
    const ROUNDS: usize = 5;
    const EACH: usize = 24;
    let mut rig = Rig::start(&[]).await;
    let mut payloads = Vec::new();
    for round in 0..ROUNDS {
        for number in 0..EACH {
            let timeout_ms = if number % 4 == 3 { 300 } else { MINUTES };
            let payload = ask(["acme", "other"][number % 2], &format!("die-{round}-{number}"), timeout_ms);
            // Some are answered before they are asked, some twice; those with a short deadline never.
            for approver in ["ann@example.com", "bob@example.com"].iter().take([1, 0, 2, 0][number % 4]) {
                say(&rig.router, &payload, approver, number % 8 < 4).await;
            }
            rig.router.submit(&payload).await;
            if number % 4 == 1 {
                say(&rig.router, &payload, "bob@example.com", true).await;
            }
            payloads.push(payload);
        }
        // The moment is what is tested: any will do.
        tokio::time::sleep(Duration::from_millis(u64::from(jitter(round)) % 120)).await;
        rig.worker.kill();
        rig.worker = rig.another(&format!("worker-{}", round + 2)).start(&rig.nats).await;
    }
    for (number, payload) in payloads.iter().enumerate() {
        let record = within(LAPSE * 2, "a record", async || rig.router.record(payload).await).await;
        let status = read(&record.payload)["status"].clone();
        assert_eq!(status, if number % 4 == 3 { "timeout" } else { "success" }, "{payload}");
    }
    kept_its_promise(&rig.router).await;
    for payload in &payloads {
        let mut results = rig.router.story(payload).results;
        results.dedup();
        assert_eq!(results.len(), 1, "the same bytes each time: {payload}");
        assert!(rig.router.story(payload).letters.is_empty(), "nothing of this is a dead letter: {payload}");
    }
}

fn jitter(round: usize) -> u32 {
    let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos();
    nanos / 1000 + u32::try_from(round).unwrap() * 7
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w38_ten_thousand_wait_beside_other_work_and_cost_little_memory() {
    const FEW: usize = 1_000;
    const MANY: usize = 10_000;
    let rig = Rig::start(&["--io-pool-size=1", "--cpu-pool-size=1"]).await;
    let park = async |from: usize, to: usize| {
        let submissions = futures::stream::iter(from..to).map(|number| {
            let router = &rig.router;
            async move { router.submit(&ask("acme", &format!("many-{number}"), MINUTES)).await }
        });
        submissions.buffer_unordered(64).for_each(|_| async {}).await;
        let known = async || (open_approvals(&rig.worker).await == to as f64).then_some(());
        within(Duration::from_secs(120), &format!("{to} approvals wait"), known).await;
        rig.router.settled(LAPSE).await;
        rig.worker.metric("process_resident_memory_bytes").await
    };
    let before = park(0, FEW).await;
    let after = park(FEW, FEW + MANY).await;
    let each = (after - before) / MANY as f64;
    eprintln!("{each} bytes of worker memory for each waiting approval");
    assert!(each <= 4096.0, "{each} bytes for each");
    // They are in nobody's way.
    for number in 0..20 {
        let payload = assignment("acme", &format!("beside-{number}"), rig.call("/ok"));
        rig.router.submit(&payload).await;
        assert_eq!(rig.router.result(&payload).await["status"], "success");
    }
    let answered: Vec<Value> = (0..50).map(|number| ask("acme", &format!("many-{}", number * 200), MINUTES)).collect();
    for payload in &answered {
        say(&rig.router, payload, "bob@example.com", true).await;
    }
    for payload in &answered {
        assert_eq!(decision(&rig.router.result(payload).await), (true, "bob@example.com"));
    }
    // Another worker comes to know them all.
    let second = rig.another("worker-2").start(&rig.nats).await;
    let left = (FEW + MANY - answered.len()) as f64;
    let known = async || (open_approvals(&second).await == left).then_some(());
    within(Duration::from_secs(60), "the second worker knows them all", known).await;
}
