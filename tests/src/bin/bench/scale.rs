//! From work that comes to workers that do it, on a real Kubernetes: how long until the Deployment asks for more of them,
//! and until there is a first result where nobody worked. Beside it the same by a HorizontalPodAutoscaler and by KEDA.
#![expect(clippy::indexing_slicing, reason = "a missing field of a JSON value is null")]

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use async_nats::jetstream;
use beamline_tests::api::Api;
use beamline_tests::cluster::{Forward, Namespace, chart, kubectl, program};
use beamline_tests::keda::Keda;
use beamline_tests::router::{RESULT, assignment};
use futures::StreamExt;
use futures::future::{join_all, try_join4};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::figures::{median, percentile};
use crate::table::{Row, Table, at_most};

/// From the first publication until the Deployment asks for more, at the 99th percentile.
const PATCHED_SECONDS: f64 = 1.0;
/// Assignments that come at once: more than one worker is needed for.
const SPIKE: usize = 400;
/// What each of them takes. An autoscaler looks so rarely that one worker would have done it all meanwhile.
const BLOCK: Duration = Duration::from_millis(100);
const LONG_BLOCK: Duration = Duration::from_secs(1);
/// Workers at most.
const MOST: i64 = 4;
/// How often a queue is looked at: a spike comes at any moment in between. By the autoscaler, as in an untouched Kubernetes.
const SIGNALS: Duration = Duration::from_millis(500);
const AUTOSCALER_SYNC: Duration = Duration::from_secs(15);
const KEDA_POLL: Duration = Duration::from_secs(5);
/// The node's address in the tests' cluster.
const NODE: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 1);
/// How closely the Deployment is looked at.
const LOOK: Duration = Duration::from_millis(20);
const PATIENCE: Duration = Duration::from_secs(180);
const NAMESPACE: &str = "beamline-bench";

/// What came of a spike.
struct Answer {
    /// From the first publication until the Deployment asks for more workers.
    patched: Duration,
    /// From the first publication until the first result.
    first: Duration,
}

/// A pool, and who gives it work.
struct Bench {
    api: Api,
    pool: &'static str,
    mode: &'static str,
    /// Workers that stay when there is nothing to do.
    rest: i64,
    block: Duration,
    broker: async_nats::Client,
    /// Ids of one run must not meet the records of an earlier one.
    run: i64,
}

/// Everything, and its table.
pub(crate) async fn run(kubeconfig: &Path, spikes: usize, autoscaled: usize, driven: usize) -> anyhow::Result<()> {
    install(&["--set=externalMetrics.enabled=true"]);
    let namespace = Namespace::create(NAMESPACE);
    namespace.start_nats();
    namespace.start_peer();
    let forward = namespace.forward("nats", 4222).await;
    let by = async |pool, mode, rest, block| Bench::new(kubeconfig, &forward, pool, mode, rest, block).await;
    // Two, since it takes half a minute until it is sure that nothing more comes and the last worker goes.
    let none = by("from-none", "Operator", 0, BLOCK).await?;
    let also_none = by("also-from-none", "Operator", 0, BLOCK).await?;
    let one = by("from-one", "Operator", 1, BLOCK).await?;
    let theirs = by("autoscaled", "HPA", 1, LONG_BLOCK).await?;
    for bench in [&none, &also_none, &one, &theirs] {
        namespace.apply(&bench.manifest().to_string());
    }
    let (half, quarter) = (spikes.div_ceil(2), spikes.div_ceil(4));
    let (mut from_none, more, from_one, by_autoscaler) = Box::pin(try_join4(
        none.measure(quarter, SIGNALS),
        also_none.measure(half - quarter, SIGNALS),
        one.measure(spikes - half, SIGNALS),
        theirs.measure(autoscaled, AUTOSCALER_SYNC),
    ))
    .await?;
    from_none.extend(more);
    let by_keda = match driven {
        0 => Vec::new(),
        driven => {
            namespace.kubectl(&["delete", "workerpools", "--all", "--wait"]);
            let _keda = keda(kubeconfig).await?;
            let theirs = by("driven", "KEDA", 0, LONG_BLOCK).await?;
            namespace.apply(&theirs.manifest().to_string());
            theirs.measure(driven, KEDA_POLL).await?
        }
    };
    let mut table = Table::default();
    patched(&mut table, "mode Operator, all", from_none.iter().chain(&from_one));
    patched(&mut table, "mode Operator, from none", &from_none);
    patched(&mut table, "mode Operator, from one", &from_one);
    patched(&mut table, "mode HPA, from one", &by_autoscaler);
    patched(&mut table, "mode KEDA, from none", &by_keda);
    first_result(&mut table, "mode Operator", BLOCK, &from_none);
    first_result(&mut table, "mode KEDA", LONG_BLOCK, &by_keda);
    table.print();
    Ok(())
}

