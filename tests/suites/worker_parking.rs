//! Ceilings of tenants, and what becomes of work over them: it is parked, in order, and holds up nobody.
#![expect(clippy::indexing_slicing, reason = "tests")]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use beamline_tests::clock::Clock;
use beamline_tests::failpoint::{self, Trap};
use beamline_tests::nats::NatsServer;
use beamline_tests::policy::Policy;
use beamline_tests::rig::{LAPSE, Rig, kept_its_promise};
use beamline_tests::router::{CANCEL, Key, assignment, cancel, json as json_of, replay};
use beamline_tests::tcpfault::{Mode, TcpFault};
use beamline_tests::wait::{SOON, until, within};
use beamline_tests::worker::Worker;
use futures::{FutureExt, StreamExt};
use serde_json::{Value, json};

const PARKED: &str = "worker_assignments_parked_total";
/// How long a lease of a ceiling holds.
const LEASE: Duration = Duration::from_secs(30);
/// One that nobody renews any more, with what clocks may differ by, and a busy machine's time.
const RECLAIMED: Duration = Duration::from_secs(30 + 5 + 25);

/// `acme` has these quotas.
fn acme(quotas: &str) -> Policy {
    Policy::new(&with(quotas))
}

fn with(quotas: &str) -> String {
    format!("tenants: {{named: [{{id: acme, maxSlotShare: 100, quotas: {quotas}}}]}}")
}

async fn all_parked(worker: &Worker, count: usize) {
    let what = format!("{count} are parked");
    within(SOON * 4, &what, async || (worker.metric(PARKED).await >= count as f64).then_some(())).await;
}

/// How many units of `acme`'s ceiling each worker has leased.
async fn leased(rig: &Rig) -> Vec<u64> {
    let key = "$KV.caf-quota.caf=2Eexec=2Eassign=2Ev1=2Fcaf-workers.acme.concurrent";
    let kept = rig.router.last("KV_caf-quota", key).await;
    let leases = kept.and_then(|kept| json_of(&kept.payload)["leases"].as_object().cloned()).unwrap_or_default();
    leases.values().filter_map(|lease| lease["slots"].as_u64()).collect()
}

/// The only unit of the tenant's is taken by the first until the gate `unit` opens, and so many more are parked.
async fn one_runs_and_others_are_parked(rig: &Rig, others: usize) -> (Value, Vec<Value>) {
    let running = assignment("acme", "running", rig.call("/gate/unit"));
    rig.router.submit(&running).await;
    rig.peer.arrived("/gate/unit", 1).await;
    let mut parked = Vec::new();
    for number in 0..others {
        let one = assignment("acme", &format!("parked-{number}"), rig.call(&format!("/ok?{number}")));
        rig.router.submit(&one).await;
        assert_eq!(rig.router.verdict(&one).await["status"], "accepted");
        parked.push(one);
    }
    all_parked(&rig.worker, others).await;
    (running, parked)
}

#[tokio::test]
async fn never_more_of_a_tenants_work_runs_at_once_over_all_workers_than_its_ceiling() {
    let (policy, fast, slow) = (acme("{concurrent: 5}"), Clock::ahead(2), Clock::ahead(-2));
    let rig = Rig::start(&[&policy.flag()]).await;
    let _others = [
        rig.another("worker-2").flag(policy.flag()).by(&fast).start(&rig.nats).await,
        rig.another("worker-3").flag(policy.flag()).by(&slow).start(&rig.nats).await,
    ];
    // The first hold all that the tenant may have until the gate opens.
    let path = |number: usize| if number < 5 { "/gate/first" } else { "/slow/50" };
    let call = |number: usize| rig.call(&format!("{}?{number}", path(number)));
    let slow: Vec<_> = (0..200).map(|number| assignment("acme", &format!("{number}"), call(number))).collect();
    for one in &slow {
        rig.router.submit(one).await;
    }
    for number in 0..20 {
        let other = assignment("other", &format!("{number}"), rig.put("x", "x"));
        rig.router.submit(&other).await;
        assert_eq!(rig.router.result(&other).await["status"], "success");
    }
    assert!(rig.peer.hits("/").len() < 200, "the other tenant waited for none of this");
    rig.peer.open("first");
    let hits = rig.peer.arrived("/", 200).await;
    kept_its_promise(&rig.router, &rig.peer).await;
    assert_eq!((rig.peer.most_at_once(), hits.len()), (5, 200));
    let number = |path: &str| path.rsplit('?').next().unwrap().parse::<usize>().unwrap();
    let out_of_place = hits.iter().enumerate().map(|(place, hit)| number(&hit.path).abs_diff(place)).max();
    assert!(out_of_place.unwrap() < 100, "in order, but for what several workers parked at once: {out_of_place:?}");
    for one in &slow {
        assert_eq!(rig.router.story(one).verdicts.len(), 1, "who takes it up says no verdict");
    }
}

