//! G1 and G2: under load, workers are killed one after the other, the broker too, and the network breaks.

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_nats::jetstream;
use beamline_tests::nats::NatsServer;
use clap::Args;

use crate::crew::{self, Member};
use crate::load::{Mix, Size};
use crate::nemesis::{Nemesis, Rhythm};
use crate::scene::Scene;
use crate::{Origin, auditor, listener};

/// After the last fault: holds lapse after 10 s, then the rest is done.
const DRAIN: Duration = Duration::from_secs(90);

#[derive(Args, Clone, Debug)]
pub(crate) struct Plan {
    /// Different assignments.
    #[arg(long, default_value_t = 20_000)]
    assignments: u64,
    /// A second; 0: as fast as they are taken.
    #[arg(long, default_value_t = 0)]
    rate: u64,
    /// Of a hundred assignments, so many are submitted twice.
    #[arg(long, default_value_t = 5)]
    duplicates: u64,
    /// Processes.
    #[arg(long, default_value_t = 4)]
    workers: usize,
    #[command(flatten)]
    rhythm: Rhythm,
    /// `kind=count`: with fewer faults of this kind the run does not count.
    #[arg(long)]
    least: Vec<String>,
    /// Within so many seconds after the death of its worker, ninety-nine of a hundred orphans run again.
    #[arg(long, default_value_t = 12.0)]
    recovery: f64,
    /// Where facts are written down; removed again where everything holds.
    #[arg(long, default_value = "target/campaign/kill")]
    journal: PathBuf,
}

/// Whether the promise was kept.
pub(crate) async fn run(plan: &Plan, origin: &Origin) -> anyhow::Result<bool> {
    let scene = Scene::set(&plan.journal).await?;
    let nats = NatsServer::start();
    let url = nats.url();
    let crew = gather(plan.workers, scene.files(), &nats).await?;
    listener::listen(&url, scene.heard.clone()).await?;
    let landed = scene.landed()?;
    let mut nemesis = Nemesis::new(nats, crew, plan.rhythm, origin.seed, landed);
    let size = Size {
        assignments: plan.assignments,
        rate: plan.rate,
        duplicates: plan.duplicates,
        latest: plan.rhythm.at_it() + Duration::from_secs(5),
        mix: Mix::Everything,
    };
    tokio::select! {
        submitted = scene.world.submit(&url, &scene.router, size, origin.seed) => submitted?,
        () = nemesis.rage() => {}
    }
    nemesis.relent();
    if !auditor::settled(&url, DRAIN).await? {
        eprintln!("not everything is settled after {DRAIN:?}");
    }
    crew::dismiss(&mut nemesis.crew).await?;
    let mut rules =
        vec![format!("--at-it={}", plan.rhythm.at_it().as_secs_f64()), format!("--recovery={}", plan.recovery)];
    rules.extend(plan.least.iter().map(|least| format!("--least={least}")));
    scene.holds("G1", &url, rules, origin).await
}

/// Starts the workers, and lets the broker keep every record of the run.
async fn gather(count: usize, root: &Path, nats: &NatsServer) -> anyhow::Result<Vec<Member>> {
    let mut crew = Vec::with_capacity(count);
    for number in 1..=count {
        let member = Member::start(format!("worker-{number}"), root, nats).await;
        member.worker.ready().await;
        crew.push(member);
    }
    let js = jetstream::new(async_nats::connect(nats.url()).await?);
    let mut records = js.get_stream("CAF_EXEC_RESULT").await?.cached_info().config.clone();
    (records.max_age, records.max_messages) = (Duration::ZERO, -1);
    js.update_stream(records).await?;
    Ok(crew)
}
