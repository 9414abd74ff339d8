//! Who holds a delivery, and until when: no more is taken than there is room for, what waits goes where there is some, and
//! nothing starts on what has lapsed.
#![expect(clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::time::Duration;

use async_nats::jetstream::AckKind;
use async_nats::jetstream::consumer::PullConsumer;
use async_nats::{HeaderMap, Subscriber};
use beamline_tests::rig::{Rig, kept_its_promise};
use beamline_tests::router::{Key, assignment, json as read};
use beamline_tests::wait::{SOON, until, within};
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use serde_json::{Value, json};

/// Longer than what counts as a pause, shorter than a hold.
const PAUSE: Duration = Duration::from_secs(4);

/// The only slot is taken by the first until the gate `slot` opens, and the second has been accepted.
async fn one_runs_and_one_waits(rig: &Rig) -> (Value, Value) {
    let running = assignment("acme", "running", rig.call("/gate/slot"));
    rig.router.submit(&running).await;
    rig.peer.arrived("/gate/slot", 1).await;
    let waiting = assignment("acme", "waiting", rig.call("/ok"));
    rig.router.submit(&waiting).await;
    rig.router.verdict(&waiting).await;
    (running, waiting)
}

/// What workers ask the intake for.
async fn pulls(rig: &Rig) -> Subscriber {
    let asked = "$JS.API.CONSUMER.MSG.NEXT.CAF_EXEC_ASSIGN.caf-workers";
    let pulls = rig.router.client().subscribe(asked).await.expect("a subscription");
    rig.router.client().flush().await.expect("the broker answers");
    pulls
}

/// Waits for a pull of exactly so many, and sees none of more.
async fn asks_for(pulls: &mut Subscriber, count: u64) {
    within(SOON, &format!("a pull of {count}"), async || {
        let asked = read(&pulls.next().await?.payload)["batch"].as_u64()?;
        assert!(asked <= count, "{asked} are asked for, and there is room for {count}");
        (asked == count).then_some(())
    })
    .await;
}

/// Nothing is asked for any more, for longer than an open pull lasts.
async fn asks_for_nothing(rig: &Rig) {
    let mut pulls = pulls(rig).await;
    until("open pulls end", async || rig.router.consumer().await.is_some_and(|info| info.num_waiting == 0)).await;
    while pulls.next().now_or_never().is_some() {}
    let asked = tokio::time::timeout(Duration::from_secs(2), pulls.next()).await;
    assert!(asked.is_err(), "{asked:?}");
}

#[tokio::test]
async fn a_worker_asks_for_its_free_slots_and_as_many_again_as_it_has() {
    let rig = Rig::start(&["--io-pool-size=4", "--cpu-pool-size=0"]).await;
    for taken in 0..4 {
        // Of what was asked for before, the rest is still open.
        let mut pulls = pulls(&rig).await;
        asks_for(&mut pulls, 8 - taken).await;
        rig.router.submit(&assignment("acme", &format!("{taken}"), rig.call("/gate/slot"))).await;
        rig.peer.arrived("/gate/slot", usize::try_from(taken + 1).expect("a small number")).await;
    }
    for waiting in 0..4 {
        rig.router.submit(&assignment("acme", &format!("waits-{waiting}"), rig.call("/gate/slot"))).await;
    }
    let left = assignment("acme", "left", rig.call("/ok"));
    rig.router.submit(&left).await;
    asks_for_nothing(&rig).await;
    let consumer = rig.router.consumer().await.expect("the workers' consumer");
    assert_eq!((consumer.num_ack_pending, consumer.num_pending), (8, 1), "the stream keeps what there is no room for");
    rig.peer.open("slot");
    assert_eq!(rig.router.result(&left).await["status"], "success");
    kept_its_promise(&rig.router, &rig.peer).await;
}

#[tokio::test]
async fn a_worker_looks_as_far_ahead_as_it_gets_in_a_tenth_of_a_second() {
    let rig = Rig::start(&["--sandbox-mode", "--io-pool-size=1", "--cpu-pool-size=0", "--log-level=warn"]).await;
    let mut asked = pulls(&rig).await;
    let job = json!({"type": "http.request", "url": "http://peer.test/"});
    for number in 0..4000 {
        let payload = assignment("acme", &number.to_string(), job.clone()).to_string();
        rig.router.client().publish("caf.exec.assign.v1", payload.into()).await.expect("the client takes it");
    }
    rig.router.settled(SOON * 4).await;
    let mut largest = 0;
    while let Some(Some(pull)) = asked.next().now_or_never() {
        largest = read(&pull.payload)["batch"].as_u64().expect("a number").max(largest);
    }
    // One slot, and so a look-ahead of one, but for the rate: forty a second are reached on any machine.
    assert!((4..=1001).contains(&largest), "{largest} at once");
}