#[tokio::test]
async fn ten_thousand_parked_messages_of_one_tenant_change_nothing_for_another() {
    let policy = acme("{concurrent: 1}");
    let rig = Rig::start(&[&policy.flag()]).await;
    let (running, _) = one_runs_and_others_are_parked(&rig, 1).await;
    let job = rig.put("x", "x");
    for number in 0..10_000 {
        let payload = assignment("acme", &format!("much-{number}"), job.clone()).to_string();
        rig.router.client().publish("caf.exec.assign.v1", payload.into()).await.unwrap();
    }
    let other = assignment("other", "at-once", rig.put("x", "x"));
    rig.router.submit(&other).await;
    assert_eq!(rig.router.result(&other).await["status"], "success");
    all_parked(&rig.worker, 10_001).await;
    until("the intake holds nothing but what runs", async || {
        rig.router.consumer().await.is_some_and(|info| (info.num_pending, info.num_ack_pending) == (0, 1))
    })
    .await;
    assert_eq!(rig.worker.metric("worker_pool_queue_depth{pool=\"io\"}").await, 0.0);
    for number in 0..100 {
        let other = assignment("other", &format!("{number}"), rig.put("x", "x"));
        rig.router.submit(&other).await;
        assert_eq!(rig.router.result(&other).await["status"], "success");
    }
    assert!(rig.router.story(&running).results.is_empty() && rig.router.parked().await == 10_001);
    rig.peer.open("unit");
    let last = assignment("acme", "much-9", job);
    assert_eq!(rig.router.result(&last).await["status"], "success", "and it goes on where it waited");
}

#[tokio::test]
async fn parked_work_survives_the_end_of_everything_and_a_policy_that_is_lifted() {
    let policy = acme("{concurrent: 1}");
    let mut rig = Rig::start(&[&policy.flag()]).await;
    let (running, parked) = one_runs_and_others_are_parked(&rig, 5).await;
    rig.worker.kill();
    rig.nats.kill();
    rig.peer.open("unit");
    rig.nats.restart();
    let _without_a_policy = rig.another("worker-2").start(&rig.nats).await;
    for one in &parked {
        assert_eq!(rig.router.result(one).await["metadata"]["worker_id"], "worker-2");
    }
    // A broker that is killed forgets how often it has delivered, so that the audit cannot count.
    rig.router.settled(LAPSE).await;
    assert_eq!(rig.peer.hits("/ok").len(), 5, "each ran once");
    let ended = parked.iter().chain([&running]).filter(|one| rig.router.story(*one).results.len() == 1).count();
    assert_eq!(ended, 6, "each has one result");
}

#[tokio::test]
async fn the_units_of_a_worker_that_was_killed_are_given_out_again() {
    // Its lease ends earlier by the clock of whoever wants it.
    let (policy, fast) = (acme("{concurrent: 1}"), Clock::ahead(4));
    let mut rig = Rig::start(&[&policy.flag()]).await;
    let before_its_lease = Instant::now();
    let (running, parked) = one_runs_and_others_are_parked(&rig, 1).await;
    let _second = rig.another("worker-2").flag(policy.flag()).by(&fast).start(&rig.nats).await;
    rig.worker.kill();
    rig.peer.open("unit");
    assert!(rig.peer.hits("/ok").is_empty(), "its unit is not free yet");
    for one in [&parked[0], &running] {
        within(RECLAIMED, "it runs", async || (!rig.router.story(one).results.is_empty()).then_some(())).await;
        assert_eq!(rig.router.result(one).await["metadata"]["worker_id"], "worker-2");
    }
    assert!(rig.peer.hits("/ok")[0].at - before_its_lease >= LEASE, "its lease might have held");
    kept_its_promise(&rig.router, &rig.peer).await;
}

