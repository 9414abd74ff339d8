//! What a worker says of itself, and what it is told.

use serde::{Deserialize, Serialize};

use super::verdict::Refused;
use crate::pool::ByPool;

/// What a worker says of itself on [`WORKER_REPORT`](super::WORKER_REPORT), and when it is told something.
#[derive(Debug, Serialize)]
pub struct WorkerReport<'a> {
    /// [`VERSION`](super::VERSION).
    pub version: &'static str,
    /// Its id.
    pub worker: &'a str,
    /// `<namespace>/<name>` of its WorkerPool.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool: Option<&'a str>,
    /// `general`, or `gpu` where it has only GPU slots.
    pub class: &'static str,
    /// Blocks that may run at once.
    pub slots: ByPool<usize>,
    /// Blocks that run.
    pub busy: ByPool<usize>,
    /// The sum of these.
    pub running: usize,
    /// Deliveries here that have not begun.
    pub waiting: usize,
    /// Whether it takes work.
    pub pulling: bool,
    /// Whether its policy says that it must not.
    pub paused: bool,
    /// Blocks that have ended since it started.
    pub finished: u64,
    /// Milliseconds that these held their slots.
    pub work_ms: u64,
    /// Tenants that have work here, had some of late, or were refused some: the busiest 20 at most.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tenants: Vec<TenantReport<'a>>,
    /// Unix time in milliseconds.
    pub started_at: i64,
    /// Unix time in milliseconds.
    pub reported_at: i64,
    /// The version of the program.
    pub build: &'static str,
}

/// What a tenant does in a worker.
#[derive(Debug, Serialize)]
pub struct TenantReport<'a> {
    /// Which one.
    pub id: &'a str,
    /// Its blocks that run.
    pub running: usize,
    /// Its blocks that wait for a slot.
    pub queued: usize,
    /// Its assignments that were refused for a budget since the worker started.
    pub refused: u64,
}

/// What a worker is told on [`WORKER_CONTROL`](super::WORKER_CONTROL).
#[derive(Debug, Deserialize)]
pub struct WorkerControl {
    /// Whether to take work.
    pub pull: Option<bool>,
}

/// The answer to what cannot be read as a [`WorkerControl`].
#[derive(Debug, Serialize)]
pub struct ControlRefused<'a> {
    /// The worker's id.
    pub worker: &'a str,
    /// Why.
    pub error: Refused<'a>,
}
