//! What the API server refuses: a table of broken pools, each with the sentence that names the field and the fix.

use beamline_tests::api::Api;
use beamline_tests::pool::{merge, pools};
use futures::{StreamExt, stream};
use serde_json::{Value, json};

use super::plane;

/// Rows side by side.
const AT_ONCE: usize = 8;

#[tokio::test(flavor = "multi_thread")]
async fn every_broken_pool_is_refused_with_the_field_and_the_fix() {
    plane().install("refusals", &["watchNamespace=refusals"]);
    let table =
        [names(), numbers(), nats(), worker(), volumes(), filesystem(), sidecars(), gpu(), tenants(), rest()].concat();
    assert!(table.len() >= 60, "only {} rows", table.len());
    let api = &plane().api().await;
    let rows = stream::iter(table).map(async |row| wrong(api, row).await);
    let wrong: Vec<_> = rows.buffer_unordered(AT_ONCE).filter_map(async |wrong| wrong).collect().await;
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_pool_with_budgets_that_a_user_would_copy_is_accepted() {
    plane().install("copied", &["watchNamespace=copied"]);
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/examples/tenants.yaml");
    plane().kubectl(&["apply", "--namespace=copied", "--dry-run=server", "-f", example], None);
}

/// Name and spec of a pool, and what must be said about it.
type Row = (&'static str, Value, &'static str);

async fn wrong(api: &Api, (name, spec, expected): Row) -> Option<String> {
    match api.would_create(&pools("refusals"), &pool(name, spec.clone())).await {
        Ok(()) => Some(format!("accepted: {name} with {spec}")),
        Err(said) => (!said.contains(expected)).then(|| format!("{name} with {spec}: not {expected:?} but {said}")),
    }
}

/// One that would be accepted, but for this.
fn pool(name: &str, spec: Value) -> Value {
    let mut pool = json!({
        "apiVersion": "beamline.dev/v1alpha1",
        "kind": "WorkerPool",
        "metadata": {"name": name},
        "spec": {"replicas": 1, "scaling": {"mode": "Manual"}, "nats": {"url": "nats://nats:4222"}},
    });
    merge(&mut pool["spec"], spec);
    pool
}

fn names() -> Vec<Row> {
    let by_rule = "metadata.name: use at most 56 of a-z, 0-9 and '-'";
    vec![
        ("orders-gpu", json!({}), "metadata.name: must not end in '-gpu'"),
        ("9orders", json!({}), by_rule),
        ("or.ders", json!({}), by_rule),
        ("a-name-that-is-longer-than-the-fifty-six-that-fit-a-service", json!({}), by_rule),
    ]
}

fn numbers() -> Vec<Row> {
    [
        (json!({"replicas": -1}), "spec.replicas"),
        (json!({"replicas": 10_001}), "spec.replicas"),
        (json!({"replicas": "many"}), "spec.replicas"),
        (json!({"worker": {"pools": {"io": 0}}}), "spec.worker.pools.io"),
        (json!({"worker": {"pools": {"cpu": 4097}}}), "spec.worker.pools.cpu"),
        (json!({"worker": {"pools": {"gpu": -1}}}), "spec.worker.pools.gpu"),
        (json!({"worker": {"limits": {"memoryMb": 15}}}), "spec.worker.limits.memoryMb"),
        (json!({"worker": {"limits": {"cpuTimeMs": 0}}}), "spec.worker.limits.cpuTimeMs"),
        (json!({"worker": {"drainSeconds": 0}}), "spec.worker.drainSeconds"),
        (json!({"worker": {"drainSeconds": 86_401}}), "spec.worker.drainSeconds"),
        (json!({"nats": {"streams": {"replicas": 6}}}), "spec.nats.streams.replicas"),
        (json!({"nats": {"streams": {"resultMaxMessages": 999}}}), "spec.nats.streams.resultMaxMessages"),
        (json!({"worker": {"resources": {"limits": {"memory": "lots"}}}}), "spec.worker.resources.limits.memory"),
    ]
    .map(named)
    .into()
}

fn nats() -> Vec<Row> {
    let retention = |field: &str, value: &str| json!({"nats": {"streams": {field: value}}});
    [
        (json!({"nats": {"url": "http://nats:4222"}}), "nats.url: must begin with nats:// or tls://"),
        (json!({"nats": {"url": "nats://nats:0"}}), "spec.nats.url"),
        (json!({"nats": {"url": "nats://nats:65536"}}), "spec.nats.url"),
        (json!({"nats": {"url": "nats://nats:70000"}}), "spec.nats.url"),
        (json!({"nats": {"url": "nats://a:4222,b:4222"}}), "spec.nats.url"),
        (json!({"nats": {"url": "nats://me:secret@nats:4222"}}), "nats.url: must not hold credentials"),
        (json!({"nats": {"delivery": "Kafka"}}), "spec.nats.delivery"),
        (json!({"nats": {"subject": "orders.*"}}), "spec.nats.subject"),
        (json!({"nats": {"subject": "orders..new"}}), "spec.nats.subject"),
        (json!({"nats": {"subject": "orders.ack"}}), "nats.subject: must not end in '.ack'"),
        (json!({"nats": {"subject": "caf.exec.result.v1"}}), "nats.subject: below 'caf.' only"),
        (json!({"nats": {"queueGroup": "a b"}}), "spec.nats.queueGroup"),
        (json!({"nats": {"queueGroup": "caf-control"}}), "nats.queueGroup: 'caf-control' and names ending in '-gpu'"),
        (json!({"nats": {"queueGroup": "orders-gpu"}}), "nats.queueGroup: 'caf-control' and names ending in '-gpu'"),
        (json!({"nats": {"credentialsSecretRef": {"name": "nats"}}}), "spec.nats.credentialsSecretRef.key"),
        (
            json!({"nats": {"credentialsSecretRef": {"name": "nats", "key": "a/b"}}}),
            "spec.nats.credentialsSecretRef.key",
        ),
        (
            json!({"nats": {"tls": {"certSecretRef": {"name": "tls", "key": "tls.crt"}}}}),
            "nats.tls: certSecretRef and keySecretRef belong together",
        ),
        (json!({"nats": {"streams": {"storage": "Tape"}}}), "spec.nats.streams.storage"),
        (retention("resultRetention", "soon"), "spec.nats.streams.resultRetention"),
        (retention("resultRetention", "1d"), "nats.streams.resultRetention: must be at least 1m, in h, m, s and ms"),
        (
            retention("resultRetention", "30s"),
            "nats.streams.resultRetention: must be at least 1m, in h, m, s and ms, such as 1h30m",
        ),
        (retention("deadLetterRetention", "59m"), "nats.streams.deadLetterRetention: must be at least 1h"),
    ]
    .map(named)
    .into()
}

/// What annotations must not ask for.
const BEYOND: &str = "worker.podAnnotations: keys below container.apparmor.security.beta.kubernetes.io/,";

fn worker() -> Vec<Row> {
    let annotated = |key: &str, value: &str| json!({"podAnnotations": {key: value}});
    let worker = |worker: Value| json!({ "worker": worker });
    let connection = |name: &str| json!({"name": name, "urlSecretRef": {"name": "crm", "key": "url"}});
    [
        (worker(json!({"image": "two words"})), "spec.worker.image"),
        (worker(json!({"imagePullPolicy": "Sometimes"})), "spec.worker.imagePullPolicy"),
        (worker(json!({"egress": {"policy": "Open"}})), "spec.worker.egress.policy"),
        (worker(json!({"egress": {"allow": ["10.0.0.0/8, 10.1.0.0/16"]}})), "spec.worker.egress.allow"),
        (worker(json!({"env": [{"name": "NATS_URL", "value": "nats://other"}]})), "worker.env: NATS_URL"),
        (worker(json!({"env": [{"name": "WORKER_TENANTS_FILE", "value": "/x"}]})), "worker.env: NATS_URL"),
        (worker(json!({"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]})), "spec.worker.env"),
        (worker(json!({"podLabels": {"beamline.dev/pool": "other"}})), "worker.podLabels: keys below beamline.dev/"),
        (worker(json!({"podLabels": {"app.kubernetes.io/name": "x"}})), "worker.podLabels: keys below beamline.dev/"),
        (worker(json!({"podAnnotations": {"beamline.dev/x": "y"}})), "worker.podAnnotations: keys below beamline.dev/"),
        (worker(annotated("container.apparmor.security.beta.kubernetes.io/worker", "unconfined")), BEYOND),
        (worker(annotated("k8s.v1.cni.cncf.io/networks", "flat")), BEYOND),
        (worker(annotated("iam.amazonaws.com/role", "admin")), BEYOND),
        (worker(json!({"sql": {"inlineConnections": "Maybe"}})), "spec.worker.sql.inlineConnections"),
        (worker(json!({"sql": {"connections": [{"name": "crm"}]}})), "spec.worker.sql.connections[0].urlSecretRef"),
        (worker(json!({"sql": {"connections": [connection("a b")]}})), "spec.worker.sql.connections[0].name"),
        (
            worker(json!({"sql": {"connections": [connection("crm"), connection("crm")]}})),
            "spec.worker.sql.connections[1]: Duplicate value",
        ),
        (worker(json!({"hostNetwork": true})), "unknown field \"spec.worker.hostNetwork\""),
        (worker(json!({"hostPID": true})), "unknown field \"spec.worker.hostPID\""),
        (worker(json!({"securityContext": {"privileged": true}})), "unknown field \"spec.worker.securityContext\""),
    ]
    .map(named)
    .into()
}

fn volumes() -> Vec<Row> {
    let volume = |volume: Value| json!({"worker": {"volumes": [volume]}});
    let mount = |path: &str| {
        let mounts = json!([{"name": "certs", "mountPath": path}]);
        json!({"worker": {"volumes": [{"name": "certs", "emptyDir": {}}], "volumeMounts": mounts}})
    };
    let token = json!({"sources": [{"serviceAccountToken": {"path": "token"}}]});
    [
        (volume(json!({"name": "host", "hostPath": {"path": "/"}})), "hostPath"),
        (volume(json!({"name": "both", "emptyDir": {}, "secret": {"secretName": "x"}})), "exactly one source"),
        (volume(json!({"name": "beamline-data", "emptyDir": {}})), "worker.volumes: names starting with 'beamline-'"),
        (volume(json!({"name": "token", "projected": token})), "must not mount a serviceAccountToken"),
        (
            json!({"worker": {"volumeMounts": [{"name": "none", "mountPath": "/x"}]}}),
            "worker.volumeMounts: every name must be that of an entry in worker.volumes",
        ),
        (mount("certs"), "worker.volumeMounts: mountPath must be absolute"),
        (mount("/etc/beamline/mine"), "worker.volumeMounts: mountPath must be absolute and outside /etc/beamline"),
        (mount("/data"), "worker.volumeMounts: mountPath is the path of a root"),
    ]
    .map(named)
    .into()
}

fn filesystem() -> Vec<Row> {
    let roots = |roots: Value| json!({"worker": {"filesystem": {"roots": roots}}});
    [
        (roots(json!([])), "spec.worker.filesystem.roots"),
        (roots(json!([{"path": "data"}])), "filesystem.roots.path: must be absolute"),
        (roots(json!([{"path": "/data/../etc"}])), "filesystem.roots.path: must be absolute"),
        (roots(json!([{"path": "/etc"}])), "filesystem.roots: a path must not be in a system directory"),
        (roots(json!([{"path": "/data"}, {"path": "/data/in"}])), "none may lie inside another"),
        (roots(json!([{"path": "/data"}, {"path": "/data"}])), "Duplicate value"),
        (roots(json!([{"path": "/data", "volume": {}}])), "set exactly one of emptyDir and persistentVolumeClaim"),
    ]
    .map(named)
    .into()
}

fn sidecars() -> Vec<Row> {
    let sidecar = |name: &str, more: Value| {
        let mut sidecar = json!({"name": name, "image": "proxy:1"});
        merge(&mut sidecar, more);
        json!({"worker": {"sidecars": [sidecar]}})
    };
    let elsewhere = |call: &str| json!({call: {"host": "169.254.169.254", "port": 80}});
    let with = |security: Value| sidecar("proxy", json!({"securityContext": security}));
    [
        (json!({"worker": {"sidecars": [{"name": "proxy"}]}}), "sidecars.image: is required"),
        (sidecar("worker", json!({})), "sidecars.name: use at most 63"),
        (sidecar("beamline-proxy", json!({})), "sidecars.name: use at most 63"),
        (with(json!({"privileged": true})), "sidecars.securityContext.privileged: must not be true"),
        (with(json!({"allowPrivilegeEscalation": true})), "allowPrivilegeEscalation: must not be true"),
        (with(json!({"runAsUser": 0})), "sidecars.securityContext: must not run as root"),
        (with(json!({"runAsNonRoot": false})), "sidecars.securityContext: must not run as root"),
        (with(json!({"capabilities": {"add": ["SYS_ADMIN"]}})), "only NET_BIND_SERVICE may be added"),
        (with(json!({"seccompProfile": {"type": "Unconfined"}})), "must not be Unconfined"),
        (sidecar("proxy", json!({"ports": [{"containerPort": 80, "hostPort": 80}]})), "hostPort: must not be set"),
        (sidecar("proxy", json!({"ports": [{"containerPort": 9090}]})), "port 9090 and the name 'metrics'"),
        (
            sidecar("proxy", json!({"volumeMounts": [{"name": "none", "mountPath": "/x"}]})),
            "worker.sidecars.volumeMounts: every name",
        ),
        (sidecar("proxy", json!({"restartPolicy": "Never"})), "unknown field"),
        (sidecar("proxy", json!({"livenessProbe": elsewhere("httpGet")})), "livenessProbe.httpGet.host\""),
        (sidecar("proxy", json!({"readinessProbe": elsewhere("tcpSocket")})), "readinessProbe.tcpSocket.host\""),
        (sidecar("proxy", json!({"startupProbe": elsewhere("httpGet")})), "startupProbe.httpGet.host\""),
        (
            sidecar("proxy", json!({"lifecycle": {"preStop": elsewhere("httpGet")}})),
            "unknown field \"spec.worker.sidecars[0].lifecycle.preStop.httpGet.host\"",
        ),
    ]
    .map(named)
    .into()
}

fn gpu() -> Vec<Row> {
    let gpu = |gpu: Value| json!({ "gpu": gpu });
    let server = json!([{"name": "triton", "image": "triton:1"}]);
    [
        (gpu(json!({"count": 0})), "spec.gpu.count"),
        (gpu(json!({"poolSize": 0})), "spec.gpu.poolSize"),
        (gpu(json!({"replicas": -1})), "spec.gpu.replicas"),
        (gpu(json!({"resourceName": "gpu"})), "spec.gpu.resourceName"),
        (
            gpu(json!({"resourceName": "nvidia.com/gpu", "resourceClaimTemplateName": "h200"})),
            "gpu: set resourceName (device plugin) or resourceClaimTemplateName",
        ),
        (gpu(json!({"count": 4, "maxTotal": 3})), "gpu.maxTotal: is less than gpu.count"),
        (gpu(json!({"minReplicas": 5})), "gpu.minReplicas: is more than gpu.maxReplicas"),
        (gpu(json!({"maxReplicas": 0})), "spec.gpu.maxReplicas"),
        (gpu(json!({"count": 2, "minReplicas": 2, "maxTotal": 3})), "gpu.minReplicas: times gpu.count"),
        (gpu(json!({"target": {"queueDepthPerReplica": 0}})), "spec.gpu.target.queueDepthPerReplica"),
        (
            gpu(json!({"resourceName": "nvidia.com/gpu", "resources": {"limits": {"nvidia.com/gpu": 1}}})),
            "gpu.resources.limits: must not name the GPU resource",
        ),
        (gpu(json!({"container": "triton"})), "gpu.container: must be 'worker' or the name"),
        (
            json!({"gpu": {"sidecars": server}, "worker": {"sidecars": server}}),
            "gpu.sidecars: must not have a name of worker.sidecars",
        ),
        (
            gpu(json!({"sidecars": [{
                "name": "triton", "image": "triton:1", "volumeMounts": [{"name": "none", "mountPath": "/x"}],
            }]})),
            "gpu.sidecars.volumeMounts: every name",
        ),
        (json!({"gpu": {}, "worker": {"pools": {"gpu": 1}}}), "worker.pools.gpu: is for pools without spec.gpu"),
        (json!({"gpu": {}, "nats": {"delivery": "Core"}}), "gpu: needs nats.delivery JetStream"),
    ]
    .map(named)
    .into()
}

fn rest() -> Vec<Row> {
    [
        (json!({"paused": "yes"}), "spec.paused"),
        (json!({"pausd": true}), "unknown field \"spec.pausd\""),
        (json!({"scaling": {"mode": "Magic"}}), "spec.scaling.mode"),
        (json!({"scaling": {"mode": "Keda"}}), "supported values: \"Operator\", \"Manual\", \"HPA\", \"KEDA\""),
        (
            json!({"scaling": {"minReplicas": 3, "maxReplicas": 2}}),
            "scaling.minReplicas: is more than scaling.maxReplicas",
        ),
        (json!({"scaling": {"minReplicas": 21}}), "scaling.minReplicas: is more than scaling.maxReplicas"),
        (json!({"scaling": {"maxReplicas": 0}}), "scaling.maxReplicas: must be at least 1"),
        (json!({"scaling": {"maxReplicas": 10_001}}), "spec.scaling.maxReplicas"),
        (json!({"scaling": {"target": {"backlogSeconds": 0}}}), "spec.scaling.target.backlogSeconds"),
        (json!({"scaling": {"target": {"queueDepthPerReplica": 0}}}), "spec.scaling.target.queueDepthPerReplica"),
        (
            json!({"scaling": {"scaleDown": {"stabilizationSeconds": -1}}}),
            "spec.scaling.scaleDown.stabilizationSeconds",
        ),
        (json!({"scaling": {"scaleDown": {"idleSecondsToZero": -1}}}), "spec.scaling.scaleDown.idleSecondsToZero"),
        (
            json!({"scaling": {"mode": "Operator"}, "nats": {"delivery": "Core"}}),
            "scaling.mode: must be Manual with nats.delivery",
        ),
        (
            json!({"scaling": {"mode": "KEDA"}, "nats": {"delivery": "Core"}}),
            "scaling.mode: must be Manual with nats.delivery",
        ),
        (json!({"networkPolicy": "Maybe"}), "spec.networkPolicy"),
        (json!({"rollout": {"maxSurge": "many"}}), "spec.rollout.maxSurge"),
        // Of a text Kubernetes takes a percentage only.
        (json!({"rollout": {"maxSurge": "1"}}), "spec.rollout.maxSurge"),
        (json!({"rollout": {"maxSurge": 3_000_000_000_i64}}), "spec.rollout.maxSurge"),
        (json!({"rollout": {"maxSurge": "00%"}}), "spec.rollout.maxSurge"),
        (json!({"disruption": {"minAvailable": "2"}}), "spec.disruption.minAvailable"),
        (json!({"rollout": {"maxSurge": 0, "maxUnavailable": 0}}), "rollout: maxSurge and maxUnavailable cannot both"),
        (json!({"disruption": {"maxUnavailable": 1, "minAvailable": 1}}), "disruption: set maxUnavailable or"),
        (json!({"observability": {"otlpEndpoint": "collector:4318"}}), "spec.observability.otlpEndpoint"),
        (json!({"observability": {"otlpEndpoint": "http://collector:70000"}}), "spec.observability.otlpEndpoint"),
    ]
    .map(named)
    .into()
}

fn tenants() -> Vec<Row> {
    let terms = |terms: Value| json!({"tenants": {"defaults": terms}});
    let quotas = |quotas: Value| json!({"tenants": {"defaults": {"quotas": quotas}}});
    let window = |window: &str| json!({"tenants": {"defaults": {"quotas": {"executions": 1, "window": window}}}});
    let named = |one: Value| json!({"tenants": {"named": [one]}});
    let too_long_or_short = "quotas.window: must be between 1s and 744h (31 days), such as 1m";
    [
        (terms(json!({"weight": 0})), "spec.tenants.defaults.weight"),
        (terms(json!({"priority": 10})), "spec.tenants.defaults.priority"),
        (terms(json!({"maxSlotShare": 101})), "spec.tenants.defaults.maxSlotShare"),
        (terms(json!({"onExceeded": "Drop"})), "supported values: \"Reject\", \"Defer\""),
        (quotas(json!({"executions": 0})), "spec.tenants.defaults.quotas.executions"),
        (quotas(json!({"executions": -1})), "spec.tenants.defaults.quotas.executions"),
        (quotas(json!({"executions": 1_000_000_000_001_i64})), "spec.tenants.defaults.quotas.executions"),
        (quotas(json!({"cpuTimeMs": 0})), "spec.tenants.defaults.quotas.cpuTimeMs"),
        (quotas(json!({"cpuTimeMs": "60s"})), "spec.tenants.defaults.quotas.cpuTimeMs"),
        (quotas(json!({"concurrent": 0})), "spec.tenants.defaults.quotas.concurrent"),
        (quotas(json!({"memoryMb": 0})), "spec.tenants.defaults.quotas.memoryMb"),
        (quotas(json!({"execution": 5})), "unknown field \"spec.tenants.defaults.quotas.execution\""),
        (window("soon"), "spec.tenants.defaults.quotas.window"),
        (window("60"), "spec.tenants.defaults.quotas.window"),
        (window("31d"), "spec.tenants.defaults.quotas.window"),
        (window("0s"), too_long_or_short),
        (window("999ms"), too_long_or_short),
        (window("744h1s"), too_long_or_short),
        (window("999999999h"), too_long_or_short),
        (
            quotas(json!({"window": "1h"})),
            "tenants.defaults.quotas.window: bounds nothing; set executions or cpuTimeMs",
        ),
        (
            named(json!({"id": "acme", "quotas": {"window": "1h", "concurrent": 4}})),
            "tenants.named.quotas.window: bounds nothing; set executions or cpuTimeMs",
        ),
        (named(json!({"id": "acme", "quotas": {"executions": 0}})), "spec.tenants.named[0].quotas.executions"),
        (named(json!({"weight": 1})), "spec.tenants.named[0].id"),
        (named(json!({"id": ""})), "spec.tenants.named[0].id"),
        (named(json!({"id": "a\u{1}b"})), "spec.tenants.named[0].id"),
        (named(json!({"id": "a\n"})), "spec.tenants.named[0].id"),
        (named(json!({"id": "é".repeat(129)})), "tenants.named.id: must have at most 256 bytes"),
        (json!({"tenants": {"named": [{"id": "acme"}, {"id": "acme"}]}}), "Duplicate value"),
    ]
    .map(self::named)
    .into()
}

fn named((spec, expected): (Value, &'static str)) -> Row {
    ("orders", spec, expected)
}
