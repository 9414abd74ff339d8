//! What a look at a pool that went well leaves behind.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;

use crate::apply::Applied;
use crate::context::RESYNC;
use crate::notice::Notice;
use crate::scale::Decisions;

/// What a pool refers to has no watch: while something is wrong with it, it is looked at this often.
const LOOK_AGAIN: Duration = Duration::from_secs(20);
/// Workers go when time has passed, too: while some are about to, they are looked at this often.
const WATCH_THEM_GO: Duration = Duration::from_secs(1);

/// A pool that is as it should be, as far as that can be.
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

impl Converged {
    /// After so long it is looked at again, whatever happens.
    pub fn look_again(&self) -> Duration {
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
