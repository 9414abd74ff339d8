//! What the pipeline is put together from.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::charge::{Meters, Silence};
use super::deaths::Deaths;
use super::in_flight::InFlight;
use super::quarantine::Quarantine;
use super::{Pipeline, tenants};
use crate::admission::ceiling::Ceilings;
use crate::admission::lease::{Budgets, Kept};
use crate::admission::memory::Memory;
use crate::approval::Approvals;
use crate::broker::Broker;
use crate::broker::streams::{self, Mode, Ready};
use crate::cancel::Tombstones;
use crate::execute::Engine;
use crate::fault::Letters;
use crate::gate::Gate;
use crate::health::Health;
use crate::identity::Identity;
use crate::intake::{Holds, Load, Parking};
use crate::metrics::Metrics;
use crate::report::dead_letter::{self, DeadLetters};
use crate::report::ledger::Ledger;
use crate::report::outbox::Outbox;
use crate::report::spool::Spool;
use crate::schedule::Schedule;
use crate::throttle::Throttle;
use crate::vital::Vital;

/// Between two lines about answers of those who were not asked.
const TELL_AGAIN: Duration = Duration::from_secs(10);

/// What an administrator decides about the pipeline.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How assignments come in.
    pub mode: Mode,
    /// Names all workers that share the budgets of tenants.
    pub pool: String,
    /// The subject that verdicts are published on.
    pub verdict_subject: String,
    /// Where work waits for workers with GPU slots.
    pub route_subject: String,
    /// Where work comes in.
    pub intake: streams::Intake,
    /// How dead letters are written.
    pub dead_letters: dead_letter::Settings,
    /// Payloads and results that may be held at once, reserved memory included.
    pub max_memory_bytes: u64,
    /// CPU time that one block may use.
    pub max_cpu_time: Duration,
    /// Which errors become dead letters.
    pub letters: Letters,
    /// Where outcomes wait that the broker does not take.
    pub spool: Option<Spool>,
}

/// What the pipeline joins.
#[derive(Debug)]
pub struct Parts {
    /// Who signs verdicts and results.
    pub identity: Arc<Identity>,
    /// Where everything comes from and goes to.
    pub broker: Broker,
    /// Which streams there are at the moment.
    pub streams: watch::Receiver<Ready>,
    /// The slots, and whose turn it is.
    pub schedule: Schedule,
    /// Who does the work.
    pub engine: Engine,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// What is wrong at the moment.
    pub health: Health,
}

impl Pipeline {
    /// The pipeline between these parts.
    pub fn new(settings: Settings, parts: Parts, vital: &Vital) -> Self {
        let Parts { identity, broker, streams, schedule, engine, metrics, health } = parts;
        let dead_letters = settings.dead_letters.clone();
        let parking = Arc::<Parking>::default();
        Self {
            ceilings: Ceilings::new(
                broker.clone(),
                streams.clone(),
                health.clone(),
                &settings.pool,
                &identity.worker_id,
                Arc::clone(&parking),
            ),
            memory: Memory::new(Arc::clone(&parking)),
            parking,
            ledger: Ledger::new(broker.clone(), settings.mode),
            approvals: Approvals::new(&broker),
            deadlines: Mutex::default(),
            outbox: Outbox::start(broker.clone(), settings.verdict_subject.clone().into(), vital),
            dead_letters: DeadLetters::new(broker.clone(), streams.clone(), Arc::clone(&identity), dead_letters),
            deaths: Deaths::new(broker.clone()),
            load: Arc::new(Load::new(settings.max_memory_bytes)),
            budgets: Budgets::new(Kept::new(broker.clone(), streams.clone(), health.clone()), &settings.pool),
            silence: Silence::default(),
            meters: Meters::default(),
            settings,
            identity,
            broker,
            streams,
            gate: Arc::new(Gate::new(schedule.policy())),
            schedule,
            engine,
            metrics,
            health,
            holds: Holds::default(),
            tasks: TaskTracker::new(),
            outcomes: TaskTracker::new(),
            on_disk: TaskTracker::new(),
            cut: CancellationToken::new(),
            tombstones: Tombstones::default(),
            in_flight: InFlight::default(),
            quarantine: Quarantine::default(),
            strangers: Throttle::new(TELL_AGAIN),
            tallies: tenants::Tallies::default(),
        }
    }
}