#[tokio::test]
async fn the_units_of_a_worker_that_stops_are_free_at_once() {
    let policy = acme("{concurrent: 1}");
    let mut rig = Rig::start(&[&policy.flag()]).await;
    let (running, parked) = one_runs_and_others_are_parked(&rig, 3).await;
    let _second = rig.another("worker-2").flag(policy.flag()).start(&rig.nats).await;
    rig.worker.terminate();
    rig.peer.open("unit");
    assert_eq!(rig.router.result(&running).await["metadata"]["worker_id"], "worker-1");
    assert_eq!(rig.worker.ended().await, Some(0));
    for one in &parked {
        rig.router.result(one).await;
    }
    kept_its_promise(&rig.router, &rig.peer).await;
    let order: Vec<_> = rig.peer.hits("/ok").into_iter().map(|hit| hit.path).collect();
    assert_eq!(order, ["/ok?0", "/ok?1", "/ok?2"]);
}

#[tokio::test]
async fn what_is_cancelled_while_a_unit_is_asked_for_wants_none_any_more() {
    let policy = acme("{concurrent: 10}");
    let mut rig = Rig::start(&[]).await;
    rig.worker.kill();
    let sockets = tempfile::tempdir().unwrap();
    let mut trap = Trap::at("looked-up", sockets.path());
    let network = TcpFault::before(SocketAddr::from(([127, 0, 0, 1], rig.nats.port()))).await;
    let far = rig.another("worker-2").flag(policy.flag()).env(failpoint::VARIABLE, &trap.socket(0));
    let far = far.flag(format!("--nats-url=nats://127.0.0.1:{}", network.port())).spawn();
    far.ready().await;
    let called_off = assignment("acme", "called-off", rig.call("/ok/off"));
    rig.router.submit(&called_off).await;
    let caught = trap.caught().await;
    // The cancel comes before the first answer to what it asks.
    network.set(Mode::Delay(Duration::from_secs(1)));
    drop(caught);
    rig.router.client().publish(CANCEL, cancel("acme", "called-off").to_string().into()).await.unwrap();
    assert_eq!(rig.router.result(&called_off).await["error"]["code"], 5001);
    network.set(Mode::Pass);
    let running = assignment("acme", "running", rig.call("/gate/unit"));
    rig.router.submit(&running).await;
    rig.peer.arrived("/gate/unit", 1).await;
    assert_eq!(leased(&rig).await, [1], "one runs, and nobody waits");
    rig.peer.open("unit");
    assert_eq!(rig.router.result(&running).await["status"], "success");
}

#[tokio::test]
async fn units_that_were_asked_for_what_is_cancelled_then_are_given_back() {
    let policy = acme("{concurrent: 10}");
    let rig = Rig::start(&[&policy.flag()]).await;
    for round in 0..5 {
        let all: Vec<_> =
            (0..8).map(|number| assignment("acme", &format!("{round}-{number}"), rig.call("/slow/10"))).collect();
        for one in &all {
            rig.router.send(one).await;
        }
        for one in &all {
            let cancel = cancel("acme", &Key::from(one).id).to_string();
            rig.router.client().publish(CANCEL, cancel.into()).await.unwrap();
        }
        for one in &all {
            rig.router.result(one).await;
        }
        until("nothing is leased", async || leased(&rig).await.is_empty()).await;
    }
}

#[tokio::test]
async fn parked_work_that_is_cancelled_ends_although_it_may_not_run() {
    let policy = acme("{concurrent: 1}");
    let rig = Rig::start(&[&policy.flag()]).await;
    let (running, parked) = one_runs_and_others_are_parked(&rig, 3).await;
    let cancel = json!({"version": "1", "tenant_id": "acme", "assignment_id": "parked-1", "reason": "changed my mind"});
    rig.router.client().publish(CANCEL, cancel.to_string().into()).await.unwrap();
    let result = rig.router.result(&parked[1]).await;
    assert_eq!((&result["status"], &result["error"]["code"]), (&json!("cancelled"), &json!(5001)));
    assert!(rig.router.story(&running).results.is_empty());
    rig.peer.open("unit");
    for one in [&running, &parked[0], &parked[2]] {
        assert_eq!(rig.router.result(one).await["status"], "success");
    }
    kept_its_promise(&rig.router, &rig.peer).await;
    assert_eq!(rig.peer.hits("/ok").len(), 2, "the one that was cancelled never ran");
    assert_eq!(rig.router.story(&parked[1]).results.len(), 1);
}

