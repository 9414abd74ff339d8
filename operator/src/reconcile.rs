//! The operator's story. Everything it does for a pool is named here.

use std::sync::Arc;

use beamline_crds::WorkerPool;
use jiff::{Timestamp, Unit};
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::controller::Action;
use kube::runtime::reflector::{Lookup, ObjectRef};

use crate::apply::{Applied, apply};
use crate::controller::{Context, Watched};
use crate::desired::desired;
use crate::error::Error;
use crate::observe::observe;
use crate::pool::validate;
use crate::scale::{self, Decisions};
use crate::status;

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
}

/// Makes a pool what it should be and says how that went.
pub async fn reconcile(watched: Arc<Watched>, ctx: Arc<Context>) -> Result<Action, Error> {
    let pool = watched.0.as_ref().map_err(|invalid| Error::Unreadable(invalid.error.clone()))?;
    if pool.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let outcome = converge(pool, &watched.to_object_ref(()), &ctx).await;
    let reading = ctx.signals.reading(&watched.to_object_ref(()));
    let before = status::current(&ctx, pool);
    let after = status::compute(pool, &before, outcome.as_ref(), &reading, now());
    let next = status::publish(&ctx, pool, &before, after).await?;
    outcome.map(|_| Action::requeue(next))
}

async fn converge(pool: &WorkerPool, reference: &ObjectRef<Watched>, ctx: &Context) -> Result<Converged, Error> {
    let valid = validate(pool, &ctx.worker_image)?;
    let observed = observe(ctx, &valid).await?;
    let decisions = scale::decide(&valid);
    let desired = desired(&valid, &decisions);
    let applied = apply(ctx, reference, &observed, &desired).await?;
    ctx.signals.follow(&valid, &decisions);
    Ok(Converged { paused: valid.paused, decisions, applied, pods: observed.pods })
}

/// As the API server keeps it: a finer time would differ from what was written, and be written again.
fn now() -> Timestamp {
    Timestamp::now().round(Unit::Second).unwrap_or_default()
}
