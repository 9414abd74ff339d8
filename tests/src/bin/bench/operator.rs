//! The operator with many pools, on a control plane whose nodes and pods are fake: how long until all of them are as they
//! should be, from nothing, and what it holds and does then.

use std::time::{Duration, Instant};

use anyhow::ensure;
use beamline_tests::nats::NatsServer;
use beamline_tests::operator::Operator;
use beamline_tests::plane::ControlPlane;
use beamline_tests::pool::{Pool, has_converged, pools};
use futures::{StreamExt, stream};
use serde_json::json;

use crate::figures::{cpu_time, resident};
use crate::table::{Row, Table, at_most};

/// Within this, from cold, the pools that are counted on.
const COLD_SECONDS: f64 = 60.0;
/// What the operator may hold then.
const RESIDENT_MIB: f64 = 40.0;
/// The targets are for as many.
const COUNTED_ON: usize = 200;
/// Pools of a namespace.
const EACH: usize = 50;
/// They may be late, but not for ever.
const PATIENCE: Duration = Duration::from_secs(900);
/// How long the operator is watched afterwards.
const REST: Duration = Duration::from_secs(60);

/// Everything, and its table.
pub(crate) async fn run(count: usize) -> anyhow::Result<()> {
    let (plane, nats) = (ControlPlane::start(), NatsServer::start());
    let release = plane.install("bench", &[]);
    let api = plane.api().await;
    let namespaces: Vec<_> = (0..count.div_ceil(EACH)).map(|number| format!("bench-{number}")).collect();
    for namespace in &namespaces {
        api.namespace(namespace).await;
    }
    let all = (0..count).map(|number| Pool::new(&format!("bench-{}", number / EACH), &format!("pool-{number}"), &nats));
    let made = stream::iter(all).for_each_concurrent(8, |pool| {
        let api = &api;
        async move { pool.create(api, json!({"replicas": 2})).await }
    });
    made.await;

    let began = Instant::now();
    let mut operator = Operator::by(&release.kubeconfig).flag("--lease-namespace=bench").spawn();
    let (mut converged, mut most) = (0, 0);
    while converged < count {
        tokio::time::sleep(Duration::from_millis(500)).await;
        ensure!(operator.is_running(), "the operator has ended");
        ensure!(began.elapsed() < PATIENCE, "{converged} of {count} pools have converged within {PATIENCE:?}");
        most = most.max(resident(operator.id())?);
        let lists = stream::iter(&namespaces).then(|namespace| async { api.list(&pools(namespace)).await });
        converged = lists.map(|pools| pools.iter().filter(|pool| has_converged(pool)).count()).fold(0, sum).await;
    }
    let (cold, work) = (began.elapsed().as_secs_f64(), cpu_time(operator.id())?);
    let requests = plane.asked_by(&release.user).len();
    tokio::time::sleep(REST).await;
    let rest = (cpu_time(operator.id())?.saturating_sub(work)).as_secs_f64() / REST.as_secs_f64();
    let held = resident(operator.id())?;
    most = most.max(held);

    let mib = |bytes: u64| bytes as f64 / (1 << 20) as f64;
    let counts = count <= COUNTED_ON;
    let mut table = Table::default();
    let mut push = |what: &str, figure: String, target| {
        table.push(Row { what: format!("operator, {count} pools: {what}"), figure, target });
    };
    let target = counts.then(|| at_most(COLD_SECONDS, "s", cold));
    push("all converged from cold", format!("{cold:.1} s"), target);
    let target = counts.then(|| at_most(RESIDENT_MIB, "MiB", mib(held)));
    push("resident at rest", format!("{:.1} MiB", mib(held)), target);
    push("resident at most", format!("{:.1} MiB", mib(most)), None);
    push("requests to the API server until then", format!("{:.1} for each pool", requests as f64 / count as f64), None);
    push("CPU time until then", format!("{:.0} ms for each pool", work.as_secs_f64() * 1000.0 / count as f64), None);
    push("CPU time at rest", format!("{:.1} % of a core", rest * 100.0), None);
    table.print();
    Ok(())
}

async fn sum(all: usize, one: usize) -> usize {
    all + one
}