#[tokio::test]
async fn a_cancel_of_a_second_publication_that_is_parked_leaves_the_success_of_the_first_alone() {
    let policy = acme("{concurrent: 1}");
    let rig = Rig::start(&[&policy.flag()]).await;
    let [first, between] = ["first", "between"].map(|id| assignment("acme", id, rig.call(&format!("/gate/{id}"))));
    rig.router.submit(&first).await;
    rig.peer.arrived("/gate/first", 1).await;
    let stop = r#"{"pull":false}"#.into();
    rig.router.client().request("caf.worker.control.v1.worker-1", stop).await.expect("it obeys");
    let second = rig.another("worker-2").flag(policy.flag()).start(&rig.nats).await;
    for (count, one) in [(1, &between), (2, &first)] {
        rig.router.submit(one).await;
        all_parked(&second, count).await;
    }
    rig.peer.open("first");
    let success = rig.router.results(&first, 1).await.remove(0);
    rig.peer.arrived("/gate/between", 1).await;
    let cancel = cancel("acme", "first").to_string();
    rig.router.client().publish(CANCEL, cancel.into()).await.unwrap();
    // Longer than what is parked is looked for.
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(rig.router.record(&first).await.expect("a record").payload, success);
    rig.peer.open("between");
    assert_eq!(rig.router.results(&first, 2).await, [success.clone(), success], "both publications have that answer");
    kept_its_promise(&rig.router, &rig.peer).await;
}

#[tokio::test]
async fn a_cancel_finds_what_is_parked_whichever_pools_worker_keeps_it() {
    const COUNT: usize = 12;
    let policy = acme("{concurrent: 1}");
    let rig = Rig::start(&[&policy.flag()]).await;
    let _other = rig.another("worker-2").flag(policy.flag()).flag("--nats-subject=other.pool").start(&rig.nats).await;
    let (running, parked) = one_runs_and_others_are_parked(&rig, COUNT).await;
    for one in &parked {
        let cancel = cancel("acme", &Key::from(one).id).to_string();
        rig.router.client().publish(CANCEL, cancel.into()).await.unwrap();
    }
    for one in &parked {
        assert_eq!(rig.router.result(one).await["error"]["code"], 5001);
    }
    assert!(rig.router.story(&running).results.is_empty());
}

#[tokio::test]
async fn of_what_is_parked_to_run_anew_only_a_later_cancel_is_about_it() {
    let policy = acme("{concurrent: 1}");
    let rig = Rig::start(&[&policy.flag()]).await;
    let [runs, ends] = ["runs", "ends"].map(|id| assignment("acme", id, rig.call(&format!("/ok/{id}"))));
    for one in [&runs, &ends] {
        rig.router.submit(one).await;
        rig.router.result(one).await;
    }
    let running = assignment("acme", "running", rig.call("/gate/unit"));
    rig.router.submit(&running).await;
    rig.peer.arrived("/gate/unit", 1).await;
    let client = rig.router.client();
    let cancel = |of: &Value| cancel("acme", &Key::from(of).id).to_string();
    let replay = replay();
    for one in [&runs, &ends] {
        client.publish(CANCEL, cancel(one).into()).await.unwrap();
        client.publish_with_headers("caf.exec.assign.v1", replay.clone(), one.to_string().into()).await.unwrap();
    }
    all_parked(&rig.worker, 2).await;
    client.publish(CANCEL, cancel(&ends).into()).await.unwrap();
    let cancelled = json_of(&rig.router.results(&ends, 2).await[1]);
    assert_eq!(cancelled["error"]["code"], 5001, "{cancelled}");
    // Longer than a cancel is looked for.
    tokio::time::sleep(Duration::from_millis(1200)).await;
    rig.peer.open("unit");
    assert_eq!(json_of(&rig.router.results(&runs, 2).await[1])["status"], "success");
    assert_eq!((rig.peer.hits("/ok/runs").len(), rig.peer.hits("/ok/ends").len()), (2, 1));
}

#[tokio::test]
async fn two_that_say_they_are_the_same_publication_are_both_parked_and_run() {
    let policy = acme("{concurrent: 1}");
    let rig = Rig::start(&[&policy.flag()]).await;
    let (running, _) = one_runs_and_others_are_parked(&rig, 0).await;
    let mut copied = HeaderMap::new();
    copied.insert("Beamline-Publication", "CAF_EXEC_ASSIGN,2026-11-26T01:02:03Z,1");
    let twins = ["one", "two"].map(|id| assignment("acme", id, rig.call(&format!("/ok/{id}"))));
    for one in &twins {
        rig.router.submit_with(one, copied.clone()).await;
    }
    all_parked(&rig.worker, 2).await;
    rig.peer.open("unit");
    for one in twins.iter().chain([&running]) {
        assert_eq!(rig.router.result(one).await["status"], "success");
    }
    kept_its_promise(&rig.router, &rig.peer).await;
}

