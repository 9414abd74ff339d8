//! Objects and rules of others: pods that look like the pool's, an admission that says no, somebody who changes what is
//! the operator's.

use std::time::{Duration, Instant};

use beamline_tests::api::Api;
use beamline_tests::failpoint::{Points, VARIABLE};
use beamline_tests::nats::NatsServer;
use beamline_tests::operator::Operator;
use beamline_tests::pool::Pool;
use beamline_tests::wait::within;
use serde_json::{Value, json};

use super::{PATIENCE, calm, condition, is_write, plane};

const TOLD: &str = "beamline.dev/policy-hash";

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_only_looks_like_a_worker_is_neither_believed_nor_changed() {
    let (plane, nats) = (plane(), NatsServer::start());
    let release = plane.install("looks-like", &["watchNamespace=looks-like"]);
    let api = plane.api().await;
    let intruder = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "intruder", "labels": {
            "app.kubernetes.io/managed-by": "beamline-operator", "beamline.dev/pool": "orders",
            "beamline.dev/class": "general", "pod-template-hash": "5c9",
        }},
        "spec": {"schedulerName": "nobody", "containers": [{"name": "worker", "image": "worker"}]},
    });
    api.apply("/api/v1/namespaces/looks-like/pods/intruder", &intruder).await;
    let pulls = json!({"status": {"phase": "Pending", "containerStatuses": [{
        "name": "worker", "image": "worker", "imageID": "", "ready": false, "restartCount": 0,
        "state": {"waiting": {"reason": "ImagePullBackOff"}},
    }]}});
    api.merge("/api/v1/namespaces/looks-like/pods/intruder/status", &pulls).await;
    let _operator = Operator::of(&release.kubeconfig, "looks-like").start().await;
    let pool = Pool::new("looks-like", "orders", &nats);
    pool.create(&api, json!({"worker": {"nodeSelector": {"no": "such-node"}}})).await;
    says(&api, &pool, "Ready", "Unschedulable").await;

    pool.change(&api, json!({"paused": true})).await;
    within(PATIENCE, "the worker is told", async || {
        let pods = api.list("/api/v1/namespaces/looks-like/pods").await;
        let told = |pod: &&Value| pod["metadata"]["annotations"][TOLD].is_string();
        pods.iter().find(told).map(|pod| assert_ne!(pod["metadata"]["name"], "intruder"))
    })
    .await;
    let intruder = api.get("/api/v1/namespaces/looks-like/pods/intruder").await.expect("it is there");
    assert_eq!(intruder["metadata"]["annotations"], Value::Null, "{intruder}");
    assert_eq!(condition(&api, &pool, "Ready").await["reason"], "Unschedulable");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_that_protects_pods_is_told_and_keeps_the_rest_of_the_pool_from_nothing() {
    let (plane, nats) = (plane(), NatsServer::start());
    let release = plane.install("protected", &["watchNamespace=protected"]);
    let api = plane.api().await;
    protect(&api, "protected").await;
    let _operator = Operator::of(&release.kubeconfig, "protected").start().await;
    let pool = Pool::new("protected", "orders", &nats);
    pool.create(&api, json!({})).await;
    pool.converged(&api, PATIENCE).await;
    let pods = api.list("/api/v1/namespaces/protected/pods").await;
    let pod = pods[0]["metadata"]["name"].as_str().expect("a name");
    let path = format!("/api/v1/namespaces/protected/pods/{pod}");
    let try_it = json!({"metadata": {"annotations": {TOLD: "mine"}}});
    within(PATIENCE, "the rule is in force", async || api.try_merge(&path, &try_it).await.err()).await;

    pool.change(&api, json!({"paused": true, "observability": {"podMonitor": true}})).await;
    says(&api, &pool, "Degraded", "PodsNotAnnotated").await;
    says(&api, &pool, "Ready", "Paused").await;
    let message = condition(&api, &pool, "Degraded").await["message"].clone();
    assert!(message.as_str().unwrap_or_default().contains("hands off"), "{message}");
    let monitor = "/apis/monitoring.coreos.com/v1/namespaces/protected/podmonitors/orders";
    within(PATIENCE, "what comes after is made", async || api.get(monitor).await.map(drop)).await;
}

