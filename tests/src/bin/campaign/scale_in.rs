//! O-19: under load, mode Operator takes workers away again and again. None of them runs anything then, so that nothing is
//! cut and nothing is executed twice.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use beamline_tests::api::Api;
use beamline_tests::nats::NatsServer;
use beamline_tests::operator::Operator;
use beamline_tests::plane::ControlPlane;
use beamline_tests::pool::Pool;
use clap::Args;
use serde_json::json;

use crate::bodies::Bodies;
use crate::load::{Mix, Size};
use crate::scene::Scene;
use crate::{Origin, auditor, listener};

const DRAIN: Duration = Duration::from_secs(60);
/// As many as there are at most, and as are left when they are not asked for: what comes keeps one busy.
const MANY: usize = 7;
const FEW: usize = 2;
/// How long all of it may take for each worker that goes.
const PATIENCE: Duration = Duration::from_secs(20);
const NAMESPACE: &str = "scale-in";

#[derive(Args, Clone, Debug)]
pub(crate) struct Plan {
    /// How many workers are taken away.
    #[arg(long, default_value_t = 200)]
    scale_ins: usize,
    /// Assignments a second, meanwhile, of a second each or so.
    #[arg(long, default_value_t = 10)]
    rate: u64,
    /// Where facts are written down; removed again where everything holds.
    #[arg(long, default_value = "target/campaign/scale-in")]
    journal: PathBuf,
}

/// Whether the promise was kept.
pub(crate) async fn run(plan: &Plan, origin: &Origin) -> anyhow::Result<bool> {
    let scene = Scene::set(&plan.journal).await?;
    let (plane, nats) = (ControlPlane::start(), NatsServer::start());
    let (api, url) = (plane.api().await, nats.url());
    let release = plane.install(NAMESPACE, &[&format!("watchNamespace={NAMESPACE}")]);
    let operator =
        Operator::of(&release.kubeconfig, NAMESPACE).flag("--log-level=beamline_operator=debug,info").start().await;
    let pool = Pool::new(NAMESPACE, "orders", &nats);
    let scaling = |least: usize| {
        json!({"scaling": {"mode": "Operator", "minReplicas": least, "maxReplicas": MANY,
            "scaleDown": {"stabilizationSeconds": 0}}})
    };
    let mut spec = scaling(MANY);
    spec["nats"] = json!({"subject": beamline_tests::router::ASSIGN});
    pool.create(&api, spec).await;
    pool.converged(&api, DRAIN).await;
    listener::listen(&url, scene.heard.clone()).await?;
    let mut bodies = Bodies {
        api: &api,
        pool: &pool,
        nats: &nats,
        files: scene.files().to_owned(),
        landed: scene.landed()?,
        alive: HashMap::new(),
        gone: 0,
    };
    let swing = async {
        loop {
            reaches(&api, &pool, |asked| asked >= MANY).await;
            pool.change(&api, scaling(1)).await;
            reaches(&api, &pool, |asked| asked <= FEW).await;
            pool.change(&api, scaling(MANY)).await;
        }
    };
    let size = Size { assignments: u64::MAX, rate: plan.rate, duplicates: 0, latest: Duration::ZERO, mix: Mix::Slow };
    let limit = PATIENCE * u32::try_from(plan.scale_ins)?;
    tokio::select! {
        submitted = scene.world.submit(&url, &scene.router, size, origin.seed) => submitted?,
        () = swing => {}
        () = bodies.follow(plan.scale_ins) => {}
        () = tokio::time::sleep(limit) => anyhow::bail!("not so many are taken away within {limit:?}"),
    }
    // As the other files, it stays where something does not hold.
    std::fs::write(plan.journal.join("operator"), operator.lines().join("\n"))?;
    drop(operator);
    if !auditor::settled(&url, DRAIN).await? {
        eprintln!("not everything is settled after {DRAIN:?}");
    }
    let rules = vec!["--effects=1".to_owned(), format!("--least=scale-in={}", plan.scale_ins)];
    scene.holds("O-19", &url, rules, origin).await
}

/// Waits until the Deployment asks for as many.
async fn reaches(api: &Api, pool: &Pool, is_enough: impl Fn(usize) -> bool) {
    let deployment = format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments/{}", pool.name);
    let asked = async || Some(api.get(&deployment).await?["spec"]["replicas"].as_u64()? as usize);
    while !asked().await.is_some_and(&is_enough) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
