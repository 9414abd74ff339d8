//! `ValidPool`: a WorkerPool that has proved itself. Every default is decided here; nothing behind `validate` asks the
//! spec again.

mod egress; // entries of lists of addresses
mod quantity; // amounts of memory

use std::collections::BTreeMap;
use std::time::Duration;

use beamline_crds as crds;
use k8s_openapi::api::core::v1::{
    Affinity, EnvVar, LocalObjectReference, Toleration, TopologySpreadConstraint, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::{Resource, ResourceExt};

pub use crds::{EgressPolicy, ImagePullPolicy, Resources, SecretKeyRef, Storage, Tls};

// What holds where a spec says nothing. `docs/operations.md` lists the same.
const SUBJECT: &str = "caf.exec.assign.v1";
const QUEUE_GROUP: &str = "caf-workers";
const STREAM_REPLICAS: usize = 1;
const RESULT_RETENTION: Duration = Duration::from_secs(3600);
const RESULT_MAX_MESSAGES: i64 = 2_000_000;
const DEAD_LETTER_RETENTION: Duration = Duration::from_secs(720 * 3600);
const CPU_SLOTS: i32 = 8;
const IO_SLOTS: i32 = 16;
const CPU_TIME: Duration = Duration::from_secs(7200);
const CPU_REQUEST: &str = "250m";
const MEMORY_REQUEST: &str = "256Mi";
const MEMORY_LIMIT: &str = "1Gi";
const DRAIN_SECONDS: i32 = 35;
const ROOT: &str = "/data";
const SCRATCH_SIZE: &str = "1Gi";
const MAX_SURGE: &str = "25%";
const ROLLOUT_MAX_UNAVAILABLE: i32 = 0;
const DRAIN_MAX_UNAVAILABLE: i32 = 1;
/// What a pod without a memory limit may hold.
const UNLIMITED_MEMORY_MB: i64 = 1024;

/// Half of it is the least that a worker accepts as `--max-memory-mb`.
const LEAST_LIMIT_MB: i64 = 32;
/// The most that a worker accepts as `--max-memory-mb`.
const MOST_MEMORY_MB: i64 = 1_048_576;

/// A pool whose every part is decided.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidPool {
    /// Name of the pool.
    pub name: String,
    /// Namespace of the pool and of all its children.
    pub namespace: String,
    /// Makes a child go when its pool goes.
    pub owner: OwnerReference,
    /// What `spec.replicas` says.
    pub replicas: i32,
    /// Where the work comes from.
    pub nats: Nats,
    /// What one pod looks like.
    pub worker: Worker,
    /// How pods are replaced.
    pub rollout: Rollout,
    /// What a node drain may take.
    pub disruption: Disruption,
    /// Where traces go.
    pub otlp_endpoint: Option<String>,
}

/// Where the work comes from.
#[derive(Clone, Debug, PartialEq)]
pub struct Nats {
    /// Address of the servers.
    pub url: String,
    /// What workers connect with.
    pub credentials: Option<SecretKeyRef>,
    /// What the operator connects with.
    pub operator_credentials: Option<SecretKeyRef>,
    /// TLS material of both.
    pub tls: Tls,
    /// Subject of the assignments.
    pub subject: String,
    /// Durable consumer on the subject.
    pub queue_group: String,
    /// How streams are created.
    pub streams: Streams,
}

/// How streams are created.
#[derive(Clone, Debug, PartialEq)]
pub struct Streams {
    /// Whether the operator creates what is missing.
    pub manage: bool,
    /// Servers that keep each stream.
    pub replicas: usize,
    /// Where they keep it.
    pub storage: Storage,
    /// Age at which a result goes.
    pub result_retention: Duration,
    /// Results kept at most.
    pub result_max_messages: i64,
    /// Age at which a dead letter goes.
    pub dead_letter_retention: Duration,
}

