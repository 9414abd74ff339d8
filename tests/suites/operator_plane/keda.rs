//! Mode KEDA: what the operator does without KEDA, what it makes for it, and what it tells it.

use std::time::Instant;

use beamline_tests::api::Api;
use beamline_tests::keda::Keda;
use beamline_tests::nats::NatsServer;
use beamline_tests::operator::Operator;
use beamline_tests::plane::{ControlPlane, Release};
use beamline_tests::pool::Pool;
use beamline_tests::process::free_port;
use beamline_tests::wait::within;
use serde_json::{Value, json};

use super::autoscaler::{Lowest, Queue, replicas, scaled, writers};
use super::{PATIENCE, condition, is_write};

/// KEDA's own.
pub(super) const SCALED_OBJECTS: &str = include_str!("scaledobjects.yaml");
const TYPE: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/scaledobjects.keda.sh";
/// KEDA makes it.
const AUTOSCALER: &str = "/apis/autoscaling/v2/namespaces/driven/horizontalpodautoscalers/keda-hpa-orders";
const SCALED_OBJECT: &str = "/apis/keda.sh/v1alpha1/namespaces/driven/scaledobjects/orders";

#[tokio::test(flavor = "multi_thread")]
async fn a_scaled_object_comes_with_kedas_type_and_goes_with_the_mode() {
    let plane = ControlPlane::start();
    let api = plane.api().await;
    let nats = NatsServer::start();
    let release = plane.install("driven", &["keda.enabled=true"]);
    let operator = || Operator::by(&release.kubeconfig).flag("--lease-namespace=driven").for_keda();
    let leader = operator().start().await;
    let pool = Pool::new("driven", "orders", &nats);
    let scaling = json!({"mode": "KEDA", "maxReplicas": 5, "target": {"queueDepthPerReplica": 10},
        "scaleDown": {"stabilizationSeconds": 1, "idleSecondsToZero": 3}});
    pool.create(&api, json!({"replicas": 2, "scaling": scaling.clone()})).await;

    // Without KEDA.
    says(&api, &pool, "ScalingActive", "False", "KedaMissing").await;
    says(&api, &pool, "Degraded", "True", "KedaMissing").await;
    assert_eq!(replicas(&api, &pool).await, (2, 2), "what /scale says counts all the same");

    // It is installed.
    plane.kubectl(&["create", "-f", "-"], Some(SCALED_OBJECTS));
    let made = within(PATIENCE, "there is a ScaledObject", async || api.get(SCALED_OBJECT).await).await;
    assert_eq!(made["spec"]["scaleTargetRef"]["kind"], "WorkerPool");
    assert_eq!(made["spec"]["triggers"][0]["metadata"]["valueLocation"], "demand");
    for field in ["minReplicaCount", "maxReplicaCount", "pollingInterval", "cooldownPeriod", "initialCooldownPeriod"] {
        assert!(made["spec"][field].is_i64(), "KEDA's type knows no {field}");
    }
    says(&api, &pool, "ScalingActive", "True", "ModeKEDA").await;
    says(&api, &pool, "Degraded", "False", "AsAsked").await;
    let status = api.get(&pool.path()).await.expect("the pool")["status"].clone();
    assert_eq!(status["scaling"]["mode"], "KEDA");

    let standby = operator().start().await;
    tokio::join!(
        it_is_looked_at_and_left_alone((&plane, &release), &api, &pool),
        keda_is_told_how_much_there_is_to_do(&api, [&leader, &standby], &scaling),
    );

    // KEDA goes: what runs stays. Another mode: so it does, and the ScaledObject goes.
    api.delete(TYPE).await;
    says(&api, &pool, "ScalingActive", "False", "KedaMissing").await;
    plane.kubectl(&["create", "-f", "-"], Some(SCALED_OBJECTS));
    // Another wish is looked at at once.
    pool.change(&api, json!({"scaling": {"maxReplicas": 6}})).await;
    within(PATIENCE, "there is a ScaledObject again", async || api.get(SCALED_OBJECT).await).await;
    api.merge(&format!("{}/scale", pool.path()), &json!({"spec": {"replicas": 4}})).await;
    scaled(&api, &pool, 4).await;
    let lowest = Lowest::watch(&api, &pool);
    pool.change(&api, json!({"scaling": {"mode": "Operator", "minReplicas": 4}})).await;
    within(PATIENCE, "it is gone", async || api.get(SCALED_OBJECT).await.is_none().then_some(())).await;
    pool.change(&api, json!({"scaling": {"mode": "KEDA", "minReplicas": 0}})).await;
    within(PATIENCE, "it is back", async || api.get(SCALED_OBJECT).await).await;
    scaled(&api, &pool, 4).await;
    assert_eq!(lowest.seen(), 4, "a change of modes took workers away");
    api.delete(&pool.path()).await;
    within(PATIENCE, "it goes with its pool", async || api.get(SCALED_OBJECT).await.is_none().then_some(())).await;
}

