//! Children whose types are other projects' and may not be installed, so that there is no watch. Each is looked at when the
//! wish changes, and now and then.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kube::api::{ApiResource, DynamicObject, Patch, PatchParams};
use kube::runtime::reflector::ObjectRef;
use kube::{Api, ResourceExt};

use super::{removal, settled};
use crate::context::{Context, RESYNC};
use crate::desired::{pod_monitors, scaled_objects};
use crate::error::Error;
use crate::failpoint;
use crate::memory::{Look, Since};
use crate::names;
use crate::notice::Notice;
use crate::observe::foreign;
use crate::pool::ValidPool;
use crate::slim::{fingerprint, slim};
use crate::watched::Watched;

/// How often a missing type is looked for.
const RETRY: Duration = Duration::from_secs(20);

/// A kind of such children.
pub(super) struct Addon {
    kind: &'static str,
    type_: fn() -> ApiResource,
    missing: fn() -> Notice,
    /// How often one is looked at that is as it should be.
    every: Duration,
}

/// How a Prometheus Operator finds the metrics of the workers.
pub(super) const POD_MONITOR: Addon =
    Addon { kind: "PodMonitor", type_: pod_monitors, missing: Notice::pod_monitor_missing, every: RESYNC };

/// Who writes how many there are, where KEDA does. What it says of itself is read, too.
pub(super) const SCALED_OBJECT: Addon =
    Addon { kind: "ScaledObject", type_: scaled_objects, missing: Notice::keda_missing, every: RETRY };

/// What became of one.
#[derive(Default)]
pub(super) struct Outcome {
    /// The child as it is now.
    pub(super) found: Option<Arc<DynamicObject>>,
    /// Why it cannot be had.
    pub(super) notice: Option<Notice>,
}

/// Makes it what it should be, or says that it cannot be had.
pub(super) async fn apply(
    ctx: &Context,
    pool: &ValidPool,
    reference: &ObjectRef<Watched>,
    addon: &Addon,
    wish: Option<&DynamicObject>,
) -> Result<Outcome, Error> {
    let fingerprint = fingerprint(&wish);
    if let Some(Look { at, wish: wished, found, notice }) = ctx.memory.last_look(reference, addon.kind)
        && wished == fingerprint
        && at.elapsed() < if notice.is_some() { RETRY } else { wish.map_or(RESYNC, |_| addon.every) }
    {
        return Ok(Outcome { found, notice });
    }
    let api = Api::namespaced_with(ctx.client.clone(), &pool.namespace, &(addon.type_)());
    let Outcome { found, notice } = converge(ctx, &api, pool, reference, addon, wish).await?;
    let look = Look { at: Instant::now(), wish: fingerprint, found: found.clone(), notice: notice.clone() };
    ctx.memory.look(reference, addon.kind, look);
    Ok(Outcome { found, notice })
}

async fn converge(
    ctx: &Context,
    api: &Api<DynamicObject>,
    pool: &ValidPool,
    reference: &ObjectRef<Watched>,
    addon: &Addon,
    wish: Option<&DynamicObject>,
) -> Result<Outcome, Error> {
    let (kind, name) = (addon.kind, pool.name.as_str());
    let failed = |source| Error::Observe { kind: kind.to_owned(), name: name.to_owned(), source };
    let live = match api.get_opt(name).await {
        Ok(live) => live.map(slimmed),
        // So the API server says that there is no such type.
        Err(kube::Error::Api(status)) if status.code == 404 => None,
        // A right that is missing with the type is not missed where none is wanted.
        Err(kube::Error::Api(status)) if status.code == 403 && wish.is_none() => None,
        Err(source) => return Err(failed(source)),
    };
    let owner = live.as_ref().and_then(|live| foreign(live.as_ref(), pool));
    match (wish, live, owner) {
        (None, Some(live), None) => {
            removal(ctx, api, kind, live.as_ref()).await?;
            ctx.memory.unsettle(reference, &(kind, live.name_any()));
            Ok(Outcome::default())
        }
        (None, ..) => Ok(Outcome::default()),
        (Some(_), _, Some(owner)) => Err(Error::InTheWay { kind: kind.to_owned(), name: name.to_owned(), owner }),
        (Some(wish), live, None) => {
            let (child, wished) = ((kind, name.to_owned()), fingerprint(wish));
            if let Some(live) = live
                && ctx.memory.since(reference, &child, &settled(live.as_ref(), wished)) == Since::Same
            {
                return Ok(Outcome { found: Some(live), notice: None });
            }
            ctx.metrics.applied(kind);
            let (params, patch) = (PatchParams::apply(names::OPERATOR).force(), Patch::Apply(wish));
            match failpoint::around("apply", kind, name, api.patch(name, &params, &patch)).await {
                Ok(applied) => {
                    let applied = slimmed(applied);
                    ctx.memory.settle(reference, child, settled(applied.as_ref(), wished));
                    Ok(Outcome { found: Some(applied), notice: None })
                }
                Err(kube::Error::Api(status)) if status.code == 404 => {
                    Ok(Outcome { found: None, notice: Some((addon.missing)()) })
                }
                Err(source) => Err(Error::Apply { kind: kind.to_owned(), name: name.to_owned(), source }),
            }
        }
    }
}

fn slimmed(mut object: DynamicObject) -> Arc<DynamicObject> {
    slim(&mut object);
    Arc::new(object)
}
