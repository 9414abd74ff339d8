//! Pods that are alike: those without GPUs of their own, and those with.

use std::collections::BTreeMap;

use beamline_crds as crds;
use beamline_crds::Resources;
use k8s_openapi::api::core::v1::{Container, Toleration};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::scaling::{self, Bounds};
use super::{InvalidPool, quantity};

const CPU_SLOTS: i32 = 8;
const IO_SLOTS: i32 = 16;
const GPU_SLOTS: i32 = 2;
const GPU_RESOURCE: &str = "nvidia.com/gpu";
const CPU_REQUEST: &str = "250m";
const MEMORY_REQUEST: &str = "256Mi";
const MEMORY_LIMIT: &str = "1Gi";
const MAX_SURGE: &str = "25%";
const MAX_UNAVAILABLE: i32 = 0;
/// The container that executes blocks.
const WORKER: &str = "worker";
/// What a pod without a memory limit may hold.
const UNLIMITED_MEMORY_MB: i64 = 1024;

/// Half of it is the least that a worker accepts as `--max-memory-mb`.
pub(super) const LEAST_LIMIT_MB: i64 = 32;
/// The most that a worker accepts as `--max-memory-mb`.
const MOST_MEMORY_MB: i64 = 1_048_576;

/// Pods that are alike, and how many a person asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Class {
    /// Which pods.
    pub kind: Kind,
    /// How many, in mode Manual.
    pub replicas: i32,
    /// Between which numbers another decides, in every other mode.
    pub bounds: Bounds,
    /// Blocks that one pod executes at once.
    pub slots: Slots,
    /// Payloads and results that one pod holds at once, in MiB.
    pub memory_mb: i64,
    /// CPU and memory of the worker's container.
    pub resources: Resources,
    /// GPUs of one pod.
    pub devices: Option<Devices>,
    /// Containers that start before the worker and stop after it.
    pub sidecars: Vec<Container>,
    /// RuntimeClass of the pods.
    pub runtime_class_name: Option<String>,
    /// Labels of their nodes.
    pub node_selector: BTreeMap<String, String>,
    /// Taints of their nodes.
    pub tolerations: Vec<Toleration>,
    /// How they are replaced.
    pub rollout: Rollout,
}

/// Which pods of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Those that take work from the intake.
    General,
    /// Those that take work from the GPU route only.
    Gpu,
}

/// Blocks that one pod executes at once, by the pool that they ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slots {
    /// Pool cpu.
    pub cpu: i32,
    /// Pool io.
    pub io: i32,
    /// Pool gpu.
    pub gpu: i32,
}

impl Slots {
    /// Blocks of any pool.
    pub const fn total(self) -> i32 {
        self.cpu + self.io + self.gpu
    }
}

/// GPUs of one pod.
#[derive(Clone, Debug, PartialEq)]
pub struct Devices {
    /// How many.
    pub count: i32,
    /// Where they come from.
    pub source: Source,
    /// Name of the container that gets them.
    pub container: String,
    /// How many the pool may have altogether.
    pub max_total: Option<i32>,
}

/// Where devices come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// A device plugin, by the name of its resource.
    Plugin(String),
    /// Dynamic resource allocation, by the name of a ResourceClaimTemplate.
    ClaimTemplate(String),
}

/// How pods are replaced.
#[derive(Clone, Debug, PartialEq)]
pub struct Rollout {
    /// Pods above the desired count.
    pub max_surge: IntOrString,
    /// Pods below the desired count.
    pub max_unavailable: IntOrString,
}

