//! An API server that answers 429, 500, 503, 409 or not at all: to three calls of ten, to one, or to none.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use beamline_tests::api::Api;
use beamline_tests::apifault::{ApiFault, Break, Fault};
use beamline_tests::nats::NatsServer;
use beamline_tests::operator::{Operator, Setup};
use beamline_tests::pool::Pool;
use beamline_tests::wait::within;
use futures::future::join_all;
use serde_json::{Value, json};

use super::{PATIENCE, is_campaign, plane};

const POOLS: usize = 5;
/// After the trouble, this long at most.
const RECOVERY: Duration = Duration::from_secs(30);
/// Requests in a second for each pool, at most.
const RATE: f64 = 5.0;
/// A watch that was cut may go on unheard; what was wrong with it is forgotten after a minute and a half.
const FORGOTTEN: Duration = Duration::from_secs(120);

#[tokio::test(flavor = "multi_thread")]
async fn while_the_api_is_in_trouble_the_operator_asks_little_and_afterwards_it_catches_up() {
    let (plane, nats) = (plane(), NatsServer::start());
    let release = plane.install("trouble", &["watchNamespace=trouble"]);
    let proxy = ApiFault::before(&release.kubeconfig).await;
    let api = plane.api().await;
    let pools: Vec<_> = (0..POOLS).map(|number| Pool::new("trouble", &format!("pool-{number}"), &nats)).collect();
    let mut operator = Operator::of(proxy.kubeconfig(), "trouble").start().await;
    for pool in &pools {
        pool.create(&api, json!({})).await;
    }
    join_all(pools.iter().map(|pool| pool.converged(&api, PATIENCE))).await;
    proxy.take_calls();

    let time = Duration::from_secs(if is_campaign() { 120 } else { 15 });
    let began = Instant::now();
    proxy.set(&Fault::ENDING);
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
    join_all(pools.iter().map(|pool| asked_for(&api, pool))).await;
    let recovered = over.elapsed();
    join_all(pools.iter().map(|pool| pool.converged(&api, PATIENCE))).await;
    assert!(operator.is_running(), "the operator has ended");

    let mut faults = BTreeMap::<_, usize>::new();
    calls.iter().filter_map(|call| call.fault).for_each(|fault| *faults.entry(fault).or_default() += 1);
    assert!(Fault::ENDING.iter().all(|fault| faults.contains_key(fault)), "not every fault was met: {faults:?}");
    // What it meets it counts, those that were cut too.
    for code in ["429", "500", "409", "none"] {
        let series = format!("beamline_operator_api_calls_total{{code=\"{code}\"}}");
        assert!(operator.metric(&series).await > 0.0, "no {series}");
    }
    let rate = calls.len() as f64 / time.as_secs_f64() / POOLS as f64;
    eprintln!(
        "trouble: {} calls in {time:?}, {rate:.1} a second for each pool, faults {faults:?}; all asked for {:.1} s after",
        calls.len(),
        recovered.as_secs_f64()
    );
    assert!(rate <= RATE, "{rate:.1} requests a second for each pool");
}

/// Waits until the Deployment is as the pool says: what the operator does is over by then, and the pods are others' work.
async fn asked_for(api: &Api, pool: &Pool) {
    let path = format!("/apis/apps/v1/namespaces/{}/deployments/{}", pool.namespace, pool.name);
    within(RECOVERY, "its workers are asked for", async || {
        let (pool, deployment) = (api.get(&pool.path()).await?, api.get(&path).await?);
        let (wanted, found) = (&pool["spec"], &deployment["spec"]);
        let image = &wanted["worker"]["image"];
        let has_image = image.is_null() || found["template"]["spec"]["containers"][0]["image"] == *image;
        (found["replicas"] == wanted["replicas"] && has_image).then_some(())
    })
    .await;
}

/// An operator in this namespace, through a proxy of its own.
async fn behind_a_proxy(namespace: &str) -> (ApiFault, Setup) {
    let release = plane().install(namespace, &[&format!("watchNamespace={namespace}")]);
    let proxy = ApiFault::before(&release.kubeconfig).await;
    let operator = Operator::of(proxy.kubeconfig(), namespace);
    (proxy, operator)
}

#[tokio::test(flavor = "multi_thread")]
async fn o06_an_operator_that_starts_while_the_api_is_away_leads_soon_after_it_is_back() {
    let away =
        [("away-500", Fault::Answer500, 4), ("away-503", Fault::Answer503, 4), ("away-silent", Fault::Silence, 2)];
    join_all(away.map(|(namespace, fault, calls)| starts_without_an_api(namespace, fault, calls))).await;
}

async fn starts_without_an_api(namespace: &str, fault: Fault, calls: usize) {
    let (proxy, operator) = behind_a_proxy(namespace).await;
    proxy.outage(fault);
    let mut operator = operator.spawn();
    let mut asked = 0;
    within(PATIENCE, "it asks again", async || {
        asked += proxy.take_calls().len();
        (asked >= calls).then_some(())
    })
    .await;
    let (code, why) = operator.get("/readyz").await.expect("it answers");
    assert!(code == 503 && why.starts_with("lease: "), "{namespace}: {code} {why}");
    proxy.set(&[]);
    let leads = async || (operator.metric("beamline_operator_leader").await > 0.0).then_some(());
    within(RECOVERY, &format!("{namespace}: it leads"), leads).await;
    operator.ready().await;
    assert!(operator.is_running(), "{namespace}: the operator has ended");
}

