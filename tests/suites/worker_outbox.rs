//! Outcomes while the broker is away: kept in memory, with `--outbox-dir` on a disk, and published when it is back.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::time::Duration;

use beamline_tests::calls;
use beamline_tests::rig::Rig;
use beamline_tests::router::{Router, assignment};
use beamline_tests::wait::{until, within};

/// After a hold has lapsed.
const LAPSE: Duration = Duration::from_secs(40);

/// Longer than a worker waits that has nothing to lose, and shorter than its drain.
const NEEDLESS: Duration = Duration::from_secs(12);

fn files(directory: &Path) -> usize {
    std::fs::read_dir(directory).map_or(0, |entries| {
        entries.filter(|entry| entry.as_ref().unwrap().path().extension().is_some_and(|ext| ext == "json")).count()
    })
}

#[tokio::test]
async fn an_outcome_survives_its_worker_while_the_broker_is_away() {
    let directory = tempfile::tempdir().unwrap();
    let flag = format!("--outbox-dir={}", directory.path().join("outbox").display());
    let mut rig = Rig::start(&[&flag]).await;
    let payload = assignment("acme", "kept", rig.call("/gate/kept"));
    rig.router.submit(&payload).await;
    rig.peer.arrived("/gate/kept", 1).await;
    rig.nats.kill();
    rig.worker.unready("connection").await;
    rig.peer.open("kept");
    until("the outcome is on the disk", async || files(&directory.path().join("outbox")) == 1).await;
    rig.worker.kill();
    rig.nats.restart();
    let second = rig.another("worker-2").flag(&flag).start(&rig.nats).await;
    let router = Router::connect(&rig.nats.url()).await;
    let record = within(LAPSE, "the outcome is recorded", async || router.record(&payload).await).await;
    assert_eq!(files(&directory.path().join("outbox")), 0);
    router.settled(LAPSE).await;
    assert_eq!(rig.peer.hits("/gate/kept").len(), 1, "it has run once");
    assert_eq!(second.metric("worker_results_replayed_total").await, 1.0, "the redelivery was answered by the record");
    let result: serde_json::Value = serde_json::from_slice(&record.payload).unwrap();
    assert_eq!(result["metadata"]["worker_id"], "worker-1");
}

#[tokio::test]
async fn a_broker_that_is_away_is_not_waited_for_at_the_end_where_nothing_would_be_lost() {
    for mode in ["--nats-delivery=jetstream", "--nats-delivery=core"] {
        let directory = tempfile::tempdir().unwrap();
        let flag = format!("--outbox-dir={}", directory.path().join("outbox").display());
        let mut rig = Rig::start(&[&flag, mode]).await;
        let payload = assignment("acme", "kept", rig.call("/gate/kept"));
        rig.router.send(&payload).await;
        rig.peer.arrived("/gate/kept", 1).await;
        rig.nats.kill();
        rig.worker.unready("connection").await;
        rig.worker.terminate();
        rig.worker.unready("draining").await;
        rig.peer.open("kept");
        assert_eq!(rig.worker.ended().await, Some(0), "{mode}");
        assert_eq!(files(&directory.path().join("outbox")), 1);

        rig.nats.restart();
        let router = Router::connect(&rig.nats.url()).await;
        let _second = rig.another("worker-2").flag(&flag).flag(mode).start(&rig.nats).await;
        let result = router.result(&payload).await;
        assert_eq!((&result["status"], &result["metadata"]["worker_id"]), (&"success".into(), &"worker-1".into()));
        until("the disk is empty", async || files(&directory.path().join("outbox")) == 0).await;
        assert_eq!(rig.peer.hits("/gate/kept").len(), 1, "it has run once");
    }
}

#[tokio::test]
async fn a_broker_that_is_away_is_waited_for_at_the_end_by_what_only_memory_has() {
    let mut rig = Rig::start(&[]).await;
    let payload = assignment("acme", "held", rig.call("/gate/held"));
    rig.router.submit(&payload).await;
    rig.peer.arrived("/gate/held", 1).await;
    rig.nats.kill();
    rig.worker.unready("connection").await;
    rig.worker.terminate();
    rig.worker.unready("draining").await;
    rig.peer.open("held");
    let ended = tokio::time::timeout(NEEDLESS, rig.worker.ended()).await;
    assert!(ended.is_err(), "{ended:?}: it waits");
    rig.nats.restart();
    let router = Router::connect(&rig.nats.url()).await;
    within(LAPSE, "the outcome is recorded", async || router.record(&payload).await).await;
    assert_eq!(rig.worker.ended().await, Some(0));
    assert_eq!(rig.peer.hits("/gate/held").len(), 1, "it has run once");
}