#[tokio::test]
async fn a_full_pool_stops_the_intake_and_leaves_the_rest_to_others() {
    let rig = Rig::start(&["--io-pool-size=1", "--cpu-pool-size=2"]).await;
    let held: Vec<_> = (0..30).map(|number| assignment("acme", &number.to_string(), rig.call("/gate/io"))).collect();
    let (full, rest) = held.split_at(4);
    for payload in full {
        rig.router.submit(payload).await;
    }
    rig.peer.arrived("/gate/io", 1).await;
    asks_for_nothing(&rig).await;
    // There are slots for this one, but what comes with it may be for the full pool.
    let mut other = assignment("acme", "cpu", rig.call("/ok"));
    other["resources"] = json!({"pool": "cpu"});
    for payload in rest.iter().chain([&other]) {
        rig.router.submit(payload).await;
    }
    asks_for_nothing(&rig).await;
    let consumer = rig.router.consumer().await.expect("the workers' consumer");
    assert_eq!((consumer.num_ack_pending, consumer.num_pending), (4, 27), "the stream keeps the rest");

    let _second = rig.another("worker-2").flag("--io-pool-size=40").start(&rig.nats).await;
    assert_eq!(rig.router.result(&other).await["metadata"]["worker_id"], "worker-2");
    rig.peer.arrived("/gate/io", 30).await;
    rig.peer.open("io");
    let mut by_first = 0;
    for payload in &held {
        by_first += usize::from(rig.router.result(payload).await["metadata"]["worker_id"] == "worker-1");
    }
    assert_eq!(by_first, 1, "what waited there went to whoever had room");
    kept_its_promise(&rig.router, &rig.peer).await;
}

#[tokio::test]
async fn what_waits_at_a_busy_worker_goes_to_one_that_has_room() {
    let rig = Rig::start(&["--io-pool-size=1"]).await;
    let (running, waiting) = one_runs_and_one_waits(&rig).await;
    let second = rig.another("worker-2").start(&rig.nats).await;
    assert_eq!(rig.router.result(&waiting).await["metadata"]["worker_id"], "worker-2");
    rig.peer.open("slot");
    assert_eq!(rig.router.result(&running).await["metadata"]["worker_id"], "worker-1");
    kept_its_promise(&rig.router, &rig.peer).await;
    assert_eq!(rig.peer.hits("/").len(), 2, "each ran once");
    assert_eq!(rig.worker.metric("worker_redeliveries_total").await, 0.0, "nothing came straight back");
    assert_eq!(second.metric("worker_redeliveries_total").await, 1.0);
}

#[tokio::test]
async fn what_waits_stays_while_nobody_has_room() {
    let small = ["--io-pool-size=1", "--cpu-pool-size=1"];
    let rig = Rig::start(&small).await;
    let second = small.iter().fold(rig.another("worker-2"), |setup, flag| setup.flag(*flag)).start(&rig.nats).await;
    for number in 0..8 {
        rig.router.submit(&assignment("acme", &format!("full-{number}"), rig.call("/gate/slot"))).await;
    }
    rig.peer.arrived("/gate/slot", 2).await;
    // The time itself is what is tested: more than work waits before others are asked for.
    tokio::time::sleep(Duration::from_secs(3)).await;
    for worker in [&rig.worker, &second] {
        assert_eq!(worker.metric("worker_redeliveries_total").await, 0.0);
    }
    rig.peer.open("slot");
    kept_its_promise(&rig.router, &rig.peer).await;
}

#[tokio::test]
async fn w04_nothing_that_waited_through_a_pause_starts_before_it_is_delivered_again() {
    let rig = Rig::start(&["--io-pool-size=1"]).await;
    let (running, waiting) = one_runs_and_one_waits(&rig).await;
    rig.worker.pause();
    tokio::time::sleep(PAUSE).await;
    rig.peer.open("slot");
    rig.worker.resume();
    assert_eq!(rig.router.result(&running).await["status"], "success", "what ran has finished");
    assert_eq!(rig.router.result(&waiting).await["status"], "success");
    kept_its_promise(&rig.router, &rig.peer).await;
    assert!(rig.worker.metric("worker_redeliveries_total").await >= 1.0, "it was delivered again");
    assert_eq!(rig.peer.hits("/").len(), 2, "each ran once");
}

