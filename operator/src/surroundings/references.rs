//! What pods need that is not the pool's own: Secrets, ConfigMaps and claims, as their specs name them. Pure.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, ContainerStatus, KeyToPath, Pod, Volume};

use crate::names;

/// One key of an object, or the object itself, and the field that asks for it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Reference {
    pub(super) kind: Kind,
    pub(super) name: String,
    pub(super) key: Option<String>,
    /// In the words of the spec.
    pub(super) field: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Kind {
    Secret,
    ConfigMap,
    Claim,
}

/// What the pods that have not started cannot start without. Those that run have what they need.
pub(super) fn of_waiting(pods: &[Arc<Pod>]) -> Vec<Reference> {
    let mut all: Vec<_> = pods.iter().filter(|pod| is_waiting(pod)).flat_map(|pod| of_pod(pod)).collect();
    all.sort();
    all.dedup();
    all
}

fn is_waiting(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    phase == Some("Pending") && pod.metadata.deletion_timestamp.is_none()
}

fn of_pod(pod: &Pod) -> Vec<Reference> {
    let Some(spec) = &pod.spec else { return Vec::new() };
    let mut found: Vec<_> = spec.volumes.iter().flatten().flat_map(of_volume).collect();
    let sidecars = spec.init_containers.iter().flatten();
    found.extend(spec.containers.iter().chain(sidecars).flat_map(of_container));
    // Pods start without these too, where the registry asks for none.
    if lacks_an_image(pod) {
        let secrets = spec.image_pull_secrets.iter().flatten();
        found.extend(secrets.map(|secret| secret_named(&secret.name, None, "worker.imagePullSecrets".to_owned())));
    }
    found
}

fn lacks_an_image(pod: &Pod) -> bool {
    let lacks = |container: &ContainerStatus| {
        let waiting = container.state.as_ref().and_then(|state| state.waiting.as_ref());
        let reason = waiting.and_then(|waiting| waiting.reason.as_deref());
        matches!(reason, Some("ErrImagePull" | "ImagePullBackOff"))
    };
    pod.status.as_ref().is_some_and(|status| {
        status.container_statuses.iter().chain(&status.init_container_statuses).flatten().any(lacks)
    })
}

fn of_volume(volume: &Volume) -> Vec<Reference> {
    let Some(field) = field_of(&volume.name) else { return Vec::new() };
    let mut found = Vec::new();
    if let Some(secret) = volume.secret.as_ref().filter(|secret| secret.optional != Some(true)) {
        found.extend(keyed(Kind::Secret, secret.secret_name.as_deref(), secret.items.as_deref(), &field));
    }
    if let Some(map) = volume.config_map.as_ref().filter(|map| map.optional != Some(true)) {
        found.extend(keyed(Kind::ConfigMap, Some(&map.name), map.items.as_deref(), &field));
    }
    if let Some(claim) = &volume.persistent_volume_claim {
        found.extend(keyed(Kind::Claim, Some(&claim.claim_name), None, &field));
    }
    let projected = volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten());
    for source in projected {
        if let Some(secret) = source.secret.as_ref().filter(|secret| secret.optional != Some(true)) {
            found.extend(keyed(Kind::Secret, Some(&secret.name), secret.items.as_deref(), &field));
        }
        if let Some(map) = source.config_map.as_ref().filter(|map| map.optional != Some(true)) {
            found.extend(keyed(Kind::ConfigMap, Some(&map.name), map.items.as_deref(), &field));
        }
    }
    found
}

/// The field behind a volume; none where the operator makes, or looks after, what is in it.
fn field_of(volume: &str) -> Option<String> {
    let Some(ours) = volume.strip_prefix("beamline-") else { return Some(format!("worker.volumes `{volume}`")) };
    Some(match ours {
        "nats-creds" => "nats.credentialsSecretRef".to_owned(),
        "nats-ca" => "nats.tls.caSecretRef".to_owned(),
        "nats-cert" => "nats.tls.certSecretRef".to_owned(),
        "nats-key" => "nats.tls.keySecretRef".to_owned(),
        _ if ours.starts_with("root-") => "worker.filesystem.roots".to_owned(),
        _ => return None,
    })
}

