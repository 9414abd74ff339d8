//! What the workers are told when they start: a change replaces the pods.

use k8s_openapi::api::core::v1::{EnvVar, EnvVarSource, ObjectFieldSelector};

use super::config_map::{POLICY, SQL_CONNECTIONS};
use super::pod::{CONFIG_DIRECTORY, METRICS_PORT};
use super::secrets;
use crate::pool::{Class, Delivery, EgressPolicy, InlineConnections, ValidPool};

/// In the order of their names; what the pool adds comes last.
pub(super) fn environment(pool: &ValidPool, class: &Class) -> Vec<EnvVar> {
    let mut ours: Vec<_> = values(pool, class).into_iter().map(|(name, value)| variable(name, value)).collect();
    ours.push(worker_id());
    ours.sort_by(|one, other| one.name.cmp(&other.name));
    ours.extend(pool.worker.env.iter().cloned());
    ours
}

fn values(pool: &ValidPool, class: &Class) -> Vec<(&'static str, String)> {
    let worker = &pool.worker;
    let nats = &pool.nats;
    let egress = match worker.egress.policy {
        EgressPolicy::Internal => "internal",
        EgressPolicy::PublicOnly => "public-only",
    };
    let delivery = match nats.delivery {
        Delivery::JetStream => "jetstream",
        Delivery::Core => "core",
    };
    let inline = match worker.sql.inline {
        InlineConnections::Allow => "allow",
        InlineConnections::Deny => "deny",
    };
    let roots: Vec<&str> = worker.roots.iter().map(|root| root.path.as_str()).collect();
    let file = |name: &str| format!("{CONFIG_DIRECTORY}/{name}");
    let always = [
        ("NATS_URL", nats.url.clone()),
        ("PROMETHEUS_ENDPOINT", format!("0.0.0.0:{METRICS_PORT}")),
        ("WORKER_CPU_POOL_SIZE", class.slots.cpu.to_string()),
        ("WORKER_DRAIN_TIMEOUT", format!("{}s", worker.drain_seconds)),
        ("WORKER_EGRESS_POLICY", egress.to_owned()),
        ("WORKER_FS_ROOTS", roots.join(",")),
        ("WORKER_GPU_POOL_SIZE", class.slots.gpu.to_string()),
        ("WORKER_IO_POOL_SIZE", class.slots.io.to_string()),
        ("WORKER_MAX_CPU_TIME_MS", worker.cpu_time.as_millis().to_string()),
        ("WORKER_MAX_MEMORY_MB", class.memory_mb.to_string()),
        // The operator creates the streams; a worker that did so too would race it with other settings.
        ("WORKER_NATS_CREATE_STREAMS", "false".to_owned()),
        ("WORKER_NATS_DELIVERY", delivery.to_owned()),
        ("WORKER_NATS_QUEUE_GROUP", nats.queue_group.clone()),
        ("WORKER_NATS_SUBJECT", nats.subject.clone()),
        ("WORKER_POOL", format!("{}/{}", pool.namespace, pool.name)),
        ("WORKER_SANDBOX_MODE", worker.sandbox.to_string()),
        ("WORKER_SQL_INLINE_CONNECTIONS", inline.to_owned()),
        ("WORKER_TENANTS_FILE", file(POLICY)),
    ];
    let sometimes = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", pool.otlp_endpoint.clone()),
        ("WORKER_EGRESS_ALLOW", list(&worker.egress.allow)),
        ("WORKER_EGRESS_DENY", list(&worker.egress.deny)),
        ("WORKER_SQL_CONNECTIONS_FILE", (!worker.sql.connections.is_empty()).then(|| file(SQL_CONNECTIONS))),
    ];
    always
        .into_iter()
        .chain(sometimes.into_iter().filter_map(|(name, value)| Some((name, value?))))
        .chain(secrets::nats(pool).into_iter().map(|(variable, file)| (variable, file.path())))
        .collect()
}

fn list(entries: &[String]) -> Option<String> {
    (!entries.is_empty()).then(|| entries.join(","))
}

fn variable(name: &str, value: String) -> EnvVar {
    EnvVar { name: name.to_owned(), value: Some(value), value_from: None }
}

fn worker_id() -> EnvVar {
    EnvVar {
        name: "WORKER_ID".to_owned(),
        value: None,
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector {
                api_version: Some("v1".to_owned()),
                field_path: "metadata.name".to_owned(),
            }),
            ..EnvVarSource::default()
        }),
    }
}
