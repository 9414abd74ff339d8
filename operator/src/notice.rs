//! What works and should not stay as it is: it becomes the condition `Degraded`.

use crate::error::SecretError;
use crate::reason;

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

    /// A Secret that pods wait for is not there, or lacks what they need of it.
    pub fn reference(field: &str, error: &SecretError) -> Self {
        Self { reason: error.reason(), message: format!("{field}: {error}") }
    }

    /// Another object that pods wait for is not there.
    pub fn missing(field: &str, kind: &str, name: &str) -> Self {
        Self { reason: reason::REFERENCE_MISSING, message: format!("{field}: {kind} `{name}` does not exist") }
    }

    /// A ConfigMap that pods wait for lacks what they need of it.
    pub fn no_key(field: &str, name: &str, key: &str) -> Self {
        Self { reason: reason::REFERENCE_MISSING, message: format!("{field}: ConfigMap `{name}` has no key `{key}`") }
    }

    /// Several pods want what one node may mount.
    pub fn claim_not_shared(path: &str, claim: &str) -> Self {
        let message = format!(
            "worker.filesystem.roots `{path}`: PersistentVolumeClaim `{claim}` has no access mode ReadWriteMany, so that \
             only pods of one node can mount it"
        );
        Self { reason: reason::CLAIM_NOT_SHARED, message }
    }

    /// The API server lets nobody, or not us, annotate a pod of the pool.
    pub fn pods_not_annotated(words: &str) -> Self {
        // `pods "default-5c9-x7k" is forbidden: …`: the name differs each time.
        let words = words.split_once(" is forbidden: ").map_or(words, |(_, why)| why);
        let message = format!(
            "pods cannot be annotated, so that a pause and tenants reach them after a minute only, and none can be chosen \
             to go first: {words}"
        );
        Self { reason: reason::PODS_NOT_ANNOTATED, message }
    }

    /// A PodMonitor is wanted, and there is no such type.
    pub fn pod_monitor_missing() -> Self {
        let message = "observability.podMonitor is true, and the type podmonitors.monitoring.coreos.com is not installed; \
                       install the Prometheus Operator or set it to false";
        Self { reason: reason::POD_MONITOR_MISSING, message: message.to_owned() }
    }

    /// A HorizontalPodAutoscaler is wanted, and nobody tells it how much waits.
    pub fn external_metrics_missing() -> Self {
        let message = "scaling.mode is HPA, and nobody serves external.metrics.k8s.io; set externalMetrics.enabled in the \
                       chart, or install a Prometheus adapter that serves beamline_queue_depth, or set scaling.mode to \
                       Operator";
        Self { reason: reason::EXTERNAL_METRICS_MISSING, message: message.to_owned() }
    }

    /// The same, and whoever should does not answer.
    pub fn external_metrics_unavailable() -> Self {
        let message = "scaling.mode is HPA, and whoever serves external.metrics.k8s.io does not answer; see kubectl \
                       describe apiservice v1beta1.external.metrics.k8s.io";
        Self { reason: reason::EXTERNAL_METRICS_UNAVAILABLE, message: message.to_owned() }
    }

    /// A ScaledObject is wanted, and there is no such type.
    pub fn keda_missing() -> Self {
        let message = "scaling.mode is KEDA, and the type scaledobjects.keda.sh is not installed; install KEDA, or set \
                       scaling.mode to Operator";
        Self { reason: reason::KEDA_MISSING, message: message.to_owned() }
    }

    /// A ScaledObject is wanted, and nobody has said where KEDA finds the numbers.
    pub fn keda_off() -> Self {
        let message = "scaling.mode is KEDA, and the operator does not serve it; set keda.enabled in the chart, or set \
                       scaling.mode to Operator";
        Self { reason: reason::KEDA_MISSING, message: message.to_owned() }
    }

    /// The type has no place for these fields of the pool's status.
    pub fn type_outdated(fields: &[String]) -> Self {
        let message = format!(
            "the type workerpools.beamline.dev is older than the operator and has no place for {}, which {} not shown; \
             upgrade the type",
            fields.join(", "),
            if fields.len() == 1 { "is" } else { "are" }
        );
        Self { reason: reason::TYPE_OUTDATED, message }
    }

    /// The operator does not know these fields of the pool's spec.
    pub fn operator_outdated(fields: &[String]) -> Self {
        let message = format!(
            "the operator is older than the type workerpools.beamline.dev and does nothing for {}; upgrade the operator",
            fields.join(", ")
        );
        Self { reason: reason::OPERATOR_OUTDATED, message }
    }

    /// Somebody else changes again and again what is ours in an object of the pool: what, and who, where that is known.
    pub fn contested(kind: &str, name: &str, who: Option<&str>) -> Self {
        let who = who.map_or_else(|| "somebody changes it".to_owned(), |who| format!("others set {who}"));
        let message = format!(
            "{kind} `{name}`: {who} again and again; the operator sets it back every 15 to 20 s meanwhile: make them \
             leave it alone, or change the pool instead"
        );
        Self { reason: reason::FIELD_CONTESTED, message }
    }

    /// Whether an autoscaler decides nothing for it.
    pub fn keeps_autoscalers_from_deciding(&self) -> bool {
        matches!(
            self.reason,
            reason::EXTERNAL_METRICS_MISSING | reason::EXTERNAL_METRICS_UNAVAILABLE | reason::KEDA_MISSING
        )
    }

    /// Whether pods cannot start for it.
    pub fn keeps_pods_from_starting(&self) -> bool {
        matches!(self.reason, reason::SECRET_UNUSABLE | reason::REFERENCE_MISSING)
    }

    /// Whether pods may not start for it: the operator cannot look.
    pub fn may_keep_pods_from_starting(&self) -> bool {
        self.reason == reason::SECRET_FORBIDDEN
    }
}
