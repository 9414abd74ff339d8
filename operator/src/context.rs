//! What every look at a pool shares.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::Client;
use kube::runtime::reflector::Store;

use crate::admin::Liveness;
use crate::events::Events;
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::signals::Signals;
use crate::surroundings::Lookout;
use crate::tenure::Tenure;

/// Every pool is looked at this often even if nothing seems to happen.
pub const RESYNC: Duration = Duration::from_secs(300);

/// What every look at a pool shares.
pub struct Context {
    /// Connection to the API server.
    pub client: Client,
    /// Whether this operator may still act on workers.
    pub tenure: Tenure,
    /// What the watches know.
    pub caches: Caches,
    /// What pools refer to.
    pub lookout: Arc<Lookout>,
    /// What the brokers say.
    pub signals: Arc<Signals>,
    /// What earlier looks left.
    pub memory: Arc<Memory>,
    /// Kubernetes events.
    pub events: Events,
    /// The operator's own series.
    pub metrics: Arc<Metrics>,
    /// Looks at pools that are under way.
    pub liveness: Liveness,
    /// Image of the workers of a pool that names none.
    pub worker_image: String,
}

/// The caches behind the watches.
pub struct Caches {
    /// Children, by kind.
    pub service_accounts: Store<ServiceAccount>,
    /// Children, by kind.
    pub config_maps: Store<ConfigMap>,
    /// Children, by kind.
    pub services: Store<Service>,
    /// Children, by kind.
    pub network_policies: Store<NetworkPolicy>,
    /// Children, by kind.
    pub budgets: Store<PodDisruptionBudget>,
    /// Children, by kind.
    pub autoscalers: Store<HorizontalPodAutoscaler>,
    /// Children, by kind.
    pub deployments: Store<Deployment>,
    /// The workers.
    pub pods: Store<Pod>,
}
