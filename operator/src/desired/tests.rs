//! Every fixture goes through the real `validate`.

use k8s_openapi::api::core::v1::{Container, PodSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::*;
use crate::pool::tests::valid;
use crate::scale;

fn wanted(spec: &str) -> Desired {
    let pool = valid(spec);
    desired(&pool, &scale::decide(&pool))
}

fn pod(spec: &str) -> PodSpec {
    wanted(spec).deployment.spec.and_then(|spec| spec.template.spec).expect("a pod")
}

fn container(spec: &str) -> Container {
    pod(spec).containers.into_iter().next().expect("a container")
}

#[track_caller]
fn tells_workers(spec: &str, name: &str, expected: Option<&str>) {
    let data = wanted(spec).config_map.data.unwrap_or_default();
    assert_eq!(data.get(name).map(String::as_str), expected, "{name}");
}

fn config_hash(spec: &str) -> String {
    let template = wanted(spec).deployment.spec.expect("a spec").template;
    template.metadata.and_then(|metadata| metadata.annotations).expect("annotations")[names::CONFIG_HASH].clone()
}

#[test]
fn all_children_are_named_after_the_pool_and_go_with_it() {
    let Desired { service_account, config_map, service, budget, deployment } = wanted("{}");
    let all = [service_account.metadata, config_map.metadata, service.metadata, budget.metadata, deployment.metadata];
    let names: Vec<_> = all.iter().filter_map(|metadata| metadata.name.as_deref()).collect();
    assert_eq!(names, ["default-worker", "default", "default", "default", "default"]);
    for metadata in &all {
        let owner = &metadata.owner_references.as_ref().expect("an owner")[0];
        assert_eq!((owner.uid.as_str(), owner.controller), ("1234", Some(true)));
        assert_eq!(metadata.labels.as_ref().expect("labels")[names::MANAGED_BY_LABEL], names::OPERATOR);
    }
}

#[test]
fn the_replicas_are_always_sent() {
    let replicas = |spec| wanted(spec).deployment.spec.and_then(|spec| spec.replicas);
    assert_eq!(replicas("{}"), Some(2));
    assert_eq!(replicas(r#"{"replicas": 0}"#), Some(0));
}

#[test]
fn workers_are_told_what_the_spec_says() {
    tells_workers("{}", "NATS_URL", Some("nats://nats:4222"));
    tells_workers("{}", "WORKER_POOL", Some("flows/default"));
    tells_workers("{}", "WORKER_NATS_SUBJECT", Some("caf.exec.assign.v1"));
    tells_workers("{}", "WORKER_NATS_QUEUE_GROUP", Some("caf-workers"));
    tells_workers("{}", "WORKER_CPU_POOL_SIZE", Some("8"));
    tells_workers("{}", "WORKER_DRAIN_TIMEOUT", Some("35s"));
    tells_workers("{}", "WORKER_FS_ROOTS", Some("/data"));
    tells_workers("{}", "OTEL_EXPORTER_OTLP_ENDPOINT", None);
    tells_workers(
        r#"{"observability": {"otlpEndpoint": "http://collector:4318"}}"#,
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        Some("http://collector:4318"),
    );
    tells_workers(r#"{"worker": {"limits": {"cpuTimeMs": 1500}}}"#, "WORKER_MAX_CPU_TIME_MS", Some("1500"));
    let egress = r#"{"worker": {"egress": {"policy": "PublicOnly", "deny": ["10.0.0.0/8", "*.corp:443"]}}}"#;
    tells_workers(egress, "WORKER_EGRESS_POLICY", Some("public-only"));
    tells_workers(egress, "WORKER_EGRESS_DENY", Some("10.0.0.0/8,*.corp:443"));
    tells_workers(egress, "WORKER_EGRESS_ALLOW", None);
}

/// What the operator sets, the API server must not let `worker.env` set as well: the pod would take that one.
#[test]
fn every_variable_of_ours_is_refused_in_worker_env() {
    let everything = r#"{
        "observability": {"otlpEndpoint": "http://collector:4318"},
        "nats": {
            "credentialsSecretRef": {"name": "nats", "key": "creds"},
            "tls": {
                "caSecretRef": {"name": "nats", "key": "ca"},
                "certSecretRef": {"name": "nats", "key": "cert"},
                "keySecretRef": {"name": "nats", "key": "key"}
            }
        },
        "worker": {"egress": {"allow": ["a"], "deny": ["b"]}}
    }"#;
    let crd = <beamline_crds::WorkerPool as kube::CustomResourceExt>::crd();
    let rules = serde_json::to_string(&crd).expect("a manifest is plain data");
    for name in wanted(everything).config_map.data.expect("data").keys().map(String::as_str).chain(["WORKER_ID"]) {
        assert!(rules.contains(&format!("'{name}'")), "worker.env may set {name}");
    }
}

#[test]
fn changed_settings_replace_the_pods_and_a_changed_count_does_not() {
    assert_eq!(config_hash("{}"), config_hash(r#"{"replicas": 9}"#));
    assert_ne!(config_hash("{}"), config_hash(r#"{"worker": {"pools": {"io": 17}}}"#));
}

#[test]
fn a_pod_has_time_to_drain_and_to_exit() {
    assert_eq!(pod(r#"{"worker": {"drainSeconds": 60}}"#).termination_grace_period_seconds, Some(65));
}

#[test]
fn a_pod_meets_the_restricted_level() {
    let pod = pod("{}");
    let security = pod.security_context.expect("a security context");
    assert_eq!(security.run_as_non_root, Some(true));
    assert_eq!(security.seccomp_profile.map(|profile| profile.type_).as_deref(), Some("RuntimeDefault"));
    assert_eq!(pod.automount_service_account_token, Some(false));
    let security = container("{}").security_context.expect("a security context");
    assert_eq!(security.allow_privilege_escalation, Some(false));
    assert_eq!(security.read_only_root_filesystem, Some(true));
    assert_eq!(security.capabilities.and_then(|capabilities| capabilities.drop), Some(vec!["ALL".to_owned()]));
}

#[test]
fn secrets_are_files_and_workers_are_told_where() {
    let spec = r#"{"nats": {
        "credentialsSecretRef": {"name": "nats", "key": "worker.creds"},
        "tls": {"caSecretRef": {"name": "nats-ca", "key": "ca.crt"}}
    }}"#;
    tells_workers(spec, "NATS_CREDS", Some("/etc/beamline/nats-creds/nats.creds"));
    tells_workers(spec, "NATS_TLS_CA", Some("/etc/beamline/nats-ca/ca.crt"));
    let mounts = container(spec).volume_mounts.expect("mounts");
    let paths: Vec<_> = mounts.iter().map(|mount| mount.mount_path.as_str()).collect();
    assert_eq!(paths, ["/data", "/etc/beamline/nats-creds", "/etc/beamline/nats-ca"]);
    let secret = pod(spec).volumes.expect("volumes")[1].secret.clone().expect("a Secret");
    assert_eq!(secret.secret_name.as_deref(), Some("nats"));
    assert_eq!(secret.items.expect("items")[0].key, "worker.creds");
}

#[test]
fn roots_are_scratch_space_or_claims() {
    let spec = r#"{"worker": {"filesystem": {"roots": [
        {"path": "/data"},
        {"path": "/shared", "volume": {"persistentVolumeClaim": {"claimName": "flows"}}}
    ]}}}"#;
    tells_workers(spec, "WORKER_FS_ROOTS", Some("/data,/shared"));
    let volumes = pod(spec).volumes.expect("volumes");
    let size = volumes[0].empty_dir.as_ref().and_then(|scratch| scratch.size_limit.clone());
    assert_eq!(size.expect("a size").0, "1Gi");
    assert_eq!(volumes[1].persistent_volume_claim.as_ref().expect("a claim").claim_name, "flows");
}

#[test]
fn pods_spread_unless_the_spec_says_how() {
    let keys = |spec| {
        let constraints = pod(spec).topology_spread_constraints.unwrap_or_default();
        constraints.into_iter().map(|constraint| constraint.topology_key).collect::<Vec<_>>()
    };
    assert_eq!(keys("{}"), ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]);
    assert_eq!(keys(r#"{"worker": {"topologySpreadConstraints": []}}"#), [""; 0]);
}

#[test]
fn the_labels_that_select_pods_cannot_be_taken_away() {
    let spec = r#"{"worker": {"podLabels": {"team": "flows", "beamline.dev/pool": "another"}}}"#;
    let template = wanted(spec).deployment.spec.expect("a spec").template;
    let labels = template.metadata.and_then(|metadata| metadata.labels).expect("labels");
    assert_eq!((labels["team"].as_str(), labels[names::POOL_LABEL].as_str()), ("flows", "default"));
}

#[test]
fn a_budget_says_what_may_be_missing_or_what_must_stay() {
    let limits = |spec| {
        let budget = wanted(spec).budget.spec.expect("a spec");
        (budget.max_unavailable, budget.min_available)
    };
    assert_eq!(limits("{}"), (Some(IntOrString::Int(1)), None));
    let half = IntOrString::String("50%".to_owned());
    assert_eq!(limits(r#"{"disruption": {"minAvailable": "50%"}}"#), (None, Some(half)));
}
