//! `make bench`: figures of the worker, each beside its target, in one table.
//!
//! Machines are shared and noisy: read the ratio to the bare loop, which takes turns with the worker, not the rates.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "its output is its product")]

mod noop; // the worker beside the bare loop
mod bare; // what the broker allows, with nothing around it
mod memory; // what a worker holds
mod figures; // the kernel's figures, medians
mod table; // all of it, for a person

use clap::{Parser, Subcommand};

use table::Table;

#[derive(Parser)]
struct Arguments {
    /// Assignments in each measurement of no-ops.
    #[arg(long, default_value_t = 100_000)]
    tasks: usize,
    /// How often each of those is measured; the median counts.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    #[command(subcommand)]
    part: Option<Part>,
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
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match arguments.part {
        Some(Part::Bare { url, no_look_up }) => runtime.block_on(bare::run(&url, !no_look_up)),
        None => runtime.block_on(measure(&arguments)),
    }
}

async fn measure(arguments: &Arguments) -> anyhow::Result<()> {
    let mut table = Table::default();
    memory::run(&mut table).await?;
    noop::run(arguments.tasks, arguments.rounds, &mut table).await?;
    table.print();
    Ok(())
}
