//! How many workers a pool gets now: the decision, by whoever decides in this pool, and the way there.

use beamline_crds::{Learned, WorkerPool, WorkerPoolStatus};
use jiff::Timestamp;
use kube::runtime::reflector::ObjectRef;

use crate::context::Context;
use crate::error::Error;
use crate::handover;
use crate::observe::Observed;
use crate::pool::{Class, Kind, Mode, ValidPool};
use crate::reports::{Crew, Worker};
use crate::retire::{Plan, plan, stay};
use crate::scale::{self, Decision, Decisions, Need, Replicas, Rules, Scaler, Why, as_written};
use crate::seen::{demand, is_hidden, seen};
use crate::signals::Reading;
use crate::watched::Watched;

/// How many workers, and the way there.
pub struct Sizing {
    /// How many, and why.
    pub decisions: Decisions,
    /// The way to as many without GPUs of their own.
    pub general: Plan,
    /// The way to as many with GPUs.
    pub gpu: Option<Plan>,
    /// What KEDA is told in its mode; `None` while that is not known, and in other modes.
    pub demand: Option<i64>,
}

impl Sizing {
    /// How many the Deployments shall have now.
    pub fn replicas(&self) -> Replicas {
        Replicas { general: self.general.replicas, gpu: self.gpu.as_ref().map(|gpu| gpu.replicas) }
    }

    /// Whether workers are told something, marked, or become more or fewer than these.
    pub fn moves(&self, observed: &Observed) -> bool {
        let moves = |kind, plan: &Plan| {
            let asked = running(observed, kind).unwrap_or(plan.replicas);
            *plan != Plan::at_once(asked)
        };
        moves(Kind::General, &self.general) || self.gpu.as_ref().is_some_and(|gpu| moves(Kind::Gpu, gpu))
    }

    /// Whether workers may go though nothing but time passes.
    pub fn some_may_go(&self) -> bool {
        let may = |decision: &Decision, plan: &Plan| decision.is_waiting || plan.replicas > decision.desired;
        may(&self.decisions.general, &self.general)
            || self.decisions.gpu.as_ref().zip(self.gpu.as_ref()).is_some_and(|(decision, plan)| may(decision, plan))
    }
}

/// What a decision is made from.
struct Scene<'a> {
    pool: &'a ValidPool,
    ctx: &'a Context,
    observed: &'a Observed,
    reading: &'a Reading,
    before: &'a WorkerPoolStatus,
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
    let scene = Scene { pool: valid, ctx, observed, reading, before };
    let scaled = |class: &Class| scene.scaled(class);
    let decisions = match valid.scaling.mode {
        Mode::Manual => Box::pin(scene.by_hand(pool)).await?,
        Mode::Hpa => scene.by_autoscaler(pool).await?,
        Mode::Keda => scene.by_keda(pool).await?,
        Mode::Operator => {
            Decisions { mode: Mode::Operator, general: scaled(&valid.general), gpu: valid.gpu.as_ref().map(scaled) }
        }
    };
    let was_ours = |kind| match scene.decided_before() {
        Some(Mode::Operator) => true,
        Some(Mode::Hpa | Mode::Keda) => kind == Kind::Gpu,
        Some(Mode::Manual) | None => false,
    };
    let way = |kind, decision: &Decision| match (valid.scaling.mode, kind) {
        (Mode::Operator, _) | (Mode::Hpa | Mode::Keda, Kind::Gpu) => without_cutting(kind, decision, observed, reading),
        // Whoever was told to go has heard it from this operator, and is asked for now.
        (Mode::Manual | Mode::Hpa | Mode::Keda, _) if was_ours(kind) => {
            stay(kind, decision.desired, &observed.pods, crew(kind, reading))
        }
        (Mode::Manual | Mode::Hpa | Mode::Keda, _) => Plan::at_once(decision.desired),
    };
    let general = way(Kind::General, &decisions.general);
    let gpu = decisions.gpu.as_ref().map(|gpu| way(Kind::Gpu, gpu));
    let demand = if valid.scaling.mode == Mode::Keda { demand(valid, reading) } else { None };
    Ok(Sizing { decisions, general, gpu, demand })
}

