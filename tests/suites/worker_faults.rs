//! The contract under fault: whatever dies, pauses, fills up or vanishes, each assignment ends once. The names carry the
//! ids of the failure catalogue.
#![expect(clippy::indexing_slicing, clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::collections::BTreeMap;
use std::time::Duration;

use beamline_tests::audit::{Allowed, audit};
use beamline_tests::failpoint::{Trap, VARIABLE};
use beamline_tests::nats::NatsServer;
use beamline_tests::rig::{LAPSE, Rig, kept_its_promise};
use beamline_tests::router::{DLQ, assignment, json as read};
use beamline_tests::tcpfault::Mode;
use beamline_tests::wait::{SOON, until, within};
use beamline_tests::worker::Setup;
use bytes::Bytes;
use serde_json::{Value, json};

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
async fn long_work_keeps_its_hold() {
    let rig = Rig::start(&[]).await;
    let second = rig.another("worker-2").start(&rig.nats).await;
    let payload = assignment("acme", "long", rig.call("/gate/long"));
    rig.router.submit(&payload).await;
    rig.peer.arrived("/gate/long", 1).await;
    // The time itself is what is tested: one hold and a bit.
    tokio::time::sleep(Duration::from_secs(12)).await;
    rig.peer.open("long");
    rig.router.result(&payload).await;
    kept_its_promise(&rig.router, &rig.peer).await;
    assert_eq!(rig.peer.hits("/gate/long").len(), 1, "nobody else was given it");
    for worker in [&rig.worker, &second] {
        assert_eq!(worker.metric("worker_redeliveries_total").await, 0.0);
    }
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
    rig.worker.says("superseded by a recorded outcome").await;
    rig.worker.ready().await;
    kept_its_promise(&rig.router, &rig.peer).await;
    assert_eq!(written(&rig).await, 5, "one record each");
    // It is of use again.
    let payload = assignment("acme", "w04-after", rig.call("/ok"));
    rig.router.submit(&payload).await;
    assert_eq!(rig.router.result(&payload).await["status"], "success");
}

/// How many records have ever been written.
async fn written(rig: &Rig) -> u64 {
    rig.router.stream("CAF_EXEC_RESULT").await.cached_info().state.last_sequence
}

/// Drops all records, as their age does.
async fn forget_records(rig: &Rig) {
    rig.router.stream("CAF_EXEC_RESULT").await.purge().await.unwrap();
}

#[tokio::test]
async fn w04_a_late_outcome_is_discarded_where_the_record_of_another_may_be_gone() {
    let rig = Rig::start(&[]).await;
    let payload = assignment("acme", "w04-late", rig.call("/gate/late"));
    rig.router.submit(&payload).await;
    rig.peer.arrived("/gate/late", 1).await;
    let _second = rig.another("worker-2").start(&rig.nats).await;
    rig.worker.pause();
    rig.peer.arrived("/gate/late", 2).await;
    rig.peer.open("late");
    assert_eq!(rig.router.result(&payload).await["metadata"]["worker_id"], "worker-2");
    rig.router.settled(LAPSE).await;
    forget_records(&rig).await;
    rig.worker.resume();
    let line = rig.worker.says("discarded a late outcome").await;
    assert_eq!(line["fields"]["assignment_id"], "w04-late");
    rig.worker.terminate();
    let Rig { mut worker, router, .. } = rig;
    assert_eq!(worker.ended().await, Some(0), "nothing is under way any more");
    router.settled(LAPSE).await;
    assert_eq!(router.story(&payload).results.len(), 1);
    assert_eq!(router.stream("CAF_EXEC_RESULT").await.cached_info().state.last_sequence, 1, "one record, once");
}

