//! What users are told. `compute` is pure: no client, no clock of its own. `publish` writes only what changed.

mod cause;
mod class;
mod conditions;
mod fit;
mod tenants;

use std::time::Duration;

use beamline_crds::{Decision, GpuStatus, Learned, LimitedBy, Mode, Queue, WorkerPool, WorkerPoolStatus};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Patch, PatchParams};
use kube::runtime::reflector::ObjectRef;
use kube::{Api, Resource};
use serde_json::json;

use crate::context::{Context, RESYNC};
use crate::converged::Converged;
use crate::error::Error;
use crate::failpoint;
use crate::names;
use crate::scale::{self, Decisions};
use crate::signals::{Readable, Reading};
use crate::watched::Watched;

use class::ClassState;

/// How far a watch may be behind our own writes.
const WATCH_LAG: Duration = Duration::from_secs(5);
/// As long as a reason may be.
const LONGEST_REASON: usize = 512;
/// Moving numbers are written this often at most.
const NUMBERS_EVERY: Duration = Duration::from_secs(2);
/// So is, where nothing else moves, the number of dead letters: it is that of all pools on the broker.
const DEAD_LETTERS_EVERY: Duration = Duration::from_secs(60);

/// What the pool says about itself now. A watch may still show what was there before our own last write.
pub fn current(ctx: &Context, pool: &WorkerPool) -> WorkerPoolStatus {
    match ctx.memory.published(&reference(pool), pool.metadata.uid.as_deref()) {
        Some(published) if published.at.elapsed() < WATCH_LAG => published.status,
        _ => pool.status.clone().unwrap_or_default(),
    }
}

/// The status that this outcome deserves. What an error hides keeps its last value.
pub fn compute(
    pool: &WorkerPool,
    before: &WorkerPoolStatus,
    outcome: Result<&Converged, &Error>,
    reading: &Reading,
    now: Timestamp,
) -> WorkerPoolStatus {
    let counts = match outcome {
        Ok(converged) => Counts::of(pool, converged, before, reading, now),
        Err(_) => Counts::kept(before),
    };
    let queue = match &reading.readable {
        Some(Ok(Readable::NoQueue)) => None,
        _ => reading.queue.clone().or_else(|| before.queue.clone()),
    };
    // Unlike other numbers it does not stay: whoever acts on it must not act on an old one.
    let demand = outcome.ok().and_then(|converged| converged.demand);
    let parked = match &reading.tenants {
        Some(tenants) => tenants.parked,
        None => before.queue.as_ref().and_then(|queue| queue.parked),
    };
    WorkerPoolStatus {
        observed_generation: pool.metadata.generation,
        replicas: counts.replicas,
        ready_replicas: counts.ready,
        desired_replicas: counts.desired,
        selector: names::selector_text(pool.metadata.name.as_deref().unwrap_or_default()),
        queue: queue.map(|queue| Queue { demand, parked, ..queue }),
        tenants: tenants::rows(before, reading, now),
        scaling: counts.scaling,
        gpu: counts.gpu,
        conditions: conditions::conditions(pool, before, outcome, reading, now),
    }
}

struct Counts {
    replicas: i32,
    ready: i32,
    desired: i32,
    scaling: Option<Decision>,
    gpu: Option<GpuStatus>,
}

impl Counts {
    fn of(
        pool: &WorkerPool,
        converged: &Converged,
        before: &WorkerPoolStatus,
        reading: &Reading,
        now: Timestamp,
    ) -> Self {
        let general = ClassState::general(converged);
        let gpu = ClassState::gpu(converged);
        let (pending, in_flight) = match (&reading.readable, reading.route) {
            (_, Some(route)) => (Some(route.pending), Some(route.in_flight)),
            (Some(Ok(Readable::NoQueue)), None) => (None, None),
            (_, None) => before.gpu.as_ref().map_or((None, None), |gpu| (gpu.pending, gpu.in_flight)),
        };
        Self {
            replicas: general.exist,
            ready: general.ready,
            desired: general.desired,
            scaling: Some(scaling(pool, &converged.decisions, before, now)),
            gpu: gpu.map(|state| GpuStatus {
                replicas: state.exist,
                ready_replicas: state.ready,
                desired_replicas: state.desired,
                limited_by: converged.decisions.gpu.as_ref().map_or(LimitedBy::None, scale::Decision::limited_by),
                reason: converged.decisions.gpu.as_ref().map(words),
                last_scale_time: before
                    .gpu
                    .as_ref()
                    .and_then(|last| last_scaled((last.desired_replicas, &last.last_scale_time), state.desired, now)),
                spec_replicas: pool.spec.gpu.as_ref().map(|gpu| gpu.replicas.unwrap_or(0)),
                learned: converged.decisions.gpu.as_ref().map(|gpu| learned(&gpu.learned)).unwrap_or_default(),
                pending,
                in_flight,
            }),
        }
    }

    fn kept(before: &WorkerPoolStatus) -> Self {
        Self {
            replicas: before.replicas,
            ready: before.ready_replicas,
            desired: before.desired_replicas,
            scaling: before.scaling.clone(),
            gpu: before.gpu.clone(),
        }
    }
}

fn scaling(pool: &WorkerPool, decisions: &Decisions, before: &WorkerPoolStatus, now: Timestamp) -> Decision {
    let Decisions { mode, general, gpu: _ } = decisions;
    let last = before.scaling.as_ref();
    Decision {
        mode: *mode,
        desired: general.desired,
        reason: words(general),
        limited_by: general.limited_by(),
        last_scale_time: last.and_then(|last| last_scaled((last.desired, &last.last_scale_time), general.desired, now)),
        learned: match (mode, last) {
            // What was learned stays true.
            (Mode::Manual, Some(last)) => last.learned.clone(),
            _ => learned(&general.learned),
        },
        spec_replicas: Some(pool.spec.replicas),
    }
}

