//! What one worker pod looks like and may do.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Affinity, Container, EnvVar, LocalObjectReference, Toleration, TopologySpreadConstraint, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Egress, Filesystem, Sql, embedded};

/// What one worker pod looks like and may do. Every pod meets the Pod Security level `restricted`.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.env) || self.env.all(e, !(e.name in ['NATS_CREDS', 'NATS_TLS_CA', 'NATS_TLS_CERT', 'NATS_TLS_KEY', 'NATS_URL', 'OTEL_EXPORTER_OTLP_ENDPOINT', 'PROMETHEUS_ENDPOINT', 'WORKER_CPU_POOL_SIZE', 'WORKER_DRAIN_TIMEOUT', 'WORKER_EGRESS_ALLOW', 'WORKER_EGRESS_DENY', 'WORKER_EGRESS_POLICY', 'WORKER_FS_ROOTS', 'WORKER_GPU_POOL_SIZE', 'WORKER_ID', 'WORKER_IO_POOL_SIZE', 'WORKER_MAX_CPU_TIME_MS', 'WORKER_MAX_MEMORY_MB', 'WORKER_NATS_CREATE_STREAMS', 'WORKER_NATS_DELIVERY', 'WORKER_NATS_QUEUE_GROUP', 'WORKER_NATS_SUBJECT', 'WORKER_POOL', 'WORKER_SANDBOX_MODE', 'WORKER_SQL_CONNECTIONS_FILE', 'WORKER_SQL_INLINE_CONNECTIONS', 'WORKER_TENANTS_FILE']))")
        .message("worker.env: NATS_URL, NATS_CREDS, NATS_TLS_*, PROMETHEUS_ENDPOINT, OTEL_EXPORTER_OTLP_ENDPOINT and the WORKER_* variables of fields are set from the fields of this spec; set the field instead"),
    validation = Rule::new("!has(self.volumes) || self.volumes.all(v, !v.name.startsWith('beamline-'))")
        .message("worker.volumes: names starting with 'beamline-' are taken by the operator; choose another"),
    validation = Rule::new("!has(self.volumes) || self.volumes.all(v, [has(v.configMap), has(v.secret), has(v.emptyDir), has(v.persistentVolumeClaim), has(v.csi), has(v.projected)].exists_one(s, s))")
        .message("worker.volumes: every volume needs exactly one source of configMap, secret, emptyDir, persistentVolumeClaim, csi and projected (hostPath is not available: pods meet the Pod Security level restricted)"),
    validation = Rule::new("!has(self.volumes) || self.volumes.all(v, !has(v.projected) || !has(v.projected.sources) || v.projected.sources.all(s, !has(s.serviceAccountToken)))")
        .message("worker.volumes.projected: must not mount a serviceAccountToken: workers have no rights in the cluster"),
    validation = Rule::new("!has(self.volumeMounts) || self.volumeMounts.all(m, has(self.volumes) && self.volumes.exists(v, v.name == m.name))")
        .message("worker.volumeMounts: every name must be that of an entry in worker.volumes"),
    validation = Rule::new("!has(self.volumeMounts) || self.volumeMounts.all(m, m.mountPath.startsWith('/') && m.mountPath != '/' && m.mountPath != '/etc/beamline' && !m.mountPath.startsWith('/etc/beamline/'))")
        .message("worker.volumeMounts: mountPath must be absolute and outside /etc/beamline, where the operator mounts the pool's own Secrets"),
    validation = Rule::new("!has(self.volumeMounts) || self.volumeMounts.all(m, has(self.filesystem) ? !self.filesystem.roots.exists(r, r.path == m.mountPath) : m.mountPath != '/data')")
        .message("worker.volumeMounts: mountPath is the path of a root in worker.filesystem (/data by default); choose another"),
    validation = Rule::new("!has(self.sidecars) || self.sidecars.all(c, !has(c.volumeMounts) || c.volumeMounts.all(m, has(self.volumes) && self.volumes.exists(v, v.name == m.name)))")
        .message("worker.sidecars.volumeMounts: every name must be that of an entry in worker.volumes"),
    validation = Rule::new("!has(self.podLabels) || self.podLabels.all(k, !k.startsWith('beamline.dev/') && !k.startsWith('app.kubernetes.io/'))")
        .message("worker.podLabels: keys below beamline.dev/ and app.kubernetes.io/ are set by the operator; choose another"),
    validation = Rule::new("!has(self.podAnnotations) || self.podAnnotations.all(k, !k.startsWith('beamline.dev/'))")
        .message("worker.podAnnotations: keys below beamline.dev/ are set by the operator; choose another"),
    validation = Rule::new("!has(self.podAnnotations) || self.podAnnotations.all(k, !['container.apparmor.security.beta.kubernetes.io/', 'k8s.v1.cni.cncf.io/', 'iam.amazonaws.com/'].exists(p, k.startsWith(p)))")
        .message("worker.podAnnotations: keys below container.apparmor.security.beta.kubernetes.io/, k8s.v1.cni.cncf.io/ and iam.amazonaws.com/ would give pods more than the Pod Security level restricted, their NetworkPolicy and their ServiceAccount do; leave them out")
)]
pub struct Worker {
    /// Image of the worker. Default: the operator's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512), regex(pattern = "^[^ ]+$"))]
    pub image: Option<String>,

