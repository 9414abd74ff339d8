//! The auditor of a fault campaign: reads what the broker keeps and what the campaign wrote down, says in one JSON line
//! what it found, and fails where a promise was broken. It shares no code with the worker, and no process with those who
//! cause the faults.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "its output is its product")]

mod streams; // what the broker keeps

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use beamline_tests::audit::{Audit, Findings, Recovery, Rules};
use beamline_tests::journal;
use clap::Parser;
use serde::Serialize;

/// The files of facts, in the order in which they are read: what was submitted, what was heard, what was done.
const FACTS: [&str; 3] = ["router", "heard", "effects"];

/// Orphaned by the death of its worker alone.
const WORKER_KILL: &str = "worker-kill";

#[derive(Parser)]
struct Arguments {
    /// The broker of the campaign, where everything is settled.
    #[arg(long)]
    nats_url: String,
    /// Where the campaign wrote its files `router`, `heard`, `effects` and `faults`.
    #[arg(long)]
    journal: PathBuf,
    /// What the campaign is to show.
    #[arg(long)]
    goal: String,
    /// How often a block may be tried in one delivery.
    #[arg(long, default_value_t = 3)]
    attempts: u64,
    /// How often a peer may be asked for one assignment.
    #[arg(long)]
    effects: Option<u32>,
    /// After so many seconds, nobody is still at what has a final record.
    #[arg(long, value_parser = seconds)]
    at_it: Option<Duration>,
    /// Within so many seconds after the death of its worker, ninety-nine of a hundred orphans run again.
    #[arg(long, value_parser = seconds)]
    recovery: Option<Duration>,
    /// `kind=count`: with fewer faults of this kind the campaign does not count.
    #[arg(long, value_parser = least)]
    least: Vec<(String, u64)>,
    /// Repeated in the answer.
    #[arg(long)]
    seed: u64,
    /// Repeated in the answer.
    #[arg(long, default_value = "unknown")]
    commit: String,
}

/// The JSON line.
#[derive(Serialize)]
struct Line<'a> {
    goal: &'a str,
    ok: bool,
    /// Assignments that the broker accepted.
    n: u64,
    publications: u64,
    /// By kind, those that landed.
    faults: &'a BTreeMap<String, u64>,
    lost: u64,
    dup: u64,
    phantom: u64,
    disorder: u64,
    excess: u64,
    stranded: u64,
    recorded: u64,
    rejected: u64,
    deliveries: u64,
    redeliveries: u64,
    effects: u64,
    repeated: u64,
    unheard: u64,
    /// How long orphaned work waited until it ran again, by whose death held it up: that of its worker, or that of the
    /// broker meanwhile, which counts every hold anew when it is back.
    recovery_ms: BTreeMap<&'static str, Recovery>,
    seconds: u64,
    seed: u64,
    commit: &'a str,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match audit(&Arguments::parse()).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("audit: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Whether everything holds and enough has happened to say so.
async fn audit(arguments: &Arguments) -> anyhow::Result<bool> {
    let mut audit =
        Audit::new(Rules { attempts: arguments.attempts, effects: arguments.effects, at_it: arguments.at_it });
    for file in FACTS {
        journal::read(&arguments.journal.join(file), |token, fact| audit.learn(token, fact));
    }
    let left = streams::read(&arguments.nats_url, &mut audit).await?;
    let mut found = audit.end(left);
    let faults = Faults::read(&arguments.journal.join("faults"))?;
    let recoveries = recoveries(&found.recoveries, &faults.broker_kills);
    if let Some(bound) = arguments.recovery {
        let recovery = recoveries.get(WORKER_KILL);
        let unknown = || Some("nothing was orphaned and ran again".to_owned());
        found.violations.extend(recovery.map_or_else(unknown, |recovery| recovery.too_slow(bound)));
    }
    for (kind, least) in &arguments.least {
        let landed = faults.landed.get(kind).copied().unwrap_or(0);
        if landed < *least {
            found.violations.push(format!("only {landed} of at least {least} faults of the kind {kind} have landed"));
        }
    }
    if found.assignments == 0 {
        found.violations.push("nothing was submitted".to_owned());
    }
    found.violations.iter().for_each(|violation| eprintln!("{violation}"));
    println!("{}", serde_json::to_string(&line(arguments, &found, &faults, recoveries, left.deliveries))?);
    Ok(found.violations.is_empty())
}

fn line<'a>(
    arguments: &'a Arguments,
    found: &Findings,
    faults: &'a Faults,
    recovery_ms: BTreeMap<&'static str, Recovery>,
    deliveries: u64,
) -> Line<'a> {
    Line {
        goal: &arguments.goal,
        ok: found.violations.is_empty(),
        n: found.assignments,
        publications: found.publications,
        faults: &faults.landed,
        lost: found.lost,
        dup: found.duplicates,
        phantom: found.phantoms,
        disorder: found.disorder,
        excess: found.excess,
        stranded: found.stranded,
        recorded: found.recorded,
        rejected: found.rejected,
        deliveries,
        redeliveries: deliveries.saturating_sub(found.publications),
        effects: found.effects,
        repeated: found.repeated,
        unheard: found.unheard,
        recovery_ms,
        seconds: faults.seconds,
        seed: arguments.seed,
        commit: &arguments.commit,
    }
}

/// From the last death that held it up until it ran again.
fn recoveries(found: &[(i64, i64)], broker_kills: &[i64]) -> BTreeMap<&'static str, Recovery> {
    let mut times = BTreeMap::<_, Vec<i64>>::new();
    for (orphaned, again) in found {
        let (whose, since) = match broker_kills.iter().rfind(|kill| (orphaned..again).contains(kill)) {
            Some(kill) => ("broker-kill", kill),
            None => (WORKER_KILL, orphaned),
        };
        times.entry(whose).or_default().push(again - since);
    }
    times.into_iter().map(|(whose, times)| (whose, Recovery::of(times))).collect()
}

/// The faults that landed, a line `<milliseconds since 1970> <kind> …` each, between a first and a last line `… start` and
/// `… end`.
struct Faults {
    landed: BTreeMap<String, u64>,
    /// When, in milliseconds since 1970, in their order.
    broker_kills: Vec<i64>,
    seconds: u64,
}

impl Faults {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let (mut landed, mut broker_kills, mut times) = (BTreeMap::new(), Vec::new(), Vec::new());
        for line in text.lines() {
            let mut words = line.split(' ');
            let (Some(time), Some(kind)) = (words.next().and_then(|time| time.parse::<i64>().ok()), words.next())
            else {
                bail!("{}: {line:?} says nothing", path.display());
            };
            times.push(time);
            if kind == "broker-kill" {
                broker_kills.push(time);
            }
            if !["start", "end"].contains(&kind) {
                *landed.entry(kind.to_owned()).or_default() += 1;
            }
        }
        let millis = times.last().zip(times.first()).map_or(0, |(last, first)| last - first);
        Ok(Self { landed, broker_kills, seconds: millis.unsigned_abs() / 1000 })
    }
}

fn seconds(text: &str) -> Result<Duration, std::num::ParseFloatError> {
    text.parse().map(Duration::from_secs_f64)
}

fn least(text: &str) -> Result<(String, u64), String> {
    let (kind, count) = text.split_once('=').ok_or("write kind=count")?;
    Ok((kind.to_owned(), count.parse().map_err(|error| format!("{count:?}: {error}"))?))
}