pub(super) fn general(
    replicas: i32,
    bounds: Bounds,
    worker: &crds::Worker,
    rollout: crds::Rollout,
) -> Result<Class, InvalidPool> {
    let crds::Pools { cpu, io, gpu } = worker.pools.clone().unwrap_or_default();
    let resources = worker.resources.clone().unwrap_or_else(default_resources);
    let crds::Rollout { max_surge, max_unavailable } = rollout;
    Ok(Class {
        kind: Kind::General,
        replicas,
        bounds,
        slots: Slots { cpu: cpu.unwrap_or(CPU_SLOTS), io: io.unwrap_or(IO_SLOTS), gpu: gpu.unwrap_or(0) },
        memory_mb: memory_mb(worker, &resources, "worker.resources.limits.memory")?,
        resources,
        devices: None,
        sidecars: worker.sidecars.clone(),
        runtime_class_name: None,
        node_selector: worker.node_selector.clone(),
        tolerations: worker.tolerations.clone(),
        rollout: Rollout {
            max_surge: max_surge.unwrap_or_else(|| IntOrString::String(MAX_SURGE.to_owned())),
            max_unavailable: max_unavailable.unwrap_or(IntOrString::Int(MAX_UNAVAILABLE)),
        },
    })
}

/// What `gpu` leaves out is as in the general class.
pub(super) fn gpu(gpu: crds::Gpu, worker: &crds::Worker, general: &Class) -> Result<Class, InvalidPool> {
    let bounds = scaling::gpu(&gpu, gpu.pool_size.unwrap_or(GPU_SLOTS));
    let crds::Gpu {
        count,
        resource_name,
        resource_claim_template_name,
        container,
        sidecars,
        pool_size,
        replicas,
        min_replicas: _,
        max_replicas: _,
        target: _,
        max_total,
        resources,
        runtime_class_name,
        node_selector,
        tolerations,
    } = gpu;
    let (resources, memory_mb) = match resources {
        None => (general.resources.clone(), general.memory_mb),
        Some(own) => {
            let memory_mb = memory_mb(worker, &own, "gpu.resources.limits.memory")?;
            (own, memory_mb)
        }
    };
    Ok(Class {
        kind: Kind::Gpu,
        replicas: replicas.unwrap_or(0),
        bounds,
        slots: Slots { cpu: 0, io: 0, gpu: pool_size.unwrap_or(GPU_SLOTS) },
        memory_mb,
        resources,
        devices: Some(Devices {
            count: count.unwrap_or(1),
            source: match resource_claim_template_name {
                Some(template) => Source::ClaimTemplate(template),
                None => Source::Plugin(resource_name.unwrap_or_else(|| GPU_RESOURCE.to_owned())),
            },
            container: container.unwrap_or_else(|| WORKER.to_owned()),
            max_total,
        }),
        sidecars: general.sidecars.iter().cloned().chain(sidecars).collect(),
        runtime_class_name,
        node_selector: general.node_selector.clone().into_iter().chain(node_selector).collect(),
        tolerations: general.tolerations.iter().cloned().chain(tolerations).collect(),
        // A surge would ask for devices that there may not be.
        rollout: Rollout { max_surge: IntOrString::Int(0), max_unavailable: IntOrString::Int(1) },
    })
}

fn default_resources() -> Resources {
    let amount = |name: &str, quantity: &str| (name.to_owned(), Quantity(quantity.to_owned()));
    Resources {
        requests: BTreeMap::from([amount("cpu", CPU_REQUEST), amount("memory", MEMORY_REQUEST)]),
        limits: BTreeMap::from([amount("memory", MEMORY_LIMIT)]),
    }
}

fn memory_mb(worker: &crds::Worker, resources: &Resources, field: &'static str) -> Result<i64, InvalidPool> {
    let asked = worker.limits.as_ref().and_then(|limits| limits.memory_mb);
    let Some(limit) = resources.limits.get("memory") else {
        return Ok(asked.unwrap_or(UNLIMITED_MEMORY_MB));
    };
    let limit_mb =
        quantity::mebibytes(&limit.0).ok_or_else(|| InvalidPool::Memory { field, value: limit.0.clone() })?;
    if limit_mb < LEAST_LIMIT_MB {
        return Err(InvalidPool::TooLittleMemory { field, value: limit.0.clone() });
    }
    match asked {
        Some(memory_mb) if memory_mb > limit_mb / 4 * 3 + limit_mb % 4 * 3 / 4 => {
            Err(InvalidPool::TooMuchMemory { memory_mb, field, limit_mb })
        }
        Some(memory_mb) => Ok(memory_mb),
        None => Ok((limit_mb / 2).min(MOST_MEMORY_MB)),
    }
}
