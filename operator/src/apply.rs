//! Writes the children by server-side apply, in an order, under one field manager.
//!
//! A child that still is as our last write left it is not written again. "As we left it" is exact: the API server
//! takes a field away from our entry in `managedFields` as soon as anybody else changes or removes it.
//!
//! What a pool wants no more is removed, if it is its own. Owner references clean up after a pool that is gone.

mod addon; // children whose types may not be installed
mod annotate; // what is ours in pods
mod nudge; // pods that should look at their files again
mod retire; // workers that go, and those that go on

use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::{NamespaceResourceScope, Resource as _};
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, Preconditions};
use kube::core::Status;
use kube::runtime::reflector::ObjectRef;
use kube::{Api, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::context::Context;
use crate::desired::{Desired, Workload, policy_hash};
use crate::error::Error;
use crate::failpoint;
use crate::memory::{Child, Settled, Since, version};
use crate::names;
use crate::notice::Notice;
use crate::observe::{self, Observed};
use crate::pool::ValidPool;
use crate::slim::{Slim, fingerprint, slim};
use crate::watched::Watched;

use addon::Outcome;
pub use retire::retire;

/// What the rest of a reconcile needs to know of the result.
pub struct Applied {
    /// The pods without GPUs of their own.
    pub general: Arc<Deployment>,
    /// The pods with GPUs; also those that nobody asks for any more, while they have something left to do.
    pub gpu: Option<Arc<Deployment>>,
    /// Who writes how many there are.
    pub autoscaler: Option<Arc<HorizontalPodAutoscaler>>,
    /// The same, where it is KEDA.
    pub scaled_object: Option<Arc<DynamicObject>>,
    /// What could not be made or told, though the pool works without it.
    pub notices: Vec<Notice>,
    /// After so long pods are to be told once more of what has changed.
    pub tells_again: Option<Duration>,
}

/// Makes the children what they should be.
pub async fn apply(ctx: &Context, valid: &ValidPool, observed: &Observed, desired: &Desired) -> Result<Applied, Error> {
    let pool = &ObjectRef::new(&valid.name).within(&valid.namespace);
    // No `..` on purpose: a new child must not compile until it has a place in this order.
    let Desired {
        service_account,
        config_map,
        service,
        network_policy,
        pod_monitor,
        autoscaler,
        scaled_object,
        general,
        gpu,
    } = desired;
    // Pods start as soon as the Deployment exists: their account and configuration come first, and so do the wall around
    // them and the budget that protects them.
    child(ctx, pool, observed.service_account.as_ref(), service_account).await?;
    let policy = policy_hash(config_map);
    let config_map = child(ctx, pool, observed.config_map.as_ref(), config_map).await?;
    let age = ctx.memory.since_write(pool, &(ConfigMap::KIND, config_map.name_any()));
    child(ctx, pool, observed.service.as_ref(), service).await?;
    match network_policy {
        Some(wall) => drop(child(ctx, pool, observed.network_policy.as_ref(), wall).await?),
        None => remove(ctx, pool, observed.network_policy.as_ref()).await?,
    }
    // Where a person decides, nobody else may write a number any more.
    let autoscaler = match autoscaler {
        Some(autoscaler) => Some(child(ctx, pool, observed.autoscaler.as_ref(), autoscaler).await?),
        None => {
            remove(ctx, pool, observed.autoscaler.as_ref()).await?;
            None
        }
    };
    let general = workload(ctx, pool, &observed.general, general).await?;
    let gpu = match gpu {
        Some(gpu) => Some(workload(ctx, pool, &observed.gpu, gpu).await?),
        None if observed.gpu_stays => observed.gpu.deployment.clone(),
        None => {
            remove(ctx, pool, observed.gpu.deployment.as_ref()).await?;
            remove(ctx, pool, observed.gpu.budget.as_ref()).await?;
            None
        }
    };
    let told = nudge::nudge(ctx, &policy, (&config_map, age), &observed.pods).await?;
    // After the autoscaler, which is gone by now if it was one: KEDA takes over nothing that another scales.
    let keda = match observed.surroundings.numbers {
        Some(_) => addon::apply(ctx, valid, pool, &addon::SCALED_OBJECT, scaled_object.as_ref()).await?,
        None => Outcome::default(),
    };
    let monitor = addon::apply(ctx, valid, pool, &addon::POD_MONITOR, pod_monitor.as_ref()).await?;
    let notices = [told.refused, keda.notice, monitor.notice].into_iter().flatten();
    let notices = notices.chain(ctx.memory.contests(pool)).collect();
    let tells_again = told.again.then_some(nudge::HEARD);
    Ok(Applied { general, gpu, autoscaler, scaled_object: keda.found, notices, tells_again })
}

async fn workload(
    ctx: &Context,
    pool: &ObjectRef<Watched>,
    observed: &observe::Workload,
    desired: &Workload,
) -> Result<Arc<Deployment>, Error> {
    let Workload { budget, deployment } = desired;
    child(ctx, pool, observed.budget.as_ref(), budget).await?;
    child(ctx, pool, observed.deployment.as_ref(), deployment).await
}

/// Removes what is left of a child.
async fn remove<K>(ctx: &Context, pool: &ObjectRef<Watched>, live: Option<&Arc<K>>) -> Result<(), Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + k8s_openapi::Resource,
    K: Clone + Debug + DeserializeOwned,
{
    let Some(live) = live else { return Ok(()) };
    let api = Api::<K>::namespaced(ctx.client.clone(), &live.namespace().unwrap_or_default());
    removal(ctx, &api, K::KIND, live.as_ref()).await?;
    ctx.memory.unsettle(pool, &(K::KIND, live.name_any()));
    Ok(())
}

/// Removes an object, unless it was replaced behind our back.
async fn removal<K>(ctx: &Context, api: &Api<K>, kind: &'static str, live: &K) -> Result<(), Error>
where
    K: Resource + Clone + Debug + DeserializeOwned,
{
    if live.meta().deletion_timestamp.is_some() {
        return Ok(());
    }
    let (name, namespace) = (live.name_any(), live.namespace().unwrap_or_default());
    let exactly = Preconditions { uid: live.uid(), resource_version: None };
    let params = DeleteParams { preconditions: Some(exactly), ..DeleteParams::background() };
    ctx.metrics.applied(kind);
    match failpoint::around("remove", kind, &name, api.delete(&name, &params)).await {
        Ok(_) => tracing::info!(kind, name, namespace, "removed"),
        // Gone already, or another object by now: the watch will tell.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
        Err(source) => return Err(Error::Remove { kind: kind.to_owned(), name, source }),
    }
    Ok(())
}

async fn child<K>(ctx: &Context, pool: &ObjectRef<Watched>, live: Option<&Arc<K>>, wish: &K) -> Result<Arc<K>, Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + k8s_openapi::Resource,
    K: Slim + Clone + Debug + Serialize + DeserializeOwned,
{
    let fingerprint = fingerprint(wish);
    let name = (K::KIND, wish.name_any());
    if let Some(live) = live {
        match ctx.memory.since(pool, &name, &settled(live.as_ref(), fingerprint)) {
            Since::Same => return Ok(Arc::clone(live)),
            Since::Changed if ctx.memory.leaves(pool, &name) => return Ok(Arc::clone(live)),
            Since::Changed => set_back(ctx, pool, &name, wish).await,
            Since::Anew => {}
        }
    }
    let applied = patch(ctx, wish, live.and_then(|live| live.uid())).await.map_err(|source| Error::Apply {
        kind: K::KIND.to_owned(),
        name: wish.name_any(),
        source,
    })?;
    ctx.memory.settle(pool, name, settled(&applied, fingerprint));
    Ok(Arc::new(applied))
}

/// What somebody has changed is about to be written again. Who does that for the fifth time is asked for.
async fn set_back<K>(ctx: &Context, pool: &ObjectRef<Watched>, name: &Child, wish: &K)
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned,
{
    if !ctx.memory.sets_back(pool, name) {
        return;
    }
    let api = Api::<K>::namespaced(ctx.client.clone(), &wish.namespace().unwrap_or_default());
    // Without force the API server says whose each field is, and does nothing.
    let params = PatchParams { dry_run: true, ..PatchParams::apply(names::OPERATOR) };
    if let Err(kube::Error::Api(status)) = api.patch(&name.1, &params, &Patch::Apply(wish)).await
        && let Some(who) = rivals(&status)
    {
        ctx.memory.blames(pool, name, who);
    }
}

/// The fields that others have taken, and their managers.
fn rivals(status: &Status) -> Option<String> {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    let rivals: Vec<_> = causes
        .filter(|cause| cause.reason == "FieldManagerConflict")
        .filter_map(|cause| {
            let manager = cause.message.split('"').nth(1)?;
            Some(format!("{} by `{manager}`", cause.field.trim_start_matches('.')))
        })
        .collect();
    (!rivals.is_empty()).then(|| rivals.join(", "))
}

async fn patch<K>(ctx: &Context, wish: &K, uid: Option<String>) -> kube::Result<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + k8s_openapi::Resource,
    K: Slim + Clone + Debug + Serialize + DeserializeOwned,
{
    let (name, namespace) = (wish.name_any(), wish.namespace().unwrap_or_default());
    let mut body = serde_json::to_value(wish).map_err(kube::Error::SerdeError)?;
    if let (Some(uid), Some(Value::Object(metadata))) = (uid, body.get_mut("metadata")) {
        // A precondition: an object that was replaced behind our back is not ours to change.
        metadata.insert("uid".to_owned(), uid.into());
    }
    ctx.metrics.applied(K::KIND);
    let (api, params) = (Api::namespaced(ctx.client.clone(), &namespace), PatchParams::apply(names::OPERATOR).force());
    let applied = failpoint::around("apply", K::KIND, &name, api.patch(&name, &params, &Patch::Apply(body))).await;
    let mut applied: K = applied?;
    slim(&mut applied);
    tracing::info!(kind = K::KIND, name, namespace, "applied");
    Ok(applied)
}

fn settled(object: &impl Resource, wish: u64) -> Settled {
    let entries = object.managed_fields().iter();
    let fields: Vec<_> =
        entries.map(|entry| (&entry.operation, entry.fields_v1.as_ref().map(|fields| &fields.0))).collect();
    let (uid, fields) = (object.uid().unwrap_or_default(), fingerprint(&fields));
    Settled { uid, version: version(object), wish, fields, at: Instant::now() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_conflict_names_fields_and_who_has_them() {
        let cause = |field: &str| {
            json!({"reason": "FieldManagerConflict", "field": field,
            "message": r#"conflict with "kubectl-edit" using apps/v1"#})
        };
        let other = json!({"reason": "FieldValueInvalid", "field": ".spec", "message": "no"});
        let status = json!({"status": "Failure", "code": 409,
            "details": {"causes": [cause(".spec.replicas"), other, cause(".metadata.labels.a")]}});
        let rivals = |status: Value| rivals(&serde_json::from_value(status).expect("a Status"));
        let both = "spec.replicas by `kubectl-edit`, metadata.labels.a by `kubectl-edit`";
        assert_eq!(rivals(status).as_deref(), Some(both));
        assert_eq!(rivals(json!({"status": "Failure", "code": 500})), None);
    }
}
