//! One block to its end: attempts, delays, deadline.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt;
use jiff::Timestamp;

use crate::assignment::Assignment;
use crate::blocks::cpu::CpuTime;
use crate::blocks::http::Webhook;
use crate::blocks::pieces::Sink;
use crate::blocks::{Blocks, Output, Scope, sandbox};
use crate::failpoint::{self, Point};
use crate::fault::{Cause, Fault, Invalid};
use crate::trace_context::TraceContext;

/// Who does the work.
#[derive(Debug)]
pub enum Engine {
    /// The blocks themselves.
    Real(Arc<Blocks>),
    /// Canned results: nothing outside is touched, but the blocks say what they would refuse before that.
    Sandbox(Arc<Blocks>),
}

impl Engine {
    /// Who is told of a request for approval; `None` also in the sandbox.
    pub fn approval_webhook(&self) -> Option<Arc<Webhook>> {
        match self {
            Self::Real(blocks) => blocks.approval_webhook(),
            Self::Sandbox(_) => None,
        }
    }

    /// What can be refused at the door: a path outside the safe roots, an address literal that the policy refuses.
    pub fn refuses(&self, assignment: &Assignment) -> Option<Invalid> {
        match self {
            Self::Real(blocks) => blocks.refuses(&assignment.block),
            Self::Sandbox(blocks) => {
                sandbox::refuses(&assignment.sandbox).or_else(|| blocks.refuses(&assignment.block))
            }
        }
    }

    /// Returns when nothing of the work that has ended goes on elsewhere.
    pub async fn stopped(&self) {
        match self {
            Self::Real(blocks) | Self::Sandbox(blocks) => blocks.stopped().await,
        }
    }

    /// Says of a fault whether anything outside can have been touched.
    fn mark(&self, mut fault: Fault) -> Fault {
        if matches!(self, Self::Sandbox(_)) {
            fault.details.sandbox = Some(true);
        }
        fault
    }
}

/// What bounds every execution.
#[derive(Clone, Debug)]
pub struct Limits {
    /// The CPU time of the block over all attempts.
    pub cpu_time: CpuTime,
    /// The most bytes that an output may have as JSON.
    pub max_output_bytes: usize,
}

/// What ties a block to the world around it.
#[derive(Clone, Debug, Default)]
pub struct Links {
    /// The trace that its calls belong to.
    pub trace: Option<TraceContext>,
    /// Where a streamed output goes.
    pub sink: Option<Arc<dyn Sink>>,
}

/// How one attempt failed.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// When it began.
    pub started_at: Timestamp,
    /// How long it took.
    pub latency: Duration,
    /// Why it failed.
    pub fault: Fault,
}

/// A block that has ended.
#[derive(Debug)]
pub struct Execution {
    /// What came of it.
    pub outcome: Result<Output, Fault>,
    /// The attempts that failed, in order.
    pub failed: Vec<Attempt>,
    /// All attempts, the successful one included.
    pub attempts: u32,
    /// From the first attempt's start to the end.
    pub latency: Duration,
    /// Of all threads that worked for it.
    pub cpu_time: Duration,
}

impl Execution {
    /// Of a block that never began.
    pub fn not_begun(fault: Fault) -> Self {
        let failed = Vec::new();
        Self { outcome: Err(fault), failed, attempts: 0, latency: Duration::ZERO, cpu_time: Duration::ZERO }
    }
}

/// A block is over, or the right to run it is gone.
#[derive(Debug)]
pub enum Ended {
    /// It came to an end of its own.
    Executed(Execution),
    /// Nothing may start any more on the delivery that it came with: its outcome so far does not count.
    Abandoned,
}