#[tokio::test]
async fn a_redelivery_of_what_this_very_worker_runs_renews_the_hold_and_starts_nothing() {
    let rig = Rig::start(&[]).await;
    let payload = assignment("acme", "w04-own", rig.call("/gate/own"));
    rig.router.submit(&payload).await;
    rig.peer.arrived("/gate/own", 1).await;
    rig.worker.pause();
    // More than counts as a pause of the process: it renews nothing any more.
    tokio::time::sleep(Duration::from_secs(4)).await;
    rig.worker.resume();
    let redelivered = async || (rig.worker.metric("worker_redeliveries_total").await == 1.0).then_some(());
    within(LAPSE, "it is delivered again", redelivered).await;
    rig.router.learn(&payload, "two verdicts", |story| (story.verdicts.len() == 2).then_some(())).await;
    // On a lapsed hold its outcome would be discarded now.
    let other = assignment("acme", "w04-other", rig.call("/ok"));
    rig.router.submit(&other).await;
    rig.router.result(&other).await;
    forget_records(&rig).await;
    // The time itself is what is tested: the hold is renewed for more than it lasts.
    tokio::time::sleep(Duration::from_secs(12)).await;
    rig.peer.open("own");
    assert_eq!(rig.router.result(&payload).await["status"], "success");
    rig.router.settled(SOON).await;
    assert_eq!(rig.worker.metric("worker_redeliveries_total").await, 1.0);
    assert_eq!((rig.peer.hits("/gate/own").len(), rig.router.story(&payload).results.len()), (1, 1));
    assert!(rig.router.record(&payload).await.is_some());
}

