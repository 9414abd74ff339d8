//! What exists for a pool: its children from the watch caches, its pods, and what the broker last said.
//!
//! What no cache holds is asked for by name, since an object in the way carries none of our labels.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::{NamespaceResourceScope, Resource as _};
use kube::runtime::reflector::{Lookup, ObjectRef, Store};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;

use crate::context::{Caches, Context};
use crate::error::Error;
use crate::names::{self, worker_class};
use crate::pool::{Kind, Mode, ValidPool};
use crate::slim::{Slim, slim};
use crate::surroundings::Surroundings;

/// What exists for a pool. Every child that is there is the pool's own.
pub struct Observed {
    /// Who the pods are.
    pub service_account: Option<Arc<ServiceAccount>>,
    /// What running workers read again when it changes.
    pub config_map: Option<Arc<ConfigMap>>,
    /// Where their metrics are found.
    pub service: Option<Arc<Service>>,
    /// The wall around them, or what is left of it.
    pub network_policy: Option<Arc<NetworkPolicy>>,
    /// Who writes how many there are, or what is left of it.
    pub autoscaler: Option<Arc<HorizontalPodAutoscaler>>,
    /// The pods without GPUs of their own.
    pub general: Workload,
    /// The pods with GPUs, or what is left of them.
    pub gpu: Workload,
    /// Whether what is left of them has something left to do.
    pub gpu_stays: bool,
    /// The workers, one by one.
    pub pods: Vec<Arc<Pod>>,
    /// What the pool refers to and does not own.
    pub surroundings: Surroundings,
}

impl Observed {
    /// The pods of this class.
    pub fn workload(&self, class: Kind) -> &Workload {
        match class {
            Kind::General => &self.general,
            Kind::Gpu => &self.gpu,
        }
    }
}

/// The pods of one class.
pub struct Workload {
    /// What a node drain may take.
    pub budget: Option<Arc<PodDisruptionBudget>>,
    /// The workers, as a whole.
    pub deployment: Option<Arc<Deployment>>,
}

/// Finds the children, and refuses to go on where the name of one that is wanted is taken.
pub async fn observe(ctx: &Context, pool: &ValidPool) -> Result<Observed, Error> {
    let Caches { service_accounts, config_maps, services, network_policies, budgets, autoscalers, deployments, pods } =
        &ctx.caches;
    let name = pool.name.as_str();
    let pods = workers(pods, pool);
    let gpu = names::workload(name, Kind::Gpu);
    let gpu = match pool.gpu {
        Some(_) => Workload {
            budget: child(&ctx.client, budgets, pool, &gpu).await?,
            deployment: deployment(ctx, pool, Kind::Gpu).await?,
        },
        None => Workload { budget: remains(budgets, pool, &gpu), deployment: remains(deployments, pool, &gpu) },
    };
    Ok(Observed {
        service_account: child(&ctx.client, service_accounts, pool, &names::service_account(name)).await?,
        config_map: child(&ctx.client, config_maps, pool, name).await?,
        service: child(&ctx.client, services, pool, name).await?,
        network_policy: if pool.network_policy {
            child(&ctx.client, network_policies, pool, name).await?
        } else {
            remains(network_policies, pool, name)
        },
        autoscaler: if pool.scaling.mode == Mode::Hpa {
            child(&ctx.client, autoscalers, pool, name).await?
        } else {
            remains(autoscalers, pool, name)
        },
        general: Workload {
            budget: child(&ctx.client, budgets, pool, name).await?,
            deployment: deployment(ctx, pool, Kind::General).await?,
        },
        gpu_stays: has_pods(&gpu) && ctx.signals.needs_gpus_still(pool),
        gpu,
        surroundings: ctx.lookout.around(pool, &pods).await,
        pods,
    })
}

fn has_pods(class: &Workload) -> bool {
    let asked = class.deployment.as_ref().and_then(|deployment| deployment.spec.as_ref()?.replicas);
    asked.is_some_and(|replicas| replicas > 0)
}

/// What the pool wants no more: only its own, and whoever else has the name is none of our business.
fn remains<K>(cache: &Store<K>, pool: &ValidPool, name: &str) -> Option<Arc<K>>
where
    K: Resource<DynamicType = ()> + Lookup<DynamicType = ()> + Clone,
{
    cache.get(&ObjectRef::new(name).within(&pool.namespace)).filter(|found| foreign(found.as_ref(), pool).is_none())
}

