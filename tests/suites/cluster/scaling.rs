//! Mode Operator: from nothing to many and back, and from one who decides to another.

use std::time::{Duration, Instant};

use beamline_tests::cluster::{Namespace, PATIENCE};
use beamline_tests::router::{Key, Router, assignment};
use serde_json::{Value, json};

use super::{condition, is, names, operator, pool};

const PODS: &str = "beamline.dev/pool=orders";

/// Scales within seconds, so that a test sees it.
fn quick(spec: Value) -> Value {
    let mut quick = json!({"scaling": {
        "mode": "Operator",
        "maxReplicas": 3,
        "target": {"queueDepthPerReplica": 5},
        "scaleDown": {"stabilizationSeconds": 5, "idleSecondsToZero": 10},
    }});
    super::merge(&mut quick, spec);
    quick
}

fn desired(count: i32) -> impl Fn(&Value) -> bool {
    move |pool| pool["status"]["desiredReplicas"] == count
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_goes_from_nothing_to_many_and_back_and_no_block_is_cut() {
    operator().await;
    let namespace = Namespace::create("beamline-scale");
    namespace.start_nats();
    namespace.start_peer();
    namespace.apply(&pool("orders", quick(json!({}))));
    let idle = namespace.until("workerpool/orders", "it is idle", |pool| is(pool, "Ready", "True")).await;
    assert_eq!(condition(&idle, "Ready")["reason"], "Idle");
    assert!(namespace.list("pods", PODS).is_empty());

    let forward = namespace.forward("nats", 4222).await;
    let router = Router::connect(&forward.nats_url()).await;
    let slow = |milliseconds: u32| json!({"type": "http.request", "url": format!("http://peer/slow/{milliseconds}"), "timeout_ms": 120_000});
    // Longer than a pod that goes has left: five seconds, and five more.
    let long = assignment("acme", "long", slow(45_000));
    let sent = Instant::now();
    router.submit(&long).await;
    for number in 0..30 {
        router.submit(&assignment("acme", &format!("short-{number}"), slow(8_000))).await;
    }
    let grown = namespace.until("workerpool/orders", "it has grown", |pool| !desired(0)(pool)).await;
    println!("from nothing to a decision in {:?}: {}", sent.elapsed(), grown["status"]["scaling"]);
    let limited = |pool: &Value| pool["status"]["scaling"]["limitedBy"] == "MaxReplicas";
    namespace.until("workerpool/orders", "more are wanted than there may be", limited).await;
    namespace.until("workerpool/orders", "as many are ready", |pool| pool["status"]["readyReplicas"] == 3).await;
    for number in 0..30 {
        router.result(("acme", format!("short-{number}").as_str())).await;
    }
    let running = namespace
        .until("workerpool/orders", "one worker is left, with the long block", |pool| pool["status"]["replicas"] == 1);
    let running = running.await;
    assert_eq!(running["status"]["queue"]["inFlight"], 1, "{}", running["status"]);
    router.settled(PATIENCE).await;
    let result = router.result(&long).await;
    assert_eq!((&result["status"], &result["metadata"]["attempts"]), (&json!("success"), &json!(1)), "{result}");
    assert_eq!(router.story(Key::from(&long)).verdicts.len(), 1, "it was delivered again");
    let back = namespace
        .until("workerpool/orders", "nobody is left", |pool| desired(0)(pool) && pool["status"]["replicas"] == 0);
    let learned = back.await["status"]["scaling"]["learned"].clone();
    assert!(learned["ratePerReplica"].is_string() && learned["podStartSeconds"].is_string(), "{learned}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_number_that_somebody_writes_counts_in_mode_manual_only_and_nothing_dips_in_between() {
    operator().await;
    let namespace = Namespace::create("beamline-handover");
    namespace.start_nats();
    namespace.apply(&pool("orders", quick(json!({"scaling": {"minReplicas": 2}}))));
    namespace.until("workerpool/orders", "two are ready", |pool| pool["status"]["readyReplicas"] == 2).await;
    let before = names(&namespace.list("pods", PODS));

    namespace.kubectl(&["scale", "workerpool/orders", "--replicas=5"]);
    let ignored = |pool: &Value| condition(pool, "ScalingActive")["reason"] == "ReplicasIgnored";
    namespace.until("workerpool/orders", "it says that five have no effect", ignored).await;
    let events = namespace.kubectl(&["get", "events", "--field-selector=reason=ReplicasIgnored", "--output=json"]);
    assert!(events.contains("spec.replicas was set to 5"), "{events}");
    let deployment = namespace.get("deployment/orders").expect("it is there");
    assert_eq!(deployment["spec"]["replicas"], 2);

    let manual = json!({"spec": {"scaling": {"mode": "Manual"}}}).to_string();
    namespace.kubectl(&["patch", "workerpool", "orders", "--type=merge", "-p", &manual]);
    let handed = |pool: &Value| pool["spec"]["replicas"] == 2 && pool["status"]["scaling"]["mode"] == "Manual";
    namespace.until("workerpool/orders", "what runs is written", handed).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(names(&namespace.list("pods", PODS)), before, "pods came or went");
    let after = namespace.get("deployment/orders").expect("it is there");
    assert_eq!(after["metadata"]["generation"], deployment["metadata"]["generation"]);

    namespace.kubectl(&["scale", "workerpool/orders", "--replicas=1"]);
    namespace.until("workerpool/orders", "one is left", |pool| pool["status"]["replicas"] == 1).await;
}