#[tokio::test]
async fn w04_work_that_waited_through_a_pause_is_left_to_whom_it_was_given() {
    let rig = Rig::start(&["--io-pool-size=1"]).await;
    let running = assignment("acme", "w04-running", rig.call("/gate/slot"));
    rig.router.submit(&running).await;
    rig.peer.arrived("/gate/slot", 1).await;
    let waiting = assignment("acme", "w04-waiting", rig.call("/ok"));
    rig.router.submit(&waiting).await;
    rig.router.verdict(&waiting).await;
    let _second = rig.another("worker-2").start(&rig.nats).await;
    rig.worker.pause();
    assert_eq!(rig.router.result(&waiting).await["metadata"]["worker_id"], "worker-2");
    rig.peer.arrived("/gate/slot", 2).await;
    rig.peer.open("slot");
    rig.worker.resume();
    rig.router.results(&running, 2).await;
    let idle = async || rig.worker.metric(r#"worker_slots_busy{pool="io"}"#).await == 0.0;
    until("the first worker is idle", idle).await;
    kept_its_promise(&rig.router, &rig.peer).await;
    assert_eq!(rig.peer.hits("/ok").len(), 1, "the first worker did not begin it");
}

#[tokio::test]
async fn w05_rolling_workers_over_executes_nothing_twice() {
    const TOTAL: usize = 600;
    let rig = Rig::start(&["--io-pool-size=4"]).await;
    let payloads: Vec<Value> =
        (0..TOTAL).map(|n| assignment("acme", &format!("w05-{n}"), rig.call("/slow/10"))).collect();
    let generations: Vec<Setup> =
        (2..6).map(|n| rig.another(&format!("worker-{n}")).flag("--io-pool-size=4")).collect();
    let Rig { worker, router, peer, nats, files: _files } = rig;
    let submit = async {
        for payload in &payloads {
            router.submit(payload).await;
        }
    };
    let roll = async {
        let mut old = worker;
        for (number, next) in generations.into_iter().enumerate() {
            peer.arrived("/slow", TOTAL / 6 * (number + 1)).await;
            let next = next.start(&nats).await;
            old.terminate();
            assert_eq!(old.ended().await, Some(0));
            old = next;
        }
        old
    };
    let (_last, ()) = futures::join!(roll, submit);
    kept_its_promise(&router, &peer).await;
    assert_eq!(peer.hits("/slow").len(), TOTAL);
    for payload in &payloads {
        assert_eq!(router.result(payload).await["status"], "success");
    }
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

/// Bytes a second, in each direction of each connection.
const SLOW: Mode = Mode::Rate(150_000);
/// Large on such a link: six seconds' worth, and as many as a connection may need for two messages.
const LARGE: usize = 900_000;
/// The time that a few of them need, for the record and for the result, and half as much again.
const SLOWLY: Duration = Duration::from_secs(90);

/// Waits for so many results of an assignment that comes over a slow link.
async fn results_in_time(rig: &Rig, assignment: &Value, count: usize) -> Vec<Bytes> {
    let results = async || {
        let results = rig.router.story(assignment).results;
        (results.len() >= count).then_some(results)
    };
    within(SLOWLY, &format!("{count} results"), results).await
}

/// Nothing was asked for again or cut off.
async fn went_smoothly(rig: &Rig) {
    assert_eq!(rig.worker.metric("worker_publish_retries_total").await, 0.0);
    let lines = rig.worker.lines().join("\n");
    for trouble in ["lost the connection", "not sure", "again"] {
        assert!(!lines.contains(trouble), "{lines}");
    }
}

#[tokio::test]
async fn w09_large_results_cross_a_slow_link_and_small_ones_with_them() {
    let mut rig = Rig::start(&[]).await;
    let link = rig.moved_behind_a_link().await;
    link.set(SLOW);
    let ask =
        |kind: &str, number: usize, path: &str| assignment("acme", &format!("w09-{kind}-{number}"), rig.call(path));
    let large: Vec<_> = (0..3).map(|number| ask("large", number, &format!("/gate/large/{LARGE}"))).collect();
    let small: Vec<_> = (0..10).map(|number| ask("small", number, "/gate/small")).collect();
    for payload in large.iter().chain(&small) {
        rig.router.submit(payload).await;
    }
    rig.peer.arrived("/gate", large.len() + small.len()).await;
    let _second = rig.another("worker-3").start(&rig.nats).await;
    rig.peer.open("large");
    rig.peer.open("small");
    for payload in large.iter().chain(&small) {
        let results = results_in_time(&rig, payload, 1).await;
        let record = rig.router.record(payload).await.expect("a record");
        assert_eq!(results, [record.payload], "as it is recorded");
    }
    went_smoothly(&rig).await;
    assert_eq!(rig.peer.hits("/gate").len(), large.len() + small.len(), "holds were kept: nothing was executed again");
    kept_its_promise(&rig.router, &rig.peer).await;
    let said = |payload: &Value| rig.router.story(payload).results.len();
    assert_eq!(large.iter().chain(&small).map(said).sum::<usize>(), large.len() + small.len(), "each was told once");
}

#[tokio::test]
async fn w09_a_large_record_that_comes_slowly_answers_a_new_publication() {
    let mut rig = Rig::start(&[]).await;
    let payload = assignment("acme", "w09-again", rig.call(&format!("/bytes/{LARGE}")));
    rig.router.submit(&payload).await;
    rig.router.result(&payload).await;
    let link = rig.moved_behind_a_link().await;
    link.set(SLOW);
    rig.router.submit(&payload).await;
    let results = results_in_time(&rig, &payload, 2).await;
    assert_eq!(results[0], results[1]);
    went_smoothly(&rig).await;
    kept_its_promise(&rig.router, &rig.peer).await;
    assert_eq!(rig.peer.hits("/bytes").len(), 1, "it is not executed again");
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
    // Open pulls last a second; then what comes stays where others may take it.
    let waiting = async || rig.router.consumer().await.map(|consumer| consumer.num_waiting);
    until("nobody pulls", async || waiting().await == Some(0)).await;
    let later = assignment("acme", "w11-later", rig.call("/ok"));
    rig.router.submit(&later).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let consumer = rig.router.consumer().await.unwrap();
    assert_eq!((consumer.num_pending, consumer.num_waiting), (1, 0), "nothing is pulled");

    config.max_bytes = 16 << 20;
    rig.router.jetstream().update_stream(&config).await.unwrap();
    worker.ready().await;
    assert_eq!(rig.router.result(&later).await["status"], "success");
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

#[tokio::test]
async fn w18_a_result_that_the_broker_no_longer_takes_is_a_final_error() {
    let mut rig = Rig::start(&[]).await;
    let small = 64 * 1024;
    // What surrounds a body in a result, so that one of them fits but for the headers of its record.
    let measured = assignment("acme", "w18-0", rig.call("/bytes/50000"));
    rig.router.submit(&measured).await;
    let around = rig.router.results(&measured, 1).await[0].len() - 50_000;
    let sizes = [small + 1, small - around - 20, small - around - 4096];
    rig.router.submit(&assignment("acme", "w18-4", rig.call("/gate/away/70000"))).await;
    rig.peer.arrived("/gate/away", 1).await;
    for (number, size) in sizes.into_iter().enumerate() {
        let job = rig.call(&format!("/gate/w18/{size}"));
        rig.router.submit(&assignment("acme", &format!("w18-{}", number + 1), job)).await;
    }
    rig.peer.arrived("/gate/w18", 3).await;
    rig.nats.kill();
    rig.worker.unready("NATS disconnected").await;
    rig.peer.open("away");
    let busy = async || rig.worker.metric(r#"worker_slots_busy{pool="io"}"#).await;
    until("one of them ends while the broker is away", async || busy().await == 3.0).await;
    rig.nats.restart_with(&format!("max_payload: {small}"));
    rig.worker.ready().await;
    rig.peer.open("w18");
    for (id, is_too_large) in [("w18-1", true), ("w18-2", true), ("w18-3", false), ("w18-4", true)] {
        let record = within(LAPSE, "a record", async || rig.router.record(("acme", id)).await).await;
        let result = read(&record.payload);
        let error = is_too_large.then(|| (json!(2002), json!(false)));
        let found = result.get("error").map(|error| (error["code"].clone(), error["retryable"].clone()));
        assert_eq!(found, error, "{id}");
    }
    kept_its_promise(&rig.router, &rig.peer).await;
    assert_eq!(rig.router.all("CAF_EXEC_DLQ", DLQ).await.len(), 3);
}

#[tokio::test]
async fn w18_what_a_stream_is_set_to_refuse_for_its_size_ends_too() {
    let mut rig = Rig::start(&[]).await;
    rig.worker.kill();
    // The administrator has bounded the messages of both streams.
    for stream in ["CAF_EXEC_RESULT", "CAF_EXEC_DLQ"] {
        let mut config = rig.router.stream(stream).await.cached_info().config.clone();
        config.max_message_size = 16 * 1024;
        rig.router.jetstream().update_stream(&config).await.unwrap();
    }
    let worker = rig.another("worker-2").start(&rig.nats).await;
    let too_large = assignment("acme", "w18-result", rig.call("/bytes/50000"));
    rig.router.submit(&too_large).await;
    let result = rig.router.result(&too_large).await;
    assert_eq!((&result["error"]["code"], &result["error"]["retryable"]), (&json!(2002), &json!(false)));
    let letter = rig.router.letter(&too_large).await;
    assert_eq!((&letter["stage"], &letter["assignment"]), (&json!("execute"), &too_large));

    let mut refused = assignment("acme", "w18-letter", json!({"type": "no.such.block"}));
    refused["padding"] = json!("p".repeat(20 * 1024));
    rig.router.submit(&refused).await;
    assert_eq!(rig.router.verdict(&refused).await["error"]["code"], 1001);
    // Whoever listens hears what the stream refused, too: what counts is what it keeps.
    let kept = rig.router.all("CAF_EXEC_DLQ", DLQ).await;
    let letters: Vec<_> = kept.iter().map(|kept| read(&kept.payload)).collect();
    let letter = letters.iter().find(|letter| letter["assignment_id"] == "w18-letter").unwrap();
    let bytes = refused.to_string().len();
    assert_eq!(letter["omitted"], format!("the original of {bytes} bytes: no message of this size is taken here"));
    assert!(letter.get("assignment").is_none(), "{letter}");
    worker.ready().await;
    kept_its_promise(&rig.router, &rig.peer).await;
}

/// Has a stream take no larger messages.
async fn bound(rig: &Rig, stream: &str, bytes: i32) {
    let mut config = rig.router.stream(stream).await.cached_info().config.clone();
    config.max_message_size = bytes;
    rig.router.jetstream().update_stream(&config).await.unwrap();
}

/// The dead letter that the stream keeps: what it refused was heard too.
async fn kept_letter(rig: &Rig, id: &str) -> Value {
    let kept = rig.router.all("CAF_EXEC_DLQ", DLQ).await;
    let mut letters = kept.iter().map(|kept| read(&kept.payload));
    letters.find(|letter| letter["assignment_id"] == id).expect("a letter")
}

#[tokio::test]
async fn w18_an_error_that_no_stream_takes_whole_says_less_and_stops_nobody() {
    let rig = Rig::start(&[]).await;
    bound(&rig, "CAF_EXEC_DLQ", 2048).await;
    let page = assignment("acme", "w18-page", rig.call("/garbled/404/2000"));
    rig.router.submit(&page).await;
    let result = rig.router.result(&page).await;
    assert_eq!(result["error"]["details"]["body"], json!("\u{1}".repeat(2000)), "the Router is told all of it");
    let letter = kept_letter(&rig, "w18-page").await;
    assert_eq!((&letter["error"]["code"], &letter["error"]["details"]), (&json!(3003), &json!({})));
    assert_eq!((&letter["attempts"], &letter["attempts_omitted"]), (&json!([]), &json!(1)));
    let message = letter["error"]["message"].as_str().unwrap();
    assert!(message.starts_with("the peer answered 404"), "{message}");

    bound(&rig, "CAF_EXEC_RESULT", 2048).await;
    let error = assignment("acme", "w18-error", rig.call("/garbled/404/1000"));
    rig.router.submit(&error).await;
    let result = rig.router.result(&error).await;
    assert_eq!(result["error"]["code"], 3003);
    assert_eq!(result["error"]["details"].get("body"), None, "{result}");
    assert_eq!(kept_letter(&rig, "w18-error").await["error"]["code"], 3003);

    let other = assignment("acme", "w18-other", rig.call("/ok"));
    rig.router.submit(&other).await;
    assert_eq!(rig.router.result(&other).await["status"], "success");
    rig.worker.ready().await;
    kept_its_promise(&rig.router, &rig.peer).await;
}

#[tokio::test]
async fn w18_a_letter_that_a_small_broker_does_not_take_whole_says_less() {
    let rig = Rig::at(NatsServer::with("max_payload: 12000"), &[]).await;
    let page = assignment("acme", "w18-small", rig.call("/garbled/404/2000"));
    rig.router.submit(&page).await;
    assert_eq!(rig.router.result(&page).await["error"]["code"], 3003);
    assert_eq!(kept_letter(&rig, "w18-small").await["error"]["code"], 3003);
    rig.worker.ready().await;
    kept_its_promise(&rig.router, &rig.peer).await;
}

#[tokio::test]
async fn w18_what_cannot_be_said_shorter_names_the_stream_and_the_setting() {
    let rig = Rig::start(&[]).await;
    bound(&rig, "CAF_EXEC_RESULT", 64).await;
    let payload = assignment("acme", "w18-never", rig.call("/ok"));
    rig.router.submit(&payload).await;
    let said = rig.worker.unready("storage refused").await;
    assert!(said.contains("max_msg_size of stream CAF_EXEC_RESULT"), "{said}");
    bound(&rig, "CAF_EXEC_RESULT", -1).await;
    assert_eq!(rig.router.result(&payload).await["error"]["code"], 2002);
    rig.worker.ready().await;
}

// The auditor itself: it notices what a worker does that breaks the promise.

/// Whether something was found that breaks this invariant.
async fn is_found(rig: &Rig, invariant: &str) -> bool {
    rig.router.settled(LAPSE).await;
    let found = audit(&rig.router, &rig.peer.hits("/"), Allowed { attempts: 3 }).await;
    found.iter().any(|violation| violation.starts_with(invariant))
}

#[tokio::test]
async fn a_worker_that_records_without_a_precondition_is_found_out() {
    let mut rig = Rig::start(&[]).await;
    let link = rig.moved_behind_a_link().await;
    link.set(Mode::Unconditional);
    let payload = assignment("acme", "unconditional", rig.call("/gate/both"));
    rig.router.submit(&payload).await;
    rig.peer.arrived("/gate/both", 1).await;
    let _second = rig.another("worker-3").start(&rig.nats).await;
    rig.worker.pause();
    rig.peer.arrived("/gate/both", 2).await;
    rig.peer.open("both");
    rig.router.result(&payload).await;
    rig.worker.resume();
    rig.router.results(&payload, 2).await;
    assert!(is_found(&rig, "I2").await);
}

#[tokio::test]
async fn a_worker_that_settles_before_it_records_is_found_out() {
    let mut rig = Rig::start(&[]).await;
    rig.worker.kill();
    let mut trap = Trap::at("before-record", rig.files.path());
    let mut worker = rig.another("worker-2").env(VARIABLE, &trap.socket(0)).start(&rig.nats).await;
    rig.router.submit(&assignment("acme", "hasty", rig.call("/ok"))).await;
    let _caught = trap.caught().await;
    // The first delivery of the first message, settled in its place; then it dies.
    let settlement = "$JS.ACK.CAF_EXEC_ASSIGN.caf-workers.1.1.1.0.0";
    rig.router.client().publish(settlement, Bytes::new()).await.unwrap();
    worker.kill();
    assert!(is_found(&rig, "I1").await);
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
