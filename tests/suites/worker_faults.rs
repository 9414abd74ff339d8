//! The contract under fault: whatever dies, pauses, fills up or vanishes, each assignment ends once. The names carry the
//! ids of the failure catalogue.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::BTreeMap;
use std::time::Duration;

use beamline_tests::audit::{Allowed, audit};
use beamline_tests::peer::Peer;
use beamline_tests::rig::Rig;
use beamline_tests::router::{DLQ, Router, assignment};
use beamline_tests::wait::{until, within};
use beamline_tests::worker::Setup;
use serde_json::{Value, json};

/// A hold lapses after 10 s; then the next worker needs a moment.
const LAPSE: Duration = Duration::from_secs(40);

/// Everything is settled, and all invariants hold.
async fn kept_its_promise(router: &Router, peer: &Peer) {
    router.settled(LAPSE).await;
    let found = audit(router, &peer.hits("/"), Allowed { attempts: 3 }).await;
    assert!(found.is_empty(), "{found:#?}");
}

#[tokio::test]
async fn w01_what_a_killed_worker_was_at_is_done_by_another_under_the_same_key() {
    let mut rig = Rig::start(&[]).await;
    let ids: Vec<String> = (0..10).map(|number| format!("w01-{number}")).collect();
    for id in &ids {
        rig.router.submit(&assignment("acme", id, rig.call("/gate/w01"))).await;
    }
    rig.peer.arrived("/gate/w01", 10).await;
    let second = rig.another("worker-2").start(&rig.nats).await;
    rig.worker.kill();
    rig.peer.arrived("/gate/w01", 20).await;
    rig.peer.open("w01");
    for id in &ids {
        let result = rig.router.result(("acme", id.as_str())).await;
        assert_eq!((&result["status"], &result["metadata"]["worker_id"]), (&json!("success"), &json!("worker-2")));
    }
    kept_its_promise(&rig.router, &rig.peer).await;
    let mut effects: BTreeMap<String, usize> = BTreeMap::new();
    for hit in rig.peer.hits("/gate/w01") {
        *effects.entry(hit.key().to_owned()).or_default() += 1;
    }
    assert_eq!(effects, ids.iter().map(|id| (format!("acme.{id}"), 2)).collect(), "one effect a delivery");
    assert_eq!(second.metric("worker_redeliveries_total").await, 10.0);
}

#[tokio::test]
async fn w04_a_worker_that_was_paused_past_its_hold_publishes_what_another_recorded() {
    let rig = Rig::start(&[]).await;
    let ids: Vec<String> = (0..5).map(|number| format!("w04-{number}")).collect();
    for id in &ids {
        rig.router.submit(&assignment("acme", id, rig.call("/gate/w04"))).await;
    }
    rig.peer.arrived("/gate/w04", 5).await;
    let _second = rig.another("worker-2").start(&rig.nats).await;
    rig.worker.pause();
    rig.peer.arrived("/gate/w04", 10).await;
    rig.peer.open("w04");
    for id in &ids {
        let result = rig.router.result(("acme", id.as_str())).await;
        assert_eq!(result["metadata"]["worker_id"], "worker-2");
    }
    rig.worker.resume();
    for id in &ids {
        let results = rig.router.results(("acme", id.as_str()), 2).await;
        assert!(results.iter().all(|result| *result == results[0]), "the stored bytes, whoever says them");
    }
    rig.worker.ready().await;
    kept_its_promise(&rig.router, &rig.peer).await;
    // It is of use again.
    let payload = assignment("acme", "w04-after", rig.call("/ok"));
    rig.router.submit(&payload).await;
    assert_eq!(rig.router.result(&payload).await["status"], "success");
}

