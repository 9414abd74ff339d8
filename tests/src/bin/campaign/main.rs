//! Fault campaigns: real workers on a real broker under load, while something breaks all the time. Each ends with the
//! auditor, a program of its own, whose JSON line is the answer. The seed makes the same assignments and the same
//! faults; what they meet is up to the machine.
#![expect(
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "test support: a failure here is the campaign's failure, and its output is its product"
)]

mod kill; // workers and the broker are killed, paused and cut off
mod crash; // one fault exactly between two steps, everywhere
mod rollout; // workers are replaced
mod scale_in; // the operator takes workers away
mod scene; // what they are played on
mod nemesis; // who does that, and when
mod bodies; // workers in pods
mod crew; // workers, each behind a network that breaks
mod load; // the Router
mod sink; // whom blocks call
mod listener; // who hears verdicts and results
mod landed; // which faults were real
mod auditor; // the judge

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    origin: Origin,
    #[command(subcommand)]
    campaign: Campaign,
}

/// What a run is known by.
#[derive(Args, Clone, Debug)]
struct Origin {
    /// Which assignments and faults; one by chance if missing.
    #[arg(long, global = true, default_value_t = fastrand::u64(..1_000_000))]
    seed: u64,
    /// Of the sources, for the JSON line.
    #[arg(long, global = true, default_value = "unknown")]
    commit: String,
}

#[derive(Subcommand)]
enum Campaign {
    /// Workers and the broker are killed under load (G1, G2; W-01, W-06, W-14).
    Kill(kill::Plan),
    /// One fault exactly between two steps of an assignment, everywhere (G3).
    Crash(crash::Plan),
    /// Workers are replaced under load, one generation after the other (W-05).
    Rollout(rollout::Plan),
    /// The operator takes workers away under load, again and again (O-19).
    ScaleIn(scale_in::Plan),
}

#[tokio::main]
async fn main() -> ExitCode {
    let Arguments { origin, campaign } = Arguments::parse();
    eprintln!("seed {}", origin.seed);
    let ended = match &campaign {
        Campaign::Kill(plan) => kill::run(plan, &origin).await,
        Campaign::Crash(plan) => crash::run(plan, &origin).await,
        Campaign::Rollout(plan) => rollout::run(plan, &origin).await,
        Campaign::ScaleIn(plan) => scale_in::run(plan, &origin).await,
    };
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("campaign: {error:#}");
            ExitCode::from(2)
        }
    }
}
