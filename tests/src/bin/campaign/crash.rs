//! G3: every kind of work, at every point between two of its steps, meets every fault once.

pub(crate) mod work; // what runs
mod case; // one assignment, one fault

use std::collections::BTreeMap;
use std::time::Duration;

use beamline_tests::audit::Recovery;
use clap::Args;
use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::Origin;
use case::{Case, Fault};
use work::Work;

#[derive(Args, Clone, Debug)]
pub(crate) struct Plan {
    /// Which faults.
    #[arg(long, value_delimiter = ',', default_value = "kill,cut,black-hole,stall,duplicate")]
    faults: Vec<Fault>,
    /// Within so many seconds after the death of its worker, ninety-nine of a hundred cases have ended.
    #[arg(long, default_value_t = 12.0)]
    recovery: f64,
    /// Only cases whose name contains this: `<work> <point> <Fault>`.
    #[arg(long, default_value = "")]
    only: String,
    /// Cases at once: they mostly wait for a hold to lapse.
    #[arg(long, default_value_t = 30)]
    at_once: usize,
}

/// The JSON line.
#[derive(Serialize)]
struct Line<'a> {
    goal: &'a str,
    ok: bool,
    /// Cases.
    n: usize,
    faults: BTreeMap<String, usize>,
    failed: usize,
    /// From the fault to the end of the assignment.
    recovery_ms: BTreeMap<String, Recovery>,
    seconds: u64,
    seed: u64,
    commit: &'a str,
}

/// Whether every case ended as it must.
pub(crate) async fn run(plan: &Plan, origin: &Origin) -> anyhow::Result<bool> {
    let started = Instant::now();
    let mut cases = cases(plan);
    // Slow and quick ones side by side.
    fastrand::Rng::with_seed(origin.seed).shuffle(&mut cases);
    let (mut running, mut recoveries, mut failed) = (JoinSet::new(), BTreeMap::<_, Vec<i64>>::new(), Vec::new());
    let mut waiting = cases.iter().copied();
    loop {
        while running.len() < plan.at_once
            && let Some(case) = waiting.next()
        {
            running.spawn(async move { (case, tokio::task::spawn_blocking(move || case.run()).await) });
        }
        let Some(ended) = running.join_next().await else { break };
        match ended? {
            (case, Ok(Ok(recovery))) => {
                let recovery = i64::try_from(recovery.as_millis())?;
                recoveries.entry(format!("{:?}", case.fault)).or_default().push(recovery);
            }
            (case, Ok(Err(error))) => failed.push(format!("{}: {error:#}", case.name())),
            (case, Err(panic)) => failed.push(format!("{}: {panic}", case.name())),
        }
    }
    let recovery_ms: BTreeMap<_, _> =
        recoveries.into_iter().map(|(fault, times)| (fault, Recovery::of(times))).collect();
    let killed = recovery_ms.get(&format!("{:?}", Fault::Kill));
    failed.extend(killed.and_then(|recovery| recovery.too_slow(Duration::from_secs_f64(plan.recovery))));
    failed.iter().for_each(|case| eprintln!("{case}"));
    let line = Line {
        goal: "G3",
        ok: failed.is_empty() && !cases.is_empty(),
        n: cases.len(),
        faults: recovery_ms.iter().map(|(fault, recovery)| (fault.clone(), recovery.samples())).collect(),
        failed: failed.len(),
        recovery_ms,
        seconds: started.elapsed().as_secs(),
        seed: origin.seed,
        commit: &origin.commit,
    };
    println!("{}", serde_json::to_string(&line)?);
    Ok(line.ok)
}

fn cases(plan: &Plan) -> Vec<Case> {
    let works = Work::ALL.into_iter().flat_map(|work| work.points().map(move |point| (work, point)));
    let faults = |(work, point)| plan.faults.iter().map(move |fault| Case { work, point, fault: *fault });
    works.flat_map(faults).filter(|case| case.name().contains(&plan.only)).collect()
}
