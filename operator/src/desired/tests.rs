//! Every fixture goes through the real `validate`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, PodSpec, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use serde_json::{Value, json};
use url::Url;

use super::*;
use crate::names;
use crate::pool::tests::valid;
use crate::scale;

fn wanted(spec: &str) -> Desired {
    surrounded(spec, &Surroundings::default())
}

fn surrounded(spec: &str, around: &Surroundings) -> Desired {
    let pool = valid(spec);
    desired(&pool, scale::as_written(&pool).replicas(), around)
}

fn template(workload: Workload) -> PodTemplateSpec {
    workload.deployment.spec.expect("a spec").template
}

fn pod(spec: &str) -> PodSpec {
    template(wanted(spec).general).spec.expect("a pod")
}

fn gpu_pod(spec: &str) -> PodSpec {
    template(wanted(spec).gpu.expect("pods with GPUs")).spec.expect("a pod")
}

fn container(spec: &str) -> Container {
    pod(spec).containers.into_iter().next().expect("a container")
}

fn environment(pod: PodSpec) -> BTreeMap<String, String> {
    let worker = pod.containers.into_iter().next().expect("a container");
    worker.env.into_iter().flatten().filter_map(|variable| Some((variable.name, variable.value?))).collect()
}

#[track_caller]
fn tells_workers(spec: &str, name: &str, expected: Option<&str>) {
    assert_eq!(environment(pod(spec)).get(name).map(String::as_str), expected, "{name}");
}

fn file(spec: &str, name: &str) -> Value {
    let data = wanted(spec).config_map.data.expect("data");
    serde_json::from_str(&data[name]).expect("JSON, which is YAML")
}

