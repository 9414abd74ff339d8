//! Weights and priorities where everybody waits: of each as much is kept waiting in the worker, whatever it has ended.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use async_nats::Client;
use beamline_tests::nats::NatsServer;
use beamline_tests::policy::Policy;
use beamline_tests::router::{ASSIGN, assignment};
use beamline_tests::worker::Worker;
use serde_json::json;

use crate::pace::{self, Heard};
use crate::table::{Row, Table, at_most};

const WEIGHTS: [u32; 3] = [4, 2, 1];
/// How far a share may be off.
const OFF_PERCENT: f64 = 5.0;
const SPAN: Duration = Duration::from_secs(10);
/// Until all wait and blocks have been measured.
const WARM_UP: Duration = Duration::from_secs(2);
/// Slots, and for how long each block holds one.
const SLOTS: usize = 14;
const HOLDS_MS: u64 = 50;
/// Priorities are 0 to 9.
const CLASSES: u32 = 10;
/// Long enough for the lowest class to be served twice.
const CLASSES_TIME: Duration = Duration::from_secs(25);
/// The lowest class is served every ten seconds at least; then its block takes its time.
const STARVES_SECONDS: f64 = 10.5;
/// Kept waiting or running of each tenant or class.
const KEPT: usize = 40;

pub(super) async fn run(spans: u32, table: &mut Table) -> anyhow::Result<()> {
    weights(spans, table).await?;
    priorities(table).await
}

/// The largest deviation of any tenant's share of the slots' time in any span.
async fn weights(spans: u32, table: &mut Table) -> anyhow::Result<()> {
    let tenants = WEIGHTS.map(|weight| format!("{{id: weight-{weight}, weight: {weight}}}"));
    let policy = Policy::new(&format!("tenants: {{named: [{}]}}", tenants.join(", ")));
    let lines = WEIGHTS.map(|weight| Line { tenant: format!("weight-{weight}"), priority: 4 });
    let (start, heard) = saturate(&policy, &lines, WARM_UP + SPAN * spans).await?;
    let mut worst = (0.0, 0.0);
    for span in 0..spans {
        let from = start + WARM_UP + SPAN * span;
        let mut time: HashMap<&str, Duration> = HashMap::new();
        for one in heard.iter().filter(|heard| (from..from + SPAN).contains(&heard.at)) {
            *time.entry(one.tenant.as_str()).or_default() += one.took;
        }
        let all: Duration = time.values().sum();
        for (line, weight) in lines.iter().zip(WEIGHTS) {
            let got = time.get(line.tenant.as_str()).copied().unwrap_or_default();
            let share = got.as_secs_f64() / all.as_secs_f64();
            let due = f64::from(weight) / f64::from(WEIGHTS.iter().sum::<u32>());
            let off = (share / due - 1.0) * 100.0;
            eprintln!("weights: {share:.4} of the time of span {span} for {}, {off:+.1} %", line.tenant);
            if off.abs() >= f64::abs(worst.0) {
                worst = (off, due);
            }
        }
    }
    let (off, due) = worst;
    table.push(Row {
        what: format!("weights 4:2:1: the share that is most off, of 3 in {spans} times {} s", SPAN.as_secs()),
        figure: format!("{off:+.2} % of {due:.3}"),
        target: Some(at_most(OFF_PERCENT, "%", off.abs())),
    });
    Ok(())
}

/// The longest that any class had to wait for the next end of one of its blocks.
async fn priorities(table: &mut Table) -> anyhow::Result<()> {
    let lines: Vec<_> = (0..CLASSES).map(|priority| Line { tenant: format!("class-{priority}"), priority }).collect();
    let (start, heard) = saturate(&Policy::new("tenants: {}"), &lines, CLASSES_TIME).await?;
    let mut longest = (Duration::ZERO, 0, 0);
    for line in &lines {
        let ends: Vec<_> = heard.iter().filter(|heard| heard.tenant == line.tenant).map(|heard| heard.at).collect();
        let until = ends.iter().copied().chain([start + CLASSES_TIME]);
        let gaps = [start].into_iter().chain(ends.iter().copied()).zip(until);
        let gap = gaps.map(|(from, until)| until.saturating_duration_since(from)).max().unwrap_or_default();
        eprintln!("priorities: {} of class {} ended, {gap:?} apart at most", ends.len(), line.priority);
        longest = longest.max((gap, line.priority, ends.len()));
    }
    let (gap, priority, ends) = longest;
    table.push(Row {
        what: "priorities 0 to 9: the longest between two ends of one class".to_owned(),
        figure: format!("{:.1} s, class {priority} ({ends} ended in {} s)", gap.as_secs_f64(), CLASSES_TIME.as_secs()),
        target: Some(at_most(STARVES_SECONDS, "s", gap.as_secs_f64())),
    });
    Ok(())
}

/// Of whom as much is kept waiting.
struct Line {
    tenant: String,
    priority: u32,
}

/// What was heard in that time from when all of the first ones were sent; each that ends makes room for the next.
async fn saturate(policy: &Policy, lines: &[Line], time: Duration) -> anyhow::Result<(Instant, Vec<Heard>)> {
    let nats = NatsServer::start();
    let worker = Worker::named("worker").flag("--sandbox-mode").flag("--log-level=warn").flag(policy.flag());
    // The slots for CPU work only widen the look-ahead, so that all of it waits in this worker.
    let worker = worker.flag(format!("--io-pool-size={SLOTS}")).flag("--cpu-pool-size=1024");
    let _worker = worker.start(&nats).await;
    let router = pace::connect(&nats).await?;
    let mut results = pace::listen(&router).await?;
    let mut sent = 0;
    for _ in 0..KEPT {
        for line in lines {
            send(&router, line, &mut sent).await?;
        }
    }
    router.flush().await?;
    let start = Instant::now();
    let mut heard = Vec::new();
    while start.elapsed() < time {
        let one = pace::next(&mut results).await?;
        if let Some(line) = lines.iter().find(|line| line.tenant == one.tenant) {
            send(&router, line, &mut sent).await?;
        }
        heard.push(one);
    }
    Ok((start, heard))
}

async fn send(router: &Client, line: &Line, sent: &mut usize) -> anyhow::Result<()> {
    *sent += 1;
    let job = json!({
        "type": "http.request", "method": "GET", "url": "http://peer.example/ok", "sandbox": {"delay_ms": HOLDS_MS},
    });
    let mut assignment = assignment(&line.tenant, &format!("a-{sent}"), job);
    if let Some(fields) = assignment.as_object_mut() {
        fields.insert("priority".to_owned(), line.priority.into());
    }
    router.publish(ASSIGN, assignment.to_string().into()).await?;
    Ok(())
}
