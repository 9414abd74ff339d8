//! What others do to a tenant: it is measured alone and beside them, in turns and at the same pace.

use std::time::{Duration, Instant};

use beamline_tests::nats::NatsServer;
use beamline_tests::peer::Peer;
use beamline_tests::policy::Policy;
use beamline_tests::router::{ASSIGN, assignment};
use beamline_tests::wait::within;
use beamline_tests::worker::Worker;
use serde_json::{Value, json};

use crate::figures::{median, percentile};
use crate::pace::{self, Heard, Planned};
use crate::table::{Row, Table, at_least, at_most};

/// How many times as long a tenant may wait beside others as alone.
const TIMES: f64 = 2.0;
/// The part of its throughput that it must keep.
const KEPT: f64 = 0.9;

/// Light tenants, each of which sends once a second: one alone would give too few figures for a percentile.
const LIGHT: usize = 20;
const NOISY: usize = 100;
/// Workers that share the work, with so many slots each.
const WORKERS: usize = 2;
const SLOTS: usize = 64;
/// For how long a block of theirs holds a slot.
const HOLDS: Duration = Duration::from_millis(100);
/// The part of the slots that noisy tenants fill.
const FILLED: f64 = 0.75;
const TURN: Duration = Duration::from_secs(7);

/// Assignments whose peer never answers.
const UNANSWERED: usize = 500;
/// Slots of that worker, and what its neighbour sends in a second.
const FEW_SLOTS: usize = 16;
const RATE: usize = 200;
const SHORT_TURN: Duration = Duration::from_secs(4);

/// What one of the tenants that are measured has waited.
#[derive(Clone, Copy)]
struct Wait {
    /// From when it was due to when its result was heard, without its block's own time.
    total: f64,
    /// In its worker, as that says.
    queued: f64,
}

/// Light tenants beside noisy ones that fill most slots and leave no backlog.
pub(super) async fn light(turns: usize, seed: u64, table: &mut Table) -> anyhow::Result<()> {
    let (nats, policy) = (NatsServer::start(), Policy::new("tenants: {}"));
    let mut workers = Vec::new();
    for number in 0..WORKERS {
        let worker = Worker::named(&format!("worker-{number}")).flag("--sandbox-mode").flag("--log-level=warn");
        workers.push(worker.flag(policy.flag()).flag(format!("--io-pool-size={SLOTS}")).start(&nats).await);
    }
    let router = pace::connect(&nats).await?;
    let mut results = pace::listen(&router).await?;
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    for turn in 0..turns {
        for (waits, is_noisy) in [(&mut alone, false), (&mut beside, true)] {
            let mut due = evenly(LIGHT, "light");
            if is_noisy {
                due.extend(by_chance(&mut random));
            }
            due.sort_by_key(|(due, _)| *due);
            let run = format!("{turn}-{is_noisy}");
            let plan = due.iter().enumerate().map(|(number, (due, tenant))| Planned {
                due: *due,
                payload: assignment(tenant, &format!("{run}-{number}"), holding()).to_string().into(),
            });
            let publishing = pace::publish(nats.url(), plan.collect());
            let heard = pace::hear(&mut results, due.len()).await?;
            let start = publishing.began()?;
            for one in heard.iter().filter(|heard| heard.tenant.starts_with("light")) {
                let (due, _) = due.get(one.number()?).ok_or_else(|| anyhow::anyhow!("an id that is not ours"))?;
                waits.push(Wait::of(one, start + *due, HOLDS));
            }
        }
    }
    let what = format!("light tenants beside {NOISY} noisy ones in {:.0} % of the slots", FILLED * 100.0);
    push_waits(&what, &alone, &beside, table);
    Ok(())
}

