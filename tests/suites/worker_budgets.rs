//! Budgets of tenants hold over all workers of a pool, whatever dies.
#![expect(clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use async_nats::jetstream::AckKind;
use async_nats::jetstream::consumer::PullConsumer;
use beamline_tests::clock::Clock;
use beamline_tests::failpoint::{self, Trap};
use beamline_tests::nats::NatsServer;
use beamline_tests::policy::Policy;
use beamline_tests::rig::{LAPSE, Rig};
use beamline_tests::router::{CANCEL, Key, Kind, assignment, cancel, json as read};
use beamline_tests::wait::{SOON, until, within};
use beamline_tests::worker::Worker;
use futures::StreamExt;
use jiff::Timestamp;
use serde_json::{Value, json};

const SANDBOX: &str = "--sandbox-mode";
/// Of the workers that no operator has given a pool's name.
const POOL: &str = "caf=2Eexec=2Eassign=2Ev1=2Fcaf-workers";
/// No window of this length ends while a test runs, but for one minute of a month.
const LONG: &str = "31days";

/// A policy of one tenant with this budget.
fn acme(quotas: &str) -> Policy {
    Policy::new(&tenants(quotas))
}

fn tenants(quotas: &str) -> String {
    format!("tenants: {{named: [{{id: acme, quotas: {{{quotas}}}}}]}}")
}

/// A canned success.
fn canned(tenant: &str, id: &str) -> Value {
    assignment(tenant, id, json!({"type": "http.request", "method": "GET", "url": "http://peer.example/ok"}))
}

/// The verdict on an assignment: whether it is accepted, else the code.
async fn verdict(rig: &Rig, payload: &Value) -> Result<(), u64> {
    rig.router.submit(payload).await;
    outcome(&rig.router.verdict(payload).await)
}

fn outcome(verdict: &Value) -> Result<(), u64> {
    if verdict["status"] == "accepted" { Ok(()) } else { Err(verdict["error"]["code"].as_u64().expect("a code")) }
}

/// Of everything that was said so far: when each id was accepted first, and how many verdicts were which refusal.
fn verdicts(rig: &Rig) -> (BTreeMap<Key, i64>, BTreeMap<u64, usize>) {
    let (mut accepted, mut refused) = (BTreeMap::new(), BTreeMap::<u64, usize>::new());
    for heard in rig.router.heard().iter().filter(|heard| heard.kind == Kind::Verdict) {
        let (said, key) = (read(&heard.payload), heard.key.clone().expect("both ids"));
        match outcome(&said) {
            Ok(()) => {
                accepted.entry(key).or_insert(said["acknowledged_at"].as_i64().expect("a time"));
            }
            Err(code) => *refused.entry(code).or_default() += 1,
        }
    }
    (accepted, refused)
}

/// Waits until so many assignments have been answered with a verdict.
async fn answered(rig: &Rig, count: usize) {
    within(SOON * 4, &format!("{count} verdicts"), async || {
        let (accepted, refused) = verdicts(rig);
        (accepted.len() + refused.values().sum::<usize>() >= count).then_some(())
    })
    .await;
}

/// What the workers have written into a tenant's account.
async fn account(rig: &Rig, tenant: &str) -> Option<Value> {
    rig.router.last("KV_caf-quota", &format!("$KV.caf-quota.{POOL}.{tenant}")).await.map(|kept| read(&kept.payload))
}

async fn another(rig: &Rig, name: &str, policy: &Policy) -> Worker {
    rig.another(name).flag(SANDBOX).flag(policy.flag()).start(&rig.nats).await
}

