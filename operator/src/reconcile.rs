//! The operator's story. Everything it does for a pool is named here.

use std::sync::Arc;

use beamline_crds::{WorkerPool, WorkerPoolStatus};
use jiff::{Timestamp, Unit};
use kube::runtime::controller::Action;
use kube::runtime::reflector::Lookup;
use tracing::Span;

use crate::apply::{apply, retire};
use crate::context::Context;
use crate::converged::Converged;
use crate::desired::desired;
use crate::error::Error;
use crate::notice::Notice;
use crate::observe::observe;
use crate::pool::validate;
use crate::signals::Reading;
use crate::sizing::{self, Sizing};
use crate::status;
use crate::streams::route_subject;
use crate::telemetry::spans;
use crate::watched::Watched;

/// Makes a pool what it should be and says how that went.
pub async fn reconcile(watched: Arc<Watched>, ctx: Arc<Context>) -> Result<Action, Error> {
    let pool = watched.pool.as_ref().map_err(|invalid| Error::Unreadable(invalid.error.clone()))?;
    if pool.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let reading = ctx.signals.reading(&watched.to_object_ref(()));
    let before = status::current(&ctx, pool);
    let outcome = converge(pool, &ctx, &reading, &before, versions(&ctx, &watched)).await;
    if matches!(outcome, Err(Error::NotLeading)) {
        return Err(Error::NotLeading);
    }
    let after = status::compute(pool, &before, outcome.as_ref(), &reading, now());
    let says = after.condition("Ready").map(|ready| ready.reason.clone());
    let next = step("publish", status::publish(&ctx, pool, &before, after)).await?;
    let converged = outcome?;
    Span::current().record("reason", says);
    Ok(Action::requeue(next.min(converged.look_again())))
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
    if sizing.moves(&observed) {
        ctx.tenure.check().await?;
    }
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
