//! No-op assignments, all waiting when the work begins: what the worker adds to what the broker and one thread allow.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use async_nats::jetstream;
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy};
use beamline_tests::nats::NatsServer;
use beamline_tests::policy::Policy;
use beamline_tests::worker::program;
use futures::StreamExt;
use tokio::process::{Child, Command};

use crate::figures::{cpu_time, median};
use crate::table::{Row, Table, at_least};

/// About the size of the contract's example, so that a rate can be compared with others.
const PAYLOAD_BYTES: usize = 600;
/// What the worker should reach of the bare loop's rate, with everything on.
const TARGET: f64 = 0.60;
/// What it should keep of its own rate where its tenant is bounded, and where it has many tenants.
const BOUNDED_TARGET: f64 = 0.95;
const CROWDED_TARGET: f64 = 0.90;
/// Every bound that there is, and none that is ever reached.
const BOUNDED: &str = "tenants: {named: [{id: tenant-1, maxSlotShare: 100, quotas: {executions: 1000000000, \
    cpuTimeMs: 1000000000, window: 1h, concurrent: 100000, memoryMb: 100000}}]}";

/// Who takes every assignment from the stream and answers it with a verdict, a record and a result.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Subject {
    /// The bare loop.
    Bare,
    /// The bare loop without its look-up.
    NoLookUp,
    /// The worker as it is started by default.
    Worker,
    /// The worker without a line for each task.
    Quiet,
    /// The worker with a policy that bounds the tenant.
    Bounded,
    /// The worker with work of ten thousand tenants.
    Crowded,
}

impl Subject {
    /// In the order in which they take turns.
    const ALL: [Self; 4] = [Self::Worker, Self::Bare, Self::Quiet, Self::NoLookUp];

    const fn name(self) -> &'static str {
        match self {
            Self::Worker => "worker, default flags",
            Self::Quiet => "worker, --log-level warn",
            Self::Bounded => "worker, all bounds",
            Self::Crowded => "worker, 10 000 tenants",
            Self::Bare => "bare loop",
            Self::NoLookUp => "bare loop, no look-up",
        }
    }

    /// Whose work it is: of so many in turn.
    const fn tenants(self) -> usize {
        if matches!(self, Self::Crowded) { 10_000 } else { 1 }
    }
}

/// One measurement.
#[derive(Clone, Copy)]
struct Figures {
    /// Tasks per second, from the first result to the last.
    rate: f64,
    /// CPU time of the process for each task.
    cpu: Duration,
    /// CPU time of the broker for each task.
    broker: Duration,
}

/// The rates of all four, taking turns, and what they are beside the bare loop of the same round.
pub(crate) async fn run(tasks: usize, rounds: usize, table: &mut Table) -> anyhow::Result<()> {
    let mut measured: [Vec<Figures>; 4] = Default::default();
    for round in 1..=rounds {
        for (subject, figures) in Subject::ALL.iter().zip(&mut measured) {
            figures.push(measure_in(round, *subject, tasks).await?);
        }
    }
    let [_, bare, ..] = &measured;
    for (subject, figures) in Subject::ALL.iter().zip(&measured) {
        let ratio = median(figures.iter().zip(bare).map(|(one, bare)| one.rate / bare.rate));
        let rate = median(figures.iter().map(|one| one.rate));
        let micros = |of: fn(&Figures) -> Duration| median(figures.iter().map(|one| of(one).as_secs_f64() * 1e6));
        let (cpu, broker) = (micros(|one| one.cpu), micros(|one| one.broker));
        let figure = format!(
            "{rate:.0} tasks/s, {cpu:.1} µs CPU each and {broker:.1} of the broker, {ratio:.2} of the bare loop"
        );
        let target = matches!(subject, Subject::Worker | Subject::Quiet).then(|| at_least(TARGET, ratio));
        table.push(Row { what: format!("no-op: {}", subject.name()), figure, target });
    }
    Ok(())
}

/// The worker's rate where its tenant has every bound that there is, and where it has many tenants, beside that of the same
/// round without.
pub(crate) async fn tenants(tasks: usize, rounds: usize, table: &mut Table) -> anyhow::Result<()> {
    let [mut plain, mut bounded, mut crowded]: [Vec<Figures>; 3] = Default::default();
    for round in 1..=rounds {
        let mut subjects =
            [(Subject::Worker, &mut plain), (Subject::Bounded, &mut bounded), (Subject::Crowded, &mut crowded)];
        // Each is first in some rounds.
        subjects.rotate_left(round % 3);
        for (subject, figures) in subjects {
            figures.push(measure_in(round, subject, tasks).await?);
        }
    }
    let rows =
        [("with budgets and ceilings", &bounded, BOUNDED_TARGET), ("with 10 000 tenants", &crowded, CROWDED_TARGET)];
    for (what, figures, target) in rows {
        let ratio = median(figures.iter().zip(&plain).map(|(one, plain)| one.rate / plain.rate));
        let rate = median(figures.iter().map(|one| one.rate));
        let micros = |figures: &[Figures], of: fn(&Figures) -> Duration| {
            median(figures.iter().map(|one| of(one).as_secs_f64() * 1e6))
        };
        let [own, own_plain] = [figures, &plain].map(|figures| micros(figures, |one| one.cpu));
        let [broker, broker_plain] = [figures, &plain].map(|figures| micros(figures, |one| one.broker));
        table.push(Row {
            what: format!("no-op: worker {what}, of the same without"),
            figure: format!(
                "{ratio:.2} ({rate:.0} tasks/s; {own:.1} µs CPU each, without {own_plain:.1}; of the broker \
                 {broker:.1}, without {broker_plain:.1})"
            ),
            target: Some(at_least(target, ratio)),
        });
    }
    Ok(())
}