/// Runs the block until it succeeds, fails for good, runs out of attempts or passes its deadline.
///
/// `may_start` is asked before each attempt; `cancelled` ends it at once.
pub async fn execute(
    engine: &Engine,
    assignment: &Assignment,
    limits: Limits,
    links: Links,
    may_start: impl Fn() -> bool,
    cancelled: impl Future<Output = Fault>,
) -> Ended {
    let mut cancelled = std::pin::pin!(cancelled);
    let started = Instant::now();
    let deadline = started + assignment.timeout;
    let mut scope = Scope {
        tenant: assignment.key.tenant.clone(),
        idempotency_key: assignment.key.token(),
        trace: links.trace,
        attempt: 1,
        sink: links.sink,
        deadline,
        max_output_bytes: limits.max_output_bytes,
        cpu_time: limits.cpu_time,
    };
    let mut failed = Vec::new();
    for attempt in 1.. {
        if !may_start() {
            return Ended::Abandoned;
        }
        scope.attempt = attempt;
        let started_at = Timestamp::now();
        let attempt_started = Instant::now();
        let work = one_attempt(engine, assignment, &scope);
        let outcome = tokio::select! {
            biased;
            outcome = tokio::time::timeout_at(deadline.into(), work) => outcome.unwrap_or_else(|_| Err(too_late(assignment))),
            fault = &mut cancelled => Err(fault),
        };
        let fault = match outcome {
            Ok(output) => {
                return Ended::Executed(finished(Ok(output), failed, attempt, started, scope.cpu_time.used()));
            }
            Err(fault) => engine.mark(fault),
        };
        let is_repeated = fault.may_repeat && fault.cause.is_retried_here();
        let delay = is_repeated.then(|| delay(assignment, &fault, attempt)).flatten();
        failed.push(Attempt { started_at, latency: attempt_started.elapsed(), fault: fault.clone() });
        match delay {
            Some(delay) if Instant::now() + delay < deadline => tokio::select! {
                () = tokio::time::sleep(delay) => {}
                fault = &mut cancelled => {
                    return Ended::Executed(finished(Err(fault), failed, attempt, started, scope.cpu_time.used()));
                }
            },
            _ => return Ended::Executed(finished(Err(fault), failed, attempt, started, scope.cpu_time.used())),
        }
    }
    Ended::Abandoned
}

async fn one_attempt(engine: &Engine, assignment: &Assignment, scope: &Scope) -> Result<Output, Fault> {
    let block = &assignment.block;
    let work = async {
        failpoint::reach(Point::BeforeEffect).await;
        let outcome = match engine {
            Engine::Real(blocks) => blocks.run(block, scope).await,
            Engine::Sandbox(blocks) => match blocks.check(block, scope).await {
                Ok(()) => sandbox::run(block, &assignment.sandbox, scope).await,
                Err(refused) => Err(refused),
            },
        };
        failpoint::reach(Point::AfterEffect).await;
        outcome
    };
    let outcome = AssertUnwindSafe(work).catch_unwind().await;
    outcome.unwrap_or_else(|panic| Err(Fault::new(Cause::Internal, format!("internal error: {}", words(&*panic)))))
}

/// What stands in the source. What was made while the block ran may quote what it works on.
fn words(panic: &(dyn std::any::Any + Send)) -> &'static str {
    panic.downcast_ref::<&str>().copied().unwrap_or("a panic")
}

fn too_late(assignment: &Assignment) -> Fault {
    Fault::new(
        assignment.block.kind().deadline_passed(),
        format!("not done within {} ms", assignment.timeout.as_millis()),
    )
}

fn delay(assignment: &Assignment, fault: &Fault, attempt: u32) -> Option<Duration> {
    let delay = assignment.backoff.delay_after(attempt, fastrand::f64())?;
    Some(fault.retry_after.map_or(delay, |asked| asked.max(delay)))
}

fn finished(
    outcome: Result<Output, Fault>,
    failed: Vec<Attempt>,
    attempts: u32,
    started: Instant,
    cpu_time: Duration,
) -> Execution {
    Execution { outcome, failed, attempts, latency: started.elapsed(), cpu_time }
}