/// What one pod looks like.
#[derive(Clone, Debug, PartialEq)]
pub struct Worker {
    /// Image of the container.
    pub image: String,
    /// Absent: what Kubernetes decides.
    pub image_pull_policy: Option<ImagePullPolicy>,
    /// Registry credentials.
    pub image_pull_secrets: Vec<LocalObjectReference>,
    /// Blocks at once in the cpu pool.
    pub cpu_slots: i32,
    /// Blocks at once in the io pool.
    pub io_slots: i32,
    /// Payloads and results held at once, in MiB.
    pub memory_mb: i64,
    /// CPU time of one block.
    pub cpu_time: Duration,
    /// CPU and memory of the container.
    pub resources: Resources,
    /// How long running blocks may finish after SIGTERM, in whole seconds.
    pub drain_seconds: i32,
    /// Whether nothing is executed for real.
    pub sandbox: bool,
    /// Directories of file blocks; never empty.
    pub roots: Vec<Root>,
    /// Reachable addresses.
    pub egress: Egress,
    /// Further environment.
    pub env: Vec<EnvVar>,
    /// Where pods run.
    pub scheduling: Scheduling,
    /// Further volumes and where they are mounted.
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

/// Where pods run.
#[derive(Clone, Debug, PartialEq)]
pub struct Scheduling {
    /// Labels of the node.
    pub node_selector: BTreeMap<String, String>,
    /// Taints that are tolerated.
    pub tolerations: Vec<Toleration>,
    /// Attraction and repulsion.
    pub affinity: Option<Affinity>,
    /// Absent: spread evenly where possible.
    pub topology_spread_constraints: Option<Vec<TopologySpreadConstraint>>,
    /// PriorityClass of the pods.
    pub priority_class_name: Option<String>,
}

/// How pods are replaced.
#[derive(Clone, Debug, PartialEq)]
pub struct Rollout {
    /// Pods above the desired count.
    pub max_surge: IntOrString,
    /// Pods below the desired count.
    pub max_unavailable: IntOrString,
}

/// What a node drain may take.
#[derive(Clone, Debug, PartialEq)]
pub enum Disruption {
    /// Pods that may be missing.
    MaxUnavailable(IntOrString),
    /// Pods that must stay.
    MinAvailable(IntOrString),
}

/// What the API server let through and the operator cannot use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPool {
    /// A pool that no API server has stored.
    #[error("metadata: the pool has no name, namespace or uid")]
    NotStored,
    /// A text that is no duration.
    #[error("{field}: `{value}` is not a duration such as 90m")]
    Duration {
        /// Which field.
        field: &'static str,
        /// What it holds.
        value: String,
    },
    /// A text that is no amount of memory.
    #[error("{field}: `{value}` is not an amount of memory such as 512Mi")]
    Memory {
        /// Which field.
        field: &'static str,
        /// What it holds.
        value: String,
    },
    /// An entry that workers cannot read.
    #[error("{field}: `{value}` is no CIDR, address, host or *.suffix with an optional :port; correct or remove it")]
    Egress {
        /// Which list.
        field: &'static str,
        /// The entry.
        value: String,
    },
    /// Too little memory for a worker to start with.
    #[error("worker.resources.limits.memory: `{value}` is less than a worker needs; set {LEAST_LIMIT_MB}Mi or more")]
    TooLittleMemory {
        /// What the container has.
        value: String,
    },
    /// More memory for payloads than the container can spare.
    #[error("worker.limits.memoryMb: {memory_mb} is over 75 % of worker.resources.limits.memory ({limit_mb} MiB)")]
    TooMuchMemory {
        /// What is asked for, in MiB.
        memory_mb: i64,
        /// What the container has, in MiB.
        limit_mb: i64,
    },
}

