//! W-05: under load, one generation of workers after the other takes over, at any moment. Nothing is executed twice.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use beamline_tests::journal::Journal;
use beamline_tests::nats::NatsServer;
use clap::Args;
use fastrand::Rng;

use crate::auditor::{self, Question};
use crate::crew::{self, Member};
use crate::landed::Landed;
use crate::load::{Mix, Size, World};
use crate::sink::Sink;
use crate::{Origin, listener};

const DRAIN: Duration = Duration::from_secs(60);

#[derive(Args, Clone, Debug)]
pub(crate) struct Plan {
    /// How often a worker is replaced.
    #[arg(long, default_value_t = 20)]
    generations: usize,
    /// Assignments a second, meanwhile.
    #[arg(long, default_value_t = 200)]
    rate: u64,
    /// Where facts are written down; removed again where everything holds.
    #[arg(long, default_value = "target/campaign/rollout")]
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
    let mut landed = Landed::create(&plan.journal.join("faults"))?;
    let (mut rng, mut crew) = (Rng::with_seed(origin.seed), Vec::new());
    for number in 0..2 {
        crew.push(Member::start(format!("worker-{number}"), files.path(), &nats).await);
    }
    for member in &crew {
        member.worker.ready().await;
    }
    listener::listen(&url, heard.clone()).await?;
    let roll = async {
        for generation in 0..plan.generations {
            tokio::time::sleep(Duration::from_secs_f64(rng.f64())).await;
            let next = Member::start(format!("worker-{}", generation + 2), files.path(), &nats).await;
            next.worker.ready().await;
            tokio::time::sleep(Duration::from_secs_f64(rng.f64())).await;
            crew::dismiss(&mut [crew.remove(0)]).await?;
            crew.push(next);
            landed.note("rollout");
        }
        landed.end();
        anyhow::Ok(())
    };
    let size = Size { assignments: u64::MAX, rate: plan.rate, duplicates: 0, latest: Duration::ZERO, mix: Mix::Calls };
    tokio::select! {
        submitted = world.submit(&url, &router, size, origin.seed) => submitted?,
        rolled = roll => rolled?,
    }
    if !auditor::settled(&url, DRAIN).await? {
        eprintln!("not everything is settled after {DRAIN:?}");
    }
    crew::dismiss(&mut crew).await?;
    [&router, &heard, &effects].into_iter().for_each(Journal::flush);
    let rules = vec!["--effects=1".to_owned(), format!("--least=rollout={}", plan.generations)];
    let question = Question { goal: "W-05", nats_url: &url, journal: &plan.journal, rules };
    let holds = auditor::ask(question, origin).await?;
    if holds {
        std::fs::remove_dir_all(&plan.journal)?;
    }
    Ok(holds)
}
