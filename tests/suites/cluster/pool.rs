//! What a pool may ask for besides workers: a pause, GPUs, sidecars, databases, a wall, a monitor.

use std::time::{Duration, Instant};

use beamline_tests::cluster::{Namespace, PATIENCE, kubectl, pretend_gpus};
use beamline_tests::router::{Router, assignment};
use beamline_tests::wait::within;
use futures::StreamExt;
use serde_json::{Value, json};

use super::{condition, is, names, operator, pool};

/// A pause is in force within this.
const PAUSE: Duration = Duration::from_secs(10);
const PODS: &str = "beamline.dev/pool=orders";

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_is_in_force_within_ten_seconds_and_replaces_no_pod() {
    operator().await;
    let namespace = Namespace::create("beamline-pause");
    namespace.start_nats();
    namespace.apply(&pool("orders", json!({"replicas": 2})));
    namespace.until("workerpool/orders", "2 workers are ready", |pool| pool["status"]["readyReplicas"] == 2).await;
    let before = names(&namespace.list("pods", PODS));
    let forward = namespace.forward("nats", 4222).await;
    let router = Router::connect(&forward.nats_url()).await;
    let mut reports = router.client().subscribe("caf.worker.report.v1.*").await.expect("a subscription");

    let mut told = policy_hashes(&namespace);
    for paused in [true, false] {
        namespace.kubectl(&[
            "patch",
            "workerpool",
            "orders",
            "--type=merge",
            "-p",
            &json!({"spec": {"paused": paused}}).to_string(),
        ]);
        let patched = Instant::now();
        let mut obeyed = std::collections::BTreeSet::new();
        while obeyed.len() < 2 {
            let left = PAUSE.checked_sub(patched.elapsed());
            let report = tokio::time::timeout(left.unwrap_or_default(), reports.next()).await;
            let report = report.unwrap_or_else(|_| panic!("paused={paused}: after {PAUSE:?} only {obeyed:?} obey"));
            let report: Value = serde_json::from_slice(&report.expect("a report").payload).expect("JSON");
            if report["pulling"] == json!(!paused) {
                obeyed.insert(report["worker"].to_string());
            }
        }
        told = within(PATIENCE, "the kubelet is told of both", async || {
            Some(policy_hashes(&namespace)).filter(|now| now.is_disjoint(&told))
        })
        .await;
        let reason = if paused { "Paused" } else { "WorkersReady" };
        let says_so = |pool: &Value| condition(pool, "Ready")["reason"] == reason && is(pool, "Ready", "True");
        namespace.until("workerpool/orders", reason, says_so).await;
        router
            .submit(&assignment("acme", &format!("paused-{paused}"), json!({"type": "fs.get", "path": "/data/x"})))
            .await;
    }
    router.result(("acme", "paused-true")).await;
    router.result(("acme", "paused-false")).await;
    let pods = namespace.list("pods", PODS);
    assert_eq!(names(&pods), before, "pods were replaced");
}