/// A tenant beside one with many blocks whose peer takes a request and never answers. A worker alone has neither.
pub(super) async fn slow(turns: usize, table: &mut Table) -> anyhow::Result<()> {
    let (peer, policy) = (Peer::start().await, Policy::new("tenants: {}"));
    let (quiet, busy) = (Place::with(&policy).await?, Place::with(&policy).await?);
    let never = json!({
        "type": "http.request", "method": "POST", "url": peer.url("/gate/never"), "body": "{}", "timeout_ms": 3_600_000,
    });
    for number in 0..UNANSWERED {
        let payload = assignment("slow", &format!("slow-{number}"), never.clone()).to_string();
        busy.router.publish(ASSIGN, payload.into()).await?;
    }
    within(Duration::from_secs(30), "all of them run or wait", async || {
        let here = busy.worker.metric(r#"worker_pool_queue_depth{pool="io"}"#).await
            + busy.worker.metric(r#"worker_slots_busy{pool="io"}"#).await;
        (here >= UNANSWERED as f64).then_some(())
    })
    .await;
    let held = busy.worker.metric(r#"worker_slots_busy{pool="io"}"#).await;

    let (mut alone, mut beside) = (Measured::default(), Measured::default());
    let (mut quiet, mut busy) = (quiet, busy);
    let job = json!({ "type": "http.request", "method": "POST", "url": peer.url("/ok"), "body": "{}" });
    for turn in 0..turns {
        alone.turn(&mut quiet, &format!("alone-{turn}"), &job).await?;
        beside.turn(&mut busy, &format!("beside-{turn}"), &job).await?;
    }
    let what = format!("a tenant beside {UNANSWERED} requests without an answer in {held:.0} of {FEW_SLOTS} slots");
    let kept = beside.rate() / alone.rate();
    table.push(Row {
        what: format!("{what}: throughput, of that alone"),
        figure: format!("{kept:.2} ({:.0} tasks/s)", beside.rate()),
        target: Some(at_least(KEPT, kept)),
    });
    push_waits(&what, &alone.waits, &beside.waits, table);
    Ok(())
}

/// A broker, a worker and who hears it.
struct Place {
    worker: Worker,
    router: async_nats::Client,
    results: async_nats::Subscriber,
    nats: NatsServer,
}

impl Place {
    async fn with(policy: &Policy) -> anyhow::Result<Self> {
        let nats = NatsServer::start();
        let worker = Worker::named("worker").flag("--egress-allow=127.0.0.0/8").flag("--log-level=warn");
        let worker = worker.flag(policy.flag()).flag(format!("--io-pool-size={FEW_SLOTS}")).start(&nats).await;
        let router = pace::connect(&nats).await?;
        let results = pace::listen(&router).await?;
        Ok(Self { worker, router, results, nats })
    }
}

#[derive(Default)]
struct Measured {
    waits: Vec<Wait>,
    time: Duration,
}

impl Measured {
    async fn turn(&mut self, place: &mut Place, run: &str, job: &Value) -> anyhow::Result<()> {
        let due = evenly_within(SHORT_TURN, RATE, "quick");
        let plan = due.iter().enumerate().map(|(number, (due, tenant))| Planned {
            due: *due,
            payload: assignment(tenant, &format!("{run}-{number}"), job.clone()).to_string().into(),
        });
        let publishing = pace::publish(place.nats.url(), plan.collect());
        let heard = pace::hear(&mut place.results, due.len()).await?;
        let start = publishing.began()?;
        for one in &heard {
            let (due, _) = due.get(one.number()?).ok_or_else(|| anyhow::anyhow!("an id that is not ours"))?;
            self.waits.push(Wait::of(one, start + *due, Duration::ZERO));
        }
        self.time += heard.iter().map(|heard| heard.at.duration_since(start)).max().unwrap_or_default();
        Ok(())
    }

    fn rate(&self) -> f64 {
        self.waits.len() as f64 / self.time.as_secs_f64()
    }
}

impl Wait {
    fn of(heard: &Heard, due: Instant, block: Duration) -> Self {
        let millis = |time: Duration| time.as_secs_f64() * 1000.0;
        let total = heard.at.duration_since(due).saturating_sub(block);
        Self { total: millis(total), queued: millis(heard.queued) }
    }
}

/// A block that does nothing but hold a slot.
fn holding() -> Value {
    json!({
        "type": "http.request", "method": "GET", "url": "http://peer.example/ok",
        "sandbox": {"delay_ms": u64::try_from(HOLDS.as_millis()).unwrap_or_default()},
    })
}

/// So many a second in a turn, from as many tenants.
fn evenly(rate: usize, name: &str) -> Vec<(Duration, String)> {
    let due = evenly_within(TURN, rate, name);
    due.into_iter().enumerate().map(|(number, (due, name))| (due, format!("{name}-{}", number % rate))).collect()
}

/// So many a second, of one tenant.
fn evenly_within(time: Duration, rate: usize, name: &str) -> Vec<(Duration, String)> {
    let count = (time.as_secs_f64() * rate as f64) as u32;
    (0..count).map(|number| (time * number / count, name.to_owned())).collect()
}

/// As noisy tenants send that know nothing of each other: as often as fills that part of the slots.
fn by_chance(random: &mut fastrand::Rng) -> Vec<(Duration, String)> {
    let rate = (WORKERS * SLOTS) as f64 * FILLED / HOLDS.as_secs_f64();
    let mut at = 0.0;
    let due = std::iter::from_fn(|| {
        at -= (1.0 - random.f64()).ln() / rate;
        (at < TURN.as_secs_f64()).then(|| (Duration::from_secs_f64(at), format!("noisy-{}", random.usize(..NOISY))))
    });
    due.collect()
}

fn push_waits(what: &str, alone: &[Wait], beside: &[Wait], table: &mut Table) {
    let p99 = |waits: &[Wait], of: fn(&Wait) -> f64| percentile(waits.iter().map(of), 99);
    let p50 = |waits: &[Wait]| median(waits.iter().map(|wait| wait.total));
    let (without, with) = (p99(alone, |wait| wait.total), p99(beside, |wait| wait.total));
    table.push(Row {
        what: format!("{what}: p99 wait, of that alone"),
        figure: format!(
            "{:.2} ({with:.1} ms, alone {without:.1}; p50 {:.1} and {:.1})",
            with / without,
            p50(beside),
            p50(alone)
        ),
        target: Some(at_most(TIMES, "", with / without)),
    });
    table.push(Row {
        what: format!("{what}: p99 of queue_ms"),
        figure: format!("{:.0} ms, alone {:.0}", p99(beside, |wait| wait.queued), p99(alone, |wait| wait.queued)),
        target: None,
    });
}
