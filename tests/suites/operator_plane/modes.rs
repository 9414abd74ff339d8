//! Who decides how many changes, or may have fewer, while there is work.

use std::path::Path;
use std::time::{Duration, Instant};

use async_nats::jetstream;
use beamline_tests::api::Api;
use beamline_tests::apifault::ApiFault;
use beamline_tests::failpoint::{Points, VARIABLE};
use beamline_tests::nats::NatsServer;
use beamline_tests::operator::{Operator, Setup};
use beamline_tests::plane::Release;
use beamline_tests::pool::Pool;
use beamline_tests::wait::within;
use serde_json::{Value, json};

use super::cast::{Cast, Part};
use super::{PATIENCE, is_campaign, is_write, plane};

/// Work for four workers, as long as nobody knows how fast they are.
const WORK: usize = 40;
/// How long something must stay as it is.
const WATCHED: Duration = Duration::from_secs(6);

#[tokio::test(flavor = "multi_thread")]
async fn g14_a_number_that_flips_every_second_is_followed_and_nothing_else_is_written() {
    let stage = Stage::set("flips", json!({"replicas": 2, "scaling": {"mode": "HPA", "maxReplicas": 9}})).await;
    stage.asks(2).await;
    super::calm(|| stage.writes()).await;
    let (before, generation) = (stage.writes(), stage.generation().await);
    let last = stage.flip(flips(), &[2, 3, 7]).await;
    stage.asks(last).await;
    super::calm(|| stage.writes()).await;
    let (writes, changes) = (stage.writes() - before, stage.generation().await - generation);
    assert!(writes <= flips(), "{writes} writes to the Deployment for {} flips", flips());
    assert!(changes <= flips() as i64, "{changes} changes of the Deployment for {} flips", flips());
    eprintln!("{} flips of /scale in mode HPA: {writes} writes to the Deployment, none without a flip", flips());
}

#[tokio::test(flavor = "multi_thread")]
async fn g14_in_mode_operator_a_number_that_flips_every_second_changes_nothing() {
    let stage = Stage::set("flips-in-vain", json!({"scaling": {"mode": "Operator", "minReplicas": 2}})).await;
    stage.asks(2).await;
    super::calm(|| stage.writes()).await;
    let (before, generation) = (stage.writes(), stage.generation().await);
    stage.flip(flips(), &[2]).await;
    super::calm(|| stage.writes()).await;
    let (writes, changes) = (stage.writes() - before, stage.generation().await - generation);
    assert_eq!((writes, changes), (0, 0), "writes to the Deployment, and changes of it");
    eprintln!("{} flips of /scale in mode Operator: {writes} writes to the Deployment", flips());
}

