//! Units of budgets for what has just come. Others wait behind it, so that it waits for no account that is slow to answer.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::ASK_AGAIN;
use crate::admission::account::Budget;
use crate::admission::lease::{Short, Taken};
use crate::ids::TenantId;
use crate::pipeline::Pipeline;

/// How long an account may take.
const PATIENCE: Duration = Duration::from_secs(1);

/// Since when no account has answered in time, if none has: all are kept in one place.
#[derive(Debug, Default)]
pub(in crate::pipeline) struct Silence(Mutex<Option<Instant>>);

impl Silence {
    fn begins(&self) {
        *self.lock() = Some(Instant::now());
    }

    fn ends(&self) {
        *self.lock() = None;
    }

    /// How long the next one may take: where none has answered, nobody waits again before one has.
    fn patience(&self) -> Duration {
        let is_known = self.lock().is_some_and(|since| since.elapsed() < 4 * ASK_AGAIN);
        if is_known { Duration::ZERO } else { PATIENCE }
    }

    /// Whether it is too early to ask again.
    fn lasts(&self) -> bool {
        self.lock().is_some_and(|since| since.elapsed() < ASK_AGAIN)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pipeline {
    /// So many units of a tenant's budget, or as many as there are at this moment.
    pub(super) async fn units(self: &Arc<Self>, tenant: &TenantId, budget: Budget, count: u64) -> Taken {
        if let Some(taken) = self.budgets.at_hand(tenant, budget, count) {
            return taken;
        }
        if self.silence.lasts() {
            return self.budgets.take_here(tenant, budget, count);
        }
        let (pipeline, whose) = (Arc::clone(self), tenant.clone());
        let mut taking = Box::pin(async move {
            let taken = pipeline.budgets.take(&whose, budget, count).await;
            if !matches!(taken.short, Some(Short::Unreachable)) {
                pipeline.silence.ends();
            }
            taken
        });
        if let Ok(taken) = tokio::time::timeout(self.silence.patience(), &mut taking).await {
            return taken;
        }
        self.silence.begins();
        // What it brings is for those who come next.
        tokio::spawn(taking);
        self.budgets.take_here(tenant, budget, count)
    }
}