#[tokio::test]
async fn w04_nothing_that_arrived_during_a_pause_starts_before_it_is_delivered_again() {
    let rig = Rig::start(&[]).await;
    // The pull may end in the moment between the look and the pause: then nothing was under way.
    for round in 0..5 {
        if was_buffered_during_a_pause(&rig, &format!("buffered-{round}")).await {
            rig.worker.says("dropping what arrived while this process was stopped: pulling anew").await;
            return;
        }
    }
    panic!("no pull was open during any of the pauses");
}

/// Whether an assignment was under way to the worker while that was stopped; whatever was, ran once.
async fn was_buffered_during_a_pause(rig: &Rig, id: &str) -> bool {
    let payload = assignment("acme", id, rig.call(&format!("/ok/{id}")));
    let redelivered = rig.worker.metric("worker_redeliveries_total").await;
    let waiting = async || rig.router.consumer().await.map(|consumer| consumer.num_waiting);
    until("a pull is open", async || waiting().await == Some(1)).await;
    rig.worker.pause();
    rig.router.submit(&payload).await;
    tokio::time::sleep(PAUSE).await;
    let was_buffered = rig.router.consumer().await.map(|consumer| consumer.num_ack_pending) == Some(1);
    rig.worker.resume();
    assert_eq!(rig.router.result(&payload).await.get("status"), Some(&json!("success")));
    kept_its_promise(&rig.router, &rig.peer).await;
    assert_eq!(rig.peer.hits(&format!("/ok/{id}")).len(), 1);
    assert_eq!(rig.worker.metric("worker_redeliveries_total").await > redelivered, was_buffered);
    was_buffered
}

#[tokio::test]
async fn a_refusal_that_is_stored_is_repeated_byte_for_byte_to_a_redelivery() {
    let mut rig = Rig::start(&[]).await;
    // What a publication is called is in the record of any other.
    let other = assignment("acme", "other", rig.call("/ok"));
    rig.router.submit(&other).await;
    rig.router.result(&other).await;
    let record = rig.router.record(&other).await.expect("a record");
    let name = record.headers.get("Beamline-Answers").expect("a record names its publication").to_string();
    rig.router.settled(SOON).await;
    rig.worker.kill();
    // A pull that is still open would take what comes with it.
    let pulls = async || rig.router.consumer().await.map(|consumer| consumer.num_waiting);
    until("nobody pulls", async || pulls().await == Some(0)).await;

    let (refused, accepted) =
        (assignment("acme", "refused", rig.call("/ok?1")), assignment("acme", "new", rig.call("/ok?2")));
    let sequence = rig.router.submit(&refused).await;
    let later = rig.router.submit(&accepted).await;
    let publication = |sequence: u64| format!("{},{sequence}", name.rsplit_once(',').expect("three parts").0);
    let said = json!({"assignment_id": "refused", "tenant_id": "acme", "status": "rejected", "message": "as it was"});
    let said = Bytes::from(said.to_string());
    // A worker that died after it had stored its refusal; and a refusal of an earlier publication of an id.
    for (payload, answers) in [(&refused, sequence), (&accepted, sequence - 1)] {
        let subject = format!("caf.exec.refused.{}", Key::from(payload).token());
        let mut headers = HeaderMap::new();
        headers.insert("Beamline-Answers", publication(answers));
        let sent = rig.router.jetstream().publish_with_headers(subject, headers, said.clone()).await;
        sent.expect("a publish").await.expect("it is stored");
    }
    let consumer: PullConsumer =
        rig.router.stream("CAF_EXEC_ASSIGN").await.get_consumer("caf-workers").await.expect("it is there");
    let mut messages = consumer.fetch().max_messages(2).messages().await.expect("messages");
    while let Some(message) = messages.next().await {
        message.expect("a message").ack_with(AckKind::Nak(None)).await.expect("it is given back");
    }
    assert_eq!(later, sequence + 1);

    let worker = rig.another("worker-2").start(&rig.nats).await;
    assert_eq!(rig.router.result(&accepted).await["status"], "success");
    rig.router.settled(SOON).await;
    let story = rig.router.story(&refused);
    assert_eq!(story.verdicts, [serde_json::from_slice::<serde_json::Value>(&said).expect("JSON")]);
    assert!(story.results.is_empty() && rig.peer.hits("/ok?1").is_empty(), "it did not run");
    assert_eq!(worker.metric("worker_redeliveries_total").await, 2.0);
}