fn install(values: &[&str]) {
    let release = ["upgrade", "--install", "beamline", &chart(), "--namespace=beamline-system", "--create-namespace"];
    program("helm", &[&release, values, &["--wait", "--timeout=2m"]].concat());
}

/// KEDA beside the cluster, on its node, where Services have addresses and no names.
async fn keda(kubeconfig: &Path) -> anyhow::Result<Keda> {
    install(&["--set=externalMetrics.enabled=false", "--set=keda.enabled=true"]);
    let beamline = |arguments: &[&str]| kubectl(&[&["--namespace=beamline-system"], arguments].concat());
    let address = beamline(&["get", "service/beamline-queues", "--output=jsonpath={.spec.clusterIP}"]);
    let deployment: Value = serde_json::from_str(&beamline(&["get", "deployment/beamline", "--output=json"]))?;
    let arguments = deployment["spec"]["template"]["spec"]["containers"][0]["args"].as_array().context("no flags")?;
    let is_url = |argument: &Value| argument.as_str().is_some_and(|flag| flag.starts_with("--keda-url="));
    let at = arguments.iter().position(is_url).context("no --keda-url")?;
    let path = format!("/spec/template/spec/containers/0/args/{at}");
    let patch = json!([{"op": "replace", "path": path, "value": format!("--keda-url=http://{address}:8080")}]);
    beamline(&["patch", "deployment/beamline", "--type=json", "--patch", &patch.to_string()]);
    beamline(&["rollout", "status", "deployment/beamline", "--timeout=90s"]);
    Ok(Keda::start(kubeconfig, &Api::by(kubeconfig).await, Some(NODE)).await)
}

impl Bench {
    async fn new(
        kubeconfig: &Path,
        forward: &Forward,
        pool: &'static str,
        mode: &'static str,
        rest: i64,
        block: Duration,
    ) -> anyhow::Result<Self> {
        let options = async_nats::ConnectOptions::new().subscription_capacity(1 << 16);
        let broker = options.connect(forward.nats_url()).await.context("no way to the broker")?;
        let run = jiff::Timestamp::now().as_millisecond();
        Ok(Self { api: Api::by(kubeconfig).await, pool, mode, rest, block, broker, run })
    }

