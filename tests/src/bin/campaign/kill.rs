//! G1 and G2: under load, workers are killed one after the other, the broker too, and the network breaks.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use async_nats::jetstream;
use beamline_tests::journal::Journal;
use beamline_tests::nats::NatsServer;
use clap::Args;

use crate::auditor::{self, Question};
use crate::crew::{self, Member};
use crate::landed::Landed;
use crate::load::{Mix, Size, World};
use crate::nemesis::{Nemesis, Rhythm};
use crate::sink::Sink;
use crate::{Origin, listener};

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
    /// Where facts are written down; removed again where everything holds.
    #[arg(long, default_value = "target/campaign/kill")]
    journal: PathBuf,
}

/// Whether the promise was kept.
pub(crate) async fn run(plan: &Plan, origin: &Origin) -> anyhow::Result<bool> {
    let _ = std::fs::remove_dir_all(&plan.journal);
    std::fs::create_dir_all(&plan.journal).with_context(|| plan.journal.display().to_string())?;
    let journal = |name: &str| Journal::create(&plan.journal.join(name));
    let (router, heard, effects) = (journal("router"), journal("heard"), journal("effects"));
    let files = tempfile::tempdir()?;
    let world = World::new(Sink::start(effects.clone()).await?, files.path().to_owned())?;
    let nats = NatsServer::start();
    let url = nats.url();
    let crew = gather(plan.workers, files.path(), &nats).await?;
    listener::listen(&url, heard.clone()).await?;
    let landed = Landed::create(&plan.journal.join("faults"))?;
    let mut nemesis = Nemesis::new(nats, crew, plan.rhythm, origin.seed, landed);
    let size = Size {
        assignments: plan.assignments,
        rate: plan.rate,
        duplicates: plan.duplicates,
        latest: plan.rhythm.at_it() + Duration::from_secs(5),
        mix: Mix::Everything,
    };
    tokio::select! {
        submitted = world.submit(&url, &router, size, origin.seed) => submitted?,
        () = nemesis.rage() => {}
    }
    nemesis.relent();
    if !auditor::settled(&url, DRAIN).await? {
        eprintln!("not everything is settled after {DRAIN:?}");
    }
    crew::dismiss(&mut nemesis.crew).await?;
    [&router, &heard, &effects].into_iter().for_each(Journal::flush);
    let mut rules = vec![format!("--at-it={}", plan.rhythm.at_it().as_secs_f64())];
    rules.extend(plan.least.iter().map(|least| format!("--least={least}")));
    let question = Question { goal: "G1", nats_url: &url, journal: &plan.journal, rules };
    let holds = auditor::ask(question, origin).await?;
    if holds {
        std::fs::remove_dir_all(&plan.journal)?;
    }
    Ok(holds)
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
