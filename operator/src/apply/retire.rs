//! Carries out what was planned for workers that go or go on.

use std::sync::OnceLock;

use futures::{StreamExt, TryStreamExt, stream};
use kube::runtime::reflector::ObjectRef;

use crate::apply::annotate::{AT_ONCE, annotate};
use crate::context::Context;
use crate::error::Error;
use crate::notice::Notice;
use crate::pool::ValidPool;
use crate::retire::{DELETION_COST, FIRST, Plan};
use crate::sizing::Sizing;
use crate::watched::Watched;

/// Tells workers, and marks pods. Those that cannot be marked stay.
pub async fn retire(ctx: &Context, pool: &ValidPool, sizing: &Sizing) -> Result<Option<Notice>, Error> {
    let pool = &ObjectRef::new(&pool.name).within(&pool.namespace);
    let refused = OnceLock::new();
    for plan in std::iter::once(&sizing.general).chain(&sizing.gpu) {
        carry_out(ctx, pool, plan, &refused).await?;
    }
    Ok(refused.into_inner())
}

async fn carry_out(
    ctx: &Context,
    pool: &ObjectRef<Watched>,
    plan: &Plan,
    refused: &OnceLock<Notice>,
) -> Result<(), Error> {
    if *plan != Plan::at_once(plan.replicas) {
        tracing::debug!(%pool, ?plan, "workers go or go on");
    }
    ctx.signals.tell(pool, &plan.go_on, true).await;
    ctx.signals.tell(pool, &plan.stop, false).await;
    let marks = plan.mark.iter().map(|name| (name, Some(FIRST)));
    let marks = marks.chain(plan.unmark.iter().map(|name| (name, None)));
    let marks = stream::iter(marks).map(Ok);
    marks.try_for_each_concurrent(AT_ONCE, |(name, cost)| mark(ctx, pool, name, cost, refused)).await
}

async fn mark(
    ctx: &Context,
    pool: &ObjectRef<Watched>,
    name: &str,
    cost: Option<&str>,
    refused: &OnceLock<Notice>,
) -> Result<(), Error> {
    let namespace = pool.namespace.as_deref().unwrap_or_default();
    annotate(ctx, "mark", (namespace, name, None), (DELETION_COST, cost), refused).await
}
