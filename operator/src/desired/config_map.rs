//! What the workers are told: their environment, but for the pod's own name.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ConfigMap;

use super::{names, pod};
use crate::pool::{EgressPolicy, ValidPool};

pub(super) fn config_map(pool: &ValidPool) -> ConfigMap {
    ConfigMap {
        metadata: names::metadata(pool, pool.name.clone()),
        data: Some(environment(pool)),
        ..ConfigMap::default()
    }
}

fn environment(pool: &ValidPool) -> BTreeMap<String, String> {
    let worker = &pool.worker;
    let nats = &pool.nats;
    let egress = match worker.egress.policy {
        EgressPolicy::Internal => "internal",
        EgressPolicy::PublicOnly => "public-only",
    };
    let roots: Vec<&str> = worker.roots.iter().map(|root| root.path.as_str()).collect();
    let always = [
        ("NATS_URL", nats.url.clone()),
        ("PROMETHEUS_ENDPOINT", format!("0.0.0.0:{}", pod::METRICS_PORT)),
        ("WORKER_CPU_POOL_SIZE", worker.cpu_slots.to_string()),
        ("WORKER_DRAIN_TIMEOUT", format!("{}s", worker.drain_seconds)),
        ("WORKER_EGRESS_POLICY", egress.to_owned()),
        ("WORKER_FS_ROOTS", roots.join(",")),
        ("WORKER_GPU_POOL_SIZE", "0".to_owned()),
        ("WORKER_IO_POOL_SIZE", worker.io_slots.to_string()),
        ("WORKER_MAX_CPU_TIME_MS", worker.cpu_time.as_millis().to_string()),
        ("WORKER_MAX_MEMORY_MB", worker.memory_mb.to_string()),
        ("WORKER_NATS_QUEUE_GROUP", nats.queue_group.clone()),
        ("WORKER_NATS_SUBJECT", nats.subject.clone()),
        ("WORKER_POOL", format!("{}/{}", pool.namespace, pool.name)),
        ("WORKER_SANDBOX_MODE", worker.sandbox.to_string()),
    ];
    let sometimes = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", pool.otlp_endpoint.clone()),
        ("WORKER_EGRESS_ALLOW", list(&worker.egress.allow)),
        ("WORKER_EGRESS_DENY", list(&worker.egress.deny)),
    ];
    always
        .into_iter()
        .chain(sometimes.into_iter().filter_map(|(name, value)| Some((name, value?))))
        .chain(pod::secret_files(pool).into_iter().map(|file| (file.variable, file.path())))
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

fn list(entries: &[String]) -> Option<String> {
    (!entries.is_empty()).then(|| entries.join(","))
}