/// Decides every default and refuses what cannot work. Workers run `default_image` where the pool names none.
pub fn validate(pool: &crds::WorkerPool, default_image: &str) -> Result<ValidPool, InvalidPool> {
    let crds::WorkerPoolSpec { replicas, nats, worker, rollout, disruption, observability } = pool.spec.clone();
    Ok(ValidPool {
        name: pool.metadata.name.clone().ok_or(InvalidPool::NotStored)?,
        namespace: pool.namespace().ok_or(InvalidPool::NotStored)?,
        owner: pool.controller_owner_ref(&()).ok_or(InvalidPool::NotStored)?,
        replicas,
        nats: valid_nats(nats)?,
        worker: valid_worker(worker.unwrap_or_default(), default_image)?,
        rollout: valid_rollout(rollout.unwrap_or_default()),
        disruption: valid_disruption(disruption.unwrap_or_default()),
        otlp_endpoint: observability.and_then(|observability| observability.otlp_endpoint),
    })
}

fn valid_nats(nats: crds::Nats) -> Result<Nats, InvalidPool> {
    let crds::Nats { url, credentials_secret_ref, operator_credentials_secret_ref, tls, subject, queue_group, streams } =
        nats;
    Ok(Nats {
        url,
        operator_credentials: operator_credentials_secret_ref.or_else(|| credentials_secret_ref.clone()),
        credentials: credentials_secret_ref,
        tls: tls.unwrap_or_default(),
        subject: subject.unwrap_or_else(|| SUBJECT.to_owned()),
        queue_group: queue_group.unwrap_or_else(|| QUEUE_GROUP.to_owned()),
        streams: valid_streams(streams.unwrap_or_default())?,
    })
}

fn valid_streams(streams: crds::Streams) -> Result<Streams, InvalidPool> {
    let crds::Streams { manage, replicas, storage, result_retention, result_max_messages, dead_letter_retention } =
        streams;
    Ok(Streams {
        manage: manage.unwrap_or(true),
        replicas: replicas.and_then(|replicas| usize::try_from(replicas).ok()).unwrap_or(STREAM_REPLICAS),
        storage: storage.unwrap_or(Storage::File),
        result_retention: duration("nats.streams.resultRetention", result_retention, RESULT_RETENTION)?,
        result_max_messages: result_max_messages.unwrap_or(RESULT_MAX_MESSAGES),
        dead_letter_retention: duration(
            "nats.streams.deadLetterRetention",
            dead_letter_retention,
            DEAD_LETTER_RETENTION,
        )?,
    })
}

fn duration(field: &'static str, value: Option<String>, default: Duration) -> Result<Duration, InvalidPool> {
    let Some(value) = value else { return Ok(default) };
    humantime::parse_duration(&value).map_err(|_| InvalidPool::Duration { field, value })
}

fn valid_worker(worker: crds::Worker, default_image: &str) -> Result<Worker, InvalidPool> {
    let crds::Worker {
        image,
        image_pull_policy,
        image_pull_secrets,
        pools,
        limits,
        resources,
        drain_seconds,
        sandbox,
        filesystem,
        egress,
        env,
        node_selector,
        tolerations,
        affinity,
        topology_spread_constraints,
        priority_class_name,
        volumes,
        volume_mounts,
        pod_labels,
        pod_annotations,
        service_account_annotations,
    } = worker;
    let crds::Pools { cpu, io } = pools.unwrap_or_default();
    let crds::Limits { memory_mb, cpu_time_ms } = limits.unwrap_or_default();
    let resources = resources.unwrap_or_else(default_resources);
    Ok(Worker {
        image: image.unwrap_or_else(|| default_image.to_owned()),
        image_pull_policy,
        image_pull_secrets,
        cpu_slots: cpu.unwrap_or(CPU_SLOTS),
        io_slots: io.unwrap_or(IO_SLOTS),
        memory_mb: valid_memory(memory_mb, &resources)?,
        cpu_time: cpu_time_ms.and_then(|limit| u64::try_from(limit).ok()).map_or(CPU_TIME, Duration::from_millis),
        resources,
        drain_seconds: drain_seconds.unwrap_or(DRAIN_SECONDS),
        sandbox: sandbox.unwrap_or(false),
        roots: valid_roots(filesystem),
        egress: valid_egress(egress.unwrap_or_default())?,
        env,
        scheduling: Scheduling {
            node_selector,
            tolerations,
            affinity,
            topology_spread_constraints,
            priority_class_name,
        },
        volumes,
        volume_mounts,
        pod_labels,
        pod_annotations,
        service_account_annotations,
    })
}