/// What makes the kubelet bring a changed policy at once, whether it was said once or twice.
fn policy_hashes(namespace: &Namespace) -> std::collections::BTreeSet<String> {
    let pods = namespace.list("pods", PODS);
    let words = pods.iter().map(|pod| pod["metadata"]["annotations"]["beamline.dev/policy-hash"].to_string());
    words.map(|word| word.replace(".2", "")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn gpu_pods_come_within_their_quota_take_their_work_and_go() {
    operator().await;
    pretend_gpus("example.com/gpu", 4);
    let namespace = Namespace::create("beamline-gpu");
    namespace.start_nats();
    let gpu = json!({
        "resourceName": "example.com/gpu", "replicas": 3, "count": 2, "maxTotal": 2,
        "sidecars": [{"name": "server", "image": "localhost/beamline-peer:0.1.0", "imagePullPolicy": "IfNotPresent"}],
        "container": "server",
    });
    namespace.apply(&pool("orders", json!({ "gpu": gpu })));
    let all_ready = |pool: &Value| pool["status"]["gpu"]["readyReplicas"] == 1 && is(pool, "Progressing", "False");
    let ready = namespace.until("workerpool/orders", "one GPU worker is ready", all_ready).await;
    assert_eq!(ready["status"]["gpu"]["limitedBy"], "MaxTotal");
    let pod = &namespace.list("pods", "beamline.dev/class=gpu")[0]["spec"];
    assert_eq!(pod["initContainers"][0]["resources"]["limits"]["example.com/gpu"], "2");

    let forward = namespace.forward("nats", 4222).await;
    let router = Router::connect(&forward.nats_url()).await;
    let mut work = assignment("acme", "on-a-gpu", json!({"type": "fs.get", "path": "/data/x"}));
    work["resources"] = json!({"pool": "gpu"});
    router.submit(&work).await;
    let result = router.result(("acme", "on-a-gpu")).await;
    let worker = result["metadata"]["worker_id"].as_str().unwrap_or_default().to_owned();
    assert!(worker.starts_with("orders-gpu-"), "{result}");

    namespace.apply(&pool("orders", json!({"gpu": null})));
    namespace.gone("deployment/orders-gpu").await;
    namespace.gone("poddisruptionbudget/orders-gpu").await;
    let without = |pool: &Value| pool["status"]["gpu"].is_null() && is(pool, "Ready", "True");
    namespace.until("workerpool/orders", "it has no GPU class", without).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_without_gpus_leaves_whoever_has_that_name_alone() {
    operator().await;
    let namespace = Namespace::create("beamline-gpu-name");
    namespace.start_nats();
    let budget = ["create", "poddisruptionbudget", "orders-gpu", "--selector=a=b", "--min-available=1"];
    namespace.kubectl(&budget);
    namespace.apply(&pool("orders", json!({})));
    namespace.until("workerpool/orders", "it is ready", |pool| is(pool, "Ready", "True")).await;
    namespace.get("poddisruptionbudget/orders-gpu").expect("it is still there");
    namespace.apply(&pool("orders", json!({"gpu": {}})));
    let in_the_way = |pool: &Value| condition(pool, "Ready")["reason"] == "NameConflict";
    let pool = namespace.until("workerpool/orders", "the budget is in the way", in_the_way).await;
    let message = condition(&pool, "Ready")["message"].as_str().unwrap_or_default();
    assert!(message.contains("PodDisruptionBudget `orders-gpu`"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_secret_is_named_and_its_coming_is_enough() {
    operator().await;
    let namespace = Namespace::create("beamline-database");
    namespace.start_nats();
    let crm = json!([{"name": "crm", "urlSecretRef": {"name": "crm-db", "key": "url"}, "tenants": ["acme"]}]);
    namespace.apply(&pool("orders", json!({"worker": {"sql": {"inlineConnections": "Deny", "connections": crm}}})));
    let is_missed = |pool: &Value| condition(pool, "Ready")["reason"] == "SecretUnusable";
    let pool = namespace.until("workerpool/orders", "the Secret is missed", is_missed).await;
    let message = condition(&pool, "Ready")["message"].as_str().unwrap_or_default();
    assert!(message.contains("worker.sql.connections `crm`: Secret `crm-db` does not exist"), "{message}");
    namespace.kubectl(&["create", "secret", "generic", "crm-db", "--from-literal=url=postgres://u:p@crm:6432/crm"]);
    let is_well = |pool: &Value| is(pool, "Ready", "True") && is(pool, "Degraded", "False");
    namespace.until("workerpool/orders", "all is well", is_well).await;
    let map = namespace.get("configmap/orders").expect("a ConfigMap");
    let text = map["data"]["sql-connections.yaml"].as_str().unwrap_or_default();
    assert!(text.contains("crm") && !text.contains("u:p"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_wall_stands_and_can_be_taken_away() {
    operator().await;
    let namespace = Namespace::create("beamline-wall");
    namespace.start_nats();
    namespace.apply(&pool("orders", json!({})));
    namespace.until("workerpool/orders", "it is ready", |pool| is(pool, "Ready", "True")).await;
    let wall = namespace.get("networkpolicy/orders").expect("a wall");
    let except = wall["spec"]["egress"][1]["to"][0]["ipBlock"]["except"].to_string();
    let slice = kubectl(&["get", "endpointslice", "kubernetes", "--namespace=default", "--output=json"]);
    let slice: Value = serde_json::from_str(&slice).expect("kubectl prints JSON");
    let api_server = slice["endpoints"][0]["addresses"][0].as_str().unwrap_or_default();
    for address in ["169.254.0.0/16", &format!("{api_server}/32")] {
        assert!(except.contains(address), "{address} is not in {except}");
    }
    namespace.kubectl(&["delete", "networkpolicy", "orders"]);
    namespace.until("networkpolicy/orders", "it is back", |_| true).await;
    namespace.apply(&pool("orders", json!({"networkPolicy": "Off"})));
    namespace.gone("networkpolicy/orders").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_monitor_is_made_once_its_type_is_there() {
    operator().await;
    let namespace = Namespace::create("beamline-monitor");
    namespace.start_nats();
    namespace.apply(&pool("orders", json!({"observability": {"podMonitor": true}})));
    let is_missed =
        |pool: &Value| condition(pool, "Degraded")["reason"] == "PodMonitorMissing" && is(pool, "Ready", "True");
    namespace.until("workerpool/orders", "the type is missed", is_missed).await;
    namespace.apply(POD_MONITORS);
    let monitor = namespace.until("podmonitors.monitoring.coreos.com/orders", "it is made", |_| true).await;
    assert_eq!(monitor["spec"]["selector"]["matchLabels"]["beamline.dev/pool"], "orders");
    namespace.until("workerpool/orders", "all is well", |pool| is(pool, "Degraded", "False")).await;
    namespace.apply(&pool("orders", json!({"observability": {"podMonitor": false}})));
    namespace.gone("podmonitors.monitoring.coreos.com/orders").await;
    kubectl(&["delete", "crd", "podmonitors.monitoring.coreos.com"]);
}

/// As much of the Prometheus Operator's type as is used.
const POD_MONITORS: &str = r#"{
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "podmonitors.monitoring.coreos.com"},
    "spec": {
        "group": "monitoring.coreos.com",
        "names": {"kind": "PodMonitor", "plural": "podmonitors", "singular": "podmonitor"},
        "scope": "Namespaced",
        "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {
            "type": "object",
            "properties": {"spec": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}
        }}}]
    }
}"#;
