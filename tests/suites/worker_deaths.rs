//! Assignments that kill their workers: they end, and nobody else's work dies with them for long.

use beamline_tests::rig::{LAPSE, Rig, kept_its_promise};
use beamline_tests::router::{DLQ, assignment};
use beamline_tests::wait::{until, within};
use beamline_tests::worker::Worker;
use serde_json::{Value, json};

/// What a worker says when it has met an assignment that may kill it.
const ISOLATES: &str = "it may kill its worker: running it alone";

/// Kills worker after worker at the moment when everything at these gates has begun for the n-th time.
async fn die(rig: &mut Rig, gates: &[&str], deaths: std::ops::RangeInclusive<usize>) {
    for death in deaths {
        for gate in gates {
            rig.peer.arrived(&format!("/gate/{gate}"), death).await;
        }
        rig.worker.kill();
        rig.worker = rig.another(&format!("worker-after-{death}")).start(&rig.nats).await;
    }
}

fn has_said(worker: &Worker, message: &str) -> bool {
    worker.lines().iter().any(|line| line.contains(message))
}

#[tokio::test]
async fn w16_a_poison_ends_after_four_deaths_and_its_neighbours_complete() {
    let mut rig = Rig::start(&[]).await;
    let poison = assignment("acme", "poison", rig.call("/gate/poison"));
    let neighbours: Vec<Value> =
        (0..40).map(|number| assignment("acme", &format!("near-{number}"), rig.call("/slow/20"))).collect();
    rig.router.submit(&poison).await;
    for near in &neighbours {
        rig.router.submit(near).await;
    }
    die(&mut rig, &["poison"], 1..=4).await;

    let result = rig.router.result(&poison).await;
    let error = &result["error"];
    assert_eq!((&error["code"], &error["retryable"]), (&json!(4001), &json!(false)));
    assert_eq!(error["message"], "killed its workers 4 times: it does not run any more");
    assert_eq!((&result["status"], &result["metadata"]["attempts"]), (&json!("error"), &json!(0)));
    let letter = rig.router.letter(&poison).await;
    assert_eq!(letter["stage"], "crash");
    assert!(letter["deliveries"].as_i64() >= Some(5), "{letter}");
    assert_eq!(letter["assignment"], poison);
    for near in &neighbours {
        assert_eq!(rig.router.result(near).await["status"], "success");
    }
    kept_its_promise(&rig.router, &rig.peer).await;
    assert_eq!(rig.router.all("CAF_EXEC_DLQ", DLQ).await.len(), 1, "one letter");
    assert_eq!(rig.router.story(&poison).results.len(), 1, "one result");
    assert_eq!(rig.peer.hits("/gate/poison").len(), 4, "four executions");
    assert_eq!(rig.worker.metric(r#"worker_dead_letters_total{stage="crash"}"#).await, 1.0);
}

#[tokio::test]
async fn w16_what_has_killed_two_workers_runs_alone_and_two_of_a_kind_one_after_the_other() {
    let mut rig = Rig::start(&["--io-pool-size=4"]).await;
    let suspects = ["one", "two"].map(|id| assignment("acme", id, rig.call(&format!("/gate/{id}"))));
    for suspect in &suspects {
        rig.router.submit(suspect).await;
    }
    die(&mut rig, &["one", "two"], 1..=2).await;
    let near = assignment("acme", "near", rig.call("/gate/near"));
    rig.router.submit(&near).await;
    rig.peer.arrived("/gate/near", 1).await;

    within(LAPSE, "a suspect has come back", async || has_said(&rig.worker, ISOLATES).then_some(())).await;
    let pulls = async || rig.router.consumer().await.map(|consumer| consumer.num_waiting);
    until("it asks for nothing more", async || pulls().await == Some(0)).await;
    // A second worker takes what comes in meanwhile.
    let second = rig.another("worker-2").start(&rig.nats).await;
    let meanwhile = assignment("acme", "meanwhile", rig.call("/ok"));
    rig.router.submit(&meanwhile).await;
    assert_eq!(rig.router.result(&meanwhile).await["metadata"]["worker_id"], "worker-2");
    second.terminate();
    assert_eq!(begun(&rig), 4, "neither begins beside the neighbour");
    rig.peer.open("near");
    rig.router.result(&near).await;

    let first =
        within(LAPSE, "one of them begins", async || suspects.iter().find(|suspect| third(&rig, suspect))).await;
    let other = suspects.iter().find(|suspect| *suspect != first).expect("there are two");
    let held = async || rig.router.consumer().await.map(|consumer| consumer.num_ack_pending);
    assert!(held().await <= Some(2), "it and at most the other one");
    assert!(!third(&rig, other), "the other one does not run beside it");
    rig.peer.open(first["assignment_id"].as_str().unwrap_or_default());
    assert_eq!(rig.router.result(first).await["status"], "success");
    within(LAPSE, "the other one begins", async || third(&rig, other).then_some(())).await;
    rig.peer.open(other["assignment_id"].as_str().unwrap_or_default());
    assert_eq!(rig.router.result(other).await["status"], "success");

    let after = assignment("acme", "after", rig.call("/ok"));
    rig.router.submit(&after).await;
    assert_eq!(rig.router.result(&after).await["status"], "success");
    kept_its_promise(&rig.router, &rig.peer).await;
}

/// Requests of the two suspects.
fn begun(rig: &Rig) -> usize {
    ["/gate/one", "/gate/two"].iter().map(|gate| rig.peer.hits(gate).len()).sum()
}

fn third(rig: &Rig, suspect: &Value) -> bool {
    rig.peer.hits(&format!("/gate/{}", suspect["assignment_id"].as_str().unwrap_or_default())).len() == 3
}

#[tokio::test]
async fn w16_ten_drains_that_cut_work_off_are_no_deaths() {
    const DRAINS: usize = 10;
    let flags = ["--io-pool-size=1", "--drain-timeout=100ms"];
    let mut rig = Rig::start(&flags).await;
    let payloads = ["one", "two"].map(|id| assignment("acme", id, rig.call("/gate/slot")));
    for payload in &payloads {
        rig.router.submit(payload).await;
    }
    for drain in 1..=DRAINS {
        rig.peer.arrived("/gate/slot", drain).await;
        let verdicts = || payloads.iter().map(|payload| rig.router.story(payload).verdicts.len()).sum::<usize>();
        until("one runs, the other one waits", async || verdicts() >= 2 * drain).await;
        rig.worker.terminate();
        assert_eq!(rig.worker.ended().await, Some(0));
        let next = rig.another(&format!("worker-{drain}"));
        rig.worker = flags.iter().fold(next, |setup, flag| setup.flag(*flag)).start(&rig.nats).await;
    }
    rig.peer.arrived("/gate/slot", DRAINS + 1).await;
    rig.peer.open("slot");
    for payload in &payloads {
        assert_eq!(rig.router.result(payload).await["status"], "success");
    }
    assert!(!has_said(&rig.worker, ISOLATES), "nothing is suspected");
    kept_its_promise(&rig.router, &rig.peer).await;
}
