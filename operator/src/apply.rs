//! Writes the children by server-side apply, in an order, under one field manager.
//!
//! A child that still is as our last write left it is not written again. "As we left it" is exact: the API server
//! takes a field away from our entry in `managedFields` as soon as anybody else changes or removes it.
//!
//! Nothing is pruned here: every pool has all of these children, and owner references clean up after the pool.

use std::fmt::Debug;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::Deployment;
use kube::api::{Patch, PatchParams};
use kube::runtime::reflector::ObjectRef;
use kube::{Api, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::controller::{Context, Watched};
use crate::desired::{Desired, names};
use crate::error::Error;
use crate::memory::Settled;
use crate::observe::Observed;

/// What the rest of a reconcile needs to know of the result.
pub struct Applied {
    /// The workers, as a whole.
    pub deployment: Arc<Deployment>,
}

/// Makes the children what they should be.
pub async fn apply(
    ctx: &Context,
    pool: &ObjectRef<Watched>,
    observed: &Observed,
    desired: &Desired,
) -> Result<Applied, Error> {
    // No `..` on purpose: a new child must not compile until it has a place in this order.
    let Desired { service_account, config_map, service, budget, deployment } = desired;
    // Pods start as soon as the Deployment exists: their account and configuration come first, and so does the budget
    // that protects them.
    child(ctx, pool, observed.service_account.as_ref(), service_account).await?;
    child(ctx, pool, observed.config_map.as_ref(), config_map).await?;
    child(ctx, pool, observed.service.as_ref(), service).await?;
    child(ctx, pool, observed.budget.as_ref(), budget).await?;
    Ok(Applied { deployment: child(ctx, pool, observed.deployment.as_ref(), deployment).await? })
}

async fn child<K>(ctx: &Context, pool: &ObjectRef<Watched>, live: Option<&Arc<K>>, wish: &K) -> Result<Arc<K>, Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + k8s_openapi::Resource,
    K: Clone + Debug + Serialize + DeserializeOwned,
{
    let fingerprint = fingerprint(wish);
    if let Some(live) = live
        && ctx.memory.is_settled(pool, K::KIND, &settled(live.as_ref(), fingerprint))
    {
        return Ok(Arc::clone(live));
    }
    let applied = patch(ctx, wish, live.and_then(|live| live.uid())).await.map_err(|source| Error::Apply {
        kind: K::KIND.to_owned(),
        name: wish.name_any(),
        source,
    })?;
    ctx.memory.settle(pool, K::KIND, settled(&applied, fingerprint));
    Ok(Arc::new(applied))
}

async fn patch<K>(ctx: &Context, wish: &K, uid: Option<String>) -> kube::Result<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + k8s_openapi::Resource,
    K: Clone + Debug + Serialize + DeserializeOwned,
{
    let (name, namespace) = (wish.name_any(), wish.namespace().unwrap_or_default());
    let mut body = serde_json::to_value(wish).map_err(kube::Error::SerdeError)?;
    if let (Some(uid), Some(Value::Object(metadata))) = (uid, body.get_mut("metadata")) {
        // A precondition: an object that was replaced behind our back is not ours to change.
        metadata.insert("uid".to_owned(), uid.into());
    }
    ctx.metrics.applied(K::KIND);
    let applied = Api::namespaced(ctx.client.clone(), &namespace)
        .patch(&name, &PatchParams::apply(names::OPERATOR).force(), &Patch::Apply(body))
        .await?;
    tracing::info!(kind = K::KIND, name, namespace, "applied");
    Ok(applied)
}

fn settled(object: &impl Resource, wish: u64) -> Settled {
    let fields: Vec<_> = object
        .managed_fields()
        .iter()
        .filter(|entry| entry.manager.as_deref() == Some(names::OPERATOR) && entry.subresource.is_none())
        .map(|entry| (&entry.operation, entry.fields_v1.as_ref().map(|fields| &fields.0)))
        .collect();
    Settled { uid: object.uid().unwrap_or_default(), wish, fields: fingerprint(&fields) }
}

fn fingerprint(value: &impl Serialize) -> u64 {
    let mut hasher = DefaultHasher::new();
    // Maps are ordered here, so that the same value has the same text.
    serde_json::to_string(value).unwrap_or_default().hash(&mut hasher);
    hasher.finish()
}
