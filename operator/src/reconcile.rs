//! The operator's story. Everything it does for a pool is named here.

use std::sync::Arc;
use std::time::Duration;

use beamline_crds::{WorkerPool, WorkerPoolStatus};
use jiff::{Timestamp, Unit};
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::controller::Action;
use kube::runtime::reflector::Lookup;
use tracing::Span;

use crate::apply::{Applied, apply, retire};
use crate::controller::{Context, RESYNC};
use crate::desired::desired;
use crate::error::Error;
use crate::notice::Notice;
use crate::observe::observe;
use crate::pool::validate;
use crate::scale::Decisions;
use crate::signals::Reading;
use crate::sizing::{self, Sizing};
use crate::status;
use crate::streams::route_subject;
use crate::telemetry::spans;
use crate::watched::Watched;

/// What a pool refers to has no watch: while something is wrong with it, it is looked at this often.
const LOOK_AGAIN: Duration = Duration::from_secs(20);
/// Workers go when time has passed, too: while some are about to, they are looked at this often.
const WATCH_THEM_GO: Duration = Duration::from_secs(1);

/// What a reconcile that went well leaves behind.
pub struct Converged {
    /// Whether workers take no work.
    pub paused: bool,
    /// How many workers, and why.
    pub decisions: Decisions,
    /// The children as they are now.
    pub applied: Applied,
    /// The workers, one by one.
    pub pods: Vec<Arc<Pod>>,
    /// What works and should not stay as it is.
    pub notices: Vec<Notice>,
    /// What workers with GPUs that are asked for no more still take work from.
    pub draining: Option<String>,
    /// Whether workers may go though nothing but time passes.
    pub some_may_go: bool,
    /// What KEDA is told in its mode.
    pub demand: Option<i64>,
}

/// Makes a pool what it should be and says how that went.
pub async fn reconcile(watched: Arc<Watched>, ctx: Arc<Context>) -> Result<Action, Error> {
    let pool = watched.pool.as_ref().map_err(|invalid| Error::Unreadable(invalid.error.clone()))?;
    if pool.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let reading = ctx.signals.reading(&watched.to_object_ref(()));
    let before = status::current(&ctx, pool);
    let outcome = converge(pool, &ctx, &reading, &before, versions(&ctx, &watched)).await;
    let after = status::compute(pool, &before, outcome.as_ref(), &reading, now());
    let says = status::ready(&after).map(|ready| ready.reason.clone());
    let next = step("publish", status::publish(&ctx, pool, &before, after)).await?;
    let converged = outcome?;
    Span::current().record("reason", says);
    Ok(Action::requeue(next.min(converged.look_again())))
}

impl Converged {
    fn look_again(&self) -> Duration {
        // What KEDA says of its ScaledObject has no watch either.
        let looks_again = !self.notices.is_empty() || self.applied.scaled_object.is_some();
        let next = match (self.some_may_go, looks_again) {
            (true, _) => WATCH_THEM_GO,
            (false, true) => LOOK_AGAIN,
            (false, false) => RESYNC,
        };
        next.min(self.applied.tells_again.unwrap_or(RESYNC))
    }
}

async fn converge(
    pool: &WorkerPool,
    ctx: &Context,
    reading: &Reading,
    before: &WorkerPoolStatus,
    versions: Vec<Notice>,
) -> Result<Converged, Error> {
    let valid = validate(pool, &ctx.worker_image)?;
    let observed = step("observe", observe(ctx, &valid)).await?;
    let sizing = sizing::size(pool, &valid, ctx, &observed, reading, before).await?;
    let desired = desired(&valid, sizing.replicas(), &observed.surroundings);
    let unmarked = step("retire", retire(ctx, &valid, &sizing)).await?;
    let applied = step("apply", apply(ctx, &valid, &observed, &desired)).await?;
    ctx.signals.follow(&valid, &sizing.decisions);
    let notices = observed.surroundings.notices.into_iter().chain(unmarked).chain(applied.notices.clone());
    let notices = notices.chain(versions).collect();
    let draining = observed.gpu_stays.then(|| route_subject(&valid.nats));
    let some_may_go = sizing.some_may_go();
    let Sizing { decisions, demand, .. } = sizing;
    let (paused, pods) = (valid.paused, observed.pods);
    Ok(Converged { paused, decisions, applied, pods, notices, draining, some_may_go, demand })
}

/// What comes of a type that is newer or older than the operator.
fn versions(ctx: &Context, watched: &Watched) -> Vec<Notice> {
    let unplaced = ctx.memory.unplaced(&watched.to_object_ref(()));
    let newer = (!watched.unknown.is_empty()).then(|| Notice::operator_outdated(&watched.unknown));
    let older = (!unplaced.is_empty()).then(|| Notice::type_outdated(&unplaced));
    newer.into_iter().chain(older).collect()
}

fn step<T>(name: &'static str, work: impl Future<Output = Result<T, Error>>) -> impl Future<Output = Result<T, Error>> {
    spans::within(spans::step(name), Error::reason, work)
}

/// As the API server keeps it: a finer time would differ from what was written, and be written again.
fn now() -> Timestamp {
    Timestamp::now().round(Unit::Second).unwrap_or_default()
}