#[tokio::test(flavor = "multi_thread")]
async fn in_mode_hpa_a_lower_limit_counts_at_once() {
    let stage = Stage::set("hpa-limits", json!({"replicas": 6, "scaling": {"mode": "HPA", "maxReplicas": 9}})).await;
    stage.asks(6).await;
    stage.pool.change(&stage.api, json!({"scaling": {"maxReplicas": 2}})).await;
    stage.asks(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_freezes_the_pods_whoever_decides_on_them() {
    let stage = Stage::set("frozen", json!({"replicas": 4})).await;
    for mode in ["Manual", "HPA", "KEDA"] {
        stage.pool.change(&stage.api, json!({"scaling": {"mode": mode}})).await;
        stage.acts_in(mode).await;
        stage.pool.change(&stage.api, json!({"paused": true})).await;
        stage.says("spec.paused is true: 4 as before").await;
        stage.scale(6).await;
        stage.stays(4).await;
        stage.pool.change(&stage.api, json!({"paused": false})).await;
        stage.asks(6).await;
        stage.scale(4).await;
        stage.asks(4).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn in_mode_operator_a_pause_freezes_the_pods_and_a_lower_limit_waits_for_what_runs() {
    let stage = Stage::set("limits-under-load", operator(9)).await;
    let cast = Cast::play(&stage.api, &stage.pool, &stage.nats).await;
    stage.fill().await;
    stage.asks(4).await;
    cast.say(Part::Busy(1));
    stage.pool.change(&stage.api, json!({"scaling": {"maxReplicas": 2}})).await;
    stage.decides(2).await;
    stage.stays(4).await;
    cast.say(Part::Honest);
    stage.asks(2).await;
    stage.pool.change(&stage.api, json!({"paused": true})).await;
    stage.says("paused").await;
    stage.empty().await;
    stage.stays(2).await;
    stage.pool.change(&stage.api, json!({"paused": false})).await;
    stage.asks(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mode_that_changes_while_workers_are_about_to_go_keeps_all_of_them() {
    let stage = Stage::set("midflight", operator(9)).await;
    let cast = Cast::play(&stage.api, &stage.pool, &stage.nats).await;
    stage.fill().await;
    stage.asks(4).await;
    cast.say(Part::Busy(1));
    stage.empty().await;
    stage.decides(0).await;
    for mode in ["Manual", "HPA"] {
        stage.pool.change(&stage.api, json!({"scaling": {"mode": mode}})).await;
        stage.says("spec.replicas is 4").await;
        stage.stays(4).await;
    }
    stage.pool.change(&stage.api, json!({"scaling": {"mode": "Operator"}})).await;
    stage.decides(0).await;
    stage.stays(4).await;
    cast.say(Part::Honest);
    stage.asks(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_with_gpus_stay_as_many_as_they_are_when_a_person_decides_on_them() {
    for mode in ["Operator", "HPA"] {
        let name = format!("gpu-handover-{}", mode.to_lowercase());
        let stage = Stage::set(&name, json!({"scaling": {"mode": mode}, "gpu": {"minReplicas": 3}})).await;
        let gpus = async || stage.deployment("orders-gpu").await["spec"]["replicas"].as_i64().expect("a number");
        within(PATIENCE, "three are asked for", async || (gpus().await == 3).then_some(())).await;
        stage.pool.change(&stage.api, json!({"scaling": {"mode": "Manual"}})).await;
        within(PATIENCE, "what runs is written", async || {
            assert_eq!(gpus().await, 3, "before it is written");
            let pool = stage.api.get(&stage.pool.path()).await.expect("the pool");
            (pool["spec"]["gpu"]["replicas"] == 3 && pool["status"]["scaling"]["mode"] == "Manual").then_some(())
        })
        .await;
        super::calm(|| stage.writes()).await;
        assert_eq!(gpus().await, 3, "when it is written");
        // Where both change, the number counts.
        stage.pool.change(&stage.api, json!({"scaling": {"mode": mode}})).await;
        stage.acts_in(mode).await;
        stage.pool.change(&stage.api, json!({"scaling": {"mode": "Manual"}, "gpu": {"replicas": 1}})).await;
        within(PATIENCE, "one is asked for", async || (gpus().await == 1).then_some(())).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_number_that_comes_while_what_runs_is_written_is_what_counts() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut points = Points::listen(directory.path());
    let release = plane().install("overtaken", &["watchNamespace=overtaken"]);
    let operator = Stage::operator(&release.kubeconfig, "overtaken").env(VARIABLE, &points.socket());
    let stage = Stage::by(operator, release, json!({"scaling": {"mode": "Operator", "minReplicas": 4}})).await;
    stage.asks(4).await;
    points.arm(Some("before scale WorkerPool orders"));
    stage.pool.change(&stage.api, json!({"scaling": {"mode": "Manual"}})).await;
    let held = points.caught().await;
    stage.scale(2).await;
    drop(held);
    stage.acts_in("Manual").await;
    let pool = stage.api.get(&stage.pool.path()).await.expect("the pool");
    assert_eq!(pool["spec"]["replicas"], 2, "it was written over");
    stage.asks(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_that_the_watch_has_not_told_of_are_there_all_the_same() {
    let release = plane().install("untold", &["watchNamespace=untold"]);
    let proxy = ApiFault::before(&release.kubeconfig).await;
    let operated = Stage::operator(proxy.kubeconfig(), "untold");
    let stage = Stage::by(operated, release, operator(9)).await;
    let cast = Cast::play(&stage.api, &stage.pool, &stage.nats).await;
    proxy.mute("/deployments");
    stage.fill().await;
    stage.asks(4).await;
    cast.say(Part::Busy(1));
    stage.empty().await;
    stage.decides(0).await;
    stage.stays(4).await;
    stage.pool.change(&stage.api, json!({"paused": true})).await;
    stage.says("spec.paused is true").await;
    stage.stays(4).await;
    stage.pool.change(&stage.api, json!({"paused": false})).await;
    cast.say(Part::Honest);
    stage.asks(0).await;
}

/// One a second; `make campaign-flips` takes more.
#[expect(clippy::disallowed_methods, reason = "what a test may take is no flag of a program")]
fn flips() -> usize {
    let asked = std::env::var("FLIPS").ok().and_then(|flips| flips.parse().ok());
    asked.unwrap_or(if is_campaign() { 300 } else { 30 })
}

/// Decided by the operator, without waiting before fewer are wanted.
pub(super) fn operator(most: i32) -> Value {
    json!({"scaling": {"mode": "Operator", "maxReplicas": most, "target": {"queueDepthPerReplica": WORK / 4},
        "scaleDown": {"stabilizationSeconds": 0, "idleSecondsToZero": 0}}})
}

/// A pool with an operator and a broker of its own.
pub(super) struct Stage {
    pub(super) api: Api,
    pub(super) release: Release,
    pub(super) pool: Pool,
    pub(super) operator: Operator,
    pub(super) nats: NatsServer,
}

impl Stage {
    pub(super) async fn set(name: &str, spec: Value) -> Self {
        let release = plane().install(name, &[&format!("watchNamespace={name}")]);
        Self::by(Self::operator(&release.kubeconfig, name), release, spec).await
    }

    /// The same with this operator.
    pub(super) async fn by(operator: Setup, release: Release, spec: Value) -> Self {
        let (api, nats) = (plane().api().await, NatsServer::start());
        let operator = operator.start().await;
        let pool = Pool::new(&release.namespace, "orders", &nats);
        pool.create(&api, spec).await;
        pool.converged(&api, PATIENCE).await;
        Self { api, release, pool, operator, nats }
    }

    /// Another operator takes its place.
    pub(super) async fn restart(&mut self) {
        self.operator = Self::operator(&self.release.kubeconfig, &self.release.namespace).start().await;
    }

    fn operator(kubeconfig: &Path, namespace: &str) -> Setup {
        Operator::of(kubeconfig, namespace).flag("--leader-election=false")
    }

    async fn jetstream(&self) -> jetstream::Context {
        jetstream::new(async_nats::connect(self.nats.url()).await.expect("a connection"))
    }

    /// Work for four.
    pub(super) async fn fill(&self) {
        self.fill_with(WORK).await;
    }

    pub(super) async fn fill_with(&self, work: usize) {
        let jetstream = self.jetstream().await;
        for _ in 0..work {
            let sent = jetstream.publish("work.orders", "{}".into()).await.expect("it is sent");
            sent.await.expect("it is kept");
        }
    }

    pub(super) async fn empty(&self) {
        let name = beamline_operator::streams::intake_stream("work.orders");
        let stream = self.jetstream().await.get_stream(name).await.expect("a stream");
        stream.purge().await.expect("it is emptied");
    }

    async fn deployment(&self, name: &str) -> Value {
        let path = format!("/apis/apps/v1/namespaces/{}/deployments/{name}", self.pool.namespace);
        self.api.get(&path).await.expect("a Deployment")
    }

    pub(super) async fn workers(&self) -> i64 {
        self.deployment("orders").await["spec"]["replicas"].as_i64().expect("a number")
    }

    async fn generation(&self) -> i64 {
        self.deployment("orders").await["metadata"]["generation"].as_i64().expect("a number")
    }

    /// The operator's writes to Deployments so far.
    pub(super) fn writes(&self) -> usize {
        self.written().iter().filter(|(resource, _)| resource == "deployments").count()
    }

    /// The pods and Deployments that the operator has written to so far, in order.
    pub(super) fn written(&self) -> Vec<(String, String)> {
        let asked = plane().asked_by(&self.release.user).into_iter().filter(is_write);
        let text = |event: &Value, key: &str| event["objectRef"][key].as_str().unwrap_or_default().to_owned();
        let all = asked.map(|event| (text(&event, "resource"), text(&event, "name")));
        all.filter(|(resource, _)| matches!(resource.as_str(), "pods" | "deployments")).collect()
    }

    /// As `kubectl scale` does.
    async fn scale(&self, replicas: i64) {
        let scale = format!("{}/scale", self.pool.path());
        self.api.merge(&scale, &json!({"spec": {"replicas": replicas}})).await;
    }

    /// Writes one of two numbers each second, and the Deployment asks for one of these all the time; the last one written.
    async fn flip(&self, flips: usize, allowed: &[i64]) -> i64 {
        let numbers = [7, 3];
        for replicas in numbers.into_iter().cycle().take(flips) {
            let next = Instant::now() + Duration::from_secs(1);
            self.scale(replicas).await;
            while Instant::now() < next {
                let asked = self.workers().await;
                assert!(allowed.contains(&asked), "{asked} workers were asked for by nobody");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        numbers[(flips - 1) % 2]
    }

    /// Waits until the Deployment asks for as many.
    pub(super) async fn asks(&self, workers: i64) {
        let what = format!("{workers} workers are asked for");
        within(PATIENCE, &what, async || (self.workers().await == workers).then_some(())).await;
    }

    /// The Deployment goes on to ask for as many.
    pub(super) async fn stays(&self, workers: i64) {
        let began = Instant::now();
        while began.elapsed() < WATCHED {
            assert_eq!(self.workers().await, workers, "{:#}", self.status().await);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Waits until the operator wants as many, whatever becomes of it.
    pub(super) async fn decides(&self, desired: i64) {
        let what = format!("{desired} are wanted");
        within(PATIENCE, &what, async || (self.status().await["desiredReplicas"] == desired).then_some(())).await;
    }

    /// Waits until the operator has acted in this mode.
    async fn acts_in(&self, mode: &str) {
        within(PATIENCE, mode, async || (self.status().await["scaling"]["mode"] == mode).then_some(())).await;
    }

    /// Waits until the reason for the number contains this.
    pub(super) async fn says(&self, words: &str) {
        within(PATIENCE, words, async || {
            self.status().await["scaling"]["reason"].as_str()?.contains(words).then_some(())
        })
        .await;
    }

    pub(super) async fn status(&self) -> Value {
        self.api.get(&self.pool.path()).await.expect("the pool")["status"].take()
    }
}
