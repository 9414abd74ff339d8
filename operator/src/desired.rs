//! What should exist for a pool. Pure: no client, no clock, the same pool gives the same bytes.

mod autoscaler;
mod budget;
mod config_map;
mod deployment;
mod environment;
mod network_policy;
mod pod_monitor;
mod pod;
mod scaled_object;
mod secrets;
mod service;
mod service_account;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::DynamicObject;
use sha2::{Digest, Sha256};

pub use config_map::policy_hash;

pub use pod_monitor::pod_monitors;
pub use scaled_object::scaled_objects;

use crate::pool::{Class, Mode, ValidPool};
use crate::scale::Replicas;
use crate::surroundings::Surroundings;

/// All children of a pool.
#[derive(Clone, Debug, PartialEq)]
pub struct Desired {
    /// Who the pods are.
    pub service_account: ServiceAccount,
    /// What running workers read again when it changes.
    pub config_map: ConfigMap,
    /// Where their metrics are found.
    pub service: Service,
    /// The wall around them.
    pub network_policy: Option<NetworkPolicy>,
    /// How a Prometheus Operator finds their metrics.
    pub pod_monitor: Option<DynamicObject>,
    /// Who writes how many there are.
    pub autoscaler: Option<HorizontalPodAutoscaler>,
    /// The same, for KEDA.
    pub scaled_object: Option<DynamicObject>,
    /// The pods without GPUs of their own.
    pub general: Workload,
    /// The pods with GPUs.
    pub gpu: Option<Workload>,
}

/// The pods of one class.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    /// What a node drain may take.
    pub budget: PodDisruptionBudget,
    /// The workers.
    pub deployment: Deployment,
}

/// The children of this pool in these surroundings, with so many workers.
pub fn desired(pool: &ValidPool, replicas: Replicas, around: &Surroundings) -> Desired {
    let workload = |class: &Class, replicas| Workload {
        budget: budget::budget(pool, class.kind),
        deployment: deployment::deployment(pool, class, replicas),
    };
    Desired {
        service_account: service_account::service_account(pool),
        config_map: config_map::config_map(pool),
        service: service::service(pool),
        network_policy: pool.network_policy.then(|| network_policy::network_policy(pool, around)),
        pod_monitor: pool.pod_monitor.then(|| pod_monitor::pod_monitor(pool)),
        autoscaler: (pool.scaling.mode == Mode::Hpa).then(|| autoscaler::autoscaler(pool)),
        scaled_object: around
            .numbers
            .as_ref()
            .filter(|_| pool.scaling.mode == Mode::Keda)
            .map(|url| scaled_object::scaled_object(pool, url)),
        general: workload(&pool.general, replicas.general),
        gpu: pool.gpu.as_ref().zip(replicas.gpu).map(|(class, replicas)| workload(class, replicas)),
    }
}

/// A short fingerprint, the same in every version of the operator.
fn digest<'a>(parts: impl Iterator<Item = &'a str>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