#[tokio::test]
async fn a_ceiling_that_is_raised_lets_parked_work_go_on() {
    let mut policy = acme("{concurrent: 1}");
    let rig = Rig::start(&[&policy.flag()]).await;
    let (running, parked) = one_runs_and_others_are_parked(&rig, 3).await;
    policy.say(&with("{concurrent: 2}"));
    for one in &parked {
        assert_eq!(rig.router.result(one).await["status"], "success");
    }
    assert!(rig.router.story(&running).results.is_empty());
    rig.peer.open("unit");
    kept_its_promise(&rig.router, &rig.peer).await;
}

#[tokio::test]
async fn work_for_gpu_slots_is_parked_for_those_who_have_some() {
    let policy = acme("{concurrent: 1}");
    let rig = Rig::start(&[&policy.flag()]).await;
    let only_gpus = ["--cpu-pool-size=0", "--io-pool-size=0", "--gpu-pool-size=2"];
    let gpu = only_gpus.iter().fold(rig.another("gpu-1").flag(policy.flag()), |setup, flag| setup.flag(*flag));
    let gpu = gpu.start(&rig.nats).await;
    let on_gpus = |id: &str, path: &str| {
        let mut one = assignment("acme", id, rig.call(path));
        one["resources"] = json!({"pool": "gpu"});
        one
    };
    let (first, second) = (on_gpus("first", "/gate/unit"), on_gpus("second", "/ok"));
    until("there is a route", async || {
        let stream = rig.router.stream("CAF_EXEC_ASSIGN").await;
        stream.consumer_info("caf-workers-gpu").await.is_ok()
    })
    .await;
    rig.router.client().publish("caf.exec.route.gpu.v1", first.to_string().into()).await.unwrap();
    rig.peer.arrived("/gate/unit", 1).await;
    rig.router.client().publish("caf.exec.route.gpu.v1", second.to_string().into()).await.unwrap();
    assert_eq!(rig.router.verdict(&second).await["status"], "accepted");
    all_parked(&gpu, 1).await;
    let general = assignment("acme", "general", rig.call("/ok"));
    rig.router.submit(&general).await;
    all_parked(&rig.worker, 1).await;
    rig.peer.open("unit");
    assert_eq!(rig.router.result(&second).await["metadata"]["worker_id"], "gpu-1");
    assert_eq!(rig.router.result(&general).await["metadata"]["worker_id"], "worker-1");
    until("nothing is parked any more", async || rig.router.parked().await == 0).await;
}

#[tokio::test]
async fn parked_work_that_may_not_run_where_it_is_taken_up_ends_as_an_error() {
    let policy = acme("{concurrent: 1}");
    let mut rig = Rig::start(&[&policy.flag()]).await;
    let (running, _) = one_runs_and_others_are_parked(&rig, 0).await;
    let [mut large, mut on_cpu, small] =
        ["large", "on-cpu", "small"].map(|id| assignment("acme", id, rig.call(&format!("/ok/{id}"))));
    large["resources"] = json!({"memory_mb": 64});
    on_cpu["resources"] = json!({"pool": "cpu"});
    for one in [&large, &on_cpu, &small] {
        rig.router.submit(one).await;
        assert_eq!(rig.router.verdict(one).await["status"], "accepted");
    }
    all_parked(&rig.worker, 3).await;
    rig.worker.terminate();
    rig.worker.unready("draining").await;
    rig.peer.open("unit");
    assert_eq!(rig.router.result(&running).await["status"], "success");
    assert_eq!(rig.worker.ended().await, Some(0));

    let lesser = ["--max-memory-mb=16", "--cpu-pool-size=0"];
    let lesser = lesser.iter().fold(rig.another("worker-2").flag(policy.flag()), |setup, flag| setup.flag(*flag));
    let _lesser = lesser.start(&rig.nats).await;
    for (one, is_retryable) in [(&large, false), (&on_cpu, true)] {
        let result = rig.router.result(one).await;
        assert_eq!((&result["status"], &result["error"]["code"]), (&json!("error"), &json!(2002)), "{result}");
        assert_eq!((&result["error"]["retryable"], &result["metadata"]["attempts"]), (&json!(is_retryable), &json!(0)));
    }
    assert_eq!(rig.router.result(&small).await["status"], "success");
    kept_its_promise(&rig.router, &rig.peer).await;
    assert_eq!(rig.peer.hits("/ok").len(), 1, "only the small one ran");
    for one in [&large, &on_cpu, &small] {
        assert_eq!(rig.router.story(one).verdicts.len(), 1, "what was accepted is not refused later");
    }
    assert_eq!(rig.router.letter(&large).await["stage"], "execute");
    assert!(rig.router.story(&on_cpu).letters.is_empty());
}

