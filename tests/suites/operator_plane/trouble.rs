//! An API server that answers 429, 500, 409 or not at all, to three calls of ten.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use beamline_tests::apifault::{ApiFault, Fault};
use beamline_tests::nats::NatsServer;
use beamline_tests::operator::Operator;
use beamline_tests::pool::Pool;
use futures::future::join_all;
use serde_json::json;

use super::{PATIENCE, is_campaign, plane};

const POOLS: usize = 5;
/// After the trouble, this long at most.
const RECOVERY: Duration = Duration::from_secs(30);
/// Requests in a second for each pool, at most.
const RATE: f64 = 5.0;

#[tokio::test(flavor = "multi_thread")]
async fn while_the_api_is_in_trouble_the_operator_asks_little_and_afterwards_it_catches_up() {
    let (plane, nats) = (plane(), NatsServer::start());
    let release = plane.install("trouble", &["watchNamespace=trouble"]);
    let proxy = ApiFault::before(&release.kubeconfig).await;
    let api = plane.api().await;
    let pools: Vec<_> = (0..POOLS).map(|number| Pool::new("trouble", &format!("pool-{number}"), &nats)).collect();
    let operator = Operator::by(proxy.kubeconfig()).flag("--watch-namespace=trouble");
    let mut operator = operator.flag("--lease-namespace=trouble").start().await;
    for pool in &pools {
        pool.create(&api, json!({})).await;
    }
    join_all(pools.iter().map(|pool| pool.converged(&api, PATIENCE))).await;
    proxy.take_calls();

    let time = Duration::from_secs(if is_campaign() { 120 } else { 15 });
    let began = Instant::now();
    proxy.set(&Fault::ALL);
    let mut round = 0;
    while began.elapsed() < time {
        for pool in &pools {
            round += 1;
            pool.change(&api, json!({"replicas": round % 4 + 1, "worker": {"image": format!("worker:{round}")}})).await;
            let deployment = format!("/apis/apps/v1/namespaces/trouble/deployments/{}", pool.name);
            if round % 3 == 0 {
                api.delete(&deployment).await;
            }
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    proxy.set(&[]);
    let over = Instant::now();
    let calls = proxy.take_calls();
    join_all(pools.iter().map(|pool| pool.converged(&api, RECOVERY))).await;
    let recovered = over.elapsed();
    assert!(operator.is_running(), "the operator has ended");

    let mut faults = BTreeMap::<_, usize>::new();
    calls.iter().filter_map(|call| call.fault).for_each(|fault| *faults.entry(fault).or_default() += 1);
    assert!(Fault::ALL.iter().all(|fault| faults.contains_key(fault)), "not every fault was met: {faults:?}");
    let rate = calls.len() as f64 / time.as_secs_f64() / POOLS as f64;
    eprintln!(
        "trouble: {} calls in {time:?}, {rate:.1} a second for each pool, faults {faults:?}; converged {:.1} s after",
        calls.len(),
        recovered.as_secs_f64()
    );
    assert!(rate <= RATE, "{rate:.1} requests a second for each pool");
}