/// Nobody may say on a pod of this namespace which policy it knows.
async fn protect(api: &Api, namespace: &str) {
    let group = "/apis/admissionregistration.k8s.io/v1";
    let rule = json!({"apiGroups": [""], "apiVersions": ["v1"], "operations": ["UPDATE"], "resources": ["pods"]});
    let expression = format!("!has(object.metadata.annotations) || !('{TOLD}' in object.metadata.annotations)");
    let policy = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": namespace},
        "spec": {
            "matchConstraints": {"resourceRules": [rule], "namespaceSelector": {
                "matchLabels": {"kubernetes.io/metadata.name": namespace},
            }},
            "validations": [{"expression": expression, "message": "hands off these pods"}],
        },
    });
    let binding = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": namespace}, "spec": {"policyName": namespace, "validationActions": ["Deny"]},
    });
    api.apply(&format!("{group}/validatingadmissionpolicies/{namespace}"), &policy).await;
    api.apply(&format!("{group}/validatingadmissionpolicybindings/{namespace}"), &binding).await;
}

async fn says(api: &Api, pool: &Pool, kind: &str, reason: &str) {
    let says = async || (condition(api, pool, kind).await["reason"] == reason).then_some(());
    within(PATIENCE, &format!("{kind} says {reason}"), says).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn o03_what_takes_the_place_of_a_child_behind_the_operators_back_is_neither_changed_nor_removed() {
    let (plane, nats) = (plane(), NatsServer::start());
    let release = plane.install("replaced", &["watchNamespace=replaced"]);
    let api = plane.api().await;
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut points = Points::listen(directory.path());
    let operator = Operator::of(&release.kubeconfig, "replaced").flag("--leader-election=false");
    let mut operator = operator.env(VARIABLE, &points.socket()).start().await;
    let image = || json!({"worker": {"image": "worker:2"}});
    for (pool, verb, path, change) in [
        ("image", "apply Deployment image", "apis/apps/v1/namespaces/replaced/deployments/image", image()),
        (
            "gpu",
            "remove Deployment gpu-gpu",
            "apis/apps/v1/namespaces/replaced/deployments/gpu-gpu",
            json!({"gpu": null}),
        ),
        (
            "wall",
            "remove NetworkPolicy wall",
            "apis/networking.k8s.io/v1/namespaces/replaced/networkpolicies/wall",
            json!({"networkPolicy": "Off"}),
        ),
    ] {
        let (pool, path) = (Pool::new("replaced", pool, &nats), format!("/{path}"));
        pool.create(&api, json!({"gpu": {"replicas": 1}})).await;
        pool.converged(&api, PATIENCE).await;
        points.arm(Some(&format!("before {verb}")));
        pool.change(&api, change).await;
        let held = tokio::time::timeout(PATIENCE, points.caught()).await.expect("it is about to do it");
        let ours = api.get(&path).await.expect("it is there");
        api.delete(&path).await;
        within(PATIENCE, "it is gone", async || api.get(&path).await.is_none().then_some(())).await;
        let mut theirs = json!({"apiVersion": ours["apiVersion"], "kind": ours["kind"],
            "metadata": {"name": ours["metadata"]["name"]}, "spec": ours["spec"]});
        if theirs["spec"]["replicas"].is_i64() {
            theirs["spec"]["replicas"] = json!(0);
        }
        api.apply(&path, &theirs).await;
        let before = api.get(&path).await.expect("it is there");
        drop(held);
        calm(|| plane.asked_by(&release.user).into_iter().filter(is_write).count()).await;
        let after = api.get(&path).await.unwrap_or_else(|| panic!("{verb}: it is gone"));
        let same = |key: &str| assert_eq!(before["metadata"][key], after["metadata"][key], "{verb}: {key}");
        ["uid", "generation", "labels", "ownerReferences"].into_iter().for_each(same);
        api.delete(&path).await;
        pool.converged(&api, PATIENCE).await;
    }
    assert!(operator.is_running());
}

#[tokio::test(flavor = "multi_thread")]
async fn o07_somebody_who_changes_ours_again_and_again_is_answered_without_a_loop_and_keeps_theirs() {
    let (plane, nats) = (plane(), NatsServer::start());
    let release = plane.install("fights", &["watchNamespace=fights"]);
    let api = plane.api().await;
    let operator = Operator::of(&release.kubeconfig, "fights").flag("--leader-election=false");
    let mut operator = operator.start().await;
    let pool = Pool::new("fights", "orders", &nats);
    pool.create(&api, json!({})).await;
    pool.converged(&api, PATIENCE).await;
    let writes = || answers(&plane.asked_by(&release.user));
    calm(writes).await;
    let before = writes();
    let path = "/apis/apps/v1/namespaces/fights/deployments/orders";
    for round in 1..=FLIPS {
        // One field is ours, another one nobody's but theirs.
        let theirs = json!({"metadata": {"annotations": {"theirs": round.to_string()}}, "spec": {"replicas": 7, "paused": false}});
        api.merge(path, &theirs).await;
        within(PATIENCE, "ours is as it was", async || {
            let deployment = api.get(path).await?;
            assert_eq!(deployment["metadata"]["annotations"]["theirs"], round.to_string());
            (deployment["spec"]["replicas"] == 1).then_some(())
        })
        .await;
    }
    calm(writes).await;
    let answers = writes() - before;
    assert!(answers <= FLIPS, "{answers} writes for {FLIPS} changes");
    pool.converged(&api, PATIENCE).await;
    assert!(operator.is_running());
}

#[tokio::test(flavor = "multi_thread")]
async fn o07_who_goes_on_changing_ours_is_named_in_condition_and_event_and_answered_now_and_then() {
    let (plane, nats) = (plane(), NatsServer::start());
    let release = plane.install("contested", &["watchNamespace=contested"]);
    let api = plane.api().await;
    let operator = Operator::of(&release.kubeconfig, "contested").flag("--leader-election=false");
    let mut operator = operator.start().await;
    let pool = Pool::new("contested", "orders", &nats);
    pool.create(&api, json!({})).await;
    pool.converged(&api, PATIENCE).await;
    let writes = || answers(&plane.asked_by(&release.user));
    calm(writes).await;
    let (before, began) = (writes(), Instant::now());
    let path = "/apis/apps/v1/namespaces/contested/deployments/orders";
    let mut flips = 0;
    let degraded = async || condition(&api, &pool, "Degraded").await;
    while began.elapsed() < FOUGHT || degraded().await["reason"] != "FieldContested" {
        assert!(began.elapsed() < PATIENCE, "{}", degraded().await);
        flips += 1;
        let theirs = json!({"spec": {"replicas": 5 + flips % 3}});
        api.merge(&format!("{path}?fieldManager=rival"), &theirs).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let (answers, time) = (writes() - before, began.elapsed());
    eprintln!("contested: {answers} writes for {flips} changes in {time:?}");
    let most = 6 + usize::try_from(time.as_secs() / 15).expect("few");
    assert!(answers <= most && answers <= flips, "{answers} writes for {flips} changes in {time:?}");
    let said = degraded().await["message"].clone();
    let said = said.as_str().unwrap_or_default();
    assert!(said.contains("Deployment `orders`: others set spec.replicas by `rival` again and again"), "{said}");
    within(PATIENCE, "an event tells of it", async || {
        let events = api.list("/apis/events.k8s.io/v1/namespaces/contested/events").await;
        events.into_iter().find(|event| event["reason"] == "FieldContested" && event["note"] == said)
    })
    .await;

    pool.converged(&api, PATIENCE).await;
    let replicas = async || (api.get(path).await?["spec"]["replicas"] == 1).then_some(());
    within(PATIENCE, "the last change is set back", replicas).await;
    within(PATIENCE, "it is over", async || (degraded().await["reason"] == "AsAsked").then_some(())).await;
    assert!(operator.is_running());
}

/// For how long they change it, once a second.
const FOUGHT: Duration = Duration::from_secs(25);

/// How often they change it.
const FLIPS: usize = 5;

/// Writes of the Deployment; to ask whose a field is writes nothing.
fn answers(events: &[Value]) -> usize {
    let asks = |event: &&Value| event["requestURI"].as_str().is_some_and(|uri| uri.contains("dryRun"));
    let all = events.iter().filter(|event| is_write(event) && event["objectRef"]["resource"] == "deployments");
    all.filter(|event| !asks(event)).count()
}