#[tokio::test]
async fn w06_work_that_ends_while_the_broker_is_dead_is_recorded_when_it_is_back() {
    let mut rig = Rig::start(&[]).await;
    let ids: Vec<String> = (0..12).map(|number| format!("w06-{number}")).collect();
    for id in &ids {
        rig.router.submit(&assignment("acme", id, rig.call("/gate/w06"))).await;
    }
    rig.peer.arrived("/gate/w06", 12).await;
    rig.nats.kill();
    rig.worker.unready("NATS disconnected").await;
    rig.peer.open("w06");
    until("the work has ended", async || rig.worker.metric(r#"worker_slots_busy{pool="io"}"#).await == 0.0).await;
    rig.nats.restart();
    rig.worker.ready().await;
    for id in &ids {
        let record = within(LAPSE, "a record", async || rig.router.record(("acme", id.as_str())).await).await;
        assert!(String::from_utf8_lossy(&record.payload).contains(r#""status":"success""#));
    }
    kept_its_promise(&rig.router, &rig.peer).await;
    assert_eq!(rig.peer.hits("/gate/w06").len(), 12, "nothing was executed again");
}

#[tokio::test]
async fn w08_a_broker_that_falls_silent_is_noticed_and_forgiven() {
    let rig = Rig::start(&[]).await;
    let running = assignment("acme", "w08-running", rig.call("/gate/w08"));
    rig.router.submit(&running).await;
    rig.peer.arrived("/gate/w08", 1).await;
    rig.nats.pause();
    rig.worker.unready("NATS disconnected").await;
    assert_eq!(rig.worker.get("/livez").await.unwrap().0, 200);
    rig.nats.resume();
    rig.worker.ready().await;
    rig.peer.open("w08");
    within(LAPSE, "a record", async || rig.router.record(&running).await).await;
    kept_its_promise(&rig.router, &rig.peer).await;
}

#[tokio::test]
async fn w11_a_full_dead_letter_stream_stops_intake_and_loses_nothing() {
    let mut rig = Rig::start(&[]).await;
    rig.worker.kill();
    // The administrator has sized the stream for a few letters.
    let mut config = rig.router.stream("CAF_EXEC_DLQ").await.cached_info().config.clone();
    config.max_bytes = 64 * 1024;
    rig.router.jetstream().update_stream(&config).await.unwrap();
    let worker = rig.another("worker-2").start(&rig.nats).await;

    let letters: usize = 30;
    for number in 0..letters {
        let mut payload = assignment("acme", &format!("w11-{number}"), json!({"type": "no.such.block"}));
        payload["padding"] = json!("p".repeat(8 * 1024));
        rig.router.submit(&payload).await;
    }
    let reasons = worker.unready("storage refused").await;
    assert!(reasons.contains(DLQ), "{reasons}");
    let said = rig.router.all("CAF_EXEC_DLQ", DLQ).await.len();
    assert!(said < letters, "the stream is full with {said}");

    config.max_bytes = 16 << 20;
    rig.router.jetstream().update_stream(&config).await.unwrap();
    worker.ready().await;
    kept_its_promise(&rig.router, &rig.peer).await;
    assert_eq!(rig.router.all("CAF_EXEC_DLQ", DLQ).await.len(), letters, "each letter once");
    for number in 0..letters {
        assert_eq!(rig.router.verdict(("acme", format!("w11-{number}").as_str())).await["status"], "rejected");
    }
}

#[tokio::test]
async fn w13_a_ledger_that_is_deleted_is_made_anew_and_the_outcome_is_recorded() {
    let rig = Rig::start(&[]).await;
    let running = assignment("acme", "w13-running", rig.call("/gate/w13"));
    rig.router.submit(&running).await;
    rig.peer.arrived("/gate/w13", 1).await;
    rig.router.jetstream().delete_stream("CAF_EXEC_RESULT").await.unwrap();
    rig.peer.open("w13");
    assert_eq!(rig.router.result(&running).await["status"], "success");
    assert!(rig.router.record(&running).await.is_some());
    rig.router.settled(LAPSE).await;

    rig.router.jetstream().delete_stream("CAF_EXEC_RESULT").await.unwrap();
    let next = assignment("acme", "w13-next", rig.call("/ok"));
    rig.router.submit(&next).await;
    assert_eq!(rig.router.result(&next).await["status"], "success");
    rig.worker.ready().await;
}

#[tokio::test]
async fn w13_an_intake_that_is_deleted_is_made_anew() {
    let rig = Rig::start(&[]).await;
    for id in ["w13-before", "w13-after"] {
        let payload = assignment("acme", id, rig.call("/ok"));
        rig.router.submit(&payload).await;
        assert_eq!(rig.router.result(&payload).await["status"], "success");
        rig.router.settled(LAPSE).await;
        rig.router.jetstream().delete_stream("CAF_EXEC_ASSIGN").await.unwrap();
    }
    // The new stream counts from 1 again: a new publication is not taken for the old one of that number.
    let mut flaky = assignment("acme", "w13-flaky", rig.call("/flaky/1"));
    flaky["retry_config"] = json!({"max_attempts": 1});
    rig.router.submit(&flaky).await;
    assert_eq!(rig.router.result(&flaky).await["status"], "error");
    rig.router.settled(LAPSE).await;
    rig.router.jetstream().delete_stream("CAF_EXEC_ASSIGN").await.unwrap();
    rig.router.submit(&flaky).await;
    assert!(String::from_utf8_lossy(&rig.router.results(&flaky, 2).await[1]).contains(r#""status":"success""#));
    rig.worker.ready().await;
}

#[tokio::test]
async fn w14_duplicates_have_one_outcome_whatever_they_say() {
    let rig = Rig::start(&[]).await;
    let _second = rig.another("worker-2").start(&rig.nats).await;
    let total: usize = 200;
    for number in 0..total {
        let id = format!("w14-{number}");
        for copy in 0..=number % 3 {
            let mut payload = assignment("acme", &id, rig.call("/slow/5"));
            if number % 10 == 0 {
                payload["job"]["body"] = json!(format!("copy {copy}"));
            }
            rig.router.submit(&payload).await;
        }
    }
    for number in 0..total {
        let results = rig.router.results(("acme", format!("w14-{number}").as_str()), 1 + number % 3).await;
        assert!(results.iter().all(|result| *result == results[0]));
    }
    kept_its_promise(&rig.router, &rig.peer).await;
}

/// 2 000 assignments of every kind, while workers are killed one after the other and the broker once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i1_to_i6_hold_when_workers_and_the_broker_are_killed_under_load() {
    const TOTAL: usize = 2_000;
    const KILLS: usize = 6;
    let rig = Rig::start(&[]).await;
    let payloads: Vec<Value> = (0..TOTAL).map(|number| mixed(&rig, number)).collect();
    let spares: Vec<Setup> = (0..KILLS + 2).map(|number| rig.another(&format!("spare-{number}"))).collect();
    let Rig { worker, router, peer, mut nats, files: _files } = rig;

    let submit = async {
        for (number, payload) in payloads.iter().enumerate() {
            for _ in 0..=usize::from(number % 25 == 0) {
                router.submit(payload).await;
            }
        }
    };
    let disturb = async {
        let mut workers = vec![worker];
        for (number, spare) in spares.into_iter().enumerate() {
            if number >= 2 {
                peer.arrived("/", 150 * (number - 1)).await;
                workers.remove(0).kill();
            }
            workers.push(spare.start(&nats).await);
            if number == KILLS / 2 {
                nats.restart();
            }
        }
        workers
    };
    let (_workers, ()) = futures::join!(disturb, submit);
    kept_its_promise(&router, &peer).await;
    let records = router.all("CAF_EXEC_RESULT", "caf.exec.ledger.>").await;
    assert_eq!(records.len(), TOTAL - TOTAL / 20, "one record each, but for those that are no assignment");
}

/// One in twenty is refused, one fails for good, one needs a second attempt, five write a file, the rest take 20 ms.
fn mixed(rig: &Rig, number: usize) -> Value {
    let id = format!("mixed-{number}");
    let job = match number % 20 {
        0 => json!({"type": "no.such.block"}),
        1 => rig.call("/status/404"),
        2 => rig.call("/flaky/1"),
        3..8 => rig.put(&id, "x"),
        _ => rig.call("/slow/20"),
    };
    assignment(["acme", "other"][number / 20 % 2], &id, job)
}
