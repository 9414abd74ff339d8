//! What a worker holds: idle, for each task that waits in it for a slot, and for each approval that waits for a person.

use std::time::Duration;

use beamline_tests::nats::NatsServer;
use beamline_tests::router::{ASSIGN, assignment};
use beamline_tests::wait::within;
use beamline_tests::worker::{Setup, Worker};
use serde_json::{Value, json};

use crate::figures::{median, resident};
use crate::table::{Row, Table, at_most};

/// What an idle worker may hold.
const IDLE_MIB: f64 = 15.0;
/// What it may hold for a task or an approval that waits, the task's payload apart.
const WAITING_KIB: f64 = 4.0;
/// Slots of the pool that is filled with work that does not end, and of one that stays empty. A worker takes as many
/// tasks ahead as it has slots.
const SLOTS: usize = 4096;
/// Tasks that wait behind it.
const WAITING: usize = 8000;
/// Approvals that wait. So many that what the allocator keeps of the burst in which they come (up to 40 MiB, however many
/// they are) is a part of each and not most of it.
const OPEN_APPROVALS: usize = 40_000;
/// Workers of each figure, of which the median counts.
const WORKERS: usize = 3;
/// Until a worker has come to rest.
const REST: Duration = Duration::from_secs(3);
/// Until a worker has taken what is there.
const PATIENCE: Duration = Duration::from_secs(60);

/// All figures, from the kernel's count of resident pages.
pub(crate) async fn run(table: &mut Table) -> anyhow::Result<()> {
    let idle = idle(Worker::named("idle")).await? as f64 / (1 << 20) as f64;
    table.push(Row {
        what: "memory: idle worker, resident".to_owned(),
        figure: format!("{idle:.1} MiB"),
        target: Some(at_most(IDLE_MIB, "MiB", idle)),
    });
    let mut push = |count: usize, what: &str, bytes: f64| {
        let kib = bytes / 1024.0;
        table.push(Row {
            what: format!("memory: each of {count} waiting {what}"),
            figure: format!("{kib:.2} KiB"),
            target: Some(at_most(WAITING_KIB, "KiB", kib)),
        });
    };
    push(WAITING, "tasks, payload apart", median_of(waiting).await?);
    push(OPEN_APPROVALS, "approvals", median_of(approvals).await?);
    Ok(())
}

async fn idle(setup: Setup) -> anyhow::Result<u64> {
    let nats = NatsServer::start();
    let worker = setup.start(&nats).await;
    tokio::time::sleep(REST).await;
    resident(worker.id())
}

/// What the allocator keeps of a burst differs from worker to worker.
async fn median_of<F>(measure: impl Fn() -> F) -> anyhow::Result<f64>
where
    F: Future<Output = anyhow::Result<f64>>,
{
    let mut figures = Vec::with_capacity(WORKERS);
    for _ in 0..WORKERS {
        figures.push(measure().await?);
    }
    Ok(median(figures))
}

/// Bytes by which a worker whose slots are all taken grows for each task that waits in it.
async fn waiting() -> anyhow::Result<f64> {
    let nats = NatsServer::start();
    let worker = Worker::named("full").flag("--sandbox-mode").flag("--log-level=warn");
    let worker = worker.flag(format!("--io-pool-size={SLOTS}")).flag(format!("--cpu-pool-size={SLOTS}"));
    let worker = worker.start(&nats).await;
    let client = async_nats::connect(nats.url()).await?;
    let job = json!({
        "type": "http.request", "method": "POST", "url": "http://peer.test/", "body": "x".repeat(300),
        "timeout_ms": 3_600_000, "sandbox": { "delay_ms": 3_600_000 },
    });
    publish(&client, "running", SLOTS, &job).await?;
    reaches(&worker, r#"worker_slots_busy{pool="io"}"#, SLOTS).await;
    tokio::time::sleep(REST).await;
    let before = resident(worker.id())?;
    let payloads = publish(&client, "waiting", WAITING, &job).await?;
    reaches(&worker, r#"worker_pool_queue_depth{pool="io"}"#, WAITING).await;
    tokio::time::sleep(REST).await;
    let grown = resident(worker.id())?.saturating_sub(before).saturating_sub(payloads as u64);
    Ok(grown as f64 / WAITING as f64)
}

/// Bytes by which a worker grows for each approval that it knows of.
async fn approvals() -> anyhow::Result<f64> {
    const OPEN: &str = "worker_approvals_open";
    let nats = NatsServer::start();
    let worker = Worker::named("patient").flag("--log-level=warn").start(&nats).await;
    let client = async_nats::connect(nats.url()).await?;
    let job = json!({
        "type": "human.approval", "prompt": "x".repeat(300), "approvers": ["ann@example.com", "bob@example.com"],
    });
    let before = resident(worker.id())?;
    publish(&client, "open", OPEN_APPROVALS, &job).await?;
    reaches(&worker, OPEN, OPEN_APPROVALS).await;
    tokio::time::sleep(REST).await;
    Ok(resident(worker.id())?.saturating_sub(before) as f64 / OPEN_APPROVALS as f64)
}

/// Gives a worker so many of these jobs, and says how many bytes they have.
async fn publish(client: &async_nats::Client, run: &str, count: usize, job: &Value) -> anyhow::Result<usize> {
    let mut bytes = 0;
    for number in 0..count {
        let payload = assignment("tenant-1", &format!("{run}-{number}"), job.clone()).to_string();
        bytes += payload.len();
        client.publish(ASSIGN, payload.into()).await?;
    }
    Ok(bytes)
}

async fn reaches(worker: &Worker, series: &str, value: usize) {
    let what = format!("{series} reaches {value}");
    within(PATIENCE, &what, async || (worker.metric(series).await >= value as f64).then_some(())).await;
}