fn of_container(container: &Container) -> Vec<Reference> {
    let whose = if container.name == names::CONTAINER {
        "worker.env".to_owned()
    } else {
        format!("env of the sidecar `{}`", container.name)
    };
    let variables = container.env.iter().flatten().filter_map(|variable| {
        let from = variable.value_from.as_ref()?;
        let field = format!("{whose} `{}`", variable.name);
        if let Some(secret) = from.secret_key_ref.as_ref().filter(|secret| secret.optional != Some(true)) {
            return Some(secret_named(&secret.name, Some(&secret.key), field));
        }
        let map = from.config_map_key_ref.as_ref().filter(|map| map.optional != Some(true))?;
        Some(Reference { kind: Kind::ConfigMap, name: map.name.clone(), key: Some(map.key.clone()), field })
    });
    let whole = container.env_from.iter().flatten().filter_map(|from| {
        if let Some(secret) = from.secret_ref.as_ref().filter(|secret| secret.optional != Some(true)) {
            return Some(secret_named(&secret.name, None, whose.clone()));
        }
        let map = from.config_map_ref.as_ref().filter(|map| map.optional != Some(true))?;
        Some(Reference { kind: Kind::ConfigMap, name: map.name.clone(), key: None, field: whose.clone() })
    });
    variables.chain(whole).collect()
}

fn secret_named(name: &str, key: Option<&str>, field: String) -> Reference {
    Reference { kind: Kind::Secret, name: name.to_owned(), key: key.map(str::to_owned), field }
}

/// The keys that are asked for by name; else the object as a whole.
fn keyed(kind: Kind, name: Option<&str>, items: Option<&[KeyToPath]>, field: &str) -> Vec<Reference> {
    let Some(name) = name else { return Vec::new() };
    let one = |key| Reference { kind, name: name.to_owned(), key, field: field.to_owned() };
    match items {
        Some(items) if !items.is_empty() => items.iter().map(|item| one(Some(item.key.clone()))).collect(),
        _ => vec![one(None)],
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn needs(phase: &str, waiting: &str) -> Vec<(Kind, String, Option<String>, String)> {
        let key = |name: &str, key: &str| json!({"name": name, "key": key});
        let pod = json!({
            "spec": {
                "imagePullSecrets": [{"name": "registry"}],
                "volumes": [
                    {"name": "beamline-config", "configMap": {"name": "orders"}},
                    {"name": "beamline-nats-creds", "secret": {"secretName": "nats", "items": [{"key": "worker.creds", "path": "nats.creds"}]}},
                    {"name": "beamline-sql-0", "secret": {"secretName": "crm"}},
                    {"name": "beamline-root-0", "persistentVolumeClaim": {"claimName": "data"}},
                    {"name": "certs", "configMap": {"name": "certs"}},
                    {"name": "maybe", "secret": {"secretName": "maybe", "optional": true}},
                    {"name": "all", "projected": {"sources": [{"secret": {"name": "part"}}]}},
                ],
                "containers": [{"name": "worker", "env": [
                    {"name": "PLAIN", "value": "1"},
                    {"name": "TOKEN", "valueFrom": {"secretKeyRef": key("tokens", "api")}},
                ]}],
                "initContainers": [{"name": "proxy", "env": [
                    {"name": "MODE", "valueFrom": {"configMapKeyRef": key("proxy", "mode")}},
                ]}],
            },
            "status": {"phase": phase, "containerStatuses": [{
                "name": "worker", "image": "", "imageID": "", "ready": false, "restartCount": 0,
                "state": {"waiting": {"reason": waiting}},
            }]},
        });
        let pod = Arc::new(serde_json::from_value(pod).expect("a Pod"));
        of_waiting(&[Arc::clone(&pod), pod]).into_iter().map(|it| (it.kind, it.name, it.key, it.field)).collect()
    }

    #[test]
    fn a_pod_that_waits_needs_what_its_spec_names_and_the_field_is_told() {
        let text = str::to_owned;
        let expected = vec![
            (Kind::Secret, text("nats"), Some(text("worker.creds")), text("nats.credentialsSecretRef")),
            (Kind::Secret, text("part"), None, text("worker.volumes `all`")),
            (Kind::Secret, text("tokens"), Some(text("api")), text("worker.env `TOKEN`")),
            (Kind::ConfigMap, text("certs"), None, text("worker.volumes `certs`")),
            (Kind::ConfigMap, text("proxy"), Some(text("mode")), text("env of the sidecar `proxy` `MODE`")),
            (Kind::Claim, text("data"), None, text("worker.filesystem.roots")),
        ];
        assert_eq!(needs("Pending", "ContainerCreating"), expected);
        let pull_secrets =
            needs("Pending", "ImagePullBackOff").into_iter().filter(|(.., field)| field == "worker.imagePullSecrets");
        assert_eq!(pull_secrets.count(), 1);
    }

    #[test]
    fn a_pod_that_runs_has_what_it_needs() {
        assert_eq!(needs("Running", "CrashLoopBackOff"), []);
    }
}
