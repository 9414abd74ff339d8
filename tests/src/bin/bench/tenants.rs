//! What tenants are promised, each promise measured beside its target: budgets while workers die, a light tenant beside
//! many noisy ones, slow peers, weights and priorities, and what all of it costs.

mod budget; // workers die, and no window is overspent
mod neighbours; // what others do to a tenant: many noisy ones, one with slow peers
mod order; // weights and priorities where everybody waits

use clap::{Args, ValueEnum};

use crate::noop;
use crate::table::Table;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Of the kills of workers and of when noisy tenants send; by chance if it is not given.
    #[arg(long)]
    seed: Option<u64>,
    /// Windows of the budget that count.
    #[arg(long, default_value_t = 3)]
    windows: u32,
    /// How long a window is.
    #[arg(long, default_value_t = 20)]
    window_seconds: u32,
    /// How often a tenant is measured alone, and beside others.
    #[arg(long, default_value_t = 4)]
    turns: usize,
    /// Of ten seconds each, in which shares are counted.
    #[arg(long, default_value_t = 2)]
    spans: u32,
    /// No-ops in each measurement of what tenants cost.
    #[arg(long, default_value_t = 60_000)]
    tasks: usize,
    /// How often each of those is measured; the median counts.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// One group of figures instead of all.
    #[arg(long)]
    only: Option<Group>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Group {
    /// A budget while workers are killed.
    Budget,
    /// A light tenant beside a hundred noisy ones.
    Light,
    /// A tenant beside one whose peers never answer.
    Slow,
    /// Weights and priorities.
    Order,
    /// What budgets, ceilings and many tenants cost.
    Cost,
}

/// Everything, and its table.
pub(crate) async fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let seed = arguments.seed.unwrap_or_else(|| fastrand::u64(..));
    eprintln!("seed {seed}");
    let mut table = Table::default();
    let wants = |group| arguments.only.is_none_or(|only| only == group);
    if wants(Group::Budget) {
        budget::run(arguments.windows, arguments.window_seconds, seed, &mut table).await?;
    }
    if wants(Group::Light) {
        neighbours::light(arguments.turns, seed, &mut table).await?;
    }
    if wants(Group::Slow) {
        neighbours::slow(arguments.turns, &mut table).await?;
    }
    if wants(Group::Order) {
        order::run(arguments.spans, &mut table).await?;
    }
    if wants(Group::Cost) {
        noop::tenants(arguments.tasks, arguments.rounds, &mut table).await?;
    }
    table.print();
    Ok(())
}
