//! Signals that are missing, old or wrong: in mode Operator none of them takes a worker away. Each row ends with the
//! truth, upon which all workers go: they could have gone before.

use std::time::Duration;

use async_nats::jetstream::consumer::{Consumer, pull};
use async_nats::jetstream::{self, AckKind, Context};
use beamline_operator::streams::intake_stream;
use beamline_tests::api::Api;
use beamline_tests::clock::Clock;
use beamline_tests::nats::NatsServer;
use beamline_tests::operator::Operator;
use beamline_tests::pool::Pool;
use beamline_tests::wait::within;
use futures::StreamExt;
use serde_json::{Value, json};

use super::cast::{Cast, Part};
use super::{PATIENCE, is_campaign, plane};

/// As many as the work needs.
const WORKERS: i64 = 4;
/// Work for each of them.
const EACH: usize = 10;
/// How long a report is believed, and a second.
const STALE: Duration = Duration::from_secs(5);
/// How long what came seconds ago is taken to be on its way.
const RECENT: Duration = Duration::from_secs(6);

/// Hours ahead of the right time. Back, certificates are not valid yet.
const JUMPS: [i64; 3] = [25, -1, 0];

/// Which workers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    General,
    Gpu,
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_is_away() {
    let mut row = Row::set("away", Class::General).await;
    row.nats.kill();
    row.is_unreadable().await;
    row.nobody_goes("the server is away").await;
    row.nats.restart();
    row.is_readable().await;
    row.nobody_goes("the server is back").await;
    row.all_would_go().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_does_not_answer() {
    let row = Row::set("mute", Class::General).await;
    row.nats.pause();
    row.is_unreadable().await;
    row.nobody_goes("the server does not answer").await;
    row.nats.resume();
    row.is_readable().await;
    row.all_would_go().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_consumer_is_missing() {
    let row = Row::set("missing", Class::General).await;
    let manage = |manage: bool| json!({"nats": {"streams": {"manage": manage}}});
    row.pool.change(&row.api, manage(false)).await;
    let stream = row.stream().await;
    // Until the operator has heard that it is not to manage it, it makes it again.
    within(PATIENCE, "the queue is unreadable", async || {
        let _ = stream.delete_consumer("caf-workers").await;
        row.queue().await.filter(|readable| readable == "False")
    })
    .await;
    row.nobody_goes("the consumer is missing").await;
    row.pool.change(&row.api, manage(true)).await;
    row.is_readable().await;
    row.all_would_go().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clock_jumps() {
    let clock = Clock::new();
    let row = Row::set_by("jumps", Class::General, Some(&clock)).await;
    for hours in JUMPS {
        clock.jump(hours);
        row.nobody_goes("the clock jumps while there is work").await;
    }
    row.cast.say(Part::Busy(1));
    row.empty().await;
    row.decides(0).await;
    for hours in JUMPS {
        clock.jump(hours);
        row.nobody_goes("the clock jumps while workers that are to go are busy").await;
    }
    clock.jump(0);
    row.cast.say(Part::Honest);
    row.all_go().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reports_are_stale() {
    for class in [Class::General, Class::Gpu] {
        let row = Row::set("stale", class).await;
        row.cast.say(Part::Silent);
        tokio::time::sleep(STALE).await;
        row.empty().await;
        row.decides(0).await;
        row.nobody_goes("nobody is heard").await;
        row.cast.say(Part::Honest);
        row.all_go().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_claims_to_run_a_billion_blocks() {
    lies("running", Part::RunsBillion).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_claims_less_than_nothing() {
    lies("negative", Part::Negative).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_claims_to_have_ended_a_billion_blocks() {
    lies("ended", Part::EndedBillion).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_says_that_it_is_idle_while_its_pod_is_busy() {
    for class in [Class::General, Class::Gpu] {
        let row = Row::set("idle", class).await;
        tokio::time::sleep(RECENT).await;
        let group = if class == Class::Gpu { "caf-workers-gpu" } else { "caf-workers" };
        let consumer: Consumer<pull::Config> = row.stream().await.get_consumer(group).await.expect("a consumer");
        let all = consumer.fetch().max_messages(EACH * 4).messages().await.expect("messages");
        let mut all: Vec<_> = all.map(|message| message.expect("a message")).collect().await;
        let held = all.pop().expect("one");
        for message in all {
            message.double_ack().await.expect("settled");
        }
        let works = async {
            loop {
                held.ack_with(AckKind::Progress).await.expect("sent");
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
        };
        let holds = async {
            row.decides(1).await;
            row.nobody_goes("one of them must have it").await;
        };
        tokio::select! {
            () = holds => {}
            () = works => {}
        }
        held.double_ack().await.expect("settled");
        row.all_go().await;
    }
}

/// One worker of each class says so, all the time.
async fn lies(name: &'static str, part: Part) {
    for class in [Class::General, Class::Gpu] {
        let row = Row::set(name, class).await;
        row.cast.say(part);
        row.nobody_goes(name).await;
        row.cast.say(Part::Honest);
        row.all_would_go().await;
    }
}

/// A pool whose workers are needed, and are played.
struct Row {
    class: Class,
    api: Api,
    jetstream: Context,
    pool: Pool,
    cast: Cast,
    _operator: Operator,
    nats: NatsServer,
}

impl Row {
    async fn set(name: &str, class: Class) -> Self {
        Self::set_by(name, class, None).await
    }

    /// With an operator that goes by this clock.
    async fn set_by(name: &str, class: Class, clock: Option<&Clock>) -> Self {
        let name = if class == Class::Gpu { format!("matrix-{name}-gpu") } else { format!("matrix-{name}") };
        let (api, nats) = (plane().api().await, NatsServer::start());
        let release = plane().install(&name, &[&format!("watchNamespace={name}")]);
        let mut operator = Operator::of(&release.kubeconfig, &name).flag("--leader-election=false");
        for (variable, value) in clock.iter().flat_map(|clock| clock.variables()) {
            operator = operator.env(variable, &value);
        }
        let operator = operator.start().await;
        let pool = Pool::new(&name, "orders", &nats);
        let mut spec = json!({"scaling": {"mode": "Operator", "maxReplicas": WORKERS + 2,
            "target": {"queueDepthPerReplica": EACH}, "scaleDown": {"stabilizationSeconds": 0, "idleSecondsToZero": 0}}});
        if class == Class::Gpu {
            spec["gpu"] = json!({"maxReplicas": WORKERS + 2, "target": {"queueDepthPerReplica": EACH}});
        }
        pool.create(&api, spec).await;
        pool.converged(&api, PATIENCE).await;
        let options = async_nats::ConnectOptions::new().retry_on_initial_connect();
        let jetstream = jetstream::new(options.connect(nats.url()).await.expect("a connection"));
        let cast = Cast::play(&api, &pool, &nats).await;
        let row = Self { class, api, jetstream, pool, cast, _operator: operator, nats };
        row.fill().await;
        let all = async || (row.workers().await == Some(WORKERS) && row.ready().await == WORKERS).then_some(());
        within(PATIENCE, "as many work as are needed", all).await;
        row
    }

    fn subject(&self) -> String {
        let intake = format!("work.{}", self.pool.name);
        if self.class == Class::Gpu { format!("{intake}.route.gpu") } else { intake }
    }

    async fn fill(&self) {
        for _ in 0..EACH * 4 {
            let sent = self.jetstream.publish(self.subject(), "{}".into()).await.expect("it is sent");
            sent.await.expect("it is kept");
        }
    }

    async fn empty(&self) {
        self.stream().await.purge().await.expect("it is emptied");
    }

    async fn stream(&self) -> jetstream::stream::Stream {
        let name = intake_stream(&format!("work.{}", self.pool.name));
        self.jetstream.get_stream(name).await.expect("a stream")
    }

    /// How many the Deployment asks for.
    async fn workers(&self) -> Option<i64> {
        let Pool { namespace, name, .. } = &self.pool;
        let name = if self.class == Class::Gpu { format!("{name}-gpu") } else { name.clone() };
        let deployment = format!("/apis/apps/v1/namespaces/{namespace}/deployments/{name}");
        self.api.get(&deployment).await?["spec"]["replicas"].as_i64()
    }

    /// How many take work.
    async fn ready(&self) -> i64 {
        let status = self.status().await;
        let class = if self.class == Class::Gpu { &status["gpu"] } else { &status };
        class["readyReplicas"].as_i64().unwrap_or(0)
    }

    async fn status(&self) -> Value {
        self.api.get(&self.pool.path()).await.expect("the pool")["status"].take()
    }

    /// Waits until the operator wants as many, whatever becomes of it.
    async fn decides(&self, desired: i64) {
        within(PATIENCE, &format!("{desired} are wanted"), async || {
            let status = self.status().await;
            let class = if self.class == Class::Gpu { &status["gpu"] } else { &status };
            (class["desiredReplicas"] == desired).then_some(())
        })
        .await;
    }

    async fn is_unreadable(&self) {
        self.queue_is("False").await;
    }

    async fn is_readable(&self) {
        self.queue_is("True").await;
    }

    async fn queue_is(&self, readable: &str) {
        let what = format!("QueueReadable is {readable}");
        within(PATIENCE, &what, async || self.queue().await.filter(|queue| queue == readable)).await;
    }

    /// The status of `QueueReadable`.
    async fn queue(&self) -> Option<String> {
        let condition = super::condition(&self.api, &self.pool, "QueueReadable").await;
        condition["status"].as_str().map(str::to_owned)
    }

    async fn nobody_goes(&self, why: &str) {
        let time = Duration::from_secs(if is_campaign() { 60 } else { 8 });
        let began = std::time::Instant::now();
        while began.elapsed() < time {
            let workers = self.workers().await;
            assert_eq!(workers, Some(WORKERS), "{why}: {:#}", self.status().await);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Once there is nothing to do.
    async fn all_would_go(&self) {
        self.empty().await;
        self.all_go().await;
    }

    async fn all_go(&self) {
        within(PATIENCE, "all workers have gone", async || (self.workers().await == Some(0)).then_some(())).await;
    }
}
