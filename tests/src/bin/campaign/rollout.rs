//! W-05: under load, one generation of workers after the other takes over, at any moment. Nothing is executed twice.

use std::path::PathBuf;
use std::time::Duration;

use beamline_tests::nats::NatsServer;
use clap::Args;
use fastrand::Rng;

use crate::crew::{self, Member};
use crate::load::{Mix, Size};
use crate::scene::Scene;
use crate::{Origin, auditor, listener};

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
    let scene = Scene::set(&plan.journal).await?;
    let nats = NatsServer::start();
    let url = nats.url();
    let mut landed = scene.landed()?;
    let (mut rng, mut crew) = (Rng::with_seed(origin.seed), Vec::new());
    for number in 0..2 {
        crew.push(Member::start(format!("worker-{number}"), scene.files(), &nats).await);
    }
    for member in &crew {
        member.worker.ready().await;
    }
    listener::listen(&url, scene.heard.clone()).await?;
    let roll = async {
        for generation in 0..plan.generations {
            tokio::time::sleep(Duration::from_secs_f64(rng.f64())).await;
            let next = Member::start(format!("worker-{}", generation + 2), scene.files(), &nats).await;
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
        submitted = scene.world.submit(&url, &scene.router, size, origin.seed) => submitted?,
        rolled = roll => rolled?,
    }
    if !auditor::settled(&url, DRAIN).await? {
        eprintln!("not everything is settled after {DRAIN:?}");
    }
    crew::dismiss(&mut crew).await?;
    let rules = vec!["--effects=1".to_owned(), format!("--least=rollout={}", plan.generations)];
    scene.holds("W-05", &url, rules, origin).await
}