#[tokio::test]
async fn what_is_too_large_to_be_parked_ends_as_an_error_and_others_are_parked() {
    let policy = acme("{concurrent: 1}");
    let rig = Rig::at(NatsServer::with("max_payload: 65536"), &[&policy.flag()]).await;
    let (running, _) = one_runs_and_others_are_parked(&rig, 0).await;
    let mut large = assignment("acme", "large", rig.call("/ok/large"));
    large["padding"] = json!("");
    large["padding"] = json!("p".repeat(65_536 - large.to_string().len()));
    let small = assignment("acme", "small", rig.call("/ok/small"));
    for one in [&large, &small] {
        rig.router.submit(one).await;
        assert_eq!(rig.router.verdict(one).await["status"], "accepted");
    }
    let result = rig.router.result(&large).await;
    assert_eq!((&result["status"], &result["error"]["code"]), (&json!("error"), &json!(2002)), "{result}");
    assert_eq!((&result["error"]["retryable"], &result["metadata"]["attempts"]), (&json!(false), &json!(0)));
    let said = result["error"]["message"].as_str().unwrap();
    assert!(said.contains("larger than the broker takes"), "{said}");
    let letter = rig.router.letter(&large).await;
    assert_eq!((&letter["stage"], &letter["error"]["code"]), (&json!("execute"), &json!(2002)));
    assert!(rig.router.story(&running).results.is_empty());
    rig.peer.open("unit");
    for one in [&running, &small] {
        assert_eq!(rig.router.result(one).await["status"], "success");
    }
    kept_its_promise(&rig.router, &rig.peer).await;
    assert_eq!(rig.peer.hits("/ok").len(), 1);

    // Sent again when there is room, it is answered by its record; as a replay it runs.
    let replay = replay();
    let mut fits = large.clone();
    fits["padding"] = json!("p");
    rig.router.submit_with(&fits, replay).await;
    assert_eq!(json_of(&rig.router.results(&large, 2).await[1])["status"], "success");
    rig.worker.ready().await;
}

#[tokio::test]
async fn no_more_bytes_are_held_for_a_tenant_than_it_may_have() {
    let policy = acme("{memoryMb: 2}");
    let rig = Rig::start(&[&policy.flag()]).await;
    let needs = |id: &str, megabytes: u64, path: &str| {
        let mut one = assignment("acme", id, rig.call(path));
        one["resources"] = json!({"memory_mb": megabytes});
        one
    };
    let (large, second, small) =
        (needs("large", 2, "/gate/memory"), needs("second", 2, "/ok?1"), needs("small", 1, "/ok?2"));
    rig.router.submit(&large).await;
    rig.peer.arrived("/gate/memory", 1).await;
    for one in [&second, &small] {
        rig.router.submit(one).await;
        assert_eq!(rig.router.verdict(one).await["status"], "accepted");
    }
    all_parked(&rig.worker, 2).await;
    let other = assignment("other", "free", rig.put("x", "x"));
    rig.router.submit(&other).await;
    rig.router.result(&other).await;
    assert!(rig.peer.hits("/ok").is_empty());
    let too_large = needs("too-large", 3, "/ok");
    rig.router.submit(&too_large).await;
    let verdict = rig.router.verdict(&too_large).await;
    assert_eq!((&verdict["status"], &verdict["error"]["code"]), (&json!("rejected"), &json!(2002)));
    assert_eq!(rig.router.letter(&too_large).await["stage"], "admit");
    rig.peer.open("memory");
    for one in [&large, &second, &small] {
        assert_eq!(rig.router.result(one).await["status"], "success");
    }
    kept_its_promise(&rig.router, &rig.peer).await;
}

