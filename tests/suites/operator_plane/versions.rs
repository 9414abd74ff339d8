//! The type of pools: missing, wider than the operator knows, narrower again. And what kubectl makes of it.

use std::time::{Duration, Instant};

use beamline_crds::WorkerPool;
use beamline_tests::api::Api;
use beamline_tests::apifault::ApiFault;
use beamline_tests::nats::NatsServer;
use beamline_tests::operator::Operator;
use beamline_tests::plane::ControlPlane;
use beamline_tests::pool::Pool;
use beamline_tests::wait::{SOON, within};
use kube::CustomResourceExt;
use serde_json::{Value, json};

use super::{PATIENCE, calm, condition, is_write, plane, start_plane};

const TYPE: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/workerpools.beamline.dev";

/// Not on the plane that the others share: it is about what all of them need.
#[tokio::test(flavor = "multi_thread")]
async fn o10_o11_the_type_comes_late_changes_and_one_object_that_does_not_fit_it_stops_no_other() {
    let (plane, nats) = (start_plane(), NatsServer::start());
    let api = plane.api().await;
    // It can do all that it may, and there is nothing to do it to.
    let operator = Operator::by(&plane.kubeconfig()).flag("--leader-election=false").spawn();
    within(PATIENCE, "it says what it waits for", async || {
        let (code, said) = operator.get("/readyz").await?;
        let is_told = said.contains("crd: the CustomResourceDefinition workerpools.beamline.dev is not installed");
        (code == 503 && is_told).then_some(())
    })
    .await;
    assert_eq!(operator.get("/livez").await.map(|(code, _)| code), Some(200));
    plane.install("types", &[]);
    operator.ready().await;

    let (healthy, broken) = (Pool::new("types", "default", &nats), Pool::new("types", "broken", &nats));
    healthy.create(&api, json!({})).await;
    healthy.converged(&api, PATIENCE).await;
    shows(&plane.kubectl(&["get", "wp", "--namespace=types"], None));
    shows(&plane.kubectl(&["get", "all", "--namespace=types"], None));
    shows(&plane.kubectl(&["get", "beamline", "--namespace=types"], None));

    // Another version of the type lets in what this operator does not know.
    let narrow = api.get(TYPE).await.expect("it is there")["spec"]["versions"].clone();
    let mut wide = narrow.clone();
    let any = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    wide[0]["schema"]["openAPIV3Schema"] = json!({"type": "object", "properties": {"spec": any, "status": any}});
    api.merge(TYPE, &json!({"spec": {"versions": wide}})).await;
    within(PATIENCE, "what does not fit is let in", async || {
        let odd = json!({"spec": {"future": {"deep": [1, 2]}}});
        api.try_merge(&healthy.path(), &odd).await.ok()?;
        (api.get(&healthy.path()).await?["spec"]["future"]["deep"] == json!([1, 2])).then_some(())
    })
    .await;
    let status = format!("{}/status", healthy.path());
    api.merge(&status, &json!({"status": {"future": "kept"}})).await;
    broken.create(&api, json!({"worker": "many"})).await;
    told(&api, "broken", "UnreadableSpec").await;
    is_told_once_while_its_queue_moves(&api, &nats).await;
    healthy.change(&api, json!({"replicas": 3})).await;
    healthy.converged(&api, PATIENCE).await;
    let after = api.get(&healthy.path()).await.expect("it is there");
    assert_eq!((&after["spec"]["future"]["deep"], &after["status"]["future"]), (&json!([1, 2]), &json!("kept")));
    // An operator that starts now finds it too, and says what it does nothing for.
    drop(operator);
    let operator = Operator::by(&plane.kubeconfig()).flag("--leader-election=false").start().await;
    says(&api, &healthy, "OperatorOutdated", "does nothing for spec.future;").await;
    healthy.change(&api, json!({"replicas": 1})).await;
    healthy.converged(&api, PATIENCE).await;

    api.merge(TYPE, &json!({"spec": {"versions": narrow}})).await;
    broken.change(&api, json!({"worker": null})).await;
    broken.converged(&api, PATIENCE).await;
    assert_eq!(operator.get("/readyz").await.map(|(code, _)| code), Some(200));

    healthy.change(&api, json!({"replicas": 2})).await;
    says(&api, &healthy, "AsAsked", "").await;

    // One that is older than this operator has no place for all that is said: the rest is, and workers are made.
    install_without(&plane, &[LATER.as_slice(), &[SAID_OF_ALL]].concat()).await;
    let late = Pool::new("types", "late", &nats);
    late.create(&api, json!({})).await;
    let unknown = "the status cannot be written: ";
    within(PATIENCE, "it is told", async || {
        let lines = operator.lines();
        lines.into_iter().find(|line| line.contains(unknown) && line.contains("specReplicas: field not declared"))
    })
    .await;
    let deployment = "/apis/apps/v1/namespaces/types/deployments/late";
    let works = async || (api.get(deployment).await?["status"]["readyReplicas"] == 1).then_some(());
    within(PATIENCE, "its worker is ready", works).await;
    late.converged(&api, PATIENCE).await;
    says(&api, &late, "TypeOutdated", "has no place for status.scaling.specReplicas, which is not shown").await;
    told(&api, "late", "TypeOutdated").await;
    upgrade(&plane).await;
    says(&api, &late, "AsAsked", "").await;
    let shown = api.get(&late.path()).await.expect("it is there")["status"]["scaling"]["specReplicas"].clone();
    assert_eq!(shown, 1);
}

