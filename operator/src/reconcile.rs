//! The operator's story. Everything it does for a pool is named here.

use std::sync::Arc;
use std::time::Duration;

use beamline_crds::WorkerPool;
use jiff::{Timestamp, Unit};
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::controller::Action;
use kube::runtime::reflector::Lookup;

use crate::apply::{Applied, apply};
use crate::controller::{Context, Watched};
use crate::desired::desired;
use crate::error::Error;
use crate::notice::Notice;
use crate::observe::observe;
use crate::pool::validate;
use crate::scale::{self, Decisions};
use crate::status;

/// What a pool refers to has no watch: while something is wrong with it, it is looked at this often.
const LOOK_AGAIN: Duration = Duration::from_secs(20);

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
}

/// Makes a pool what it should be and says how that went.
pub async fn reconcile(watched: Arc<Watched>, ctx: Arc<Context>) -> Result<Action, Error> {
    let pool = watched.0.as_ref().map_err(|invalid| Error::Unreadable(invalid.error.clone()))?;
    if pool.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let outcome = converge(pool, &ctx).await;
    let reading = ctx.signals.reading(&watched.to_object_ref(()));
    let before = status::current(&ctx, pool);
    let after = status::compute(pool, &before, outcome.as_ref(), &reading, now());
    let next = status::publish(&ctx, pool, &before, after).await?;
    outcome.map(|converged| Action::requeue(if converged.notices.is_empty() { next } else { next.min(LOOK_AGAIN) }))
}

async fn converge(pool: &WorkerPool, ctx: &Context) -> Result<Converged, Error> {
    let valid = validate(pool, &ctx.worker_image)?;
    let observed = observe(ctx, &valid).await?;
    let decisions = scale::decide(&valid);
    let desired = desired(&valid, &decisions, &observed.surroundings);
    let applied = apply(ctx, &valid, &observed, &desired).await?;
    ctx.signals.follow(&valid, &decisions);
    let notices = observed.surroundings.notices.into_iter().chain(applied.notice.clone()).collect();
    Ok(Converged { paused: valid.paused, decisions, applied, pods: observed.pods, notices })
}

/// As the API server keeps it: a finer time would differ from what was written, and be written again.
fn now() -> Timestamp {
    Timestamp::now().round(Unit::Second).unwrap_or_default()
}
