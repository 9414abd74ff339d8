//! What works and should not stay as it is: it becomes the condition `Degraded`.

use crate::reason;
use crate::secrets::SecretError;

/// One thing that a person should look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Reason of the condition: a closed set.
    pub reason: &'static str,
    /// What is wrong, and what to do.
    pub message: String,
}

impl Notice {
    /// A database of the pool cannot be used.
    pub fn secret(connection: &str, error: &SecretError) -> Self {
        Self { reason: error.reason(), message: format!("worker.sql.connections `{connection}`: {error}") }
    }

    /// Several pods want what one node may mount.
    pub fn claim_not_shared(path: &str, claim: &str) -> Self {
        let message = format!(
            "worker.filesystem.roots `{path}`: PersistentVolumeClaim `{claim}` has no access mode ReadWriteMany, so that \
             only pods of one node can mount it"
        );
        Self { reason: reason::CLAIM_NOT_SHARED, message }
    }

    /// A PodMonitor is wanted, and there is no such type.
    pub fn pod_monitor_missing() -> Self {
        let message = "observability.podMonitor is true, and the type podmonitors.monitoring.coreos.com is not installed; \
                       install the Prometheus Operator or set it to false";
        Self { reason: reason::POD_MONITOR_MISSING, message: message.to_owned() }
    }

    /// Whether pods that are not there yet may wait for it.
    pub fn keeps_pods_from_starting(&self) -> bool {
        matches!(self.reason, reason::SECRET_UNUSABLE | reason::SECRET_FORBIDDEN)
    }
}