/// A pool that cannot be read any more.
async fn is_told_once_while_its_queue_moves(api: &Api, nats: &NatsServer) {
    let pool = Pool::new("types", "moving", nats);
    pool.create(api, json!({})).await;
    pool.converged(api, PATIENCE).await;
    pool.change(api, json!({"worker": "many"})).await;
    let event = told(api, "moving", "UnreadableSpec").await;
    let jetstream = async_nats::jetstream::new(async_nats::connect(nats.url()).await.expect("a connection"));
    let began = Instant::now();
    while began.elapsed() < MOVING {
        let sent = jetstream.publish("work.moving", "{}".into()).await.expect("it is sent");
        sent.await.expect("it is kept");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let name = event["metadata"]["name"].as_str().expect("a name");
    let path = format!("/apis/events.k8s.io/v1/namespaces/types/events/{name}");
    let series = api.get(&path).await.expect("the event")["series"].clone();
    assert_eq!(series, Value::Null, "it is told again and again");
    api.delete(&pool.path()).await;
}

/// How long a queue moves.
const MOVING: Duration = Duration::from_secs(4);

/// Waits until the pool says this in its condition `Degraded`.
async fn says(api: &Api, pool: &Pool, reason: &str, words: &str) {
    let is_so = async || {
        let said = condition(api, pool, "Degraded").await;
        (said["reason"] == reason && said["message"].as_str()?.contains(words)).then_some(())
    };
    within(PATIENCE, reason, is_so).await;
}

/// Waits for an event of this pool.
async fn told(api: &Api, pool: &str, reason: &str) -> Value {
    let is_told = |event: &Value| event["regarding"]["name"] == pool && event["reason"] == reason;
    let events = "/apis/events.k8s.io/v1/namespaces/types/events";
    within(PATIENCE, reason, async || api.list(events).await.into_iter().find(is_told)).await
}

/// A watch goes on for a moment with the type that it began with.
#[tokio::test(flavor = "multi_thread")]
async fn o10_what_a_watch_leaves_out_that_is_older_than_its_type_is_acted_on_once_it_is_shown() {
    let (plane, nats) = (plane(), NatsServer::start());
    let release = plane.install("outlives", &["watchNamespace=outlives"]);
    let proxy = ApiFault::before(&release.kubeconfig).await;
    let api = plane.api().await;
    let _operator = Operator::of(proxy.kubeconfig(), "outlives").start().await;
    let pool = Pool::new("outlives", "orders", &nats);
    pool.create(&api, json!({})).await;
    pool.converged(&api, PATIENCE).await;
    proxy.hide("paused");
    pool.change(&api, json!({"paused": true})).await;
    let says = async |reason: &str| {
        let generation = api.get(&pool.path()).await?["metadata"]["generation"].clone();
        let ready = condition(&api, &pool, "Ready").await;
        (ready["reason"] == reason && ready["observedGeneration"] == generation).then_some(())
    };
    within(PATIENCE, "it answers what it was shown", async || says("WorkersReady").await).await;
    // What comes of itself is over: nothing else is left to make it look again.
    calm(|| plane.asked_by(&release.user).into_iter().filter(is_write).count()).await;
    proxy.set(&[]);
    api.merge(&pool.path(), &json!({"metadata": {"annotations": {"shown": "anew"}}})).await;
    within(SOON, "the pool is paused", async || says("Paused").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_explains_a_pool_and_its_parts_in_the_words_of_its_type() {
    plane().install("explained", &["watchNamespace=explained"]);
    let schema = versions()[0]["schema"]["openAPIV3Schema"]["properties"].clone();
    for part in ["spec", "status"] {
        let path = format!("workerpool.{part}");
        is_explained(&path, &schema[part]);
        for (name, field) in schema[part]["properties"].as_object().expect("fields") {
            if field["properties"].is_object() {
                is_explained(&format!("{path}.{name}"), field);
            }
        }
    }
}

fn is_explained(path: &str, schema: &Value) {
    let said = words(&plane().kubectl(&["explain", path], None));
    for (name, field) in schema["properties"].as_object().expect("fields") {
        let text = field["description"].as_str().unwrap_or_default();
        let is_said = !text.is_empty() && said.contains(&words(text)) && said.contains(&format!(" {name} <"));
        assert!(is_said, "{path}.{name} is not explained: {said}");
    }
}

/// Without the ends of lines.
fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[track_caller]
fn shows(table: &str) {
    let mut lines = table.lines().skip_while(|line| !line.contains("IN-FLIGHT"));
    let (head, row) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    let columns = ["NAME", "READY", "DESIRED", "DEPTH", "IN-FLIGHT", "OLDEST", "DLQ", "MODE", "STATUS", "AGE"];
    assert_eq!(head.split_whitespace().collect::<Vec<_>>(), columns, "{table}");
    let cells: Vec<_> = row.split_whitespace().collect();
    let name = cells.first().map(|name| name.trim_start_matches("workerpool.beamline.dev/"));
    assert_eq!((name, cells.get(1..3)), (Some("default"), Some(["1", "1"].as_slice())), "{table}");
    assert!(cells.contains(&"Manual") && cells.contains(&"WorkersReady"), "{table}");
}

/// What was not in the first version of the type, what a plain pool can do without, and no rule names.
const LATER: [&str; 5] = [
    "/spec/properties/tenants",
    "/spec/properties/paused",
    "/spec/properties/observability/properties/podMonitor",
    "/status/properties/tenants",
    "/status/properties/queue/properties/parked",
];
/// What was not in it either, and is said of every pool.
const SAID_OF_ALL: &str = "/status/properties/scaling/properties/specReplicas";

/// Installs an older version of the type, in which the status of a plain pool has a place.
pub(super) async fn downgrade(plane: &ControlPlane) {
    install_without(plane, &LATER).await;
}

async fn install_without(plane: &ControlPlane, later: &[&str]) {
    let mut versions = versions();
    let schema = &mut versions[0]["schema"]["openAPIV3Schema"]["properties"];
    for path in later {
        let (parent, field) = path.rsplit_once('/').expect("a path");
        let fields = schema.pointer_mut(parent).and_then(Value::as_object_mut).expect("fields");
        fields.remove(field).unwrap_or_else(|| panic!("there is no {path}"));
    }
    install(plane, &versions, false).await;
}

/// Installs the one that this operator knows.
pub(super) async fn upgrade(plane: &ControlPlane) {
    install(plane, &versions(), true).await;
}

fn versions() -> Value {
    serde_json::to_value(WorkerPool::crd()).expect("plain data")["spec"]["versions"].take()
}

/// Until it is in force, which takes the API server a moment.
async fn install(plane: &ControlPlane, versions: &Value, knows_all: bool) {
    plane.api().await.merge(TYPE, &json!({"spec": {"versions": versions}})).await;
    let probe = json!({"apiVersion": "beamline.dev/v1alpha1", "kind": "WorkerPool", "metadata": {"name": "probe"},
        "spec": {"replicas": 1, "paused": true, "nats": {"url": "nats://nats:4222"}}});
    let dry_run = ["create", "--dry-run=server", "--validate=strict", "--namespace=default", "-f", "-"];
    within(PATIENCE, "the type is in force", async || {
        (plane.try_kubectl(&dry_run, Some(&probe.to_string())).is_ok() == knows_all).then_some(())
    })
    .await;
}