fn default_resources() -> Resources {
    let amount = |name: &str, quantity: &str| (name.to_owned(), Quantity(quantity.to_owned()));
    Resources {
        requests: BTreeMap::from([amount("cpu", CPU_REQUEST), amount("memory", MEMORY_REQUEST)]),
        limits: BTreeMap::from([amount("memory", MEMORY_LIMIT)]),
    }
}

fn valid_memory(asked: Option<i64>, resources: &Resources) -> Result<i64, InvalidPool> {
    let Some(limit) = resources.limits.get("memory") else {
        return Ok(asked.unwrap_or(UNLIMITED_MEMORY_MB));
    };
    let limit_mb = quantity::mebibytes(&limit.0)
        .ok_or_else(|| InvalidPool::Memory { field: "worker.resources.limits.memory", value: limit.0.clone() })?;
    if limit_mb < LEAST_LIMIT_MB {
        return Err(InvalidPool::TooLittleMemory { value: limit.0.clone() });
    }
    match asked {
        Some(memory_mb) if memory_mb > limit_mb / 4 * 3 + limit_mb % 4 * 3 / 4 => {
            Err(InvalidPool::TooMuchMemory { memory_mb, limit_mb })
        }
        Some(memory_mb) => Ok(memory_mb),
        None => Ok((limit_mb / 2).min(MOST_MEMORY_MB)),
    }
}

fn valid_roots(filesystem: Option<crds::Filesystem>) -> Vec<Root> {
    let roots = filesystem.map(|filesystem| filesystem.roots).unwrap_or_default();
    if roots.is_empty() {
        return vec![Root { path: ROOT.to_owned(), volume: scratch(None) }];
    }
    roots.into_iter().map(|crds::Root { path, volume }| Root { path, volume: valid_volume(volume) }).collect()
}

fn valid_volume(volume: Option<crds::RootVolume>) -> RootVolume {
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

fn valid_egress(egress: crds::Egress) -> Result<Egress, InvalidPool> {
    let crds::Egress { policy, allow, deny } = egress;
    Ok(Egress {
        policy: policy.unwrap_or(EgressPolicy::Internal),
        allow: entries("worker.egress.allow", allow)?,
        deny: entries("worker.egress.deny", deny)?,
    })
}

fn entries(field: &'static str, entries: Vec<String>) -> Result<Vec<String>, InvalidPool> {
    match entries.iter().find(|entry| !egress::is_entry(entry)) {
        None => Ok(entries),
        Some(wrong) => Err(InvalidPool::Egress { field, value: wrong.clone() }),
    }
}

fn valid_rollout(rollout: crds::Rollout) -> Rollout {
    let crds::Rollout { max_surge, max_unavailable } = rollout;
    Rollout {
        max_surge: max_surge.unwrap_or_else(|| IntOrString::String(MAX_SURGE.to_owned())),
        max_unavailable: max_unavailable.unwrap_or(IntOrString::Int(ROLLOUT_MAX_UNAVAILABLE)),
    }
}

fn valid_disruption(disruption: crds::Disruption) -> Disruption {
    let crds::Disruption { max_unavailable, min_available } = disruption;
    match (min_available, max_unavailable) {
        (Some(min_available), None) => Disruption::MinAvailable(min_available),
        (_, max_unavailable) => {
            Disruption::MaxUnavailable(max_unavailable.unwrap_or(IntOrString::Int(DRAIN_MAX_UNAVAILABLE)))
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
