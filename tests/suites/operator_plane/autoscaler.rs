//! Mode HPA end to end: Kubernetes' own HorizontalPodAutoscaler controller asks the API server, which asks the operator.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use async_nats::jetstream;
use beamline_operator::streams::intake_stream;
use beamline_tests::api::Api;
use beamline_tests::nats::NatsServer;
use beamline_tests::operator::{Operator, Setup};
use beamline_tests::plane::{ControlPlane, Release};
use beamline_tests::pool::Pool;
use beamline_tests::process::free_port;
use beamline_tests::wait::within;
use futures::StreamExt;
use serde_json::{Value, json};

use super::{PATIENCE, start_plane};

pub(super) const API_SERVICE: &str = "/apis/apiregistration.k8s.io/v1/apiservices/v1beta1.external.metrics.k8s.io";
const SERVICE: &str = "beamline-external-metrics";

/// An operator that serves external metrics to this API server.
pub(super) async fn serving(api: &Api, release: &Release) -> Setup {
    let (namespace, port) = (&release.namespace, free_port());
    // There is no network of services: the API server finds the operator by name.
    let service = format!("/api/v1/namespaces/{namespace}/services/{namespace}-{SERVICE}");
    api.delete(&service).await;
    within(PATIENCE, "the Service is gone", async || api.get(&service).await.is_none().then_some(())).await;
    let by_name = json!({"apiVersion": "v1", "kind": "Service",
        "metadata": {"name": format!("{namespace}-{SERVICE}")},
        "spec": {"type": "ExternalName", "externalName": "localhost"}});
    api.apply(&service, &by_name).await;
    api.merge(API_SERVICE, &json!({"spec": {"service": {"port": port}}})).await;
    Operator::by(&release.kubeconfig)
        .flag(format!("--lease-namespace={namespace}"))
        .flag(format!("--external-metrics-endpoint={}", SocketAddr::from((Ipv4Addr::LOCALHOST, port))))
        .flag(format!("--external-metrics-service={namespace}-{SERVICE}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_autoscaler_takes_a_pool_from_one_to_many_and_back_and_the_operator_from_zero_and_to_it() {
    let plane = start_plane();
    let api = plane.api().await;
    let nats = NatsServer::start();
    let release = plane.install("metrics", &["externalMetrics.enabled=true"]);
    let operator = serving(&api, &release).await.start().await;
    let pool = Pool::new("metrics", "orders", &nats);
    let scaling = json!({"mode": "HPA", "maxReplicas": 5, "target": {"queueDepthPerReplica": 10},
        "scaleDown": {"stabilizationSeconds": 1, "idleSecondsToZero": 3}});
    pool.create(&api, json!({"replicas": 0, "scaling": scaling})).await;
    let depth = async || number(&plane, "beamline_queue_depth").ok();
    within(PATIENCE, "an empty queue has a number", async || depth().await.filter(|depth| depth == "0")).await;
    assert_eq!(replicas(&api, &pool).await, (0, 0), "nothing has asked for a worker");

    // One worker by the operator, four by the autoscaler: the depth over what one may have, rounded up.
    let queue = Queue::of(&nats, &pool).await;
    queue.fill(35).await;
    scaled(&api, &pool, 4).await;
    assert_eq!(number(&plane, "beamline_queue_pending"), Ok("35".to_owned()));
    assert_eq!(number(&plane, "beamline_queue_in_flight"), Ok("0".to_owned()));
    assert_eq!(writers(&api, &pool).await, ["beamline-operator"], "one writes the Deployment's replicas");
    let status = api.get(&pool.path()).await.expect("the pool")["status"].clone();
    assert_eq!(status["scaling"]["mode"], "HPA");
    assert_eq!(status["scaling"]["reason"], "spec.replicas is 4, as the autoscaler has it");
    assert_eq!(condition(&status, "ScalingActive"), ("True".to_owned(), "ModeHPA".to_owned()));

    // Who leaves mode HPA finds what it had; who enters it from mode Operator finds what runs.
    let lowest = Lowest::watch(&api, &pool);
    pool.change(&api, json!({"scaling": {"mode": "Operator"}})).await;
    let autoscaler = "/apis/autoscaling/v2/namespaces/metrics/horizontalpodautoscalers/orders";
    within(PATIENCE, "there is no autoscaler", async || api.get(autoscaler).await.is_none().then_some(())).await;
    pool.change(&api, json!({"scaling": {"mode": "HPA"}})).await;
    within(PATIENCE, "there is an autoscaler", async || api.get(autoscaler).await).await;
    scaled(&api, &pool, 4).await;
    assert_eq!(lowest.seen(), 4, "a change of modes took workers away");

    // An autoscaler that somebody changes or removes comes back.
    api.merge(autoscaler, &json!({"spec": {"maxReplicas": 3}})).await;
    let repaired = async || (api.get(autoscaler).await?["spec"]["maxReplicas"] == 5).then_some(());
    within(PATIENCE, "the autoscaler is repaired", repaired).await;

    // What cannot be read has no number, and takes nobody away.
    nats.pause();
    within(PATIENCE, "there is no number", async || number(&plane, "beamline_queue_depth").err()).await;
    let inactive = async || {
        let status = api.get(&pool.path()).await?["status"].take();
        (condition(&status, "ScalingActive").1 == "AutoscalerInactive").then_some(())
    };
    within(PATIENCE, "the pool says that nothing is decided", inactive).await;
    assert_eq!(replicas(&api, &pool).await, (4, 4));
    nats.resume();

    queue.empty().await;
    scaled(&api, &pool, 0).await;
    assert_eq!(depth().await.as_deref(), Some("0"));
    queue.fill(1).await;
    scaled(&api, &pool, 1).await;

    // One can serve this API: another release says who does.
    let refused = plane.refusal("second", &["externalMetrics.enabled=true"]);
    assert!(refused.contains("belongs to Service metrics/metrics-beamline-external-metrics already"), "{refused}");
    drop(operator);
    within(PATIENCE, "nobody answers any more", async || number(&plane, "beamline_queue_depth").err()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_anybody_who_serves_metrics_the_pool_says_what_to_set() {
    let plane = super::plane();
    let api = plane.api().await;
    let nats = NatsServer::start();
    let release = plane.install("blind", &["watchNamespace=blind"]);
    let _operator = Operator::of(&release.kubeconfig, "blind").start().await;
    let pool = Pool::new("blind", "orders", &nats);
    pool.create(&api, json!({"replicas": 2, "scaling": {"mode": "HPA"}})).await;
    for (kind, status) in [("ScalingActive", "False"), ("Degraded", "True")] {
        let missing = (status.to_owned(), "ExternalMetricsMissing".to_owned());
        let says = async || {
            let status = api.get(&pool.path()).await?["status"].take();
            (condition(&status, kind) == missing).then_some(())
        };
        within(PATIENCE, kind, says).await;
    }
    assert_eq!(replicas(&api, &pool).await, (2, 2), "what /scale says counts all the same");
}

/// One number, as an autoscaler asks for it; or what the API server says instead.
fn number(plane: &ControlPlane, metric: &str) -> Result<String, String> {
    let path = format!("/apis/external.metrics.k8s.io/v1beta1/namespaces/metrics/{metric}");
    let answer = plane.try_kubectl(&["get", "--raw", &format!("{path}?labelSelector=workerpool%3Dorders")], None)?;
    let answer: Value = serde_json::from_str(&answer).expect("JSON");
    Ok(answer["items"][0]["value"].as_str().expect("a number").to_owned())
}

/// What `/scale` says, and the Deployment.
pub(super) async fn replicas(api: &Api, pool: &Pool) -> (i64, i64) {
    let of =
        async |path: &str| api.get(path).await.and_then(|object| object["spec"]["replicas"].as_i64()).unwrap_or(-1);
    (of(&pool.path()).await, of(&deployment(pool)).await)
}

pub(super) async fn scaled(api: &Api, pool: &Pool, to: i64) {
    let what = format!("{to} workers are asked for");
    within(PATIENCE, &what, async || (replicas(api, pool).await == (to, to)).then_some(())).await;
}

/// Who has written how many there are.
pub(super) async fn writers(api: &Api, pool: &Pool) -> Vec<String> {
    let deployment = api.get(&deployment(pool)).await.expect("a Deployment");
    let entries = deployment["metadata"]["managedFields"].as_array().cloned().unwrap_or_default();
    let wrote = |entry: &&Value| entry["fieldsV1"]["f:spec"]["f:replicas"].is_object();
    entries.iter().filter(wrote).filter_map(|entry| Some(entry["manager"].as_str()?.to_owned())).collect()
}

fn deployment(pool: &Pool) -> String {
    format!("/apis/apps/v1/namespaces/{}/deployments/{}", pool.namespace, pool.name)
}

fn condition(status: &Value, kind: &str) -> (String, String) {
    let all = status["conditions"].as_array().into_iter().flatten();
    let found = all.into_iter().find(|one| one["type"] == kind);
    let text = |key: &str| found.and_then(|one| one[key].as_str()).unwrap_or_default().to_owned();
    (text("status"), text("reason"))
}

/// A queue whose assignments nobody takes: pods are fake.
pub(super) struct Queue {
    jetstream: jetstream::Context,
    subject: String,
}

impl Queue {
    pub(super) async fn of(nats: &NatsServer, pool: &Pool) -> Self {
        Self::on(nats, &format!("work.{}", pool.name)).await
    }

    pub(super) async fn on(nats: &NatsServer, subject: &str) -> Self {
        let client = async_nats::connect(nats.url()).await.expect("a connection");
        Self { jetstream: jetstream::new(client), subject: subject.to_owned() }
    }

    pub(super) async fn fill(&self, count: usize) {
        for _ in 0..count {
            let publish = self.jetstream.publish(self.subject.clone(), "{}".into()).await.expect("it is sent");
            publish.await.expect("it is kept");
        }
    }

    /// Says something to which the broker gives no answer.
    pub(super) async fn tell(&self, subject: &'static str) {
        let _ = self.jetstream.publish(subject, "{}".into()).await.expect("it is sent");
    }

    pub(super) async fn empty(&self) {
        let stream = self.jetstream.get_stream(intake_stream(&self.subject)).await.expect("a stream");
        stream.purge().await.expect("it is emptied");
    }
}

/// The fewest workers that were ever asked for while it looked.
pub(super) struct Lowest {
    looking: tokio::task::JoinHandle<()>,
    lowest: Arc<AtomicI64>,
}

impl Lowest {
    pub(super) fn watch(api: &Api, pool: &Pool) -> Self {
        let (api, pool) = (api.clone(), pool.clone());
        let lowest = Arc::new(AtomicI64::new(i64::MAX));
        let seen = Arc::clone(&lowest);
        let looking = tokio::spawn(async move {
            let path = format!("/apis/apps/v1/namespaces/{}/deployments", pool.namespace);
            let mut states = api.watch(&path, &pool.name).await;
            while let Some(deployment) = states.next().await {
                seen.fetch_min(deployment["spec"]["replicas"].as_i64().unwrap_or(-1), Ordering::Relaxed);
            }
        });
        Self { looking, lowest }
    }

    pub(super) fn seen(self) -> i64 {
        self.looking.abort();
        self.lowest.load(Ordering::Relaxed)
    }
}