/// When the number changed last.
fn last_scaled((was, since): (i32, &Option<Time>), is: i32, now: Timestamp) -> Option<Time> {
    if was == is { since.clone() } else { Some(Time(now)) }
}

fn words(decision: &scale::Decision) -> String {
    let mut words = decision.why.to_string();
    words.truncate(words.floor_char_boundary(LONGEST_REASON));
    words
}

fn learned(learned: &scale::Learned) -> Learned {
    // All digits that there are: whoever reads it decides the same.
    let shown = |value: Option<f64>| value.map(|value| format!("{value:?}"));
    Learned { rate_per_replica: shown(learned.rate), pod_start_seconds: shown(learned.start) }
}

/// Writes the status if it changed, as far as the type has a place for it, and says when to come back.
pub async fn publish(
    ctx: &Context,
    pool: &WorkerPool,
    before: &WorkerPoolStatus,
    next: WorkerPoolStatus,
) -> Result<Duration, Error> {
    let next = fit::without(next, &ctx.memory.unplaced(&reference(pool)));
    let published = ctx.memory.published(&reference(pool), pool.metadata.uid.as_deref());
    match due(before, &next, published.map(|published| published.at.elapsed())) {
        Due::Nothing => Ok(RESYNC),
        Due::In(rest) => Ok(rest),
        Due::Now => {
            write(ctx, pool, &next).await?;
            if let (Some(was), Some(is)) = (&before.scaling, &next.scaling) {
                ctx.metrics.scaled(was.desired, is.desired);
            }
            if let (Some(was), Some(is)) = (&before.gpu, &next.gpu) {
                ctx.metrics.scaled(was.desired_replicas, is.desired_replicas);
            }
            ctx.events.announce(pool, before, &next).await;
            ctx.memory.publish(&reference(pool), pool.metadata.uid.clone(), next);
            Ok(RESYNC)
        }
    }
}

fn reference(pool: &WorkerPool) -> ObjectRef<Watched> {
    let metadata = &pool.metadata;
    ObjectRef::new(metadata.name.as_deref().unwrap_or_default())
        .within(metadata.namespace.as_deref().unwrap_or_default())
}

#[derive(Debug, PartialEq)]
enum Due {
    Nothing,
    In(Duration),
    Now,
}

fn due(before: &WorkerPoolStatus, next: &WorkerPoolStatus, since: Option<Duration>) -> Due {
    if before == next {
        return Due::Nothing;
    }
    let without_numbers = |status: &WorkerPoolStatus| WorkerPoolStatus {
        queue: None,
        tenants: Vec::new(),
        scaling: status.scaling.clone().map(|scaling| Decision {
            reason: String::new(),
            learned: Learned::default(),
            ..scaling
        }),
        gpu: status.gpu.clone().map(|gpu| GpuStatus {
            pending: None,
            in_flight: None,
            reason: None,
            learned: Learned::default(),
            ..gpu
        }),
        ..status.clone()
    };
    let numbers_only = without_numbers(before) == without_numbers(next);
    let every =
        if without_dead_letters(before) == without_dead_letters(next) { DEAD_LETTERS_EVERY } else { NUMBERS_EVERY };
    match since.and_then(|since| every.checked_sub(since)) {
        Some(rest) if numbers_only && !started_or_ended(before.queue.as_ref(), next.queue.as_ref()) => Due::In(rest),
        _ => Due::Now,
    }
}

fn without_dead_letters(status: &WorkerPoolStatus) -> WorkerPoolStatus {
    let queue = status.queue.clone().map(|queue| Queue { dead_letters: 0, ..queue });
    WorkerPoolStatus { queue, ..status.clone() }
}

/// Work appearing or the last of it going is news, not a moving number.
fn started_or_ended(before: Option<&Queue>, after: Option<&Queue>) -> bool {
    let has_work = |queue: &Queue| queue.depth > 0 || queue.demand > Some(0);
    before.is_some_and(has_work) != after.is_some_and(has_work)
}

async fn write(ctx: &Context, pool: &WorkerPool, status: &WorkerPoolStatus) -> Result<(), Error> {
    let name = pool.metadata.name.as_deref().unwrap_or_default();
    let api = Api::<WorkerPool>::namespaced(ctx.client.clone(), pool.metadata.namespace.as_deref().unwrap_or_default());
    let patch = json!({
        "apiVersion": WorkerPool::api_version(&()),
        "kind": WorkerPool::kind(&()),
        "metadata": {"name": name, "uid": pool.metadata.uid},
        "status": status,
    });
    ctx.metrics.status_written();
    let (params, patch) = (PatchParams::apply(names::OPERATOR).force(), Patch::Apply(patch));
    match failpoint::around("publish", "status", name, api.patch_status(name, &params, &patch)).await {
        Ok(_) => Ok(()),
        // Deleted meanwhile: there is nobody left to tell.
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(source) => {
            let unplaced = fit::unplaced(&source);
            if !unplaced.is_empty() {
                // What is left is written by the next look, which says so too.
                ctx.memory.misplaces(&reference(pool), unplaced);
            }
            Err(Error::Publish(source))
        }
    }
}

#[cfg(test)]
mod tests;
