//! Fixtures that go through the real `validate`, and the defaults that users can rely on.

use std::time::Duration;

use super::*;

const IMAGE: &str = "registry.example.com/beamline:1";

/// A stored WorkerPool with this spec beside the one required field.
#[track_caller]
pub(crate) fn stored(spec: &str) -> crds::WorkerPool {
    let mut pool = serde_json::json!({
        "apiVersion": "beamline.dev/v1alpha1",
        "kind": "WorkerPool",
        "metadata": {"name": "default", "namespace": "flows", "uid": "1234", "generation": 3},
        "spec": {"replicas": 2, "nats": {"url": "nats://nats:4222"}},
    });
    let spec: serde_json::Value = serde_json::from_str(spec).expect("JSON");
    merge(&mut pool["spec"], spec);
    serde_json::from_value(pool).expect("a WorkerPool")
}

#[track_caller]
pub(crate) fn valid(spec: &str) -> ValidPool {
    validate(&stored(spec), IMAGE).expect("a valid pool")
}

fn merge(into: &mut serde_json::Value, from: serde_json::Value) {
    match (into, from) {
        (serde_json::Value::Object(into), serde_json::Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(serde_json::Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

#[track_caller]
fn rejects(spec: &str, expected: &str) {
    let invalid = validate(&stored(spec), IMAGE).expect_err("the pool was accepted");
    assert_eq!(invalid.to_string(), expected);
}

#[test]
fn workers_run_the_image_that_the_pool_or_else_the_operator_names() {
    assert_eq!(valid("{}").worker.image, IMAGE);
    assert_eq!(valid(r#"{"worker": {"image": "beamline:2"}}"#).worker.image, "beamline:2");
}

#[test]
fn memory_defaults_to_half_of_the_limit() {
    let memory = |limit| {
        valid(&format!(r#"{{"worker": {{"resources": {{"limits": {{"memory": {limit}}}}}}}}}"#)).general.memory_mb
    };
    assert_eq!(memory(r#""2Gi""#), 1024);
    assert_eq!(memory(r#""512Mi""#), 256);
    assert_eq!(memory(r#""2G""#), 953);
    assert_eq!(memory("1073741824"), 512);
    assert_eq!(memory(r#""1e9""#), 476);
    assert_eq!(valid("{}").general.memory_mb, 512, "half of the default limit");
}

#[test]
fn memory_leaves_a_quarter_to_the_worker_itself() {
    let asked = |memory_mb| {
        format!(
            r#"{{"worker": {{"limits": {{"memoryMb": {memory_mb}}}, "resources": {{"limits": {{"memory": "1Gi"}}}}}}}}"#
        )
    };
    assert_eq!(valid(&asked(768)).general.memory_mb, 768);
    rejects(&asked(769), "worker.limits.memoryMb: 769 is over 75 % of worker.resources.limits.memory (1024 MiB)");
}

#[test]
fn pods_with_gpus_are_as_the_others_where_nothing_else_is_said() {
    let gpu = |spec| valid(spec).gpu.expect("pods with GPUs");
    let class = gpu(r#"{"gpu": {}, "worker": {"resources": {"limits": {"memory": "2Gi"}}}}"#);
    assert_eq!((class.replicas, class.slots, class.memory_mb), (0, Slots { cpu: 0, io: 0, gpu: 2 }, 1024));
    let devices = class.devices.expect("devices");
    assert_eq!((devices.count, devices.container.as_str()), (1, "worker"));
    assert_eq!(devices.source, Source::Plugin("nvidia.com/gpu".to_owned()));
    let own = r#"{"gpu": {"resources": {"limits": {"memory": "20Mi"}}}}"#;
    rejects(own, "gpu.resources.limits.memory: `20Mi` is less than a worker needs; set 32Mi or more");
}

#[test]
fn memory_stays_within_what_a_worker_accepts() {
    let limit = |memory: &str| format!(r#"{{"worker": {{"resources": {{"limits": {{"memory": "{memory}"}}}}}}}}"#);
    assert_eq!(valid(&limit("32Mi")).general.memory_mb, 16);
    assert_eq!(valid(&limit("4Ti")).general.memory_mb, 1_048_576);
    rejects(&limit("20Mi"), "worker.resources.limits.memory: `20Mi` is less than a worker needs; set 32Mi or more");
}

#[test]
fn an_entry_that_workers_cannot_read_is_refused() {
    rejects(
        r#"{"worker": {"egress": {"deny": ["10.0.0.0/8", "10.0.0.0/33"]}}}"#,
        "worker.egress.deny: `10.0.0.0/33` is no CIDR, address, host or *.suffix with an optional :port; \
         correct or remove it",
    );
}

#[test]
fn a_retention_is_a_duration() {
    let streams = valid(r#"{"nats": {"streams": {"resultRetention": "1h30m"}}}"#).nats.streams;
    assert_eq!(streams.result_retention, Duration::from_secs(5400));
    assert_eq!(streams.dead_letter_retention, Duration::from_secs(720 * 3600));
    rejects(
        r#"{"nats": {"streams": {"resultRetention": "soon"}}}"#,
        "nats.streams.resultRetention: `soon` is not a duration such as 90m",
    );
}

#[test]
fn the_operator_uses_its_own_credentials_or_those_of_the_workers() {
    let name = |spec| valid(spec).nats.operator_credentials.map(|secret| secret.key);
    assert_eq!(name("{}"), None);
    let workers = r#"{"nats": {"credentialsSecretRef": {"name": "nats", "key": "worker.creds"}}}"#;
    assert_eq!(name(workers).as_deref(), Some("worker.creds"));
    let own = r#"{"nats": {"operatorCredentialsSecretRef": {"name": "nats", "key": "operator.creds"}}}"#;
    assert_eq!(name(own).as_deref(), Some("operator.creds"));
}

#[test]
fn a_pool_that_no_server_stored_is_refused() {
    let mut pool = stored("{}");
    pool.metadata.uid = None;
    assert_eq!(validate(&pool, IMAGE), Err(InvalidPool::NotStored));
}

#[test]
fn a_bare_name_is_a_service_of_the_pools_namespace() {
    assert_eq!(qualified("nats://nats:4222", "shop"), "nats://nats.shop.svc:4222");
    assert_eq!(qualified("tls://nats", "shop"), "tls://nats.shop.svc");
    for whole in ["nats://nats.nats.svc:4222", "nats://10.1.2.3:4222", "nats://[::1]:4222", "nats://localhost:4222"] {
        assert_eq!(qualified(whole, "shop"), whole);
    }
}