#[tokio::test]
async fn with_defer_work_over_the_budget_of_a_window_runs_in_the_next_ones_in_order() {
    let policy = Policy::new("tenants: {named: [{id: acme, onExceeded: Defer, quotas: {executions: 2, window: 4s}}]}");
    let rig = Rig::start(&[&policy.flag()]).await;
    let all: Vec<_> =
        (0..6).map(|number| assignment("acme", &format!("{number}"), rig.call(&format!("/ok?{number}")))).collect();
    for one in &all {
        rig.router.submit(one).await;
        assert_eq!(rig.router.verdict(one).await["status"], "accepted");
    }
    let hits = rig.peer.arrived("/ok", 6).await;
    let other = assignment("other", "free", rig.put("x", "x"));
    rig.router.submit(&other).await;
    rig.router.result(&other).await;
    kept_its_promise(&rig.router, &rig.peer).await;
    for (place, hit) in hits.iter().enumerate() {
        let number: usize = hit.path.rsplit('?').next().unwrap().parse().unwrap();
        assert!(number.abs_diff(place) <= 1, "in order, but for the two that start at once: {hits:?}");
    }
    let whole_window = hits[4].at - hits[1].at;
    assert!(whole_window >= Duration::from_secs(3), "one lies between the first two and the last: {whole_window:?}");
    for one in &all {
        assert_eq!(rig.router.story(one).verdicts.len(), 1);
    }
}

/// So many of a month have run; what has come after them is deferred.
async fn what_comes_after_is_deferred(rig: &Rig, used: usize, after: &[Value]) {
    for number in 0..used {
        assert_eq!(rig.run("acme", &format!("used-{number}"), rig.call("/echo")).await["status"], "success");
    }
    for one in after {
        rig.router.submit(one).await;
        assert_eq!(rig.router.verdict(one).await["status"], "accepted");
    }
    all_parked(&rig.worker, after.len()).await;
}

fn deferring(executions: usize) -> String {
    format!(
        "tenants: {{named: [{{id: acme, onExceeded: Defer, quotas: {{executions: {executions}, window: 31days}}}}]}}"
    )
}

#[tokio::test]
async fn with_defer_people_are_asked_when_it_may_be_and_not_before() {
    let mut policy = Policy::new(&deferring(1));
    let rig = Rig::start(&[&policy.flag()]).await;
    let mut announced = rig.router.client().subscribe("caf.human.request.v1").await.unwrap();
    let job = json!({"type": "human.approval", "prompt": "Well?", "approvers": ["ann"]});
    let [asked, cancelled] = ["asked", "cancelled"].map(|id| assignment("acme", id, job.clone()));
    what_comes_after_is_deferred(&rig, 1, &[asked.clone(), cancelled.clone()]).await;
    rig.router.client().publish(CANCEL, cancel("acme", "cancelled").to_string().into()).await.unwrap();
    assert_eq!(rig.router.result(&cancelled).await["error"]["code"], 5001);
    assert!(announced.next().now_or_never().is_none(), "nobody was asked");
    policy.say(&deferring(2));
    let told = tokio::time::timeout(SOON, announced.next()).await.expect("somebody is asked").unwrap();
    assert_eq!(json_of(&told.payload)["assignment_id"], "asked");
    let yes = json!({"assignment_id": "asked", "tenant_id": "acme", "approver": "ann", "approved": true});
    rig.router.client().publish("caf.human.response.v1", yes.to_string().into()).await.unwrap();
    assert_eq!(rig.router.result(&asked).await["result"]["approved"], true);
    kept_its_promise(&rig.router, &rig.peer).await;
}

#[tokio::test]
async fn with_defer_no_more_of_a_budget_is_leased_than_the_ceiling_lets_run() {
    let policy = acme("{concurrent: 1, executions: 100, window: 31days}, onExceeded: Defer");
    let rig = Rig::start(&[&policy.flag()]).await;
    let (running, parked) = one_runs_and_others_are_parked(&rig, 20).await;
    let _second = rig.another("worker-2").flag(policy.flag()).start(&rig.nats).await;
    // Longer than what is parked is looked for.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let key = "$KV.caf-quota.caf=2Eexec=2Eassign=2Ev1=2Fcaf-workers.acme";
    let account = json_of(&rig.router.last("KV_caf-quota", key).await.expect("an account").payload);
    let leased = account["executions"].as_u64().unwrap();
    assert!(leased <= 21, "the first, and those that came before the first was parked: {account}");
    rig.peer.open("unit");
    for one in parked.iter().chain([&running]) {
        assert_eq!(rig.router.result(one).await["status"], "success");
    }
}