#[test]
fn all_children_are_named_after_the_pool_and_go_with_it() {
    let Desired {
        service_account,
        config_map,
        service,
        network_policy,
        pod_monitor,
        autoscaler,
        scaled_object: _,
        general,
        gpu,
    } = wanted(r#"{"gpu": {}, "observability": {"podMonitor": true}, "scaling": {"mode": "HPA"}}"#);
    let mut all = vec![service_account.metadata, config_map.metadata, service.metadata];
    all.extend(network_policy.map(|wall| wall.metadata));
    all.extend(pod_monitor.map(|monitor| monitor.metadata));
    all.extend(autoscaler.map(|autoscaler| autoscaler.metadata));
    for Workload { budget, deployment } in std::iter::once(general).chain(gpu) {
        all.extend([budget.metadata, deployment.metadata]);
    }
    let names: Vec<_> = all.iter().filter_map(|metadata| metadata.name.as_deref()).collect();
    let expected = [
        "default-worker",
        "default",
        "default",
        "default",
        "default",
        "default",
        "default",
        "default",
        "default-gpu",
        "default-gpu",
    ];
    assert_eq!(names, expected);
    for metadata in &all {
        let owner = &metadata.owner_references.as_ref().expect("an owner")[0];
        assert_eq!((owner.uid.as_str(), owner.controller), ("1234", Some(true)));
        assert_eq!(metadata.labels.as_ref().expect("labels")[names::MANAGED_BY_LABEL], names::OPERATOR);
    }
}

#[test]
fn an_autoscaler_is_there_in_its_mode_only_and_never_asks_for_none() {
    let autoscaler = |scaling: &str| wanted(&format!(r#"{{"scaling": {scaling}}}"#)).autoscaler?.spec;
    assert_eq!((autoscaler("{}"), autoscaler(r#"{"mode": "Manual"}"#)), (None, None));
    let spec = autoscaler(r#"{"mode": "HPA"}"#).expect("an autoscaler");
    let target = &spec.scale_target_ref;
    assert_eq!((target.kind.as_str(), target.name.as_str()), ("WorkerPool", "default"));
    assert_eq!((spec.min_replicas, spec.max_replicas), (Some(1), 20));
    let all = r#"{"mode": "HPA", "minReplicas": 2, "maxReplicas": 9, "target": {"queueDepthPerReplica": 7},
        "scaleDown": {"stabilizationSeconds": 30}}"#;
    let spec = serde_json::to_value(autoscaler(all)).expect("JSON");
    assert_eq!((&spec["minReplicas"], &spec["maxReplicas"]), (&json!(2), &json!(9)));
    let external = &spec["metrics"][0]["external"];
    assert_eq!(external["metric"]["name"], "beamline_queue_depth");
    assert_eq!(external["metric"]["selector"]["matchLabels"], json!({"workerpool": "default"}));
    assert_eq!(external["target"], json!({"type": "AverageValue", "averageValue": "7"}));
    assert_eq!(spec["behavior"]["scaleDown"]["stabilizationWindowSeconds"], 30);
}

#[test]
fn a_scaled_object_is_there_in_its_mode_only_and_asks_the_operator() {
    let numbers = Url::parse("http://beamline-queues.beamline-system.svc:8080").ok();
    let around = Surroundings { numbers, ..Surroundings::default() };
    let object = |scaling: &str| {
        let pool = valid(&format!(r#"{{"scaling": {scaling}}}"#));
        desired(&pool, Replicas { general: 2, gpu: None }, &around).scaled_object
    };
    for other in ["{}", r#"{"mode": "Manual"}"#, r#"{"mode": "HPA"}"#] {
        assert_eq!(object(other), None, "{other}");
    }
    assert_eq!(wanted(r#"{"scaling": {"mode": "KEDA"}}"#).scaled_object, None, "nobody can be asked");
    let all = r#"{"mode": "KEDA", "minReplicas": 0, "maxReplicas": 9, "target": {"queueDepthPerReplica": 7},
        "scaleDown": {"stabilizationSeconds": 30, "idleSecondsToZero": 45}}"#;
    let object = object(all).expect("a ScaledObject");
    assert_eq!(object.types.map(|types| types.kind).as_deref(), Some("ScaledObject"));
    assert_eq!(object.metadata.name.as_deref(), Some("default"));
    assert_eq!(object.metadata.owner_references.expect("an owner")[0].uid, "1234");
    let behaviour = json!({"scaleDown": {"stabilizationWindowSeconds": 30}});
    let expected = json!({
        "scaleTargetRef": {"apiVersion": "beamline.dev/v1alpha1", "kind": "WorkerPool", "name": "default"},
        "minReplicaCount": 0,
        "maxReplicaCount": 9,
        "pollingInterval": 5,
        "cooldownPeriod": 45,
        "initialCooldownPeriod": 45,
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": behaviour}},
        "triggers": [{"type": "metrics-api", "metricType": "AverageValue", "metadata": {
            "url": "http://beamline-queues.beamline-system.svc:8080/queues/flows/default",
            "valueLocation": "demand",
            "targetValue": "7",
        }}],
    });
    assert_eq!(object.data["spec"], expected);
}

#[test]
fn the_replicas_are_always_sent() {
    let replicas = |spec| wanted(spec).general.deployment.spec.and_then(|spec| spec.replicas);
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
        "worker": {
            "egress": {"allow": ["a"], "deny": ["b"]},
            "sql": {"connections": [{"name": "crm", "urlSecretRef": {"name": "crm", "key": "url"}}]}
        }
    }"#;
    let crd = <beamline_crds::WorkerPool as kube::CustomResourceExt>::crd();
    let rules = serde_json::to_string(&crd).expect("a manifest is plain data");
    for name in environment(pod(everything)).keys().map(String::as_str).chain(["WORKER_ID"]) {
        assert!(rules.contains(&format!("'{name}'")), "worker.env may set {name}");
    }
}

#[test]
fn only_what_workers_read_at_their_start_replaces_them() {
    let template = |spec| template(wanted(spec).general);
    let running = template("{}");
    assert_ne!(running, template(r#"{"worker": {"pools": {"io": 17}}}"#));
    for spec in [
        r#"{"replicas": 9}"#,
        r#"{"paused": true}"#,
        r#"{"tenants": {"named": [{"id": "acme", "weight": 4}]}}"#,
        r#"{"tenants": {"defaults": {"onExceeded": "Defer", "quotas": {"executions": 1, "window": "1m"}}}}"#,
        r#"{"gpu": {"replicas": 1}}"#,
        r#"{"rollout": {"maxSurge": 3}}"#,
    ] {
        assert_eq!(running, template(spec), "{spec}");
    }
}

#[test]
fn a_policy_tells_running_workers_to_pause_and_what_tenants_get() {
    assert_eq!(file("{}", "policy.yaml"), json!({"paused": false}));
    let quotas = json!({"executions": 6000, "cpuTimeMs": 60000, "window": "1m", "concurrent": 50, "memoryMb": 512});
    let tenants = json!({
        "defaults": {"maxSlotShare": 50, "onExceeded": "Defer", "quotas": quotas},
        "named": [{"id": "acme", "weight": 4, "priority": 7, "quotas": {"window": "1h"}}],
    });
    let spec = json!({"paused": true, "tenants": tenants}).to_string();
    assert_eq!(file(&spec, "policy.yaml"), json!({"paused": true, "tenants": tenants}));
    let hash = |spec: &str| policy_hash(&wanted(spec).config_map);
    assert_eq!(hash("{}"), hash(r#"{"replicas": 9}"#));
    assert_ne!(hash("{}"), hash(&spec));
}

#[test]
fn a_database_is_named_in_a_file_and_its_url_stays_in_its_secret() {
    let spec = r#"{"worker": {"sql": {"inlineConnections": "Deny", "connections": [
        {"name": "crm", "urlSecretRef": {"name": "crm-db", "key": "url"}, "tenants": ["acme"]},
        {"name": "wiki", "urlSecretRef": {"name": "wiki-db", "key": "dsn"}}
    ]}}}"#;
    tells_workers(spec, "WORKER_SQL_INLINE_CONNECTIONS", Some("deny"));
    tells_workers(spec, "WORKER_SQL_CONNECTIONS_FILE", Some("/etc/beamline/config/sql-connections.yaml"));
    tells_workers("{}", "WORKER_SQL_CONNECTIONS_FILE", None);
    let expected = json!([
        {"name": "crm", "urlFile": "/etc/beamline/sql/0/url", "tenants": ["acme"]},
        {"name": "wiki", "urlFile": "/etc/beamline/sql/1/url"},
    ]);
    assert_eq!(file(spec, "sql-connections.yaml"), expected);
    let volumes = pod(spec).volumes.expect("volumes");
    let secret = volumes.iter().find(|volume| volume.name == "beamline-sql-1").and_then(|volume| volume.secret.clone());
    let secret = secret.expect("a Secret");
    assert_eq!(secret.secret_name.as_deref(), Some("wiki-db"));
    assert_eq!(secret.items.expect("items")[0].key, "dsn");
}

#[test]
fn pods_with_gpus_take_only_what_asks_for_the_gpu_pool() {
    let spec = r#"{
        "worker": {
            "nodeSelector": {"zone": "a", "accelerator": "none"},
            "tolerations": [{"key": "flows", "operator": "Exists"}]
        },
        "gpu": {
            "replicas": 1,
            "count": 2,
            "poolSize": 4,
            "runtimeClassName": "nvidia",
            "nodeSelector": {"accelerator": "h200"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "resources": {"limits": {"memory": "8Gi"}}
        }
    }"#;
    let pod = gpu_pod(spec);
    let told = environment(pod.clone());
    let slots = ["WORKER_CPU_POOL_SIZE", "WORKER_IO_POOL_SIZE", "WORKER_GPU_POOL_SIZE"].map(|name| told[name].as_str());
    assert_eq!(slots, ["0", "0", "4"]);
    assert_eq!(told["WORKER_MAX_MEMORY_MB"], "4096", "half of its own limit");
    let limits = pod.containers[0].resources.clone().and_then(|resources| resources.limits).expect("limits");
    assert_eq!((limits["nvidia.com/gpu"].0.as_str(), limits["memory"].0.as_str()), ("2", "8Gi"));
    let nodes = pod.node_selector.expect("nodes");
    assert_eq!((nodes["zone"].as_str(), nodes["accelerator"].as_str()), ("a", "h200"));
    assert_eq!(pod.tolerations.map(|all| all.len()), Some(2));
    assert_eq!(pod.runtime_class_name.as_deref(), Some("nvidia"));
    let Workload { budget, deployment } = wanted(spec).gpu.expect("pods with GPUs");
    let spec = deployment.spec.expect("a spec");
    assert_eq!(budget.spec.and_then(|budget| budget.selector), Some(spec.selector));
    let rolling = spec.strategy.and_then(|strategy| strategy.rolling_update).expect("a rolling update");
    assert_eq!(rolling.max_surge, Some(IntOrString::Int(0)), "there may be no device for one more");
}

#[test]
fn the_container_that_is_to_have_the_devices_gets_them() {
    let of = |gpu: Value| {
        let pod = gpu_pod(&json!({ "gpu": gpu }).to_string());
        let sidecar = pod.init_containers.clone().unwrap_or_default().into_iter().next();
        (pod.containers[0].clone(), sidecar, pod.resource_claims)
    };
    let server = json!([{"name": "triton", "image": "triton:1"}]);
    let (worker, sidecar, _) = of(json!({"container": "triton", "sidecars": server, "resourceName": "amd.com/gpu"}));
    assert!(!worker.resources.and_then(|resources| resources.limits).expect("limits").contains_key("amd.com/gpu"));
    let limits = sidecar.and_then(|sidecar| sidecar.resources).and_then(|resources| resources.limits).expect("limits");
    assert_eq!(limits["amd.com/gpu"].0, "1");
    let (worker, _, claims) = of(json!({"resourceClaimTemplateName": "h200"}));
    let claim = &worker.resources.and_then(|resources| resources.claims).expect("claims")[0];
    let claims = claims.expect("claims of the pod");
    assert_eq!(claims[0].name, claim.name);
    assert_eq!(claims[0].resource_claim_template_name.as_deref(), Some("h200"));
}

#[test]
fn a_sidecar_is_native_and_as_tight_as_its_author_lets_it_be() {
    let spec = r#"{"worker": {"sidecars": [
        {"name": "proxy", "image": "proxy:1"},
        {"name": "cache", "image": "cache:1", "securityContext": {
            "runAsUser": 1000, "readOnlyRootFilesystem": false, "capabilities": {"add": ["NET_BIND_SERVICE"]}
        }}
    ]}}"#;
    let sidecars = pod(spec).init_containers.expect("sidecars");
    let [proxy, cache] = &sidecars[..] else { panic!("two sidecars") };
    assert_eq!(proxy.restart_policy.as_deref(), Some("Always"));
    let security = proxy.security_context.clone().expect("a security context");
    assert_eq!((security.allow_privilege_escalation, security.read_only_root_filesystem), (Some(false), Some(true)));
    let security = cache.security_context.clone().expect("a security context");
    assert_eq!((security.run_as_user, security.read_only_root_filesystem), (Some(1000), Some(false)));
    let capabilities = security.capabilities.expect("capabilities");
    assert_eq!(capabilities.drop, Some(vec!["ALL".to_owned()]));
    assert_eq!(capabilities.add, Some(vec!["NET_BIND_SERVICE".to_owned()]));
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
    let expected = ["/etc/beamline/config", "/data", "/etc/beamline/nats-creds", "/etc/beamline/nats-ca"];
    assert_eq!(paths, expected);
    let secret = pod(spec).volumes.expect("volumes")[2].secret.clone().expect("a Secret");
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
    let size = volumes[1].empty_dir.as_ref().and_then(|scratch| scratch.size_limit.clone());
    assert_eq!(size.expect("a size").0, "1Gi");
    assert_eq!(volumes[2].persistent_volume_claim.as_ref().expect("a claim").claim_name, "flows");
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
    let labels = template(wanted(spec).general).metadata.and_then(|metadata| metadata.labels).expect("labels");
    assert_eq!((labels["team"].as_str(), labels[names::POOL_LABEL].as_str()), ("flows", "default"));
}

#[test]
fn a_budget_says_what_may_be_missing_or_what_must_stay() {
    let limits = |spec| {
        let budget = wanted(spec).general.budget.spec.expect("a spec");
        // Workers that do not work keep no node.
        assert_eq!(budget.unhealthy_pod_eviction_policy.as_deref(), Some("AlwaysAllow"));
        (budget.max_unavailable, budget.min_available)
    };
    assert_eq!(limits("{}"), (Some(IntOrString::Int(1)), None));
    let half = IntOrString::String("50%".to_owned());
    assert_eq!(limits(r#"{"disruption": {"minAvailable": "50%"}}"#), (None, Some(half)));
}

fn wall(spec: &str, around: &Surroundings) -> Value {
    let wall = surrounded(spec, around).network_policy.and_then(|wall| wall.spec).expect("a wall");
    serde_json::to_value(wall).expect("plain data")
}

fn tcp(ports: &[u16]) -> Value {
    ports.iter().map(|port| json!({"protocol": "TCP", "port": port})).collect()
}

#[test]
fn the_wall_keeps_from_metadata_and_the_api_server() {
    let api_server = ["10.96.0.1", "192.0.2.7", "fd00::7"].map(|address| address.parse().expect("an address"));
    let around = Surroundings { api_server: BTreeSet::from(api_server), ..Surroundings::default() };
    let wall = wall("{}", &around);
    let blocks = json!([
        {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16", "10.96.0.1/32", "192.0.2.7/32"]}},
        {"ipBlock": {"cidr": "::/0", "except": ["fe80::/10", "fd00::7/128"]}},
    ]);
    let dns = json!([{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]);
    assert_eq!(wall["egress"], json!([{"ports": dns}, {"to": blocks}]));
    assert_eq!(wall["ingress"], json!([{"ports": tcp(&[9090])}]));
    assert_eq!(wall["podSelector"], json!({"matchLabels": {"beamline.dev/pool": "default"}}));
    assert!(wanted(r#"{"networkPolicy": "Off"}"#).network_policy.is_none());
}

#[test]
fn a_public_wall_lets_out_to_what_the_pool_depends_on() {
    let spec = r#"{
        "worker": {"egress": {"policy": "PublicOnly", "allow": ["10.1.2.0/24:8443", "api.corp:444"]}},
        "observability": {"otlpEndpoint": "http://collector:4318"}
    }"#;
    let around = Surroundings { database_ports: BTreeSet::from([5432]), ..Surroundings::default() };
    let rules = wall(spec, &around)["egress"].clone();
    assert_eq!(rules[1]["ports"], tcp(&[444, 4222, 4318, 5432]));
    let except = rules[2]["to"][0]["ipBlock"]["except"].to_string();
    assert!(["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"].iter().all(|cidr| except.contains(cidr)), "{except}");
    assert_eq!(rules[3], json!({"to": [{"ipBlock": {"cidr": "10.1.2.0/24"}}], "ports": tcp(&[8443])}));
}

/// Whether a policy lets a packet out: one rule must have both a peer and a port for it.
fn lets_out(wall: &Value, (protocol, to, port): (&str, &str, u16)) -> bool {
    let to: IpAddr = to.parse().expect("an address");
    let any_of = |list: &Value, is_it: &dyn Fn(&Value) -> bool| list.as_array().is_none_or(|all| all.iter().any(is_it));
    wall["egress"].as_array().expect("rules").iter().any(|rule| {
        let is_peer = |peer: &Value| {
            let block = &peer["ipBlock"];
            let mut except = block["except"].as_array().into_iter().flatten();
            contains(&block["cidr"], to) && !except.any(|cidr| contains(cidr, to))
        };
        any_of(&rule["to"], &is_peer) && any_of(&rule["ports"], &|it| it["protocol"] == protocol && it["port"] == port)
    })
}

fn contains(cidr: &Value, address: IpAddr) -> bool {
    let (network, length) = cidr.as_str().and_then(|cidr| cidr.split_once('/')).expect("a CIDR");
    let length: u32 = length.parse().expect("a length");
    match (network.parse().expect("an address"), address) {
        (IpAddr::V4(network), IpAddr::V4(address)) => (network.to_bits() ^ address.to_bits()).leading_zeros() >= length,
        (IpAddr::V6(network), IpAddr::V6(address)) => (network.to_bits() ^ address.to_bits()).leading_zeros() >= length,
        _ => false,
    }
}

#[test]
fn s04_the_wall_lets_out_to_what_a_pool_needs_and_to_nothing_that_it_must_not_reach() {
    let spec = |policy: &str| {
        json!({
            "worker": {"egress": {"policy": policy, "allow": ["10.1.2.0/24:8443", "api.corp:444"]}},
            "observability": {"otlpEndpoint": "http://collector:80"},
        })
        .to_string()
    };
    let around = Surroundings {
        api_server: BTreeSet::from(["10.96.0.1".parse().expect("an address")]),
        database_ports: BTreeSet::from([5432]),
        ..Surroundings::default()
    };
    let needed = [
        ("UDP", "10.96.0.10", 53),
        ("TCP", "10.96.0.10", 53),
        ("UDP", "169.254.20.10", 53),
        ("TCP", "10.96.3.4", 4222),
        ("TCP", "10.9.9.9", 80),
        ("TCP", "172.20.5.5", 5432),
        ("TCP", "10.1.2.9", 8443),
        ("TCP", "192.168.3.3", 444),
        ("TCP", "93.184.216.34", 443),
        ("TCP", "2606:2800::1", 443),
    ];
    let forbidden = [
        ("TCP", "169.254.169.254", 80),
        ("TCP", "169.254.169.254", 443),
        ("TCP", "fe80::1", 80),
        ("TCP", "10.96.0.1", 443),
        ("TCP", "10.96.0.1", 444),
    ];
    let private = [
        ("TCP", "10.5.5.5", 443),
        ("TCP", "10.1.2.9", 8080),
        ("TCP", "192.168.1.1", 8080),
        ("TCP", "172.16.0.1", 22),
        ("TCP", "100.64.1.1", 443),
        ("TCP", "fc00::1", 443),
        ("UDP", "10.9.9.9", 4222),
    ];
    for (policy, private_passes) in [("Internal", true), ("PublicOnly", false)] {
        let wall = wall(&spec(policy), &around);
        for packet in needed {
            assert!(lets_out(&wall, packet), "{policy} keeps {packet:?} in");
        }
        for packet in forbidden {
            assert!(!lets_out(&wall, packet), "{policy} lets {packet:?} out");
        }
        for packet in private {
            assert_eq!(lets_out(&wall, packet), private_passes, "{policy}: {packet:?}");
        }
    }
}

#[test]
fn a_host_without_a_port_makes_the_wall_as_wide_as_for_internal_addresses() {
    let open = r#"{"worker": {"egress": {"policy": "PublicOnly", "allow": ["*.corp"]}}}"#;
    let around = Surroundings::default();
    assert_eq!(wall(open, &around)["egress"], wall("{}", &around)["egress"]);
}