async fn measure_in(round: usize, subject: Subject, tasks: usize) -> anyhow::Result<Figures> {
    let figures = measure(subject, tasks).await?;
    let Figures { rate, cpu, broker } = figures;
    eprintln!("round {round}: {:<24} {rate:>7.0} tasks/s, {cpu:?} CPU each, broker {broker:?}", subject.name());
    Ok(figures)
}

/// Over a broker of its own with all work waiting.
async fn measure(subject: Subject, tasks: usize) -> anyhow::Result<Figures> {
    let broker = NatsServer::start();
    let client = async_nats::ConnectOptions::new().subscription_capacity(tasks * 2).connect(broker.url()).await?;
    let js = jetstream::new(client.clone());
    prepare(&js).await?;
    publish(&client, tasks, subject.tenants()).await?;
    let mut results = client.subscribe("caf.exec.result.v1").await?;
    let mut verdicts = client.subscribe("caf.exec.assign.v1.ack").await?;
    client.flush().await?;
    let verdicts = tokio::spawn(async move { verdicts.by_ref().take(tasks).count().await });
    let idle = cpu_time(broker.id())?;
    let policy = Policy::new(BOUNDED);
    let mut process = start(subject, &broker.url(), &policy)?;
    let rate = tokio::time::timeout(Duration::from_secs(120), async {
        results.next().await.context("no result")?;
        let first = Instant::now();
        let rest = results.by_ref().take(tasks - 1).count().await;
        ensure!(rest == tasks - 1, "only {rest} results");
        anyhow::Ok(rest as f64 / first.elapsed().as_secs_f64())
    });
    let rate = rate.await.context("the work did not end within two minutes")??;
    ensure!(verdicts.await? == tasks, "a verdict is missing");
    let used = cpu_time(process.id().context("it has ended")?)?;
    let of_broker = cpu_time(broker.id())?.saturating_sub(idle);
    process.kill().await?;
    let each = u32::try_from(tasks)?;
    Ok(Figures { rate, cpu: used / each, broker: of_broker / each })
}

/// The worker makes the other streams itself; work has to wait somewhere before it runs.
async fn prepare(js: &jetstream::Context) -> anyhow::Result<()> {
    js.create_stream(Config {
        name: "CAF_EXEC_ASSIGN".to_owned(),
        subjects: vec!["caf.exec.assign.v1".to_owned(), "caf.exec.route.*.v1".to_owned()],
        retention: RetentionPolicy::WorkQueue,
        discard: DiscardPolicy::New,
        ..Config::default()
    })
    .await?;
    Ok(())
}

async fn publish(client: &async_nats::Client, tasks: usize, tenants: usize) -> anyhow::Result<()> {
    let body = "x".repeat(PAYLOAD_BYTES - 320);
    for number in 0..tasks {
        let assignment = serde_json::json!({
            "version": "1",
            "assignment_id": format!("assign-{number}"),
            "request_id": format!("req-{number}"),
            "tenant_id": format!("tenant-{}", number % tenants + 1),
            "executor": {"provider_id": "bench"},
            "job": {"type": "http.request", "method": "POST", "url": "http://peer.test/", "body": body},
        });
        client.publish("caf.exec.assign.v1", assignment.to_string().into()).await?;
    }
    client.flush().await?;
    let js = jetstream::new(client.clone());
    let stored = async {
        while js.get_stream("CAF_EXEC_ASSIGN").await?.cached_info().state.messages < tasks as u64 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(Duration::from_secs(60), stored).await.context("the stream did not keep the work")?
}

fn start(subject: Subject, url: &str, policy: &Policy) -> anyhow::Result<Child> {
    let mut command = match subject {
        Subject::Worker | Subject::Quiet | Subject::Bounded | Subject::Crowded => {
            let mut command = Command::new(program());
            command.args(["--nats-url", url, "--sandbox-mode", "--prometheus-endpoint", "127.0.0.1:0"]);
            command
        }
        Subject::Bare | Subject::NoLookUp => {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["bare", url]);
            command
        }
    };
    match subject {
        Subject::Quiet => command.args(["--log-level", "warn"]),
        Subject::Bounded => command.arg(policy.flag()),
        Subject::NoLookUp => command.arg("--no-look-up"),
        Subject::Worker | Subject::Crowded | Subject::Bare => &mut command,
    };
    command.stdout(Stdio::null()).kill_on_drop(true).spawn().context("cannot start what is measured")
}