/// Each look comes a third of a minute after the last.
async fn it_is_looked_at_and_left_alone((plane, release): (&ControlPlane, &Release), api: &Api, pool: &Pool) {
    let asked = || -> Vec<bool> {
        let is_it = |event: &Value| {
            let object = &event["objectRef"];
            // Without its type there was nothing to be asked of.
            object["resource"] == "scaledobjects"
                && object["name"] == "orders"
                && event["responseStatus"]["code"] != 404
        };
        plane.asked_by(&release.user).into_iter().filter(is_it).map(|event| is_write(&event)).collect()
    };
    // What KEDA writes into it is no reason to write it again; what it says there is said of the pool.
    let kedas = json!({"metadata": {"labels": {"scaledobject.keda.sh/name": "orders"}}});
    api.merge(SCALED_OBJECT, &kedas).await;
    let failed = json!([{"type": "Ready", "status": "False", "message": "Triggers are not working"}]);
    api.merge(&format!("{SCALED_OBJECT}/status"), &json!({"status": {"conditions": failed}})).await;
    says(api, pool, "ScalingActive", "False", "AutoscalerInactive").await;
    api.merge(&format!("{SCALED_OBJECT}/status"), &json!({"status": {"conditions": []}})).await;
    says(api, pool, "ScalingActive", "True", "ModeKEDA").await;
    // The log is behind.
    let twice = async || (asked().len() >= 3).then(asked);
    assert_eq!(within(PATIENCE, "it is looked at twice", twice).await, [true, false, false], "once it is written");
    api.merge(SCALED_OBJECT, &json!({"spec": {"maxReplicaCount": 99}})).await;
    let repaired = async || (api.get(SCALED_OBJECT).await?["spec"]["maxReplicaCount"] == 5).then_some(());
    within(PATIENCE, "it is repaired", repaired).await;
    let twice = async || (asked().iter().filter(|is_write| **is_write).count() == 2).then_some(());
    within(PATIENCE, "that was one write", twice).await;
}

