//! What all pods of a pool have in common.

use std::collections::BTreeMap;
use std::time::Duration;

use beamline_crds as crds;
use beamline_crds::{EgressPolicy, ImagePullPolicy, InlineConnections, SqlConnection};
use k8s_openapi::api::core::v1::{
    Affinity, EnvVar, LocalObjectReference, TopologySpreadConstraint, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::InvalidPool;
use super::egress::Place;

const CPU_TIME: Duration = Duration::from_secs(7200);
const DRAIN_SECONDS: i32 = 35;
const ROOT: &str = "/data";
const SCRATCH_SIZE: &str = "1Gi";

/// What all pods have in common.
#[derive(Clone, Debug, PartialEq)]
pub struct Worker {
    /// Image of the container.
    pub image: String,
    /// Absent: what Kubernetes decides.
    pub image_pull_policy: Option<ImagePullPolicy>,
    /// Registry credentials.
    pub image_pull_secrets: Vec<LocalObjectReference>,
    /// CPU time of one block.
    pub cpu_time: Duration,
    /// How long running blocks may finish after SIGTERM, in whole seconds.
    pub drain_seconds: i32,
    /// Whether nothing is executed for real.
    pub sandbox: bool,
    /// Directories of file blocks; never empty.
    pub roots: Vec<Root>,
    /// Reachable addresses.
    pub egress: Egress,
    /// Databases.
    pub sql: Sql,
    /// Further environment.
    pub env: Vec<EnvVar>,
    /// Attraction and repulsion.
    pub affinity: Option<Affinity>,
    /// Absent: spread evenly where possible.
    pub topology_spread_constraints: Option<Vec<TopologySpreadConstraint>>,
    /// PriorityClass of the pods.
    pub priority_class_name: Option<String>,
    /// Further volumes.
    pub volumes: Vec<Volume>,
    /// Where the further volumes are mounted.
    pub volume_mounts: Vec<VolumeMount>,
    /// Further labels of the pods.
    pub pod_labels: BTreeMap<String, String>,
    /// Further annotations of the pods.
    pub pod_annotations: BTreeMap<String, String>,
    /// Annotations of the ServiceAccount.
    pub service_account_annotations: BTreeMap<String, String>,
}

/// One directory of file blocks.
#[derive(Clone, Debug, PartialEq)]
pub struct Root {
    /// Absolute path in the container.
    pub path: String,
    /// What lies behind it.
    pub volume: RootVolume,
}

/// What lies behind a root.
#[derive(Clone, Debug, PartialEq)]
pub enum RootVolume {
    /// Scratch space of one pod, with its size.
    Scratch(Quantity),
    /// A claim that all pods share.
    Claim(String),
}

/// Reachable addresses.
#[derive(Clone, Debug, PartialEq)]
pub struct Egress {
    /// The rule.
    pub policy: EgressPolicy,
    /// Exceptions that lift a refusal.
    pub allow: Vec<String>,
    /// Exceptions that refuse.
    pub deny: Vec<String>,
}

/// Databases of SQL blocks.
#[derive(Clone, Debug, PartialEq)]
pub struct Sql {
    /// Whether a block may bring its own connection string.
    pub inline: InlineConnections,
    /// Databases under a name.
    pub connections: Vec<SqlConnection>,
}

/// What stands in [`super::Class`] is not looked at here.
pub(super) fn worker(worker: crds::Worker, default_image: &str) -> Result<Worker, InvalidPool> {
    let crds::Worker {
        image,
        image_pull_policy,
        image_pull_secrets,
        pools: _,
        limits,
        resources: _,
        drain_seconds,
        sandbox,
        filesystem,
        egress,
        sql,
        env,
        node_selector: _,
        tolerations: _,
        affinity,
        topology_spread_constraints,
        priority_class_name,
        volumes,
        volume_mounts,
        sidecars: _,
        pod_labels,
        pod_annotations,
        service_account_annotations,
    } = worker;
    let cpu_time_ms = limits.and_then(|limits| limits.cpu_time_ms);
    let crds::Sql { inline_connections, connections } = sql.unwrap_or_default();
    Ok(Worker {
        image: image.unwrap_or_else(|| default_image.to_owned()),
        image_pull_policy,
        image_pull_secrets,
        cpu_time: cpu_time_ms.and_then(|limit| u64::try_from(limit).ok()).map_or(CPU_TIME, Duration::from_millis),
        drain_seconds: drain_seconds.unwrap_or(DRAIN_SECONDS),
        sandbox: sandbox.unwrap_or(false),
        roots: roots(filesystem),
        egress: reachable(egress.unwrap_or_default())?,
        sql: Sql { inline: inline_connections.unwrap_or(InlineConnections::Allow), connections },
        env,
        affinity,
        topology_spread_constraints,
        priority_class_name,
        volumes,
        volume_mounts,
        pod_labels,
        pod_annotations,
        service_account_annotations,
    })
}

fn roots(filesystem: Option<crds::Filesystem>) -> Vec<Root> {
    let roots = filesystem.map(|filesystem| filesystem.roots).unwrap_or_default();
    if roots.is_empty() {
        return vec![Root { path: ROOT.to_owned(), volume: scratch(None) }];
    }
    roots.into_iter().map(|crds::Root { path, volume }| Root { path, volume: behind(volume) }).collect()
}

fn behind(volume: Option<crds::RootVolume>) -> RootVolume {
    let crds::RootVolume { empty_dir, persistent_volume_claim } = volume.unwrap_or_default();
    match persistent_volume_claim {
        Some(claim) => RootVolume::Claim(claim.claim_name),
        None => scratch(empty_dir),
    }
}

fn scratch(empty_dir: Option<crds::EmptyDir>) -> RootVolume {
    let size = empty_dir.and_then(|empty_dir| empty_dir.size_limit);
    RootVolume::Scratch(size.unwrap_or_else(|| Quantity(SCRATCH_SIZE.to_owned())))
}

fn reachable(egress: crds::Egress) -> Result<Egress, InvalidPool> {
    let crds::Egress { policy, allow, deny } = egress;
    Ok(Egress {
        policy: policy.unwrap_or(EgressPolicy::Internal),
        allow: entries("worker.egress.allow", allow)?,
        deny: entries("worker.egress.deny", deny)?,
    })
}

fn entries(field: &'static str, entries: Vec<String>) -> Result<Vec<String>, InvalidPool> {
    match entries.iter().find(|entry| Place::parse(entry).is_none()) {
        None => Ok(entries),
        Some(wrong) => Err(InvalidPool::Egress { field, value: wrong.clone() }),
    }
}