#[tokio::test]
async fn an_outcome_is_on_the_disk_to_stay() {
    let directory = tempfile::tempdir().unwrap();
    let (outbox, log) = (directory.path().join("outbox"), directory.path().join("calls"));
    let mut rig = Rig::start(&[]).await;
    rig.worker.kill();
    let setup = rig.another("worker-2").flag(format!("--outbox-dir={}", outbox.display()));
    let worker = setup.traced(calls::TOLD, &log).start(&rig.nats).await;
    let payload = assignment("acme", "kept", rig.call("/gate/kept"));
    rig.router.submit(&payload).await;
    rig.peer.arrived("/gate/kept", 1).await;
    rig.nats.kill();
    worker.unready("connection").await;
    rig.peer.open("kept");
    let entry = format!("{}>)", outbox.display());
    let (file, renamed, entry) = within(LAPSE, "the outcome is on the disk", async || {
        let calls = calls::calls(&log);
        let renamed = calls::find(&calls, &["rename", ".json"])?.clone();
        let later: Vec<_> = calls.iter().filter(|call| call.begun > renamed.done).cloned().collect();
        let file = calls::find(&calls, &["sync(", "/outbox/", ".tmp"])?.clone();
        Some((file, renamed, calls::find(&later, &["sync(", &entry])?.clone()))
    })
    .await;
    assert!(file.done < renamed.begun && renamed.done < entry.begun, "{file:?} {renamed:?} {entry:?}");
}

#[tokio::test]
async fn an_outcome_in_memory_is_recorded_when_the_broker_is_back() {
    let directory = tempfile::tempdir().unwrap();
    let mut rig = Rig::start(&[&format!("--outbox-dir={}", directory.path().display())]).await;
    let payload = assignment("acme", "back", rig.call("/gate/back"));
    rig.router.submit(&payload).await;
    rig.peer.arrived("/gate/back", 1).await;
    rig.nats.kill();
    rig.worker.unready("connection").await;
    rig.peer.open("back");
    until("the outcome is on the disk", async || files(directory.path()) == 1).await;
    rig.nats.restart();
    let router = Router::connect(&rig.nats.url()).await;
    within(LAPSE, "the outcome is recorded", async || router.record(&payload).await).await;
    until("the disk is empty", async || files(directory.path()) == 0).await;
    router.settled(LAPSE).await;
    assert_eq!(rig.peer.hits("/gate/back").len(), 1, "it has run once");
}

#[tokio::test]
async fn an_outcome_on_the_disk_that_no_stream_takes_any_more_is_a_final_error() {
    let directory = tempfile::tempdir().unwrap();
    let flag = format!("--outbox-dir={}", directory.path().display());
    let mut rig = Rig::start(&[&flag]).await;
    let payload = assignment("acme", "large", rig.call("/gate/large/50000"));
    rig.router.submit(&payload).await;
    rig.peer.arrived("/gate/large", 1).await;
    rig.nats.kill();
    rig.worker.unready("connection").await;
    rig.peer.open("large");
    until("the outcome is on the disk", async || files(directory.path()) == 1).await;
    rig.worker.kill();
    rig.nats.restart();
    let router = Router::connect(&rig.nats.url()).await;
    let mut config = router.stream("CAF_EXEC_RESULT").await.cached_info().config.clone();
    config.max_message_size = 16 * 1024;
    router.jetstream().update_stream(&config).await.unwrap();
    let second = rig.another("worker-2").flag(&flag).start(&rig.nats).await;
    let result = router.result(&payload).await;
    assert_eq!((&result["error"]["code"], &result["error"]["retryable"]), (&2002.into(), &false.into()));
    router.letter(&payload).await;
    router.settled(LAPSE).await;
    assert_eq!(rig.peer.hits("/gate/large").len(), 1, "it has run once");
    assert_eq!(files(directory.path()), 0);
    second.ready().await;
}
