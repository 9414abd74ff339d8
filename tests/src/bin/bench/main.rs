//! `make bench`: figures of the worker, each beside its target, in one table; `make bench-tenants`: what tenants are
//! promised; `make bench-operator` and `make bench-scale`: the operator's.
//!
//! Machines are shared and noisy: read the ratio to the bare loop, which takes turns with the worker, not the rates.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "its output is its product")]

mod noop; // the worker beside the bare loop
mod bare; // what the broker allows, with nothing around it
mod gate; // the rate and the latencies that a worker must reach
mod cancel; // how soon running work ends
mod memory; // what a worker holds
mod tenants; // what tenants do to each other, and what their bounds cost
mod operator; // many pools
mod scale; // from work to workers
mod pace; // work that comes when it is due
mod figures; // the kernel's figures, medians
mod table; // all of it, for a person

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

use table::Table;

#[derive(Parser)]
struct Arguments {
    /// Assignments in each measurement of no-ops.
    #[arg(long, default_value_t = 100_000)]
    tasks: usize,
    /// How often each of those is measured; the median counts.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long the gate's rate is kept up.
    #[arg(long, default_value_t = 20)]
    seconds: usize,
    /// One group of figures instead of all.
    #[arg(long)]
    only: Option<Group>,
    #[command(subcommand)]
    part: Option<Part>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Group {
    /// The worker beside the bare loop.
    Noop,
    /// Rate and latencies of all blocks.
    Gate,
    /// How soon running work ends that is cancelled.
    Cancel,
    /// What a worker holds.
    Memory,
}

#[derive(Subcommand)]
enum Part {
    /// The bare loop, in a process of its own as the worker is.
    Bare {
        /// Where the broker is.
        url: String,
        /// Without asking what is recorded of each assignment.
        #[arg(long)]
        no_look_up: bool,
    },
    /// What tenants are promised.
    Tenants(tenants::Arguments),
    /// The operator and so many pools, instead of the worker.
    Operator {
        /// How many.
        #[arg(long, default_value_t = 200)]
        pools: usize,
    },
    /// The operator on a real Kubernetes, each time that work comes, instead of the worker.
    Scale {
        /// How often it comes in mode Operator, half of them where nobody works.
        #[arg(long, default_value_t = 50)]
        spikes: usize,
        /// How often in mode HPA, meanwhile.
        #[arg(long, default_value_t = 6)]
        autoscaled: usize,
        /// How often in mode KEDA, afterwards, in the tests' own cluster.
        #[arg(long, default_value_t = 0)]
        driven: usize,
        /// How the API server is reached.
        #[arg(long, env = "KUBECONFIG")]
        kubeconfig: PathBuf,
    },
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match arguments.part {
        Some(Part::Bare { url, no_look_up }) => runtime.block_on(bare::run(&url, !no_look_up)),
        Some(Part::Tenants(arguments)) => runtime.block_on(tenants::run(&arguments)),
        Some(Part::Operator { pools }) => runtime.block_on(operator::run(pools)),
        Some(Part::Scale { spikes, autoscaled, driven, kubeconfig }) => {
            runtime.block_on(scale::run(&kubeconfig, spikes, autoscaled, driven))
        }
        None => runtime.block_on(measure(&arguments)),
    }
}

async fn measure(arguments: &Arguments) -> anyhow::Result<()> {
    let mut table = Table::default();
    let wants = |group| arguments.only.is_none_or(|only| only == group);
    if wants(Group::Memory) {
        memory::run(&mut table).await?;
    }
    if wants(Group::Gate) {
        gate::run(arguments.seconds, &mut table).await?;
    }
    if wants(Group::Cancel) {
        cancel::run(&mut table).await?;
    }
    if wants(Group::Noop) {
        noop::run(arguments.tasks, arguments.rounds, &mut table).await?;
    }
    table.print();
    Ok(())
}