impl Scene<'_> {
    async fn by_hand(&self, pool: &WorkerPool) -> Result<Decisions, Error> {
        let Decisions { mode, general, gpu } = as_written(self.pool);
        let gpu = gpu.map(|gpu| self.frozen(gpu, Kind::Gpu));
        let gpu_handed_over = self.gpu_handed_over(pool).await?;
        let gpu = gpu_handed_over.clone().or(gpu);
        if let Some(runs) = self.handed_over(pool) {
            return handover::write(self.ctx, pool, runs, gpu).await;
        }
        // As long as the watch does not show what was written, the mode before has not ended.
        let mode = self.decided_before().filter(|_| gpu_handed_over.is_some()).unwrap_or(mode);
        if mode == Mode::Manual {
            self.ctx.memory.forget_scalers(&reference(self.pool));
        }
        Ok(Decisions { mode, general: self.frozen(general, Kind::General), gpu })
    }

    /// As many pods with GPUs as run, where that had to be written for whoever decides from now on.
    async fn gpu_handed_over(&self, pool: &WorkerPool) -> Result<Option<Decision>, Error> {
        let Some(class) = &self.pool.gpu else { return Ok(None) };
        let runs = running(self.observed, Kind::Gpu);
        let Some(runs) = handover::gpu_due(self.pool, class.replicas, self.before, runs) else { return Ok(None) };
        handover::write_gpu(self.ctx, pool, runs).await.map(Some)
    }

    /// What an autoscaler has written through `/scale`, but for the step between none and one worker.
    async fn by_autoscaler(&self, pool: &WorkerPool) -> Result<Decisions, Error> {
        let gpu = self.pool.gpu.as_ref().map(|class| self.scaled(class));
        if let Some(runs) = self.handed_over(pool) {
            return handover::write(self.ctx, pool, runs, gpu).await;
        }
        let written = pool.spec.replicas;
        let class = &self.pool.general;
        let step = self.decided(class, &Rules::of(self.pool, class).of_one(), Some(written.min(1)));
        let is_ours = !self.pool.paused && handover::is_step(written, step.desired);
        let general = match written {
            _ if is_ours => self.stepped(pool, step).await?,
            0 => step,
            _ => {
                let why = Why::of(Need::Autoscaler(written));
                Decision { desired: written, why, is_waiting: step.is_waiting && written == 1, ..step }
            }
        };
        Ok(Decisions { mode: Mode::Hpa, general: self.frozen(general, Kind::General), gpu })
    }

    /// What KEDA has written through `/scale`, from zero and to it too. What the work teaches is learned all the same.
    async fn by_keda(&self, pool: &WorkerPool) -> Result<Decisions, Error> {
        let gpu = self.pool.gpu.as_ref().map(|class| self.scaled(class));
        if let Some(runs) = self.handed_over(pool) {
            return handover::write(self.ctx, pool, runs, gpu).await;
        }
        let written = pool.spec.replicas;
        let class = &self.pool.general;
        let ours = self.decided(class, &Rules::of(self.pool, class), Some(written));
        let general = Decision { desired: written, why: Why::of(Need::Autoscaler(written)), is_waiting: false, ..ours };
        Ok(Decisions { mode: Mode::Keda, general: self.frozen(general, Kind::General), gpu })
    }

    /// Writes the step; where the pool has changed meanwhile, nobody goes until it is looked at again.
    async fn stepped(&self, pool: &WorkerPool, step: Decision) -> Result<Decision, Error> {
        if handover::scale(self.ctx, pool, step.desired).await? {
            return Ok(step);
        }
        let written = pool.spec.replicas;
        let runs = running(self.observed, Kind::General).unwrap_or(written);
        Ok(Decision { desired: runs.max(written).max(step.desired), is_waiting: true, ..step })
    }

    fn scaled(&self, class: &Class) -> Decision {
        // An autoscaler has decided on more than the first worker.
        let by_autoscaler = matches!(self.decided_before(), Some(Mode::Hpa | Mode::Keda));
        let is_new = class.kind == Kind::General && by_autoscaler;
        let runs = running(self.observed, class.kind).filter(|_| is_new);
        self.decided(class, &Rules::of(self.pool, class), runs)
    }

    /// By mode Operator's rule; from this number on, where it is not the one decided last.
    fn decided(&self, class: &Class, rules: &Rules, from: Option<i32>) -> Decision {
        let Self { pool, ctx, observed, reading, before } = self;
        let reference = reference(pool);
        let known = ctx.memory.scaler(&reference, class.kind);
        let mut scaler = known.unwrap_or_else(|| scaler(before, class.kind));
        if let Some(from) = from {
            scaler.starts_from(from);
        }
        let running = running(observed, class.kind);
        let seen = seen(pool, class.kind, reading, running, &observed.pods, scaler.usual_start(), Timestamp::now());
        let decision = scaler.decide(rules, &seen, ctx.memory.age());
        ctx.memory.keep_scaler(&reference, class.kind, scaler);
        decision
    }

    /// While workers take no work, they stay as many as they are.
    fn frozen(&self, decision: Decision, kind: Kind) -> Decision {
        match running(self.observed, kind).filter(|_| self.pool.paused) {
            Some(running) => Decision { desired: running, why: Why::of(Need::Paused(running)), ..decision },
            None => decision,
        }
    }

    fn handed_over(&self, pool: &WorkerPool) -> Option<i32> {
        handover::due(self.pool, pool.spec.replicas, self.before, running(self.observed, Kind::General))
    }

    fn decided_before(&self) -> Option<Mode> {
        self.before.scaling.as_ref().map(|scaling| scaling.mode)
    }
}