/// How many workers it asks for is decided upon: where a watch is behind our own write of that, it is asked for.
async fn deployment(ctx: &Context, pool: &ValidPool, class: Kind) -> Result<Option<Arc<Deployment>>, Error> {
    let (name, reference) = (names::workload(&pool.name, class), ObjectRef::new(&pool.name).within(&pool.namespace));
    let cached = ctx.caches.deployments.get(&ObjectRef::new(&name).within(&pool.namespace));
    let is_current = |found: &Arc<Deployment>| {
        !ctx.memory.is_before_our_write(&reference, &(Deployment::KIND, name.clone()), found.as_ref())
    };
    ours(&ctx.client, cached.filter(is_current), pool, &name).await
}

async fn child<K>(client: &Client, cache: &Store<K>, pool: &ValidPool, name: &str) -> Result<Option<Arc<K>>, Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Lookup<DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + Slim
        + DeserializeOwned,
{
    ours(client, cache.get(&ObjectRef::new(name).within(&pool.namespace)), pool, name).await
}

/// The child of this name, asked for where it is not known; refuses one that is not the pool's.
async fn ours<K>(client: &Client, known: Option<Arc<K>>, pool: &ValidPool, name: &str) -> Result<Option<Arc<K>>, Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + std::fmt::Debug + Slim + DeserializeOwned,
{
    let kind = <K as Resource>::kind(&()).into_owned();
    let found = match known {
        Some(known) => Some(known),
        None => {
            let found = Api::<K>::namespaced(client.clone(), &pool.namespace).get_opt(name).await;
            let failed = |source| Error::Observe { kind: kind.clone(), name: name.to_owned(), source };
            found.map_err(failed)?.map(|mut found| {
                slim(&mut found);
                Arc::new(found)
            })
        }
    };
    match found.as_ref().and_then(|object| foreign(object.as_ref(), pool)) {
        Some(owner) => Err(Error::InTheWay { kind, name: name.to_owned(), owner }),
        None => Ok(found),
    }
}

/// Whose an object is, unless it is this pool's: controlled by it, or controlled by nobody and carrying its labels.
pub(crate) fn foreign(object: &impl Resource, pool: &ValidPool) -> Option<String> {
    let controller = object.owner_references().iter().find(|owner| owner.controller == Some(true));
    match controller {
        Some(owner) if owner.uid == pool.owner.uid => None,
        Some(owner) => Some(format!("it belongs to {} `{}`", owner.kind, owner.name)),
        None => {
            let carries = |label: &str, value: &str| object.labels().get(label).is_some_and(|found| found == value);
            let is_ours = carries(names::POOL_LABEL, &pool.name) && carries(names::MANAGED_BY_LABEL, names::OPERATOR);
            (!is_ours).then(|| "it was not made for this pool".to_owned())
        }
    }
}

fn workers(pods: &Store<Pod>, pool: &ValidPool) -> Vec<Arc<Pod>> {
    let is_theirs = |pod: &Pod| pod.metadata.namespace.as_ref() == Some(&pool.namespace);
    pods.state_filter(|pod| is_theirs(pod) && worker_class(pod, &pool.name).is_some())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

    use super::*;
    use crate::pool::tests::valid;

    fn config_map(owner: Option<&str>, labelled: bool) -> ConfigMap {
        let controller = |uid: &str| OwnerReference {
            kind: "WorkerPool".to_owned(),
            name: "default".to_owned(),
            uid: uid.to_owned(),
            controller: Some(true),
            ..OwnerReference::default()
        };
        ConfigMap {
            metadata: ObjectMeta {
                owner_references: owner.map(|uid| vec![controller(uid)]),
                labels: labelled.then(|| names::all_labels("default")),
                ..ObjectMeta::default()
            },
            ..ConfigMap::default()
        }
    }

    #[test]
    fn an_object_is_ours_by_its_controller_or_by_labels_without_one() {
        let pool = valid("{}");
        assert_eq!(foreign(&config_map(Some("1234"), false), &pool), None);
        assert_eq!(foreign(&config_map(None, true), &pool), None, "left behind by a pool of this name");
    }

    #[test]
    fn any_other_object_is_in_the_way() {
        let pool = valid("{}");
        let before = foreign(&config_map(Some("an earlier uid"), true), &pool);
        assert_eq!(before.as_deref(), Some("it belongs to WorkerPool `default`"));
        assert_eq!(foreign(&config_map(None, false), &pool).as_deref(), Some("it was not made for this pool"));
    }
}
