//! Three workers of a pool, killed and started anew all the time, and a tenant that sends many times its budget.
//!
//! A verdict counts in the window of its `acknowledged_at`, and what is said of an assignment again counts once.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::ensure;
use async_nats::Subscriber;
use beamline_tests::nats::NatsServer;
use beamline_tests::policy::Policy;
use beamline_tests::router::{ASSIGN, assignment};
use beamline_tests::worker::{Setup, Worker};
use futures::StreamExt;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::json;

use crate::figures::median;
use crate::pace::{self, Planned};
use crate::table::{Row, Table, at_least, at_most};

/// Executions in a window.
const BUDGET: usize = 1000;
/// Of them that must be usable.
const USABLE: f64 = 0.98;
/// Sent in each window, evenly.
const SENT: u32 = 6000;
const WORKERS: usize = 3;
/// Between two kills, in milliseconds.
const KILLED_AFTER: std::ops::Range<u64> = 700..1800;

/// When the last verdict has been heard.
const SILENCE: Duration = Duration::from_secs(1);

/// What became of one window.
#[derive(Default)]
struct Window {
    accepted: usize,
    /// When the last one was, in Unix milliseconds.
    last: i64,
    kills: usize,
    /// Kills while there was something left of the budget.
    kills_under_way: usize,
}

/// A worker died.
struct Kill {
    /// In Unix milliseconds.
    at: i64,
}

pub(super) async fn run(count: u32, seconds: u32, seed: u64, table: &mut Table) -> anyhow::Result<()> {
    let nats = NatsServer::start();
    let policy = Policy::new(&format!(
        "tenants: {{named: [{{id: acme, quotas: {{executions: {BUDGET}, window: {seconds}s}}}}]}}"
    ));
    let mut workers = Vec::new();
    for number in 0..WORKERS {
        workers.push(worker(number, &policy).start(&nats).await);
    }
    let router = pace::connect(&nats).await?;
    let mut verdicts = router.subscribe(format!("{ASSIGN}.ack")).await?;
    router.flush().await?;

    let length = i64::from(seconds) * 1000;
    let now = Timestamp::now().as_millisecond();
    // The first whole one, and what comes before it.
    let first = now + length - now.rem_euclid(length);
    let end = first + i64::from(count) * length;
    let every = Duration::from_secs(seconds.into()) / SENT;
    let time = Duration::from_millis(end.abs_diff(now));
    let job = json!({"type": "http.request", "method": "GET", "url": "http://peer.example/ok"});
    let numbers = 0..u32::try_from(time.as_micros() / every.as_micros().max(1))?;
    let plan = numbers.map(|number| Planned {
        due: every * number,
        payload: assignment("acme", &format!("a-{number}"), job.clone()).to_string().into(),
    });
    let publishing = pace::publish(nats.url(), plan.collect());
    let kills = kill(&mut workers, &policy, &nats, end, seed).await;
    publishing.began()?;
    router.flush().await?;

    let mut windows: HashMap<i64, Window> = HashMap::new();
    for at in acceptances(&mut verdicts).await?.into_values() {
        let window = windows.entry(at - at.rem_euclid(length)).or_default();
        window.accepted += 1;
        window.last = window.last.max(at);
    }
    let windows: Vec<_> = (0..i64::from(count))
        .map(|number| {
            let start = first + number * length;
            let mut window = windows.remove(&start).unwrap_or_default();
            let within = |until: i64| kills.iter().filter(|kill| (start..until).contains(&kill.at)).count();
            (window.kills, window.kills_under_way) = (within(start + length), within(window.last));
            window
        })
        .collect();
    report(&windows, table)
}

fn worker(number: usize, policy: &Policy) -> Setup {
    Worker::named(&format!("worker-{number}")).flag("--sandbox-mode").flag("--log-level=warn").flag(policy.flag())
}

/// Kills one after another until that moment; a new one of the same name comes at once.
async fn kill(workers: &mut [Worker], policy: &Policy, nats: &NatsServer, end: i64, seed: u64) -> Vec<Kill> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut kills = Vec::new();
    loop {
        let pause = i64::try_from(random.u64(KILLED_AFTER)).unwrap_or(i64::MAX);
        let left = end - Timestamp::now().as_millisecond();
        tokio::time::sleep(Duration::from_millis(pause.min(left).max(0).unsigned_abs())).await;
        if left <= pause {
            return kills;
        }
        let number = random.usize(..workers.len());
        if let Some(worker_there) = workers.get_mut(number) {
            kills.push(Kill { at: Timestamp::now().as_millisecond() });
            worker_there.kill();
            *worker_there = worker(number, policy).start(nats).await;
        }
    }
}

/// When each assignment was accepted that was, as the first verdict says that was heard.
async fn acceptances(verdicts: &mut Subscriber) -> anyhow::Result<HashMap<String, i64>> {
    #[derive(Deserialize)]
    struct Verdict {
        assignment_id: String,
        status: String,
        acknowledged_at: i64,
    }
    let mut accepted = HashMap::new();
    while let Ok(Some(message)) = tokio::time::timeout(SILENCE, verdicts.next()).await {
        let verdict: Verdict = serde_json::from_slice(&message.payload)?;
        if verdict.status == "accepted" {
            accepted.entry(verdict.assignment_id).or_insert(verdict.acknowledged_at);
        }
    }
    Ok(accepted)
}

fn report(windows: &[Window], table: &mut Table) -> anyhow::Result<()> {
    for Window { accepted, kills, kills_under_way, .. } in windows {
        eprintln!(
            "budget: {accepted} of {BUDGET} accepted, {kills} kills, {kills_under_way} while there was some left"
        );
    }
    let sum = |of: fn(&Window) -> usize| windows.iter().map(of).sum::<usize>();
    let (accepted, kills, under_way) = (sum(|it| it.accepted), sum(|it| it.kills), sum(|it| it.kills_under_way));
    ensure!(under_way > 0, "no kill landed while there was something left of a budget: this run does not count");
    let most = windows.iter().map(|window| window.accepted).max().unwrap_or(0);
    let used = |window: &Window| window.accepted as f64 / BUDGET as f64;
    let worst = windows.iter().map(used).fold(f64::NAN, f64::min);
    let lost = (windows.len() * BUDGET).saturating_sub(accepted) as f64 / under_way as f64;
    table.push(Row {
        what: format!("budget: most accepted in a window of {SENT} sent, {kills} workers killed in {}", windows.len()),
        figure: format!("{most}"),
        target: Some(at_most(BUDGET as f64, "", most as f64)),
    });
    table.push(Row {
        what: format!("budget: used of it, worst window, {under_way} of the kills while there was some left"),
        figure: format!(
            "{worst:.3} (median {:.3}, {lost:.1} units lost with each kill)",
            median(windows.iter().map(used))
        ),
        target: Some(at_least(USABLE, worst)),
    });
    Ok(())
}