    /// When the image is pulled. Default: what Kubernetes decides (Always for the tag latest, else IfNotPresent).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_pull_policy: Option<ImagePullPolicy>,

    /// Secrets of the pool's namespace with credentials for the image registry.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "embedded::image_pull_secrets")]
    pub image_pull_secrets: Vec<LocalObjectReference>,

    /// How many blocks one pod executes at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pools: Option<Pools>,

    /// What the blocks of one pod may use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,

    /// CPU and memory of the container. Default: requests of 250m CPU and 256Mi, a memory limit of 1Gi.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,

    /// How long running blocks may finish when a pod is asked to leave, in seconds; what is left then goes to another
    /// pod. Should be above the longest usual block (the default timeout of a block is 30 s). Default: 35.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 86_400))]
    pub drain_seconds: Option<i32>,

    /// Executes nothing for real: every block returns a canned result. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<bool>,

    /// The directories that file and SQLite blocks may use. Default: /data, on 1Gi of scratch space.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filesystem: Option<Filesystem>,

    /// Which addresses HTTP and SQL blocks may reach.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress: Option<Egress>,

    /// Databases of sql.query blocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sql: Option<Sql>,

    /// Further environment variables of the container, such as WORKER_HTTP_CONNECT_TIMEOUT.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "embedded::env")]
    pub env: Vec<EnvVar>,

    /// Labels that a node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "embedded::strings")]
    pub node_selector: BTreeMap<String, String>,

    /// Node taints that the pods tolerate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "embedded::tolerations")]
    pub tolerations: Vec<Toleration>,

    /// Rules on which nodes, and beside which other pods, the pods run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "embedded::affinity")]
    pub affinity: Option<Affinity>,

    /// How pods spread over nodes and zones. Default: evenly over nodes and zones, as far as that is possible.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "embedded::topology_spread_constraints")]
    pub topology_spread_constraints: Option<Vec<TopologySpreadConstraint>>,

    /// Name of the PriorityClass of the pods.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub priority_class_name: Option<String>,

    /// Further volumes of the pods. Node directories (hostPath) are not available.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "embedded::volumes")]
    pub volumes: Vec<Volume>,

    /// Where the container mounts those volumes. Blocks use only filesystem.roots; these are for certificates and
    /// the like.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "embedded::volume_mounts")]
    pub volume_mounts: Vec<VolumeMount>,

    /// Further containers of the pods, such as a database proxy or an inference server. They run as native sidecars:
    /// started before the worker, restarted by themselves, and stopped after it. Where an entry leaves it open, its
    /// security context is that of the worker, with a read-only root; they may mount worker.volumes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "embedded::sidecars")]
    pub sidecars: Vec<Container>,

    /// Further labels of the pods.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "embedded::strings")]
    pub pod_labels: BTreeMap<String, String>,

    /// Further annotations of the pods.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "embedded::strings")]
    pub pod_annotations: BTreeMap<String, String>,

    /// Annotations of the ServiceAccount <name>-worker, as cloud identity needs them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "embedded::strings")]
    pub service_account_annotations: BTreeMap<String, String>,
}

/// When the image is pulled.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImagePullPolicy {
    /// At every start of a pod.
    Always,
    /// When the node does not have it.
    IfNotPresent,
    /// The node must have it.
    Never,
}

/// How many blocks one pod executes at once.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Pools {
    /// Blocks that ask for the cpu pool. Default: 8.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub cpu: Option<i32>,

    /// Blocks that wait for networks and disks: all that ask for no pool. Default: 16.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub io: Option<i32>,

    /// Blocks that ask for the gpu pool, on pods that find GPUs without spec.gpu. Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 4096))]
    pub gpu: Option<i32>,
}

/// What the blocks of one pod may use.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Limits {
    /// Payloads and results that a pod holds at once, in MiB; with more, it takes no further work. At most 75 % of
    /// resources.limits.memory (else the pool gets the condition Ready=False, InvalidSpec). Default: half of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 16, max = 1_048_576))]
    pub memory_mb: Option<i64>,

    /// CPU time that one block may use, in milliseconds. Default: 7200000 (two hours).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 604_800_000))]
    pub cpu_time_ms: Option<i64>,
}

/// CPU and memory of the container.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Resources {
    /// What a node reserves for a pod, such as {cpu: "1", memory: 512Mi}.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "embedded::quantities")]
    pub requests: BTreeMap<String, Quantity>,

    /// What a pod may use at most, such as {memory: 2Gi}. Memory must be at least 32Mi (else the pool gets the condition
    /// Ready=False, InvalidSpec).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "embedded::quantities")]
    pub limits: BTreeMap<String, Quantity>,
}
