//! How the program starts, waits, stops and fails, and which of several acts.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use beamline_tests::nats::NatsServer;
use beamline_tests::operator::Operator;
use beamline_tests::pool::Pool;
use beamline_tests::wait::within;
use serde_json::{Value, json};

use super::{PATIENCE, calm, is_write, plane};

/// From the signal to the end of the process, at most; and time for a busy machine.
const STOP: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_flag_or_variable_is_named_and_ends_it_with_2() {
    for (flag, variable, value) in [
        ("--log-level", "BEAMLINE_LOG", "no=such=level"),
        ("--concurrency", "BEAMLINE_CONCURRENCY", "0"),
        ("--otlp-endpoint", "OTEL_EXPORTER_OTLP_ENDPOINT", "grpc://collector:4317"),
    ] {
        let mut operator = Operator::by(Path::new("none")).env(variable, value).spawn();
        assert_eq!(operator.ended().await, Some(2), "{variable}");
        let said = operator.lines().join("\n");
        assert!(said.contains(flag) && said.contains(variable), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn its_last_words_are_a_line_of_its_log_also_where_nobody_takes_its_spans() {
    let operator = Operator::by(Path::new("/no/such/kubeconfig"));
    let mut operator = operator.env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1").spawn();
    assert_eq!(operator.ended().await, Some(1));
    let lines = operator.lines();
    let last: Value = serde_json::from_str(lines.last().expect("it says something")).expect("a line of JSON");
    assert_eq!((&last["level"], &last["message"]), (&json!("ERROR"), &json!("the operator ends")));
    let why = last["fields"]["error"].as_str().unwrap_or_default();
    assert!(why.contains("/no/such/kubeconfig"), "{last}");
}

#[tokio::test(flavor = "multi_thread")]
async fn told_to_stop_it_gives_the_lease_back_and_ends_well_whoever_holds_a_connection_open() {
    let (plane, nats) = (plane(), NatsServer::start());
    let release = plane.install("stop", &["watchNamespace=stop"]);
    let api = plane.api().await;
    let mut operator = Operator::of(&release.kubeconfig, "stop").start().await;
    let pool = Pool::new("stop", "orders", &nats);
    pool.create(&api, json!({})).await;
    pool.converged(&api, PATIENCE).await;
    let lease = "/apis/coordination.k8s.io/v1/namespaces/stop/leases/beamline-operator";
    let held = api.get(lease).await.expect("there is a Lease");
    assert!(!held["spec"]["holderIdentity"].as_str().unwrap_or_default().is_empty(), "{held}");
    // Neither of them ever asks.
    let _silent = TcpStream::connect(operator.admin()).expect("it listens");
    let mut slow = TcpStream::connect(operator.admin()).expect("it listens");
    slow.write_all(b"GET /metrics HTTP/1.1\r\n").expect("it reads");

    let told = Instant::now();
    operator.terminate();
    assert_eq!(operator.ended().await, Some(0));
    let needed = told.elapsed();
    assert!(needed < STOP, "{needed:?}");
    let left = api.get(lease).await.expect("there is a Lease");
    assert!(left["spec"]["holderIdentity"].as_str().unwrap_or_default().is_empty(), "{left}");
    for line in operator.lines() {
        serde_json::from_str::<Value>(&line).unwrap_or_else(|_| panic!("no line of JSON: {line}"));
    }
}

/// From the last sign of a leader to the first of the next one, at most, in seconds.
const HANDOVER: f64 = 15.0;

#[tokio::test(flavor = "multi_thread")]
async fn o13_another_operator_leads_within_15_s_of_a_death_and_at_once_after_a_good_end() {
    let (plane, nats) = (plane(), NatsServer::start());
    let release = plane.install("leads", &["watchNamespace=leads"]);
    let api = plane.api().await;
    let start = || Operator::of(&release.kubeconfig, "leads");
    let mut first = start().start().await;
    leads(&first, PATIENCE).await;
    let mut second = start().start().await;
    assert_eq!(second.metric(LEADER).await, 0.0, "two lead");
    let pool = Pool::new("leads", "orders", &nats);
    pool.create(&api, json!({})).await;
    pool.converged(&api, PATIENCE).await;

    first.kill();
    let lease = "/apis/coordination.k8s.io/v1/namespaces/leads/leases/beamline-operator";
    let last = time(&api.get(lease).await.expect("there is a Lease")["spec"]["renewTime"]);
    leads(&second, PATIENCE).await;
    let needed = time(&api.get(lease).await.expect("there is a Lease")["spec"]["acquireTime"]) - last;
    assert!(needed <= HANDOVER, "{needed} s");
    pool.change(&api, json!({"replicas": 2})).await;
    pool.converged(&api, PATIENCE).await;

    let third = start().start().await;
    second.terminate();
    assert_eq!(second.ended().await, Some(0));
    let given_back = jiff::Timestamp::now().as_millisecond() as f64 / 1000.0;
    leads(&third, PATIENCE).await;
    let needed = time(&api.get(lease).await.expect("there is a Lease")["spec"]["acquireTime"]) - given_back;
    assert!(needed <= 5.0, "{needed} s: the lease that was given back had most of its time before it");
    pool.change(&api, json!({"replicas": 1})).await;
    pool.converged(&api, PATIENCE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn o13_a_leader_that_was_stopped_for_longer_than_its_lease_ends_when_it_goes_on() {
    let (plane, nats) = (plane(), NatsServer::start());
    let release = plane.install("stopped", &["watchNamespace=stopped"]);
    let api = plane.api().await;
    let start = || Operator::of(&release.kubeconfig, "stopped");
    let mut first = start().start().await;
    leads(&first, PATIENCE).await;
    let pool = Pool::new("stopped", "orders", &nats);
    pool.create(&api, json!({})).await;
    pool.converged(&api, PATIENCE).await;
    first.pause();
    let second = start().spawn();
    leads(&second, PATIENCE).await;
    pool.change(&api, json!({"replicas": 2})).await;
    pool.converged(&api, PATIENCE).await;
    first.resume();
    assert_eq!(first.ended().await, Some(1), "Kubernetes starts it again, as a standby");
    assert!(first.lines().last().is_some_and(|line| line.contains("another operator leads")));
    assert_eq!(second.metric(LEADER).await, 1.0);
    pool.converged(&api, PATIENCE).await;
}

/// A holder whose clock is wrong by this, either way.
const SKEW: jiff::SignedDuration = jiff::SignedDuration::from_hours(1);
/// Longer than any lease.
const RENEWED_FOR: Duration = Duration::from_secs(20);

/// The Lease as somebody else has it who renewed it then.
fn anothers(renewed: jiff::Timestamp) -> Value {
    let time = format!("{renewed:.6}");
    let spec = json!({"holderIdentity": "another", "leaseDurationSeconds": 10, "acquireTime": time, "renewTime": time});
    json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "beamline-operator"}, "spec": spec})
}

#[tokio::test(flavor = "multi_thread")]
async fn o25_a_wrong_clock_of_the_holder_neither_costs_it_the_lease_nor_keeps_it_when_it_is_dead() {
    let (release, api) = (plane().install("skew", &["watchNamespace=skew"]), plane().api().await);
    let lease = "/apis/coordination.k8s.io/v1/namespaces/skew/leases/beamline-operator";
    let renew = async |skew: jiff::SignedDuration| api.apply(lease, &anothers(jiff::Timestamp::now() + skew)).await;
    renew(-SKEW).await;
    let operator = Operator::of(&release.kubeconfig, "skew").start().await;
    let began = Instant::now();
    while began.elapsed() < RENEWED_FOR {
        renew(-SKEW).await;
        assert_eq!(operator.metric(LEADER).await, 0.0, "a living holder has lost its lease");
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    renew(SKEW).await;
    let died = Instant::now();
    leads(&operator, PATIENCE).await;
    let needed = died.elapsed().as_secs_f64();
    // By the Lease's own times the hand-over is held to its bound elsewhere; here it must not depend on the holder's clock.
    assert!(needed <= 2.0 * HANDOVER, "{needed} s");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_somebody_deletes_is_made_anew_by_whoever_waits_for_it() {
    let (release, api) = (plane().install("deleted", &["watchNamespace=deleted"]), plane().api().await);
    let lease = "/apis/coordination.k8s.io/v1/namespaces/deleted/leases/beamline-operator";
    api.apply(lease, &anothers(jiff::Timestamp::now())).await;
    let operator = Operator::of(&release.kubeconfig, "deleted").start().await;
    assert_eq!(operator.metric(LEADER).await, 0.0);
    api.delete(lease).await;
    leads(&operator, PATIENCE).await;
    let anew = api.get(lease).await.expect("there is a Lease");
    assert!(!anew["spec"]["holderIdentity"].as_str().unwrap_or_default().is_empty(), "{anew}");
}

#[tokio::test(flavor = "multi_thread")]
async fn o13_two_operators_that_both_act_write_the_same_and_come_to_rest() {
    let (plane, nats) = (plane(), NatsServer::start());
    let release = plane.install("both", &["watchNamespace=both"]);
    let api = plane.api().await;
    let start = || Operator::of(&release.kubeconfig, "both").flag("--leader-election=false");
    let (mut one, mut other) = (start().start().await, start().start().await);
    let pool = Pool::new("both", "orders", &nats);
    pool.create(&api, json!({"gpu": {"replicas": 1}})).await;
    pool.converged(&api, PATIENCE).await;
    for change in [
        json!({"replicas": 3, "worker": {"image": "worker:2"}}),
        json!({"paused": true}),
        json!({"paused": false, "gpu": null}),
    ] {
        pool.change(&api, change).await;
        pool.converged(&api, PATIENCE).await;
    }
    let deployments = "/apis/apps/v1/namespaces/both/deployments";
    within(PATIENCE, "one Deployment is left", async || (api.list(deployments).await.len() == 1).then_some(())).await;
    let written = || plane.asked_by(&release.user).into_iter().filter(is_write).count();
    calm(written).await;
    let before = written();
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(written() - before, 0, "they write against each other");
    assert!(one.is_running() && other.is_running());
    for metric in [one.metric(LEADER).await, other.metric(LEADER).await] {
        assert_eq!(metric, 1.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn o03_what_there_is_is_asked_for_as_it_is_now_and_never_as_some_cache_may_have_it() {
    let (plane, nats) = (plane(), NatsServer::start());
    let release = plane.install("current", &["watchNamespace=current"]);
    let api = plane.api().await;
    let _operator = Operator::of(&release.kubeconfig, "current").flag("--relist-after=2s").start().await;
    let pool = Pool::new("current", "orders", &nats);
    pool.create(&api, json!({})).await;
    pool.converged(&api, PATIENCE).await;
    let lists = || {
        let mut lists = BTreeMap::<String, Vec<String>>::new();
        for event in plane.asked_by(&release.user).into_iter().filter(|event| event["verb"] == "list") {
            let uri = event["requestURI"].as_str().unwrap_or_default().to_owned();
            lists.entry(event["objectRef"]["resource"].to_string()).or_default().push(uri);
        }
        lists
    };
    let anew = async || (lists().len() >= 9 && lists().values().all(|uris| uris.len() >= 2)).then_some(());
    within(PATIENCE, "all that is watched is listed anew", anew).await;
    for uri in lists().into_values().flatten() {
        assert!(!uri.contains("resourceVersion"), "{uri} may be answered from the past");
    }
}

/// In seconds.
fn time(text: &Value) -> f64 {
    let time: jiff::Timestamp = text.as_str().unwrap_or_default().parse().expect("a time");
    time.as_millisecond() as f64 / 1000.0
}

const LEADER: &str = "beamline_operator_leader";

async fn leads(operator: &Operator, limit: Duration) {
    within(limit, "it leads", async || {
        operator.get("/metrics").await?;
        (operator.metric(LEADER).await == 1.0).then_some(())
    })
    .await;
}