/// By whoever leads and by whoever does not.
async fn keda_is_told_how_much_there_is_to_do(api: &Api, operators: [&Operator; 2], scaling: &Value) {
    let nats = NatsServer::start();
    let pool = Pool::new("driven", "counted", &nats);
    pool.create(api, json!({"replicas": 2, "scaling": scaling})).await;
    says(api, &pool, "ScalingActive", "True", "ModeKEDA").await;
    let queue = Queue::of(&nats, &pool).await;
    let told = async |operator: &Operator| {
        let (code, text) = operator.get("/queues/driven/counted").await?;
        let said: Value = serde_json::from_str(&text).expect("JSON");
        Some((code, said["demand"].as_i64()))
    };
    for (waiting, more) in [(0, 0), (35, 35)] {
        queue.fill(more).await;
        for operator in operators {
            let is_so = async || (told(operator).await == Some((200, Some(waiting)))).then_some(());
            within(PATIENCE, &format!("{waiting} are to be done"), is_so).await;
        }
    }
    nats.pause();
    for operator in operators {
        let refused = async || (told(operator).await == Some((503, None))).then_some(());
        within(PATIENCE, "there is no number", refused).await;
        assert_eq!(operator.get("/queues/driven/other").await.map(|(code, _)| code), Some(404));
    }
    says(api, &pool, "ScalingActive", "False", "QueueUnreadable").await;
    assert_eq!(replicas(api, &pool).await, (2, 2));
    nats.resume();
    api.delete(&pool.path()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_that_does_not_serve_keda_says_what_to_set() {
    let plane = super::plane();
    let api = plane.api().await;
    let nats = NatsServer::start();
    let release = plane.install("undriven", &["watchNamespace=undriven"]);
    let operator = Operator::of(&release.kubeconfig, "undriven").start().await;
    let pool = Pool::new("undriven", "orders", &nats);
    pool.create(&api, json!({"replicas": 2, "scaling": {"mode": "KEDA"}})).await;
    says(&api, &pool, "ScalingActive", "False", "KedaMissing").await;
    let said = condition(&api, &pool, "ScalingActive").await;
    assert!(said["message"].as_str().expect("words").contains("set keda.enabled in the chart"), "{said}");
    assert_eq!(replicas(&api, &pool).await, (2, 2));
    assert_eq!(operator.get("/queues/undriven/orders").await.map(|(code, _)| code), Some(404));
}

async fn says(api: &Api, pool: &Pool, kind: &str, status: &str, reason: &str) {
    let is_so = async || {
        let said = condition(api, pool, kind).await;
        (said["status"] == status && said["reason"] == reason).then_some(())
    };
    within(PATIENCE, &format!("{kind} is {status}, {reason}"), is_so).await;
}

/// KEDA's own operator, metrics server and types, and Kubernetes' own autoscaler.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "make test-keda: KEDA takes minutes to build"]
async fn the_real_keda_takes_a_pool_from_zero_to_many_and_back() {
    let plane = ControlPlane::start();
    let api = plane.api().await;
    let nats = NatsServer::start();
    let own_copy = SCALED_OBJECTS.split_once("---\n").expect("a comment, and KEDA's own").1;
    assert!(Keda::types().contains(own_copy), "scaledobjects.yaml is of another version than KEDA");
    let release = plane.install("driven", &["keda.enabled=true"]);
    let _operator = Operator::by(&release.kubeconfig).flag("--lease-namespace=driven").for_keda().start().await;
    let keda = Keda::start(&plane.kubeconfig(), &api, None).await;
    let pool = Pool::new("driven", "orders", &nats);
    let scaling = json!({"mode": "KEDA", "maxReplicas": 5, "target": {"queueDepthPerReplica": 10},
        "scaleDown": {"stabilizationSeconds": 1, "idleSecondsToZero": 3}});
    pool.create(&api, json!({"replicas": 0, "scaling": scaling})).await;
    says(&api, &pool, "ScalingActive", "True", "ModeKEDA").await;
    within(PATIENCE, "KEDA has made an autoscaler", async || api.get(AUTOSCALER).await).await;
    let ready = async || {
        let object = api.get(SCALED_OBJECT).await?;
        let conditions = object["status"]["conditions"].as_array()?;
        conditions.iter().any(|one| one["type"] == "Ready" && one["status"] == "True").then_some(())
    };
    within(PATIENCE, "KEDA takes the ScaledObject", ready).await;
    assert_eq!(replicas(&api, &pool).await, (0, 0), "an empty queue is an empty queue");

    let queue = Queue::of(&nats, &pool).await;
    let took = async |to: i64| {
        let since = Instant::now();
        scaled(&api, &pool, to).await;
        since.elapsed()
    };
    queue.fill(35).await;
    eprintln!("keda: from 0 to 4 workers in {:.1?}", took(4).await);
    assert_eq!(writers(&api, &pool).await, ["beamline-operator"], "one writes the Deployment's replicas");
    queue.fill(100).await;
    eprintln!("keda: to the most, 5 workers, in {:.1?}", took(5).await);

    // What cannot be read has no number, and takes nobody away.
    nats.pause();
    says(&api, &pool, "ScalingActive", "False", "QueueUnreadable").await;
    let failed = async || {
        let object = api.get(SCALED_OBJECT).await?;
        let conditions = object["status"]["conditions"].as_array()?;
        conditions.iter().any(|one| one["type"] == "Ready" && one["status"] == "False").then_some(())
    };
    within(PATIENCE, "KEDA has no number", failed).await;
    assert_eq!(replicas(&api, &pool).await, (5, 5));
    nats.resume();
    says(&api, &pool, "ScalingActive", "True", "ModeKEDA").await;

    queue.empty().await;
    eprintln!("keda: to 0 workers in {:.1?}", took(0).await);
    // A cancel, an answer or a deadline wakes a pool that has nothing in its queue.
    queue.tell("caf.exec.cancel.v1").await;
    eprintln!("keda: to 1 worker for a message in the control stream in {:.1?}", took(1).await);

    // Who leaves the mode finds what it had, and KEDA takes its autoscaler along.
    queue.fill(35).await;
    scaled(&api, &pool, 4).await;
    let lowest = Lowest::watch(&api, &pool);
    pool.change(&api, json!({"scaling": {"mode": "Manual"}})).await;
    for path in [SCALED_OBJECT, AUTOSCALER] {
        within(PATIENCE, path, async || api.get(path).await.is_none().then_some(())).await;
    }
    pool.change(&api, json!({"scaling": {"mode": "KEDA"}})).await;
    within(PATIENCE, "KEDA has made an autoscaler again", async || api.get(AUTOSCALER).await).await;
    within(PATIENCE, "KEDA takes the ScaledObject", ready).await;
    pool.change(&api, json!({"scaling": {"mode": "HPA"}})).await;
    within(PATIENCE, "it is gone", async || api.get(AUTOSCALER).await.is_none().then_some(())).await;
    assert_eq!(lowest.seen(), 4, "a change of modes took workers away");
    api.delete(&pool.path()).await;
    drop(keda);
}

/// As docs/operations.md shows it, but for the address of the broker's monitoring.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "make test-keda: KEDA takes minutes to build"]
async fn the_real_keda_scales_a_pool_by_its_own_trigger_on_the_stream() {
    let plane = ControlPlane::start();
    let api = plane.api().await;
    let monitoring = format!("127.0.0.1:{}", free_port());
    let nats = NatsServer::with(&format!("http: \"{monitoring}\"\n"));
    let release = plane.install("own-trigger", &[]);
    let _operator = Operator::by(&release.kubeconfig).flag("--lease-namespace=own-trigger").start().await;
    let _keda = Keda::start(&plane.kubeconfig(), &api, None).await;
    let pool = Pool::new("own-trigger", "flows", &nats);
    pool.create(&api, json!({"nats": {"subject": "caf.exec.assign.v1"}})).await;
    scaled(&api, &pool, 1).await;
    let page = include_str!("../../../docs/operations.md");
    let (_, example) = page.split_once("**KEDA's own `nats-jetstream` trigger**").expect("the example");
    let manifest = example.split("```").nth(1).and_then(|block| block.strip_prefix("yaml\n")).expect("a manifest");
    let manifest = manifest.replace("nats.nats.svc:8222", &monitoring);
    plane.kubectl(&["create", "--namespace=own-trigger", "-f", "-"], Some(&manifest));

    // Four, since each is to have a hundred at most.
    Queue::on(&nats, "caf.exec.assign.v1").await.fill(350).await;
    scaled(&api, &pool, 4).await;
    assert_eq!(writers(&api, &pool).await, ["beamline-operator"], "one writes the Deployment's replicas");
    let status = api.get(&pool.path()).await.expect("the pool")["status"].clone();
    assert_eq!(
        (&status["scaling"]["mode"], &status["scaling"]["reason"]),
        (&json!("Manual"), &json!("spec.replicas is 4"))
    );
}
