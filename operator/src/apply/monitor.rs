//! The PodMonitor: its type is another project's and may not be installed, so there is no watch. It is looked at when the
//! wish changes, and now and then.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kube::Api;
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::runtime::reflector::ObjectRef;

use super::{fingerprint, removal};
use crate::controller::{Context, RESYNC, Watched};
use crate::desired::{names, pod_monitors};
use crate::error::Error;
use crate::failpoint;
use crate::memory::Look;
use crate::notice::Notice;
use crate::observe::foreign;
use crate::pool::ValidPool;

const KIND: &str = "PodMonitor";
/// How often a missing type is looked for.
const RETRY: Duration = Duration::from_secs(20);

/// Makes it what it should be, or says that it cannot be had.
pub(super) async fn apply(
    ctx: &Context,
    pool: &ValidPool,
    reference: &ObjectRef<Watched>,
    wish: Option<&DynamicObject>,
) -> Result<Option<Notice>, Error> {
    let fingerprint = fingerprint(&wish);
    if let Some(look) = ctx.memory.last_look(reference)
        && look.wish == fingerprint
        && look.at.elapsed() < if look.notice.is_some() { RETRY } else { RESYNC }
    {
        return Ok(look.notice);
    }
    let api = Api::namespaced_with(ctx.client.clone(), &pool.namespace, &pod_monitors());
    let notice = converge(ctx, &api, pool, wish).await?;
    ctx.memory.look(reference, Look { at: Instant::now(), wish: fingerprint, notice: notice.clone() });
    Ok(notice)
}

async fn converge(
    ctx: &Context,
    api: &Api<DynamicObject>,
    pool: &ValidPool,
    wish: Option<&DynamicObject>,
) -> Result<Option<Notice>, Error> {
    let name = pool.name.as_str();
    let failed = |source| Error::Observe { kind: KIND.to_owned(), name: name.to_owned(), source };
    let live = match api.get_opt(name).await {
        Ok(live) => live.map(Arc::new),
        // So the API server says that there is no such type.
        Err(kube::Error::Api(status)) if status.code == 404 => None,
        // A right that is missing with the type is not missed where no PodMonitor is wanted.
        Err(kube::Error::Api(status)) if status.code == 403 && wish.is_none() => None,
        Err(source) => return Err(failed(source)),
    };
    let owner = live.as_ref().and_then(|live| foreign(live.as_ref(), pool));
    match (wish, live, owner) {
        (None, Some(live), None) => {
            removal(ctx, api, KIND, &live).await?;
            Ok(None)
        }
        (None, ..) => Ok(None),
        (Some(_), _, Some(owner)) => Err(Error::InTheWay { kind: KIND.to_owned(), name: name.to_owned(), owner }),
        (Some(wish), ..) => {
            ctx.metrics.applied(KIND);
            let (params, wish) = (PatchParams::apply(names::OPERATOR).force(), Patch::Apply(wish));
            match failpoint::around("apply", KIND, name, api.patch(name, &params, &wish)).await {
                Ok(_) => Ok(None),
                Err(kube::Error::Api(status)) if status.code == 404 => Ok(Some(Notice::pod_monitor_missing())),
                Err(source) => Err(Error::Apply { kind: KIND.to_owned(), name: name.to_owned(), source }),
            }
        }
    }
}
