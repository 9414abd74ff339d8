//! `make bench`: figures of the worker beside the bare limit, alternating in one run, as rates and as a ratio.
//!
//! Machines are shared and noisy: read the ratio, not the rates.
#![expect(clippy::print_stdout, reason = "its output is its product")]

mod bare; // what the broker allows, with nothing around it

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use async_nats::jetstream;
use async_nats::jetstream::stream::{Config, RetentionPolicy};
use beamline_tests::nats::NatsServer;
use beamline_tests::worker::program;
use clap::{Parser, Subcommand};
use futures::StreamExt;
use tokio::process::{Child, Command};

/// About the size of the contract's example, so that a rate can be compared with others.
const PAYLOAD_BYTES: usize = 600;

#[derive(Parser)]
struct Arguments {
    /// Assignments in each measurement.
    #[arg(long, default_value_t = 100_000)]
    tasks: usize,
    /// Pairs of measurements; the median counts.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    #[command(subcommand)]
    part: Option<Part>,
}

#[derive(Subcommand)]
enum Part {
    /// The bare loop, in a process of its own as the worker is.
    Bare {
        /// Where the broker is.
        url: String,
    },
}

/// What is measured: both take every assignment from the stream and answer it with a verdict, a record and a result.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Subject {
    Worker,
    Bare,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match arguments.part {
        Some(Part::Bare { url }) => runtime.block_on(bare::run(&url)),
        None => runtime.block_on(compare(arguments.tasks, arguments.rounds)),
    }
}

async fn compare(tasks: usize, rounds: usize) -> anyhow::Result<()> {
    println!("no-op assignments, {PAYLOAD_BYTES} B, {tasks} each, look-up included, file storage: tasks/s");
    println!("{:>6} {:>10} {:>10} {:>7}", "round", "worker", "bare", "ratio");
    let (mut workers, mut bares, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=rounds {
        let (worker, bare) = (measure(Subject::Worker, tasks).await?, measure(Subject::Bare, tasks).await?);
        println!("{round:>6} {worker:>10.0} {bare:>10.0} {:>7.2}", worker / bare);
        workers.push(worker);
        bares.push(bare);
        ratios.push(worker / bare);
    }
    println!("{:>6} {:>10.0} {:>10.0} {:>7.2}", "median", median(workers), median(bares), median(ratios));
    Ok(())
}

/// Tasks per second from the first result to the last, over a broker of its own with all work waiting.
async fn measure(subject: Subject, tasks: usize) -> anyhow::Result<f64> {
    let broker = NatsServer::start();
    let client = async_nats::ConnectOptions::new().subscription_capacity(tasks * 2).connect(broker.url()).await?;
    let js = jetstream::new(client.clone());
    prepare(&js).await?;
    publish(&client, tasks).await?;
    let mut results = client.subscribe("caf.exec.result.v1").await?;
    let mut verdicts = client.subscribe("caf.exec.assign.v1.ack").await?;
    client.flush().await?;
    let verdicts = tokio::spawn(async move { verdicts.by_ref().take(tasks).count().await });
    let mut process = start(subject, &broker.url())?;
    let rate = tokio::time::timeout(Duration::from_secs(120), async {
        results.next().await.context("no result")?;
        let first = Instant::now();
        let rest = results.by_ref().take(tasks - 1).count().await;
        ensure!(rest == tasks - 1, "only {rest} results");
        anyhow::Ok(rest as f64 / first.elapsed().as_secs_f64())
    });
    let rate = rate.await.context("the work did not end within two minutes")??;
    ensure!(verdicts.await? == tasks, "a verdict is missing");
    process.kill().await?;
    Ok(rate)
}

/// The worker makes the other streams itself; work has to wait somewhere before it runs.
async fn prepare(js: &jetstream::Context) -> anyhow::Result<()> {
    js.create_stream(Config {
        name: "CAF_EXEC_ASSIGN".to_owned(),
        subjects: vec!["caf.exec.assign.v1".to_owned(), "caf.exec.route.*.v1".to_owned()],
        retention: RetentionPolicy::WorkQueue,
        discard: jetstream::stream::DiscardPolicy::New,
        ..Config::default()
    })
    .await?;
    Ok(())
}

async fn publish(client: &async_nats::Client, tasks: usize) -> anyhow::Result<()> {
    let body = "x".repeat(PAYLOAD_BYTES - 320);
    for number in 0..tasks {
        let assignment = serde_json::json!({
            "version": "1",
            "assignment_id": format!("assign-{number}"),
            "request_id": format!("req-{number}"),
            "tenant_id": "tenant-1",
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

fn start(subject: Subject, url: &str) -> anyhow::Result<Child> {
    let mut command = match subject {
        Subject::Worker => {
            let mut command = Command::new(program());
            command.args(["--nats-url", url, "--sandbox-mode", "--prometheus-endpoint", "127.0.0.1:0"]);
            command.args(["--log-level", "warn"]);
            command
        }
        Subject::Bare => {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["bare", url]);
            command
        }
    };
    command.stdout(Stdio::null()).kill_on_drop(true).spawn().context("cannot start what is measured")
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}
