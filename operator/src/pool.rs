//! `ValidPool`: a WorkerPool that has proved itself. Every default is decided here; nothing behind `validate` asks the
//! spec again.

mod class; // pods that are alike
pub mod egress; // entries of lists of addresses
mod nats; // where the work comes from
pub mod port; // where a URL leads
mod quantity; // amounts of memory
mod tenants; // what each of them may use
mod scaling; // who decides how many, within which bounds
mod worker; // what all pods have in common

use beamline_crds as crds;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::{Resource, ResourceExt};

pub use class::{Class, Devices, Kind, Rollout, Slots, Source};
pub use crds::{
    Delivery, EgressPolicy, ImagePullPolicy, InlineConnections, Resources, SecretKeyRef, SqlConnection, Storage,
    Tenants, Tls,
};
pub use nats::{Explicit, Nats, Streams, meeting_point, qualified};
pub use scaling::{Bounds, Mode, Scaling};
pub use tenants::{Limits, Quotas};
pub use worker::{Egress, Root, RootVolume, Sql, Worker};

/// What a node drain may take where a spec says nothing.
const DRAIN_MAX_UNAVAILABLE: i32 = 1;

/// A pool whose every part is decided.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidPool {
    /// Name of the pool.
    pub name: String,
    /// Namespace of the pool and of all its children.
    pub namespace: String,
    /// Makes a child go when its pool goes.
    pub owner: OwnerReference,
    /// Whether workers take no work.
    pub paused: bool,
    /// Who decides how many workers there are.
    pub scaling: Scaling,
    /// Where the work comes from.
    pub nats: Nats,
    /// What all pods have in common.
    pub worker: Worker,
    /// The pods without GPUs of their own.
    pub general: Class,
    /// The pods with GPUs.
    pub gpu: Option<Class>,
    /// What each tenant gets.
    pub tenants: Option<Tenants>,
    /// What each tenant may use.
    pub limits: Limits,
    /// What a node drain may take, of each class.
    pub disruption: Disruption,
    /// Whether the pods get a NetworkPolicy.
    pub network_policy: bool,
    /// Where traces go.
    pub otlp_endpoint: Option<String>,
    /// Whether the pods get a PodMonitor.
    pub pod_monitor: bool,
}

impl ValidPool {
    /// The pods without GPUs, then those with.
    pub fn classes(&self) -> impl Iterator<Item = &Class> {
        std::iter::once(&self.general).chain(&self.gpu)
    }
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
    #[error("{field}: `{value}` is less than a worker needs; set {}Mi or more", class::LEAST_LIMIT_MB)]
    TooLittleMemory {
        /// Which field.
        field: &'static str,
        /// What the container has.
        value: String,
    },
    /// More memory for payloads than the container can spare.
    #[error("worker.limits.memoryMb: {memory_mb} is over 75 % of {field} ({limit_mb} MiB)")]
    TooMuchMemory {
        /// What is asked for, in MiB.
        memory_mb: i64,
        /// Where the container's own limit stands.
        field: &'static str,
        /// What the container has, in MiB.
        limit_mb: i64,
    },
}

/// Decides every default and refuses what cannot work. Workers run `default_image` where the pool names none.
pub fn validate(pool: &crds::WorkerPool, default_image: &str) -> Result<ValidPool, InvalidPool> {
    let crds::WorkerPoolSpec {
        replicas,
        paused,
        scaling,
        nats,
        worker,
        gpu,
        rollout,
        tenants,
        disruption,
        network_policy,
        observability,
    } = pool.spec.clone();
    let worker = worker.unwrap_or_default();
    let scaling = scaling.unwrap_or_default();
    let general = class::general(replicas, scaling::general(&scaling), &worker, rollout.unwrap_or_default())?;
    let crds::Observability { otlp_endpoint, pod_monitor } = observability.unwrap_or_default();
    Ok(ValidPool {
        name: pool.metadata.name.clone().ok_or(InvalidPool::NotStored)?,
        namespace: pool.namespace().ok_or(InvalidPool::NotStored)?,
        owner: pool.controller_owner_ref(&()).ok_or(InvalidPool::NotStored)?,
        paused: paused.unwrap_or(false),
        scaling: scaling::scaling(&scaling),
        nats: nats::nats(nats)?,
        gpu: gpu.map(|gpu| class::gpu(gpu, &worker, &general)).transpose()?,
        general,
        worker: worker::worker(worker, default_image)?,
        limits: tenants::limits(tenants.as_ref())?,
        tenants,
        disruption: allowed(disruption.unwrap_or_default()),
        network_policy: network_policy.unwrap_or(crds::NetworkPolicy::Auto) == crds::NetworkPolicy::Auto,
        otlp_endpoint,
        pod_monitor: pod_monitor.unwrap_or(false),
    })
}

fn allowed(disruption: crds::Disruption) -> Disruption {
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
