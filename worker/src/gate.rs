//! Whether this worker takes work: while its policy does not pause it, and nobody has told it to stop.

use std::sync::Arc;

use tokio::sync::watch;

use crate::policy::Policy;

/// Open while nothing speaks against work.
#[derive(Debug)]
pub struct Gate {
    policy: watch::Receiver<Arc<Policy>>,
    told_to_pull: watch::Sender<bool>,
}

impl Gate {
    /// A gate that this policy closes.
    pub fn new(policy: watch::Receiver<Arc<Policy>>) -> Self {
        Self { policy, told_to_pull: watch::Sender::new(true) }
    }

    /// Whether work may be fetched.
    pub fn is_open(&self) -> bool {
        !self.is_paused() && *self.told_to_pull.borrow()
    }

    /// What the policy says now.
    pub fn policy(&self) -> Arc<Policy> {
        Arc::clone(&self.policy.borrow())
    }

    /// Whether the policy says so.
    pub fn is_paused(&self) -> bool {
        self.policy.borrow().paused
    }

    /// Whether the policy's file has said something since that cannot be used.
    pub fn has_stale_policy(&self) -> bool {
        self.policy.borrow().is_stale
    }

    /// What whoever looks after the worker wants of it.
    pub fn tell(&self, pull: bool) {
        self.told_to_pull.send_replace(pull);
    }
}