#[tokio::test]
async fn with_defer_a_paused_worker_takes_nothing_up() {
    let mut policy = Policy::new(&deferring(1));
    let rig = Rig::start(&[&policy.flag()]).await;
    let waits = assignment("acme", "waits", rig.call("/ok"));
    what_comes_after_is_deferred(&rig, 1, std::slice::from_ref(&waits)).await;
    policy.say("paused: true");
    let nobody_pulls = async || rig.router.consumer().await.is_some_and(|consumer| consumer.num_waiting == 0);
    until("nobody pulls", nobody_pulls).await;
    policy.say(&format!("paused: true\n{}", deferring(2)));
    // Longer than what is parked is looked for.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert!(rig.peer.hits("/ok").is_empty() && rig.router.parked().await == 1);
    policy.say(&deferring(2));
    assert_eq!(rig.router.result(&waits).await["status"], "success");
    kept_its_promise(&rig.router, &rig.peer).await;
}

#[tokio::test]
async fn with_defer_whose_accounts_are_lost_has_its_budget_again_and_loses_nothing() {
    let mut policy = Policy::new(&deferring(2));
    let rig = Rig::start(&[&policy.flag()]).await;
    let all: Vec<_> =
        (0..6).map(|number| assignment("acme", &format!("{number}"), rig.call(&format!("/ok?{number}")))).collect();
    what_comes_after_is_deferred(&rig, 2, &all).await;
    rig.router.jetstream().delete_stream("KV_caf-quota").await.expect("it is deleted");
    rig.peer.arrived("/ok", 2).await;
    until("the rest waits", async || rig.router.parked().await == 4).await;
    policy.say(&deferring(6));
    for one in &all {
        assert_eq!(rig.router.result(one).await["status"], "success");
    }
    kept_its_promise(&rig.router, &rig.peer).await;
    let order: Vec<_> = rig.peer.hits("/ok").iter().map(|hit| hit.path.replace("/ok?", "")).collect();
    assert_eq!((order[..2].contains(&"0".into()), order[..2].contains(&"1".into()), order.len()), (true, true, 6));
}

#[tokio::test]
async fn parked_work_that_waits_for_its_tenants_share_of_slots_holds_up_nobody_elses() {
    let terms = |id: &str, executions: usize| {
        format!("{{id: {id}, onExceeded: Defer, quotas: {{executions: {executions}, window: 4s}}}}")
    };
    let policy = Policy::new(&format!("tenants: {{named: [{}, {}]}}", terms("acme", 40), terms("globex", 2)));
    let rig = Rig::start(&[&policy.flag(), "--io-pool-size=16", "--cpu-pool-size=8"]).await;
    let mut job = rig.call("/gate/never");
    job["timeout_ms"] = json!(600_000);
    for number in 0..100 {
        rig.router.submit(&assignment("acme", &format!("{number}"), job.clone())).await;
    }
    // Twelve run, which is its share; the others of its first window wait, and as many parked ones as there are slots.
    until("parked work waits for a slot", async || {
        rig.worker.metric(r#"worker_pool_queue_depth{pool="io"}"#).await >= 28.0 + 12.0
    })
    .await;
    let others: Vec<_> = (0..6).map(|number| assignment("globex", &format!("{number}"), rig.call("/ok"))).collect();
    for one in &others {
        rig.router.submit(one).await;
    }
    for one in &others {
        assert_eq!(rig.router.result(one).await["status"], "success");
    }
    assert_eq!(rig.peer.hits("/gate/never").len(), 12);
}

#[tokio::test]
async fn a_ceiling_that_cannot_be_asked_about_is_told_by_readyz() {
    let policy = acme("{concurrent: 1}");
    let mut rig = Rig::start(&[]).await;
    rig.worker.kill();
    let setup = rig.another("worker-2").flag(policy.flag()).flag("--nats-create-streams=false");
    let worker = setup.start(&rig.nats).await;
    rig.router.jetstream().delete_stream("KV_caf-quota").await.expect("it is deleted");
    let waits = assignment("acme", "waits", rig.call("/ok"));
    rig.router.submit(&waits).await;
    let reasons = worker.unready("streams unavailable").await;
    assert!(reasons.contains("caf-quota"), "{reasons}");
    // Somebody makes it anew.
    let _third = rig.another("worker-3").start(&rig.nats).await;
    assert_eq!(rig.router.result(&waits).await["status"], "success");
}