#[tokio::test]
async fn w39_of_a_thousand_at_eight_workers_exactly_as_many_are_accepted_as_the_budget_has() {
    let policy = acme(&format!("executions: 100, window: {LONG}"));
    let rig = Rig::start(&[SANDBOX, &policy.flag()]).await;
    let mut others = Vec::new();
    for number in 2..9 {
        others.push(another(&rig, &format!("worker-{number}"), &policy).await);
    }
    let router = &rig.router;
    let submitting =
        (0..1000).map(|number| async move { router.submit(&canned("acme", &format!("a-{number}"))).await });
    futures::stream::iter(submitting).buffer_unordered(50).collect::<Vec<_>>().await;
    rig.router.settled(SOON * 4).await;
    let (accepted, refused) = verdicts(&rig);
    assert_eq!((accepted.len(), refused), (100, BTreeMap::from([(2004, 900)])));
    let results = rig.router.heard().iter().filter(|heard| heard.kind == Kind::Result).count();
    let letters = rig.router.heard().iter().filter(|heard| heard.kind == Kind::Letter).count();
    assert_eq!((results, letters), (100, 0));
    assert_eq!(account(&rig, "acme").await.expect("an account")["executions"], 100);
    let mut counted = rig.worker.metric(r#"worker_assignments_rejected_total{code="2004"}"#).await;
    for worker in &others {
        counted += worker.metric(r#"worker_assignments_rejected_total{code="2004"}"#).await;
    }
    assert_eq!(counted, 900.0);
}

#[tokio::test]
async fn no_window_accepts_more_than_its_budget_and_nearly_all_of_it_can_be_used() {
    const WINDOW: i64 = 4_000;
    let policy = acme("executions: 100, window: 4s");
    let rig = Rig::start(&[SANDBOX, &policy.flag()]).await;
    let _second = another(&rig, "worker-2", &policy).await;
    let _third = another(&rig, "worker-3", &policy).await;
    let started = Timestamp::now().as_millisecond();
    let mut sent = 0;
    // Three whole windows, and their edges.
    while Timestamp::now().as_millisecond() < started + 4 * WINDOW {
        for _ in 0..20 {
            rig.router.submit(&canned("acme", &format!("a-{sent}"))).await;
            sent += 1;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    rig.router.settled(SOON * 2).await;
    let (accepted, refused) = verdicts(&rig);
    assert_eq!(accepted.len() + refused[&2004], sent, "each has one answer");
    let mut windows = BTreeMap::<i64, usize>::new();
    accepted.values().for_each(|at| *windows.entry(at - at % WINDOW).or_default() += 1);
    assert!(windows.values().all(|count| *count <= 100), "{windows:?}");
    let whole = windows.iter().filter(|(start, _)| **start > started && **start + WINDOW < started + 4 * WINDOW);
    let whole: Vec<_> = whole.map(|(_, count)| *count).collect();
    assert!(whole.len() >= 2 && whole.iter().all(|count| *count >= 98), "{windows:?}");
}

#[tokio::test]
async fn however_clocks_differ_no_window_accepts_more_than_its_budget() {
    const WINDOW: i64 = 4_000;
    let (fast, slow) = (Clock::ahead(3), Clock::ahead(-2));
    let policy = acme("executions: 100, window: 4s");
    let rig = Rig::start(&[SANDBOX, &policy.flag()]).await;
    let wrong = |name: &str, clock: &Clock| rig.another(name).flag(SANDBOX).flag(policy.flag()).by(clock);
    let _fast = wrong("worker-2", &fast).start(&rig.nats).await;
    let _slow = wrong("worker-3", &slow).start(&rig.nats).await;
    let (started, mut sent) = (Timestamp::now().as_millisecond(), 0);
    while Timestamp::now().as_millisecond() < started + 2 * WINDOW {
        for _ in 0..20 {
            rig.router.submit(&canned("acme", &format!("a-{sent}"))).await;
            sent += 1;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    rig.router.settled(SOON * 2).await;
    let mut windows = BTreeMap::<i64, usize>::new();
    verdicts(&rig).0.values().for_each(|at| *windows.entry(at - at % WINDOW).or_default() += 1);
    assert!(windows.values().all(|count| *count <= 100), "{windows:?}");
    // The fast clock begins a window for all.
    let begun = windows.iter().filter(|(start, _)| (started..started + WINDOW).contains(&(**start - 3_000)));
    let begun: Vec<_> = begun.map(|(_, count)| *count).collect();
    assert!(!begun.is_empty() && begun.iter().all(|count| *count >= 98), "{windows:?}");
    let by_a_slow_one = rig.router.heard().into_iter().filter(|heard| heard.kind == Kind::Verdict);
    let mut by_a_slow_one = by_a_slow_one.map(|heard| read(&heard.payload));
    assert!(by_a_slow_one.any(|said| said["worker_id"] == "worker-3" && outcome(&said).is_ok()), "it takes part");
}

#[tokio::test]
async fn a_refusal_says_which_budget_and_until_when_and_other_tenants_go_on() {
    let policy = acme("executions: 2, window: 1h");
    let rig = Rig::start(&[SANDBOX, &policy.flag()]).await;
    for id in ["a", "b"] {
        assert_eq!(verdict(&rig, &canned("acme", id)).await, Ok(()));
    }
    let refused = canned("acme", "c");
    rig.router.submit(&refused).await;
    let said = rig.router.verdict(&refused).await;
    assert_eq!((&said["error"]["code"], &said["error"]["retryable"]), (&json!(2004), &json!(true)));
    let (words, end) = said["message"].as_str().unwrap().rsplit_once(' ').unwrap();
    assert_eq!(words, "tenant acme has used its 2 executions of this 1h window: it ends at");
    let end: Timestamp = end.parse().expect("RFC 3339");
    let rest = end.as_millisecond() - said["acknowledged_at"].as_i64().unwrap();
    assert!((0..=3_600_000).contains(&rest) && end.as_second() % 3600 == 0, "{end}");
    assert_eq!(verdict(&rig, &canned("globex", "a")).await, Ok(()), "nobody bounds it");
    rig.router.settled(SOON).await;
    let story = rig.router.story(&refused);
    assert!(story.results.is_empty() && story.letters.is_empty(), "{story:?}");
    assert_eq!(read(&rig.router.refusal(&refused).await.expect("it is stored").payload), said);
    assert_eq!(account(&rig, "globex").await, None);
}

#[tokio::test]
async fn a_refusal_for_a_budget_is_repeated_byte_for_byte_to_a_redelivery() {
    let policy = acme(&format!("executions: 1, window: {LONG}"));
    let mut rig = Rig::start(&[SANDBOX, &policy.flag()]).await;
    assert_eq!(verdict(&rig, &canned("acme", "first")).await, Ok(()));
    rig.router.settled(SOON).await;
    rig.worker.kill();
    // It has stored its refusal and dies before it says so.
    let sockets = tempfile::tempdir().unwrap();
    let mut trap = Trap::at("before-result", sockets.path());
    let setup = rig.another("worker-2").flag(SANDBOX).flag(policy.flag()).env(failpoint::VARIABLE, &trap.socket(0));
    let mut second = setup.start(&rig.nats).await;
    let refused = canned("acme", "second");
    rig.router.submit(&refused).await;
    let caught = trap.caught().await;
    let stored = within(SOON, "it is stored", async || rig.router.refusal(&refused).await).await;
    second.kill();
    drop(caught);
    assert!(rig.router.story(&refused).verdicts.is_empty());
    // Meanwhile there is more to be had.
    let generous = acme(&format!("executions: 100, window: {LONG}"));
    let _third = another(&rig, "worker-3", &generous).await;
    within(LAPSE, "it is refused again", async || rig.router.story(&refused).verdicts.first().cloned()).await;
    rig.router.settled(LAPSE).await;
    let said: Vec<_> = rig.router.heard().into_iter().filter(|heard| heard.key == Some(Key::from(&refused))).collect();
    assert_eq!(said.iter().map(|heard| &heard.payload).collect::<Vec<_>>(), [&stored.payload]);
}

#[tokio::test]
async fn a_worker_that_is_killed_loses_its_lease_and_one_that_stops_loses_nothing() {
    let policy = acme(&format!("executions: 1280, window: {LONG}"));
    let mut rig = Rig::start(&[SANDBOX, &policy.flag()]).await;
    assert_eq!(verdict(&rig, &canned("acme", "first")).await, Ok(()));
    rig.worker.kill();
    let leased = account(&rig, "acme").await.expect("an account")["executions"].as_i64().unwrap();
    assert!((1..=10).contains(&leased), "{leased} units for one execution: no more than a 128th");
    let mut second = another(&rig, "worker-2", &policy).await;
    assert_eq!(verdict(&rig, &canned("acme", "second")).await, Ok(()));
    rig.router.settled(LAPSE).await;
    second.terminate();
    assert_eq!(second.ended().await, Some(0));
    assert_eq!(account(&rig, "acme").await.unwrap()["executions"], leased + 1, "what was not used is back");
    let _third = another(&rig, "worker-3", &policy).await;
    for number in 0..1400 {
        rig.router.submit(&canned("acme", &format!("a-{number}"))).await;
    }
    answered(&rig, 1402).await;
    let (accepted, refused) = verdicts(&rig);
    let usable = usize::try_from(1280 - leased + 1).unwrap();
    assert_eq!((accepted.len(), refused[&2004]), (usable, 1402 - usable));
}

#[tokio::test]
async fn what_is_not_used_goes_back_at_the_end_of_the_lease() {
    let policy = acme(&format!("executions: 1280, window: {LONG}"));
    let rig = Rig::start(&[SANDBOX, &policy.flag()]).await;
    assert_eq!(verdict(&rig, &canned("acme", "first")).await, Ok(()));
    until("only what was used is charged", async || account(&rig, "acme").await.unwrap()["executions"] == 1).await;
}

/// What a worker was at when it was killed.
async fn killed_at_work(policy: &Policy) -> (Rig, Value) {
    let mut rig = Rig::start(&[&policy.flag()]).await;
    let running = assignment("acme", "running", rig.call("/gate/one"));
    rig.router.submit(&running).await;
    rig.peer.arrived("/gate/one", 1).await;
    rig.worker.kill();
    (rig, running)
}

async fn is_accepted_again(rig: &Rig, running: &Value, limit: Duration) {
    within(limit, "it has a verdict again", async || (rig.router.story(running).verdicts.len() == 2).then_some(()))
        .await;
    rig.peer.open("one");
    assert_eq!(rig.router.result(running).await["status"], "success");
    let statuses: Vec<_> = rig.router.story(running).verdicts.iter().map(outcome).collect();
    assert_eq!(statuses, [Ok(()), Ok(())]);
}

#[tokio::test]
async fn a_redelivery_is_not_charged_again_nor_refused() {
    let policy = acme(&format!("executions: 1, window: {LONG}"));
    let (rig, running) = killed_at_work(&policy).await;
    let _second = rig.another("worker-2").flag(policy.flag()).start(&rig.nats).await;
    assert_eq!(verdict(&rig, &assignment("acme", "another", rig.call("/ok"))).await, Err(2004), "it is used up");
    is_accepted_again(&rig, &running, LAPSE).await;
}

#[tokio::test]
async fn what_a_broker_has_forgotten_to_have_delivered_is_not_charged_again_nor_refused() {
    let policy = acme(&format!("executions: 1, window: {LONG}"));
    let (rig, running) = killed_at_work(&policy).await;
    rig.router.stream("CAF_EXEC_ASSIGN").await.delete_consumer("caf-workers").await.expect("it is deleted");
    let _second = rig.another("worker-2").flag(policy.flag()).start(&rig.nats).await;
    // It is the first delivery of a new consumer.
    is_accepted_again(&rig, &running, SOON).await;
    assert_eq!(verdict(&rig, &assignment("acme", "another", rig.call("/ok"))).await, Err(2004), "it is used up");
}

#[tokio::test]
async fn a_redelivery_counts_in_the_window_that_has_paid_for_it() {
    let policy = acme("executions: 2, window: 4s");
    let mut rig = Rig::start(&[SANDBOX, &policy.flag()]).await;
    rig.worker.kill();
    let both = ["first", "second"].map(|id| canned("acme", id));
    for one in &both {
        rig.router.submit(one).await;
    }
    // It dies when it has paid for both and has accepted one.
    let sockets = tempfile::tempdir().unwrap();
    let mut trap = Trap::at("accepted", sockets.path());
    let setup = rig.another("worker-2").flag(SANDBOX).flag(policy.flag()).env(failpoint::VARIABLE, &trap.socket(0));
    let mut second = setup.start(&rig.nats).await;
    let caught = trap.caught().await;
    let noted = async || !rig.router.all("KV_caf-deliveries", "$KV.caf-deliveries.*.charged.>").await.is_empty();
    until("it is noted that both are paid for", noted).await;
    let paid = rig.router.verdict(&both[0]).await["acknowledged_at"].as_i64().unwrap();
    second.kill();
    drop(caught);
    assert!(rig.router.story(&both[1]).verdicts.is_empty());
    let _third = another(&rig, "worker-3", &policy).await;
    rig.router.settled(LAPSE).await;
    assert!(Timestamp::now().as_millisecond() / 4_000 > paid / 4_000, "another window has begun");
    let accepted: Vec<_> = verdicts(&rig).0.into_values().map(|at| at / 4_000).collect();
    assert_eq!(accepted, [paid / 4_000; 2]);
}

#[tokio::test]
async fn no_window_accepts_more_than_its_budget_while_workers_are_killed() {
    const WINDOW: i64 = 4_000;
    let policy = acme("executions: 100, window: 4s");
    let mut rig = Rig::start(&[SANDBOX, &policy.flag()]).await;
    let mut others = [another(&rig, "worker-2", &policy).await, another(&rig, "worker-3", &policy).await];
    let started = Timestamp::now().as_millisecond();
    let (mut sent, mut kills) = (0, Vec::new());
    while Timestamp::now().as_millisecond() < started + 4 * WINDOW {
        for _ in 0..20 {
            rig.router.submit(&canned("acme", &format!("a-{sent}"))).await;
            sent += 1;
        }
        if sent % 100 == 0 {
            let victim = kills.len() % others.len();
            kills.push(Timestamp::now().as_millisecond());
            others[victim].kill();
            others[victim] = another(&rig, &format!("worker-{}", victim + 2), &policy).await;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(kills.len() > 5, "{kills:?}");
    rig.router.settled(LAPSE * 2).await;
    let (accepted, _) = verdicts(&rig);
    let mut windows = BTreeMap::<i64, usize>::new();
    accepted.values().for_each(|at| *windows.entry(at - at % WINDOW).or_default() += 1);
    assert!(windows.values().all(|count| *count <= 100), "{windows:?}");
    // Leases have one unit each. What was admitted and not said is lost with its worker until it is delivered again.
    let whole = windows.iter().filter(|(start, _)| **start > started && **start + WINDOW < started + 4 * WINDOW);
    let whole: Vec<_> = whole.map(|(_, count)| *count).collect();
    assert!(whole.len() >= 2 && whole.iter().all(|count| *count >= 90), "{windows:?}");
    rig.worker.terminate();
    assert_eq!(rig.worker.ended().await, Some(0));
}

/// Somebody has had it before, where no worker runs, and may have accepted it.
async fn somebody_else_has_had(rig: &Rig, payload: &Value) {
    let nobody = async || rig.router.consumer().await.is_some_and(|consumer| consumer.num_waiting == 0);
    until("nobody pulls", nobody).await;
    rig.router.submit(payload).await;
    let stream = rig.router.stream("CAF_EXEC_ASSIGN").await;
    let consumer: PullConsumer = stream.get_consumer("caf-workers").await.expect("the consumer");
    let mut messages = consumer.fetch().max_messages(1).messages().await.expect("a pull");
    let message = messages.next().await.expect("a message").expect("it can be read");
    message.ack_with(AckKind::Nak(Some(Duration::from_secs(1)))).await.expect("it is given back");
}

#[tokio::test]
async fn a_redelivery_that_nobody_has_paid_for_waits_for_the_next_window() {
    let policy = acme("executions: 1, window: 8s");
    let mut rig = Rig::start(&[SANDBOX, &policy.flag()]).await;
    rig.worker.kill();
    let waits = canned("acme", "waits");
    somebody_else_has_had(&rig, &waits).await;
    let _second = another(&rig, "worker-2", &policy).await;
    // One of each window's is taken by those who come for the first time, as soon as it begins.
    let mut number = 0;
    let accepted = within(SOON * 4, "it is accepted", async || {
        if number < 40 {
            rig.router.submit(&canned("acme", &format!("a-{number}"))).await;
            number += 1;
        }
        rig.router.story(&waits).verdicts.first().cloned()
    })
    .await;
    assert_eq!(outcome(&accepted), Ok(()), "it is never refused");
    rig.router.settled(SOON * 2).await;
    let mut windows = BTreeMap::<i64, usize>::new();
    verdicts(&rig).0.values().for_each(|at| *windows.entry(at - at % 8_000).or_default() += 1);
    assert!(windows.values().all(|count| *count == 1), "{windows:?}");
}

#[tokio::test]
async fn a_redelivery_that_would_wait_for_the_next_window_ends_at_once_where_it_is_cancelled() {
    let policy = acme(&format!("executions: 1, window: {LONG}"));
    let mut rig = Rig::start(&[SANDBOX, &policy.flag()]).await;
    assert_eq!(verdict(&rig, &canned("acme", "first")).await, Ok(()));
    rig.router.settled(SOON).await;
    rig.worker.kill();
    let waits = canned("acme", "waits");
    somebody_else_has_had(&rig, &waits).await;
    rig.router.client().publish(CANCEL, cancel("acme", "waits").to_string().into()).await.expect("a connection");
    let _second = another(&rig, "worker-2", &policy).await;
    let result = rig.router.result(&waits).await;
    assert_eq!((&result["status"], &result["error"]["code"]), (&json!("cancelled"), &json!(5001)), "{result}");
    rig.router.settled(SOON).await;
}

#[tokio::test]
async fn an_id_that_its_record_answers_costs_nothing() {
    let policy = acme(&format!("executions: 2, window: {LONG}"));
    let rig = Rig::start(&[SANDBOX, &policy.flag()]).await;
    let first = canned("acme", "first");
    assert_eq!(verdict(&rig, &first).await, Ok(()));
    rig.router.results(&first, 1).await;
    for copies in 2..5 {
        rig.router.submit(&first).await;
        rig.router.results(&first, copies).await;
    }
    assert_eq!(verdict(&rig, &canned("acme", "second")).await, Ok(()));
    rig.router.submit(&first).await;
    rig.router.results(&first, 5).await;
    assert_eq!(verdict(&rig, &canned("acme", "third")).await, Err(2004), "and nothing is there twice");
}

#[tokio::test]
async fn what_runs_nothing_is_refused_for_no_budget() {
    let policy = acme(&format!("executions: 2, window: {LONG}"));
    let rig = Rig::start(&[&policy.flag()]).await;
    let ask = json!({"type": "human.approval", "prompt": "Well?", "approvers": ["ann"]});
    let open = assignment("acme", "open", ask);
    let running = assignment("acme", "running", rig.call("/gate/slot"));
    for one in [&open, &running] {
        rig.router.submit(one).await;
        assert_eq!(outcome(&rig.router.verdict(one).await), Ok(()));
    }
    rig.peer.arrived("/gate/slot", 1).await;
    assert!(verdict(&rig, &assignment("acme", "over", rig.call("/ok"))).await.is_err(), "all units are used");
    for one in [&open, &running] {
        rig.router.submit(one).await;
    }
    rig.router.learn(&open, "second verdict", |story| story.verdicts.get(1).cloned()).await;
    rig.peer.open("slot");
    let results = rig.router.results(&running, 2).await;
    assert_eq!(results[0], results[1], "the second has the answer of the first");
    let verdicts = |one: &Value| rig.router.story(one).verdicts;
    assert!(verdicts(&open).iter().chain(&verdicts(&running)).all(|verdict| outcome(verdict) == Ok(())));
    assert_eq!(rig.peer.hits("/").len(), 1);
}

/// A query on a file of the tenant's.
fn query_of(rig: &Rig, tenant: &str, query: &str) -> Value {
    rig.database(tenant, "CREATE TABLE t (x)");
    json!({"type": "sql.query", "connection_string": "sqlite://db.sqlite", "query": query})
}

#[tokio::test]
async fn cpu_time_is_charged_afterwards() {
    let policy = acme(&format!("cpuTimeMs: 100, window: {LONG}"));
    let rig = Rig::start(&[&policy.flag()]).await;
    let query = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 3000000) SELECT count(*) FROM n";
    let busy = assignment("acme", "busy", query_of(&rig, "acme", query));
    rig.router.submit(&busy).await;
    let result = rig.router.result(&busy).await;
    let used = result["metadata"]["cpu_time_ms"].as_u64().unwrap();
    assert!(result["status"] == "success" && used > 100, "{result}");
    let refused = assignment("acme", "refused", rig.call("/ok"));
    assert_eq!(verdict(&rig, &refused).await, Err(2004));
    let said = rig.router.verdict(&refused).await;
    let words = "tenant acme has used its 100 ms of CPU time of this 31d window: it ends at ";
    assert!(said["message"].as_str().unwrap().starts_with(words), "{said}");
    assert_eq!(account(&rig, "acme").await.unwrap()["cpu_time_ms"], used, "debt and all");
    assert_eq!(verdict(&rig, &assignment("globex", "free", rig.call("/ok"))).await, Ok(()));
}

/// CPU time that was charged to a tenant.
async fn charged(rig: &Rig, tenant: &str) -> u64 {
    account(rig, tenant).await.map_or(0, |account| account["cpu_time_ms"].as_u64().expect("a time"))
}

const COUNTING: &str = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 100000000000)";

#[tokio::test]
async fn cpu_time_of_blocks_that_fail_end_late_or_are_cancelled_is_charged() {
    let terms = ["failing", "late", "cancelled", "files"]
        .map(|tenant| format!("{{id: {tenant}, quotas: {{cpuTimeMs: 100, window: {LONG}}}}}"));
    let policy = Policy::new(&format!("tenants: {{named: [{}]}}", terms.join(", ")));
    let rig = Rig::start(&[&policy.flag()]).await;
    let count = format!("{COUNTING} SELECT count(*) FROM n");
    let fails = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 1000000) \
                 SELECT abs(-9223372036854775807 - min(x)) FROM n";
    let failing = assignment("failing", "one", query_of(&rig, "failing", fails));
    let mut late = assignment("late", "one", query_of(&rig, "late", &count));
    late["job"]["timeout_ms"] = json!(600);
    let cancelled = assignment("cancelled", "one", query_of(&rig, "cancelled", &count));
    for one in [&failing, &late, &cancelled] {
        rig.router.submit(one).await;
    }
    assert_eq!(rig.router.result(&failing).await["error"]["code"], 2001);
    assert_eq!(rig.router.result(&late).await["error"]["code"], 5002);
    rig.router.client().publish(CANCEL, cancel("cancelled", "one").to_string().into()).await.unwrap();
    assert_eq!(rig.router.result(&cancelled).await["error"]["code"], 5001);
    for one in [&failing, &late, &cancelled] {
        let tenant = Key::from(one).tenant;
        until("it is charged", async || charged(&rig, &tenant).await > 100).await;
        assert_eq!(verdict(&rig, &assignment(&tenant, "two", rig.call("/ok"))).await, Err(2004), "{tenant}");
    }
    // More than a result may have, as it turns out when it is read.
    std::fs::create_dir_all(rig.file_of("files", "")).unwrap();
    std::fs::write(rig.file_of("files", "large"), [0xFF; 900_000]).unwrap();
    for number in 0..20 {
        let result = rig.run("files", &format!("{number}"), json!({"type": "fs.get", "path": rig.path("large")})).await;
        assert_eq!(result["error"]["code"], 2002, "{result}");
    }
    until("files cost CPU time, too", async || charged(&rig, "files").await > 0).await;
}

#[tokio::test]
async fn cpu_time_that_a_thread_uses_after_its_block_has_ended_is_charged() {
    let policy = acme(&format!("cpuTimeMs: 1500, window: {LONG}"));
    let rig = Rig::start(&[&policy.flag()]).await;
    // All columns of one row are computed before anybody looks at the clock.
    let column = |letter: char| format!("s LIKE '%{}{letter}%'", "0".repeat(90));
    let columns: Vec<_> = ('a'..='p').map(column).collect();
    let text = "WITH t(s) AS MATERIALIZED (SELECT hex(zeroblob(500000)))";
    let slow = format!("{text} SELECT {} FROM t", columns.join(", "));
    let mut late = assignment("acme", "late", query_of(&rig, "acme", &slow));
    late["job"]["timeout_ms"] = json!(1000);
    rig.router.submit(&late).await;
    assert_eq!(rig.router.result(&late).await["error"]["code"], 5002);
    let is_charged = async || (charged(&rig, "acme").await > 1500).then_some(());
    within(SOON * 4, "what it has used since then is charged", is_charged).await;
    assert_eq!(verdict(&rig, &assignment("acme", "next", rig.call("/ok"))).await, Err(2004));
}

#[tokio::test]
async fn cpu_time_of_work_that_a_worker_hands_back_when_it_stops_is_charged() {
    let policy = acme(&format!("cpuTimeMs: 100, window: {LONG}"));
    let mut rig = Rig::start(&[&policy.flag(), "--drain-timeout=1s"]).await;
    let busy = query_of(&rig, "acme", &format!("{COUNTING} SELECT count(*) FROM n"));
    rig.router.submit(&assignment("acme", "busy", busy)).await;
    let runs = async || rig.worker.metric(r#"worker_slots_busy{pool="io"}"#).await == 1.0;
    until("it runs", runs).await;
    rig.worker.terminate();
    assert_eq!(rig.worker.ended().await, Some(0));
    assert!(charged(&rig, "acme").await > 100);
}

#[tokio::test]
async fn a_budget_changes_without_a_restart_and_a_broken_file_changes_nothing() {
    let mut policy = acme(&format!("executions: 2, window: {LONG}"));
    let rig = Rig::start(&[SANDBOX, &policy.flag()]).await;
    assert_eq!(verdict(&rig, &canned("acme", "a")).await, Ok(()));
    assert_eq!(verdict(&rig, &canned("acme", "b")).await, Ok(()));
    assert_eq!(verdict(&rig, &canned("acme", "c")).await, Err(2004));
    policy.say("tenants: {named: [{id: acme, quotas: {executions: lots}}]}");
    let broken = async || rig.worker.metric("worker_tenants_file_broken").await;
    until("the broken file is noticed", async || broken().await == 1.0).await;
    assert_eq!(verdict(&rig, &canned("acme", "d")).await, Err(2004), "the last good one holds");
    policy.say(&tenants(&format!("executions: 3, window: {LONG}")));
    until("the good file is used", async || broken().await == 0.0).await;
    assert_eq!(verdict(&rig, &canned("acme", "e")).await, Ok(()), "raised");
    assert_eq!(verdict(&rig, &canned("acme", "f")).await, Err(2004));
    policy.say(&tenants(&format!("executions: 1, window: {LONG}")));
    // A refusal names the budget that holds.
    let mut number = 0;
    let said = within(SOON, "the lowered budget holds", async || {
        number += 1;
        let payload = canned("acme", &format!("lowered-{number}"));
        rig.router.submit(&payload).await;
        let said = rig.router.verdict(&payload).await;
        assert_eq!(outcome(&said), Err(2004), "nothing more before the turn");
        said["message"].as_str().unwrap().contains("its 1 executions").then_some(said)
    })
    .await;
    assert_eq!(said["error"]["retryable"], true);
    policy.say("paused: false");
    until("nobody is bounded any more", async || {
        number += 1;
        verdict(&rig, &canned("acme", &format!("free-{number}"))).await == Ok(())
    })
    .await;
}

#[tokio::test]
async fn the_defaults_bound_whoever_is_not_named_each_by_itself() {
    let policy = Policy::new(&format!("tenants: {{defaults: {{quotas: {{executions: 1, window: {LONG}}}}}}}"));
    let rig = Rig::start(&[SANDBOX, &policy.flag()]).await;
    for tenant in ["globex", "a.b*>= é"] {
        assert_eq!(verdict(&rig, &canned(tenant, "a")).await, Ok(()), "{tenant}");
        assert_eq!(verdict(&rig, &canned(tenant, "b")).await, Err(2004), "{tenant}");
    }
    assert_eq!(account(&rig, "a=2Eb=2A=3E=3D=20=C3=A9").await.unwrap()["executions"], 1);
}

#[tokio::test]
async fn a_budget_outlives_its_broker_and_every_worker() {
    let policy = acme(&format!("executions: 20, window: {LONG}"));
    let mut rig = Rig::start(&[SANDBOX, &policy.flag()]).await;
    for number in 0..10 {
        assert_eq!(verdict(&rig, &canned("acme", &format!("before-{number}"))).await, Ok(()));
    }
    rig.router.settled(SOON).await;
    rig.nats.kill();
    rig.worker.unready("NATS disconnected").await;
    rig.nats.restart();
    rig.worker.ready().await;
    until("the Router is back", async || rig.router.consumer().await.is_some()).await;
    // What was said while the Router was away it has not heard: nothing was.
    for number in 0..5 {
        assert_eq!(verdict(&rig, &canned("acme", &format!("after-{number}"))).await, Ok(()));
    }
    rig.router.settled(SOON).await;
    rig.worker.kill();
    let _second = another(&rig, "worker-2", &policy).await;
    let mut accepted = 0;
    for number in 0..10 {
        accepted += usize::from(verdict(&rig, &canned("acme", &format!("later-{number}"))).await.is_ok());
    }
    assert_eq!(accepted, 5);
}

#[tokio::test]
async fn an_account_that_is_lost_or_nonsense_begins_anew() {
    let policy = acme(&format!("executions: 2, window: {LONG}"));
    let rig = Rig::start(&[SANDBOX, &policy.flag()]).await;
    let subject = format!("$KV.caf-quota.{POOL}.acme");
    let publish = async |text: &'static str| {
        let sent = rig.router.jetstream().publish(subject.clone(), text.into()).await;
        sent.expect("a publish").await.expect("it is stored");
    };
    publish("nonsense").await;
    assert_eq!(verdict(&rig, &canned("acme", "a")).await, Ok(()));
    rig.worker.says("what is kept of a budget is no account: it begins anew").await;
    assert_eq!(verdict(&rig, &canned("acme", "b")).await, Ok(()));
    assert_eq!(verdict(&rig, &canned("acme", "c")).await, Err(2004));
    rig.router.jetstream().delete_stream("KV_caf-quota").await.expect("it is deleted");
    let mut number = 0;
    until("the bucket is made anew, and the account", async || {
        number += 1;
        verdict(&rig, &canned("acme", &format!("d-{number}"))).await == Ok(())
    })
    .await;
}

/// With a worker whose accounts are gone, and not made anew by it.
async fn rig_without_accounts(flags: &[&str]) -> (Rig, Worker) {
    let mut rig = Rig::start(flags).await;
    rig.worker.kill();
    let setup = flags.iter().fold(rig.another("worker-2"), |setup, flag| setup.flag(*flag));
    let worker = setup.flag("--nats-create-streams=false").start(&rig.nats).await;
    rig.router.jetstream().delete_stream("KV_caf-quota").await.expect("it is deleted");
    (rig, worker)
}

/// A hundred of acme's, whose account cannot be asked, each before one of another tenant's, which has no budget.
async fn others_do_not_wait_for_the_account(rig: &Rig, worker: &Worker, publish: impl AsyncFn(&Value)) {
    let started = Instant::now();
    for number in 0..100 {
        publish(&canned("acme", &format!("a-{number}"))).await;
        let other = canned("globex", &format!("g-{number}"));
        publish(&other).await;
        assert_eq!(rig.router.result(&other).await["status"], "success");
    }
    let took = started.elapsed();
    assert!(took < Duration::from_secs(8), "the others waited for the account: {took:?}");
    worker.unready("streams unavailable").await;
}

#[tokio::test]
async fn accounts_that_cannot_be_asked_hold_up_no_tenant_without_a_budget() {
    let policy = acme(&format!("executions: 1000, window: {LONG}"));
    let (rig, worker) = rig_without_accounts(&[SANDBOX, &policy.flag()]).await;
    let publish = async |payload: &Value| _ = rig.router.submit(payload).await;
    others_do_not_wait_for_the_account(&rig, &worker, publish).await;
    // Somebody makes the bucket anew.
    let _third = another(&rig, "worker-3", &policy).await;
    answered(&rig, 200).await;
    let (accepted, refused) = verdicts(&rig);
    assert_eq!((accepted.len(), refused), (200, BTreeMap::new()), "what had to wait was put off");
    rig.router.settled(LAPSE).await;
}

#[tokio::test]
async fn in_core_mode_too_accounts_that_cannot_be_asked_hold_up_no_tenant_without_a_budget() {
    let policy = acme(&format!("executions: 1000, window: {LONG}"));
    let core = "--nats-delivery=core";
    let (rig, worker) = rig_without_accounts(&[core, SANDBOX, &policy.flag()]).await;
    others_do_not_wait_for_the_account(&rig, &worker, async |payload| rig.router.send(payload).await).await;
    answered(&rig, 200).await;
    let (accepted, refused) = verdicts(&rig);
    assert_eq!((accepted.len(), refused), (100, BTreeMap::from([(4002, 100)])), "acme may send it again");
    // Somebody makes the bucket anew.
    let _third = rig.another("worker-3").flag(core).flag(SANDBOX).flag(policy.flag()).start(&rig.nats).await;
    within(SOON, "acme has a budget again", async || {
        let again = canned("acme", &format!("again-{}", Timestamp::now()));
        rig.router.send(&again).await;
        (rig.router.verdict(&again).await["status"] == "accepted").then_some(())
    })
    .await;
}

#[tokio::test]
async fn in_core_mode_without_jetstream_each_worker_has_a_budget_of_its_own() {
    let policy = acme(&format!("executions: 3, window: {LONG}"));
    let rig = Rig::at(NatsServer::without_jetstream(), &["--nats-delivery=core", SANDBOX, &policy.flag()]).await;
    let mut outcomes = Vec::new();
    for number in 0..5 {
        let payload = canned("acme", &format!("a-{number}"));
        rig.router.send(&payload).await;
        outcomes.push(outcome(&rig.router.verdict(&payload).await));
    }
    assert_eq!(outcomes, [Ok(()), Ok(()), Ok(()), Err(2004), Err(2004)]);
}

#[tokio::test]
async fn in_core_mode_with_jetstream_workers_share_the_budget() {
    let policy = acme(&format!("executions: 3, window: {LONG}"));
    let core = "--nats-delivery=core";
    let rig = Rig::start(&[core, SANDBOX, &policy.flag()]).await;
    let _second = rig.another("worker-2").flag(core).flag(SANDBOX).flag(policy.flag()).start(&rig.nats).await;
    for number in 0..20 {
        rig.router.send(&canned("acme", &format!("a-{number}"))).await;
    }
    answered(&rig, 20).await;
    let (accepted, refused) = verdicts(&rig);
    assert_eq!((accepted.len(), refused), (3, BTreeMap::from([(2004, 17)])));
}