/// What cannot be read, or must stay, takes no worker away.
fn without_cutting(kind: Kind, decision: &Decision, observed: &Observed, reading: &Reading) -> Plan {
    match (running(observed, kind), &decision.why.need) {
        (None, _) => Plan::at_once(decision.desired),
        (Some(running), Need::Paused(_) | Need::Unreadable(_)) => Plan::at_once(running.max(decision.desired)),
        (Some(running), _) => {
            let crew = crew(kind, reading);
            let crew = if is_hidden(reading) { &doubted(crew) } else { crew };
            plan(
                kind,
                made(observed, kind).unwrap_or(running),
                decision.desired,
                &observed.pods,
                crew,
                Timestamp::now(),
            )
        }
    }
}

/// Whoever says that it holds nothing may hold what nobody speaks of.
fn doubted(crew: &Crew) -> Crew {
    let workers = crew.workers.iter().cloned().map(|worker| Worker { has_stopped: false, ..worker });
    Crew { workers: workers.collect(), ..crew.clone() }
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

/// As many pods as there are or will be: a Deployment that must not make more asks for them all the same.
fn made(observed: &Observed, kind: Kind) -> Option<i32> {
    let deployment = observed.workload(kind).deployment.as_ref()?;
    let asked = deployment.spec.as_ref()?.replicas?;
    let Some(status) = &deployment.status else { return Some(asked) };
    let fails = status.conditions.iter().flatten().any(|one| one.type_ == "ReplicaFailure" && one.status == "True");
    Some(if fails { asked.min(status.replicas.unwrap_or(0)) } else { asked })
}

fn reference(pool: &ValidPool) -> ObjectRef<Watched> {
    ObjectRef::new(&pool.name).within(&pool.namespace)
}

/// Where another operator has stopped: what it decided, and what it learned.
fn scaler(status: &WorkerPoolStatus, class: Kind) -> Scaler {
    let mode = status.scaling.as_ref().map(|scaling| scaling.mode);
    let (desired, learned) = match class {
        Kind::General => (
            status.scaling.as_ref().map(|scaling| scaling.desired),
            status.scaling.as_ref().map(|scaling| &scaling.learned),
        ),
        Kind::Gpu => (status.gpu.as_ref().map(|gpu| gpu.desired_replicas), status.gpu.as_ref().map(|gpu| &gpu.learned)),
    };
    let Learned { rate_per_replica, pod_start_seconds } = learned.cloned().unwrap_or_default();
    let number = |shown: Option<String>| shown?.parse().ok().filter(|value: &f64| value.is_finite() && *value >= 0.0);
    let learned =
        scale::Learned { rate: number(rate_per_replica).filter(|rate| *rate > 0.0), start: number(pod_start_seconds) };
    let was_ours = match class {
        Kind::General => mode == Some(Mode::Operator),
        Kind::Gpu => matches!(mode, Some(Mode::Operator | Mode::Hpa | Mode::Keda)),
    };
    // Who decided in another mode says nothing about what is needed: what runs does.
    Scaler::after(desired.filter(|_| was_ours), learned)
}
