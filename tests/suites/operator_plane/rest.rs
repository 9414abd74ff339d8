//! Nothing happens, and nothing is written; numbers move, and are written now and then.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use beamline_tests::nats::NatsServer;
use beamline_tests::operator::Operator;
use beamline_tests::pool::Pool;
use beamline_tests::wait::within;
use futures::future::join_all;
use serde_json::{Value, json};

use super::autoscaler::Queue;
use super::{PATIENCE, calm, is_campaign, is_write, plane};

const POOLS: usize = 20;
/// So long without a write, and what came before is over: rates are the last to settle.
const CALM: usize = 15;

#[tokio::test(flavor = "multi_thread")]
async fn at_rest_twenty_pools_make_no_write_but_of_the_lease_and_few_for_dead_letters_of_one() {
    let (plane, nats) = (plane(), NatsServer::start());
    let release = plane.install("rest", &["watchNamespace=rest"]);
    let api = plane.api().await;
    let pools: Vec<_> = (0..POOLS).map(|number| Pool::new("rest", &format!("pool-{number}"), &nats)).collect();
    for (number, pool) in pools.iter().enumerate() {
        pool.create(&api, kind(number)).await;
    }
    let _operator = Operator::of(&release.kubeconfig, "rest").start().await;
    join_all(pools.iter().map(|pool| pool.converged(&api, PATIENCE))).await;

    let written = || plane.asked_by(&release.user).into_iter().filter(is_write).filter(|event| !is_lease(event));
    let (mut count, mut calm) = (0, 0);
    within(PATIENCE, "the last write is over", async || {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = written().count();
        calm = if now == count { calm + 1 } else { 0 };
        count = now;
        (calm >= CALM).then_some(())
    })
    .await;
    let renewals = || plane.asked_by(&release.user).into_iter().filter(is_write).filter(is_lease).count();
    let renewed = renewals();
    let time = Duration::from_secs(if is_campaign() { 300 } else { 30 });
    tokio::time::sleep(time).await;
    let more: Vec<_> = written().skip(count).map(|event| event["requestURI"].clone()).collect();
    assert!(more.is_empty(), "{} writes in {time:?}: {more:?}", more.len());
    let renewals = renewals() - renewed;
    assert!(renewals > 0, "the audit log shows no renewal of the Lease either");
    eprintln!("at rest: 0 writes over {POOLS} pools in {time:?}, {renewals} renewals of the Lease");
    let before = written().count();
    let dead_letters = trickle(&nats).await;
    let by_pool = written().skip(before).fold(BTreeMap::<String, usize>::new(), |mut writes, event| {
        *writes.entry(event["requestURI"].to_string()).or_default() += 1;
        writes
    });
    assert!(by_pool.values().all(|writes| *writes <= 1), "{dead_letters} dead letters of one pool: {by_pool:?}");
    within(PATIENCE, "a pool tells of them", async || {
        let pool = api.get(&pools[0].path()).await?;
        (pool["status"]["queue"]["deadLetters"].as_u64()? > 0).then_some(())
    })
    .await;
}

/// For how long numbers move, and how often they are written then.
const MOVING: Duration = Duration::from_secs(12);
const NUMBERS_EVERY: u64 = 2;

#[tokio::test(flavor = "multi_thread")]
async fn numbers_that_move_are_written_every_two_seconds_at_most() {
    let (plane, nats) = (plane(), NatsServer::start());
    let release = plane.install("moves", &["watchNamespace=moves"]);
    let api = plane.api().await;
    let _operator = Operator::of(&release.kubeconfig, "moves").start().await;
    let pool = Pool::new("moves", "orders", &nats);
    pool.create(&api, json!({"replicas": 0})).await;
    pool.converged(&api, PATIENCE).await;
    let is_status = |event: &Value| is_write(event) && event["objectRef"]["subresource"] == "status";
    let written = || plane.asked_by(&release.user).into_iter().filter(is_status).count();
    calm(written).await;
    let (before, began) = (written(), Instant::now());
    let queue = Queue::of(&nats, &pool).await;
    while began.elapsed() < MOVING {
        queue.fill(1).await;
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    let (writes, time) = (written() - before, began.elapsed());
    // The first of it is news, and is written at once.
    let most = 2 + usize::try_from(time.as_secs() / NUMBERS_EVERY).expect("few");
    assert!((3..=most).contains(&writes), "{writes} writes of the status in {time:?}");
}

/// Dead letters of some pool, one a second; how many.
async fn trickle(nats: &NatsServer) -> usize {
    const COUNT: usize = 15;
    let jetstream = async_nats::jetstream::new(async_nats::connect(nats.url()).await.expect("a connection"));
    for _ in 0..COUNT {
        let stored = jetstream.publish("caf.exec.dlq.v1", "{}".into()).await.expect("sent");
        stored.await.expect("stored");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    COUNT
}

/// As they are in life: some with GPUs, some paused, some that nobody works for.
fn kind(number: usize) -> Value {
    match number % 5 {
        0 => json!({"gpu": {"replicas": 1}}),
        1 => json!({"paused": true}),
        2 => json!({"replicas": 0}),
        3 => json!({"observability": {"podMonitor": true}, "networkPolicy": "Off"}),
        _ => json!({"replicas": 3}),
    }
}

fn is_lease(event: &Value) -> bool {
    event["objectRef"]["resource"] == "leases"
}
