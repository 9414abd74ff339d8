//! What should exist for a pool. Pure: no client, no clock, the same pool gives the same bytes.

mod budget;
mod config_map;
mod deployment;
pub mod names;
mod pod;
mod service;
mod service_account;

use beamline_crds::Scaling;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;

use crate::pool::ValidPool;

/// All children of a pool.
#[derive(Clone, Debug, PartialEq)]
pub struct Desired {
    /// Who the pods are.
    pub service_account: ServiceAccount,
    /// What the workers are told.
    pub config_map: ConfigMap,
    /// Where their metrics are found.
    pub service: Service,
    /// What a node drain may take.
    pub budget: PodDisruptionBudget,
    /// The workers.
    pub deployment: Deployment,
}

/// The children of this pool, with as many workers as decided.
pub fn desired(pool: &ValidPool, scaling: &Scaling) -> Desired {
    let config_map = config_map::config_map(pool);
    Desired {
        service_account: service_account::service_account(pool),
        service: service::service(pool),
        budget: budget::budget(pool),
        deployment: deployment::deployment(pool, scaling, &config_map),
        config_map,
    }
}

#[cfg(test)]
mod tests;