#[tokio::test(flavor = "multi_thread")]
async fn o05_a_write_that_is_never_answered_holds_up_one_pool_and_not_for_long() {
    let (proxy, operator) = behind_a_proxy("silence").await;
    let (api, nats) = (plane().api().await, NatsServer::start());
    let _operator = operator.start().await;
    let [struck, other] = ["struck", "other"].map(|name| Pool::new("silence", name, &nats));
    for pool in [&struck, &other] {
        pool.create(&api, json!({})).await;
        pool.converged(&api, PATIENCE).await;
    }
    proxy.take_calls();
    proxy.strike("PATCH", "/deployments/struck", Fault::Silence);
    struck.change(&api, json!({"replicas": 2})).await;
    let mut calls = Vec::new();
    within(PATIENCE, "the write is lost", async || {
        calls.extend(proxy.take_calls());
        calls.iter().any(|call| call.fault == Some(Fault::Silence)).then_some(())
    })
    .await;
    other.change(&api, json!({"replicas": 3})).await;
    other.converged(&api, RECOVERY / 2).await;
    struck.converged(&api, RECOVERY).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn o06_after_an_outage_all_pools_converge_within_half_a_minute() {
    let (proxy, operator) = behind_a_proxy("outage").await;
    let (api, nats) = (plane().api().await, NatsServer::start());
    let mut operator = operator.start().await;
    let pools: Vec<_> = (0..POOLS).map(|number| Pool::new("outage", &format!("pool-{number}"), &nats)).collect();
    for pool in &pools {
        pool.create(&api, json!({})).await;
    }
    join_all(pools.iter().map(|pool| pool.converged(&api, PATIENCE))).await;
    proxy.outage(Fault::Answer503);
    for pool in &pools {
        pool.change(&api, json!({"replicas": 3})).await;
    }
    // So long that a client which waits twice as long after each try would wait for longer than is left afterwards.
    tokio::time::sleep(Duration::from_secs(45)).await;
    proxy.set(&[]);
    join_all(pools.iter().map(|pool| asked_for(&api, pool))).await;
    join_all(pools.iter().map(|pool| pool.converged(&api, PATIENCE))).await;
    assert!(operator.is_running(), "the operator has ended");
}

/// Events of one change of a pool, on all watches; and how many of them a short run loses.
const EVENTS: usize = 24;
const FEW: usize = 8;

#[tokio::test(flavor = "multi_thread")]
async fn o04_o05_a_watch_that_breaks_before_any_of_its_events_keeps_nothing_from_being_done() {
    let (proxy, operator) = behind_a_proxy("breaks").await;
    eprintln!("{}", all_is_done(&proxy, operator, "breaks", &[Break::Cut, Break::Gone], FEW).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn o04_an_event_that_a_watch_never_tells_is_made_good_when_all_is_listed_anew() {
    let (proxy, operator) = behind_a_proxy("loses").await;
    let operator = operator.flag("--relist-after=3s");
    eprintln!("{}", all_is_done(&proxy, operator, "loses", &[Break::Lost], FEW / 2).await);
}

/// Whatever a pool is changed to, though one event of the change meets one of these; how many did.
async fn all_is_done(proxy: &ApiFault, operator: Setup, namespace: &str, breaks: &[Break], few: usize) -> String {
    let (api, nats) = (plane().api().await, NatsServer::start());
    let mut operator = operator.flag("--leader-election=false").start().await;
    let pool = Pool::new(namespace, "orders", &nats);
    pool.create(&api, json!({})).await;
    pool.converged(&api, PATIENCE).await;
    let mut cases: Vec<_> = (0..EVENTS).flat_map(|event| breaks.iter().map(move |how| (event, *how))).collect();
    fastrand::shuffle(&mut cases);
    cases.truncate(if is_campaign() { cases.len() } else { few });
    let (count, mut met) = (cases.len(), 0);
    for (round, (event, how)) in cases.into_iter().enumerate() {
        proxy.break_watch(event, how);
        let image = format!("worker:{round}");
        let (gpu, replicas) = ((round % 2 == 0).then(|| json!({"replicas": 1})), round % 3 + 1);
        pool.change(&api, json!({"replicas": replicas, "gpu": gpu, "worker": {"image": image}})).await;
        let path = format!("/apis/apps/v1/namespaces/{namespace}/deployments");
        let what = format!("what is asked for is there, with {how:?} in place of event {event}");
        within(PATIENCE, &what, async || {
            let found = api.list(&path).await;
            let has_come = |deployment: &Value| {
                let containers = &deployment["spec"]["template"]["spec"]["containers"];
                containers
                    .as_array()
                    .is_some_and(|all| all.iter().any(|container| container["image"] == image.as_str()))
            };
            (found.len() == 1 + usize::from(gpu.is_some()) && found.iter().all(has_come)).then_some(())
        })
        .await;
        pool.converged(&api, PATIENCE).await;
        met += usize::from(!proxy.still_breaks());
        proxy.set(&[]);
    }
    assert!(met * 2 >= count, "{met} of {count} watches were broken");
    assert!(operator.is_running());
    format!("{namespace}: {met} of {count} events")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_is_ready_again_after_its_watches_were_cut_though_nothing_changes() {
    let (proxy, operator) = behind_a_proxy("cut").await;
    let operator = operator.start().await;
    within(PATIENCE, "it watches", async || {
        proxy.take_calls().iter().any(|call| call.what.contains("/networkpolicies?&watch=true")).then_some(())
    })
    .await;
    proxy.outage(Fault::Answer503);
    let unready = async || operator.get("/readyz").await.filter(|(code, why)| *code == 503 && why.contains("watch of"));
    within(PATIENCE, "it says that a watch fails", unready).await;
    proxy.set(&[]);
    let ready = async || operator.get("/readyz").await.filter(|(code, _)| *code == 200).map(drop);
    within(FORGOTTEN, "it is ready again", ready).await;
}
