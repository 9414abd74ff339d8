//! A bug in the operator is one pool's trouble, and passes with its cause, or with a restart.

use std::time::Duration;

use beamline_tests::failpoint::{self, Points};
use beamline_tests::nats::NatsServer;
use beamline_tests::operator::Operator;
use beamline_tests::pool::Pool;
use beamline_tests::wait::within;
use serde_json::{Value, json};

use super::{PATIENCE, plane};

/// A bucket that workers keep approvals' answers in, which the operator makes where it is missing.
const BUCKET: &str = "KV_caf-answers";

#[tokio::test(flavor = "multi_thread")]
async fn o24_a_panic_is_one_pools_and_it_is_looked_after_again() {
    let (plane, nats) = (plane(), NatsServer::start());
    let directory = tempfile::tempdir().expect("a directory");
    let mut points = Points::listen(directory.path());
    let release = plane.install("panics", &["watchNamespace=panics"]);
    let api = plane.api().await;
    let operator = Operator::of(&release.kubeconfig, "panics").env(failpoint::VARIABLE, &points.socket());
    let mut operator = operator.start().await;
    let [struck, other] = ["struck", "other"].map(|name| Pool::new("panics", name, &nats));
    for pool in [&struck, &other] {
        pool.create(&api, json!({})).await;
        pool.converged(&api, PATIENCE).await;
    }

    points.arm(Some("before apply Deployment struck"));
    struck.change(&api, json!({"replicas": 2})).await;
    let held = points.caught().await;
    other.change(&api, json!({"replicas": 3})).await;
    other.converged(&api, PATIENCE).await;
    Points::panic(held).await;
    struck.converged(&api, PATIENCE).await;
    assert!(operator.metric(r#"beamline_operator_reconciles_total{result="Panicked"}"#).await >= 1.0);

    // A pool's task at the broker has no reconcile around it.
    let jetstream = async_nats::jetstream::new(async_nats::connect(nats.url()).await.expect("a connection"));
    let before = readable(&api.get(&struck.path()).await.expect("the pool"));
    points.arm(Some(&format!("before create stream {BUCKET}")));
    jetstream.delete_stream(BUCKET).await.expect("deleted");
    Points::panic(points.caught().await).await;
    within(PATIENCE, "a pool says so", async || {
        let pools = [api.get(&struck.path()).await, api.get(&other.path()).await];
        pools.into_iter().flatten().any(|pool| readable(&pool)["reason"] == "Panicked").then_some(())
    })
    .await;
    within(PATIENCE, "the bucket is there again", async || jetstream.get_stream(BUCKET).await.ok()).await;
    for pool in [&struck, &other] {
        within(Duration::from_secs(30), "its queue is read again", async || {
            let now = readable(&api.get(&pool.path()).await?);
            (now["status"] == "True" && now["reason"] == before["reason"]).then_some(())
        })
        .await;
    }
    assert!(operator.is_running(), "the operator has ended");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_is_alive_while_every_look_at_a_pool_ends() {
    let (plane, nats) = (plane(), NatsServer::start());
    let directory = tempfile::tempdir().expect("a directory");
    let mut points = Points::listen(directory.path());
    let release = plane.install("stalls", &["watchNamespace=stalls"]);
    let api = plane.api().await;
    let operator = Operator::of(&release.kubeconfig, "stalls").env(failpoint::VARIABLE, &points.socket());
    let operator = operator.flag("--stall-after=5s").start().await;
    let lives = async |code: u16| operator.get("/livez").await.filter(|(found, _)| *found == code);
    within(PATIENCE, "it is alive", async || lives(200).await).await;
    points.arm(Some("before apply Deployment orders"));
    let pool = Pool::new("stalls", "orders", &nats);
    pool.create(&api, json!({})).await;
    let held = points.caught().await;
    let (_, said) = within(PATIENCE, "it is not alive", async || lives(503).await).await;
    assert!(said.starts_with("stalled: a look at pool stalls/orders has not ended for "), "{said}");
    drop(held);
    within(PATIENCE, "it is alive again", async || lives(200).await).await;
    pool.converged(&api, PATIENCE).await;
}

fn readable(pool: &Value) -> Value {
    let conditions = pool["status"]["conditions"].as_array().cloned().unwrap_or_default();
    conditions.into_iter().find(|condition| condition["type"] == "QueueReadable").unwrap_or_default()
}
