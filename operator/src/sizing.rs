//! How many workers a pool gets now: the decision, by whoever decides in this pool, and the way there.

use beamline_crds::{WorkerPool, WorkerPoolStatus};
use jiff::Timestamp;
use kube::runtime::reflector::ObjectRef;

use crate::controller::{Context, Watched};
use crate::error::Error;
use crate::observe::Observed;
use crate::pool::{Class, Kind, Mode, ValidPool};
use crate::reports::Crew;
use crate::retire::{Plan, plan};
use crate::scale::{Decision, Decisions, Need, Replicas, Rules, as_written, fixed};
use crate::seen::seen;
use crate::signals::Reading;
use crate::{handover, status};

/// How many workers, and the way there.
pub struct Sizing {
    /// How many, and why.
    pub decisions: Decisions,
    /// The way to as many without GPUs of their own.
    pub general: Plan,
    /// The way to as many with GPUs.
    pub gpu: Option<Plan>,
}

impl Sizing {
    /// How many the Deployments shall have now.
    pub fn replicas(&self) -> Replicas {
        Replicas { general: self.general.replicas, gpu: self.gpu.as_ref().map(|gpu| gpu.replicas) }
    }

    /// Whether workers may go though nothing but time passes.
    pub fn some_may_go(&self) -> bool {
        let may = |decision: &Decision, plan: &Plan| decision.is_waiting || plan.replicas > decision.desired;
        may(&self.decisions.general, &self.general)
            || self.decisions.gpu.as_ref().zip(self.gpu.as_ref()).is_some_and(|(decision, plan)| may(decision, plan))
    }
}

/// Decides, and plans.
pub async fn size(
    pool: &WorkerPool,
    valid: &ValidPool,
    ctx: &Context,
    observed: &Observed,
    reading: &Reading,
    before: &WorkerPoolStatus,
) -> Result<Sizing, Error> {
    let decisions = match valid.scaling.mode {
        Mode::Manual => by_hand(pool, valid, ctx, observed, before).await?,
        Mode::Operator => {
            let scaled = |class: &Class| scaled(valid, class, ctx, observed, reading, before);
            Decisions { mode: Mode::Operator, general: scaled(&valid.general), gpu: valid.gpu.as_ref().map(scaled) }
        }
    };
    let was_operator = before.scaling.as_ref().is_some_and(|scaling| scaling.mode == Mode::Operator);
    let way = |kind, decision: &Decision| match (valid.scaling.mode, was_operator) {
        (Mode::Operator, _) => without_cutting(kind, decision, observed, reading),
        // Whoever was told to go has heard it from this operator, and is asked for now.
        (Mode::Manual, true) => {
            let stay = plan(kind, decision.desired, decision.desired, &observed.pods, crew(kind, reading));
            Plan { replicas: decision.desired, ..stay }
        }
        (Mode::Manual, false) => Plan::at_once(decision.desired),
    };
    let general = way(Kind::General, &decisions.general);
    let gpu = decisions.gpu.as_ref().map(|gpu| way(Kind::Gpu, gpu));
    Ok(Sizing { decisions, general, gpu })
}

async fn by_hand(
    pool: &WorkerPool,
    valid: &ValidPool,
    ctx: &Context,
    observed: &Observed,
    before: &WorkerPoolStatus,
) -> Result<Decisions, Error> {
    let frozen = |decision: Decision, kind| match running(observed, kind).filter(|_| valid.paused) {
        Some(running) => fixed(running, Need::Paused(running), None),
        None => decision,
    };
    let written = as_written(valid);
    let gpu = written.gpu.map(|gpu| frozen(gpu, Kind::Gpu));
    if let Some(runs) = handover::due(valid, pool.spec.replicas, before, running(observed, Kind::General)) {
        return handover::write(ctx, pool, runs, gpu).await;
    }
    ctx.memory.forget_scalers(&reference(valid));
    Ok(Decisions { mode: Mode::Manual, general: frozen(written.general, Kind::General), gpu })
}

fn scaled(
    pool: &ValidPool,
    class: &Class,
    ctx: &Context,
    observed: &Observed,
    reading: &Reading,
    before: &WorkerPoolStatus,
) -> Decision {
    let reference = reference(pool);
    let known = ctx.memory.scaler(&reference, class.kind);
    let mut scaler = known.unwrap_or_else(|| status::scaler(before, class.kind));
    let running = running(observed, class.kind);
    let seen = seen(pool, class.kind, reading, running, &observed.pods, scaler.usual_start(), Timestamp::now());
    let decision = scaler.decide(&Rules::of(pool, class), &seen, ctx.memory.age());
    ctx.memory.keep_scaler(&reference, class.kind, scaler);
    decision
}

/// What cannot be read, or must stay, takes no worker away.
fn without_cutting(kind: Kind, decision: &Decision, observed: &Observed, reading: &Reading) -> Plan {
    match (running(observed, kind), &decision.why.need) {
        (None, _) => Plan::at_once(decision.desired),
        (Some(running), Need::Paused(_) | Need::Unreadable(_)) => Plan::at_once(running.max(decision.desired)),
        (Some(running), _) => plan(kind, running, decision.desired, &observed.pods, crew(kind, reading)),
    }
}

const fn crew(kind: Kind, reading: &Reading) -> &Crew {
    match kind {
        Kind::General => &reading.general,
        Kind::Gpu => &reading.gpu,
    }
}

fn running(observed: &Observed, kind: Kind) -> Option<i32> {
    observed.workload(kind).deployment.as_ref().and_then(|deployment| deployment.spec.as_ref()?.replicas)
}

fn reference(pool: &ValidPool) -> ObjectRef<Watched> {
    ObjectRef::new(&pool.name).within(&pool.namespace)
}
