//! How the program starts, waits, stops and fails, and which of several acts.

use std::io::Write;
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use beamline_tests::nats::NatsServer;
use beamline_tests::operator::Operator;
use beamline_tests::pool::Pool;
use serde_json::{Value, json};

use super::{PATIENCE, plane};

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
async fn its_last_words_are_a_line_of_its_log() {
    let mut operator = Operator::by(Path::new("/no/such/kubeconfig")).spawn();
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
    let operator = Operator::by(&release.kubeconfig).flag("--watch-namespace=stop").flag("--lease-namespace=stop");
    let mut operator = operator.start().await;
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