    /// As it is by default, but for time: nobody waits for minutes until there is nothing to do.
    fn manifest(&self) -> Value {
        let scaling = json!({"mode": self.mode, "minReplicas": self.rest, "maxReplicas": MOST,
            "target": {"backlogSeconds": 4, "queueDepthPerReplica": 10},
            "scaleDown": {"stabilizationSeconds": 0, "idleSecondsToZero": 1}});
        let worker = json!({"pools": {"cpu": 1, "io": 8}, "drainSeconds": 1,
            "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "256Mi"}}});
        json!({"apiVersion": "beamline.dev/v1alpha1", "kind": "WorkerPool", "metadata": {"name": self.pool},
            "spec": {"replicas": 1, "scaling": scaling, "worker": worker,
                "nats": {"url": "nats://nats:4222", "subject": self.subject()}}})
    }

    fn subject(&self) -> String {
        format!("bench.{}", self.pool)
    }

    fn path(&self) -> String {
        format!("/apis/beamline.dev/v1alpha1/namespaces/{NAMESPACE}/workerpools/{}", self.pool)
    }

    /// So many spikes, each at any moment of the period in which the queue is looked at, and on a pool at rest.
    async fn measure(&self, count: usize, period: Duration) -> anyhow::Result<Vec<Answer>> {
        let mut answers = Vec::with_capacity(count);
        for number in 1..=count {
            self.at_rest().await?;
            sleep(period.mul_f64(fastrand::f64())).await;
            let answer = self.spike(number).await?;
            let (patched, first) = (answer.patched.as_secs_f64(), answer.first.as_secs_f64());
            eprintln!(
                "{}, {number} of {count}: patched after {patched:.2} s, first result after {first:.2} s",
                self.pool
            );
            answers.push(answer);
        }
        Ok(answers)
    }

    /// Waits until nothing waits or runs, and as many workers as then stay are all that there are.
    async fn at_rest(&self) -> anyhow::Result<()> {
        let since = Instant::now();
        loop {
            let status = self.api.get(&self.path()).await.unwrap_or_default()["status"].take();
            let has = |field: &str| status[field] == self.rest;
            let rests =
                has("replicas") && has("readyReplicas") && has("desiredReplicas") && status["queue"]["depth"] == 0;
            if rests && self.replicas().await == Some(self.rest) {
                return Ok(());
            }
            ensure!(since.elapsed() < PATIENCE, "{} does not come to rest: {status}", self.pool);
            sleep(LOOK * 10).await;
        }
    }

    async fn spike(&self, number: usize) -> anyhow::Result<Answer> {
        let prefix = format!("{}-{}-{number}-", self.pool, self.run);
        let mut results = self.broker.subscribe(RESULT).await?;
        self.broker.flush().await?;
        let began = Instant::now();
        let patched = async {
            while self.replicas().await.is_none_or(|asked| asked <= self.rest) {
                sleep(LOOK).await;
            }
            began.elapsed()
        };
        let first = async {
            while let Some(result) = results.next().await {
                let result: Value = serde_json::from_slice(&result.payload).unwrap_or_default();
                if result["assignment_id"].as_str().is_some_and(|id| id.starts_with(&prefix)) {
                    break;
                }
            }
            began.elapsed()
        };
        let all = async { tokio::join!(self.publish(&prefix), patched, first) };
        let (published, patched, first) = tokio::time::timeout(PATIENCE, all).await.context("nothing comes of it")?;
        published?;
        Ok(Answer { patched, first })
    }

    async fn publish(&self, prefix: &str) -> anyhow::Result<()> {
        let jetstream = jetstream::new(self.broker.clone());
        let url = format!("http://peer.{NAMESPACE}.svc/slow/{}", self.block.as_millis());
        let mut kept = Vec::with_capacity(SPIKE);
        for number in 0..SPIKE {
            let job = json!({"type": "http.request", "url": url});
            let payload = assignment("acme", &format!("{prefix}{number}"), job).to_string();
            kept.push(jetstream.publish(self.subject(), payload.into()).await?.into_future());
        }
        for kept in join_all(kept).await {
            kept?;
        }
        Ok(())
    }

    /// As many as the Deployment asks for.
    async fn replicas(&self) -> Option<i64> {
        let path = format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments/{}", self.pool);
        self.api.get(&path).await?["spec"]["replicas"].as_i64()
    }
}

fn patched<'a>(table: &mut Table, what: &str, answers: impl IntoIterator<Item = &'a Answer>) {
    let seconds: Vec<_> = answers.into_iter().map(|answer| answer.patched.as_secs_f64()).collect();
    if seconds.is_empty() {
        return;
    }
    let (middle, late) = (median(seconds.iter().copied()), percentile(seconds.iter().copied(), 99));
    let target = what.starts_with("mode Operator").then(|| at_most(PATCHED_SECONDS, "s", late));
    let what = format!("{what}: spike until the Deployment is patched ({})", seconds.len());
    table.push(Row { what, figure: format!("median {middle:.2} s, p99 {late:.2} s"), target });
}

/// What lies between the patch and the first result is the block, and else a pod's start.
fn first_result(table: &mut Table, mode: &str, block: Duration, answers: &[Answer]) {
    if answers.is_empty() {
        return;
    }
    let first = || answers.iter().map(|answer| answer.first.as_secs_f64());
    let starts = answers.iter().map(|answer| answer.first.saturating_sub(answer.patched + block).as_secs_f64());
    let (middle, late) = (median(first()), percentile(first(), 99));
    let what = format!("{mode}, from none: spike until the first result ({})", answers.len());
    table.push(Row { what, figure: format!("median {middle:.2} s, p99 {late:.2} s"), target: None });
    let start = median(starts);
    let figure = format!("median {start:.2} s, {:.0} %", start / middle * 100.0);
    table.push(Row { what: "of this, a pod's start".to_owned(), figure, target: None });
}
