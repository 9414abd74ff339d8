//! The whole story of an assignment in two functions: [`Pipeline::accept`] and [`Pipeline::finish`].
//!
//! The only place that records metrics and writes outcome logs: everything that it calls returns facts.

mod in_flight; // which assignments run here

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, Span};

use crate::admin::{Concern, Health};
use crate::admission::{self, Refusal};
use crate::assignment::{Addressee, Assignment, AssignmentKey, Pool, Undecodable};
use crate::broker::{Broker, StoreError, Stored};
use crate::execute::{self, Ended, Engine, Execution, Limits};
use crate::fault::Fault;
use crate::intake::{Delivery, Load, Room, Settlement};
use crate::metrics::Metrics;
use crate::report::dead_letter::{DeadLetters, Stage};
use crate::report::ledger::{Ledger, Record};
use crate::report::outbox::Outbox;
use crate::report::{self, StepResult};
use crate::schedule::Schedule;
use crate::telemetry::{self, SpanIds};
use in_flight::{Claim, Flight, InFlight};

/// Look-ups on their way at once; the records of one chunk are read while the next one arrives.
const LOOK_UPS: usize = 8;
/// The most that is fetched ahead of free slots, unless there are more slots.
const MAX_LOOK_AHEAD: usize = 1000;
/// A pool that has let work wait for this long without starting any is overloaded.
const OVERLOADED: Duration = Duration::from_secs(30);
/// What the names and numbers around a result may need of the broker's largest message: nine ids of at most 256 bytes,
/// each byte escaped, and the fixed fields.
const ENVELOPE_BYTES: usize = 8 * 1024;
/// The broker's limit counts a record's headers too; they have no more than this.
const HEADER_BYTES: usize = 1024;

/// What an administrator decides about the pipeline.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Who signs verdicts and results.
    pub worker_id: String,
    /// Where verdicts go.
    pub verdict_subject: String,
    /// Payloads and results that may be held at once.
    pub max_memory_bytes: u64,
    /// CPU time that one block may use.
    pub max_cpu_time: Duration,
    /// Whether retryable errors become dead letters when their attempts are used up.
    pub dlq_exhausted: bool,
}

/// Everything that an assignment meets between the broker's delivery and its settlement.
#[derive(Debug)]
pub struct Pipeline {
    /// What an administrator decided.
    pub settings: Settings,
    /// The connection.
    pub broker: Broker,
    /// The records.
    pub ledger: Ledger,
    /// Results on their way out.
    pub outbox: Outbox,
    /// The dead letters.
    pub dead_letters: DeadLetters,
    /// The slots.
    pub schedule: Schedule,
    /// The blocks.
    pub engine: Engine,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// What is wrong.
    pub health: Health,
    /// What is held.
    pub load: Arc<Load>,
    /// Everything that still has a delivery.
    pub tasks: TaskTracker,
    /// Ends what still runs when the drain's time is up.
    pub cut: CancellationToken,
    in_flight: InFlight,
}

/// A delivery whose assignment may run here, and the Router has been told so.
#[derive(Debug)]
struct Arrival {
    delivery: Delivery,
    assignment: Assignment,
    /// `worker.assignment.receive`: from its arrival to its settlement.
    span: Span,
}

/// An arrival that nothing else here works on, with what is recorded of it.
#[derive(Debug)]
struct Accepted {
    arrival: Arrival,
    record: Option<Record>,
    flight: Flight,
}

/// Why a delivery does not run.
struct Rejection {
    addressee: Addressee,
    fault: Fault,
    ends: RejectionEnd,
}

enum RejectionEnd {
    /// Kept as a dead letter, then said.
    DeadLetter(Stage),
    /// Stored for redeliveries, then said: the Router may send it again.
    Refused(AssignmentKey),
}

/// What stands in the record at the end.
enum Standing {
    /// This worker's outcome.
    Ours(Bytes),
    /// An outcome that somebody recorded before.
    Theirs(Record),
}

impl Pipeline {
    /// The pipeline between these parts.
    pub fn new(
        settings: Settings,
        broker: Broker,
        dead_letters: DeadLetters,
        schedule: Schedule,
        engine: Engine,
        metrics: Arc<Metrics>,
        health: Health,
    ) -> Self {
        Self {
            settings,
            ledger: Ledger::new(broker.clone()),
            outbox: Outbox::start(broker.clone()),
            broker,
            dead_letters,
            schedule,
            engine,
            metrics,
            health,
            load: Arc::new(Load::default()),
            tasks: TaskTracker::new(),
            cut: CancellationToken::new(),
            in_flight: InFlight::default(),
        }
    }

    /// Takes chunks of deliveries until there are no more, and leaves each to a task of its own.
    pub async fn run(self: &Arc<Self>, chunks: mpsc::Receiver<Vec<Delivery>>) {
        let chunks = futures::stream::unfold(chunks, |mut chunks| async { Some((chunks.recv().await?, chunks)) });
        let accepted = chunks.map(|chunk| self.accept(chunk)).buffered(LOOK_UPS);
        accepted.for_each(|accepted| async { self.start(accepted) }).await;
    }

    /// How much may be fetched at this moment.
    pub fn room(&self) -> Room {
        let slots: usize = Pool::ALL.iter().map(|pool| self.schedule.size(*pool)).sum();
        let busy: usize = Pool::ALL.iter().map(|pool| self.schedule.busy(*pool)).sum();
        let look_ahead = slots.max(self.load.finished_per_100_ms().min(MAX_LOOK_AHEAD));
        let is_full = |pool: &Pool| self.schedule.waiting(*pool) >= look_ahead.max(1);
        // What could not be stored would only pile up here. Whoever could not store it clears the concern.
        let cannot_store = self.health.is_raised(Concern::StorageRefused);
        let free = match self.holds_too_much() || cannot_store || Pool::ALL.iter().any(is_full) {
            true => 0,
            false => (slots - busy + look_ahead).saturating_sub(self.load.waiting()),
        };
        Room { free, whole: slots + look_ahead }
    }

    /// The first half: decodes each delivery, says the verdict, sets copies of running work aside, and reads with one
    /// request what is recorded of the rest.
    async fn accept(self: &Arc<Self>, chunk: Vec<Delivery>) -> Vec<Accepted> {
        let mut arrivals = Vec::with_capacity(chunk.len());
        for delivery in chunk {
            if delivery.delivered() > 1 {
                self.metrics.redelivered();
            }
            match self.judge(&delivery) {
                Ok(assignment) => {
                    let verdict = report::accepted(&assignment, &self.settings.worker_id);
                    self.broker.say(self.settings.verdict_subject.clone(), verdict).await;
                    let span = self.receive_span(&delivery, &assignment);
                    arrivals.push(Arrival { delivery, assignment, span });
                }
                Err(rejection) => self.spawn(Self::reject, (delivery, rejection)),
            }
        }
        self.look_up(arrivals).await
    }

    /// The second half: outcome recorded, dead letter kept, result published, delivery settled, in this order.
    async fn finish(&self, arrival: Arrival, expected: u64, queued: Duration, execution: Execution) {
        let Arrival { delivery, assignment, span } = arrival;
        if delivery.is_lapsed() && delivery.held(self.may_be_answered_already(&delivery)).await {
            tracing::warn!(assignment_id = %assignment.key.assignment_id, "discarded a late outcome");
            return;
        }
        let failed = execution.failed.clone();
        let mut step = StepResult::of(execution, assignment.block.kind(), queued);
        let result = self.encode(&mut step, &assignment);
        let _held = self.load.hold_bytes(result.len());
        let standing = delivery.held(self.record(&delivery, &assignment, expected, &mut step, result)).await;
        let published = match standing {
            Standing::Ours(result) => {
                if let Some(fault) = step.error.as_ref().filter(|fault| self.is_dead_letter(fault)) {
                    let addressee = assignment.addressee();
                    let letter = self.keep_dead_letter(&delivery, &addressee, Stage::Execute, fault, &failed);
                    delivery.held(letter).await;
                }
                self.note_outcome(&assignment, &step);
                result
            }
            Standing::Theirs(record) => {
                tracing::info!(assignment_id = %assignment.key.assignment_id, "superseded by a recorded outcome");
                return self.answer(Arrival { delivery, assignment, span }, record).await;
            }
        };
        let publish = telemetry::publish_span(&span, &self.span_ids(&assignment));
        delivery.held(self.outbox.publish(published).instrument(publish)).await;
        delivery.settle(Settlement::Done).await;
    }

    /// A task for each: it ends when its delivery is settled or dropped.
    fn start(self: &Arc<Self>, accepted: Vec<Accepted>) {
        for one in accepted {
            self.spawn(Self::carry_out, one);
        }
    }

    fn spawn<T, F>(self: &Arc<Self>, step: impl FnOnce(Arc<Self>, T) -> F, work: T)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.tasks.spawn(step(Arc::clone(self), work));
    }

    fn judge(&self, delivery: &Delivery) -> Result<Assignment, Rejection> {
        let assignment = Assignment::decode(delivery.payload()).map_err(Rejection::undecodable)?;
        if let Some(invalid) = self.engine.refuses(&assignment.block) {
            return Err(Rejection::undecodable(Undecodable { addressee: assignment.addressee(), invalid }));
        }
        match admission::refusal(&assignment, &self.schedule, self.settings.max_memory_bytes >> 20) {
            None => Ok(assignment),
            Some(refusal) => Err(Rejection::refused(&assignment, refusal)),
        }
    }

    /// Dead letter or stored refusal first, verdict second, so that what was said is also kept.
    async fn reject(self: Arc<Self>, (delivery, rejection): (Delivery, Rejection)) {
        let Rejection { addressee, fault, ends } = rejection;
        let verdict = report::rejected(&addressee, fault.cause, &fault.message, &self.settings.worker_id);
        match &ends {
            RejectionEnd::DeadLetter(stage) => {
                delivery.held(self.keep_dead_letter(&delivery, &addressee, *stage, &fault, &[])).await;
            }
            RejectionEnd::Refused(key) => {
                let stored = verdict.clone().unwrap_or_default();
                let store = || self.ledger.write_refusal(key, delivery.publication(), stored.clone());
                delivery.held(self.until_definite(store)).await;
            }
        }
        self.metrics.rejected(fault.cause);
        tracing::info!(
            assignment_id = addressee.assignment_id,
            tenant_id = addressee.tenant_id,
            trace_id = addressee.trace_id,
            code = fault.cause.code(),
            reason = fault.message,
            "Assignment rejected"
        );
        if let Some(verdict) = verdict {
            self.broker.say(self.settings.verdict_subject.clone(), verdict).await;
        }
        delivery.settle(Settlement::Done).await;
    }

    async fn look_up(self: &Arc<Self>, arrivals: Vec<Arrival>) -> Vec<Accepted> {
        let mut claimed = Vec::with_capacity(arrivals.len());
        for arrival in arrivals {
            match self.in_flight.claim(arrival) {
                Claim::First(arrival, flight) => claimed.push((arrival, flight)),
                Claim::SetAside | Claim::Renewed => {}
            }
        }
        let keys: Vec<_> = claimed.iter().map(|(arrival, _)| arrival.assignment.key.clone()).collect();
        let mut records = self.read_records(&keys).await;
        let accepted = claimed.into_iter().map(|(arrival, flight)| {
            let record = records.remove(&report::ledger::subject(&arrival.assignment.key));
            Accepted { arrival, record, flight }
        });
        accepted.collect()
    }

    /// Asks until there is an answer: without one nothing may start.
    async fn read_records(&self, keys: &[AssignmentKey]) -> HashMap<String, Record> {
        if keys.is_empty() {
            return HashMap::new();
        }
        for attempt in 0.. {
            match self.ledger.look_up(keys).await {
                Ok(records) => return records,
                Err(error) => {
                    tracing::warn!(%error, "a look-up failed: asking again");
                    self.raise_unless_away(Concern::StreamsUnavailable, &error);
                    tokio::time::sleep(pause(attempt)).await;
                }
            }
        }
        HashMap::new()
    }

    async fn carry_out(self: Arc<Self>, accepted: Accepted) {
        let Accepted { arrival, record, flight } = accepted;
        match record {
            Some(record) if !may_replace(&record, &arrival.delivery) => {
                self.metrics.result_replayed();
                self.answer(arrival, record).await;
            }
            record => self.execute(arrival, record.map_or(0, |record| record.sequence)).await,
        }
        let copies = flight.land();
        if !copies.is_empty() {
            let accepted = self.look_up(copies).await;
            self.start(accepted);
        }
    }

    async fn execute(&self, mut arrival: Arrival, expected: u64) {
        let assignment = &arrival.assignment;
        let turn = self.schedule.slot(assignment.pool, &assignment.key.tenant, assignment.priority);
        let Ok(slot) = arrival.delivery.held(turn).await else {
            return arrival.delivery.settle(Settlement::HandBack).await;
        };
        arrival.delivery.started();
        let queued = arrival.delivery.received().elapsed();
        let limits = Limits {
            cpu_time: self.settings.max_cpu_time,
            max_output_bytes: self.broker.max_payload().saturating_sub(ENVELOPE_BYTES),
        };
        let may_start = || !arrival.delivery.is_lapsed() && !self.cut.is_cancelled();
        let span = telemetry::execute_span(&arrival.span, &self.span_ids(&arrival.assignment));
        let work = execute::execute(&self.engine, &arrival.assignment, limits, may_start).instrument(span.clone());
        let ended = tokio::select! {
            ended = arrival.delivery.held(work) => ended,
            () = self.cut.cancelled() => Ended::Abandoned,
        };
        drop(slot);
        self.load.finished();
        if matches!(&ended, Ended::Executed(execution) if execution.outcome.is_err()) {
            [&span, &arrival.span].into_iter().for_each(telemetry::mark_failed);
        }
        match ended {
            Ended::Executed(execution) => self.finish(arrival, expected, queued, execution).await,
            Ended::Abandoned => arrival.delivery.settle(Settlement::HandBack).await,
        }
    }

    /// Repeats a recorded outcome, and its dead letter where whoever recorded it may not have come to write it.
    async fn answer(&self, arrival: Arrival, record: Record) {
        let Arrival { delivery, assignment, span } = arrival;
        if record.publication.as_ref() == Some(delivery.publication())
            && let Some(fault) = record.fault.as_ref().filter(|fault| !fault.retryable)
        {
            let addressee = assignment.addressee();
            let write = || self.dead_letters.rewrite(&delivery, &addressee, fault);
            delivery.held(self.until_definite(write)).await;
        }
        let publish = telemetry::publish_span(&span, &self.span_ids(&assignment));
        delivery.held(self.outbox.publish(record.result).instrument(publish)).await;
        delivery.settle(Settlement::Done).await;
    }

    /// Writes the record until its outcome is definite, and returns what stands in the end.
    async fn record(
        &self,
        delivery: &Delivery,
        assignment: &Assignment,
        expected: u64,
        step: &mut StepResult,
        result: Bytes,
    ) -> Standing {
        let key = &assignment.key;
        let (mut expected, mut result) = (expected, result);
        loop {
            let may_shrink = step.outputs.is_some();
            let write = || async {
                match self.ledger.write(key, delivery.publication(), expected, result.clone()).await {
                    // The broker has come back with a smaller limit: no other try can succeed.
                    Err(_) if may_shrink && result.len() > self.largest_result() => Ok(Stored::Refused),
                    outcome => outcome,
                }
            };
            if let Stored::At(_) = self.until_definite(write).await {
                return Standing::Ours(result);
            }
            if may_shrink && result.len() > self.largest_result() {
                result = self.encode(step, assignment);
                continue;
            }
            let stored = self.read_records(std::slice::from_ref(key)).await.into_values().next();
            match stored {
                None => expected = 0,
                Some(record) if record.result == result => return Standing::Ours(result),
                Some(record) if may_replace(&record, delivery) => expected = record.sequence,
                Some(record) => return Standing::Theirs(record),
            }
        }
    }

    fn encode(&self, step: &mut StepResult, assignment: &Assignment) -> Bytes {
        step.encode(assignment, &self.settings.worker_id, self.largest_result())
    }

    fn largest_result(&self) -> usize {
        self.broker.max_payload().saturating_sub(HEADER_BYTES)
    }

    async fn keep_dead_letter(
        &self,
        delivery: &Delivery,
        addressee: &Addressee,
        stage: Stage,
        fault: &Fault,
        failed: &[execute::Attempt],
    ) {
        self.until_definite(|| self.dead_letters.write(delivery, addressee, stage, fault, failed)).await;
        self.metrics.dead_letter(stage.as_str());
    }

    /// Repeats a write until the broker has definitely done or refused it; `/readyz` says so meanwhile.
    async fn until_definite<T, F>(&self, write: impl Fn() -> F) -> T
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let mut attempt = 0;
        loop {
            match write().await {
                Ok(done) => {
                    if attempt > 0 {
                        self.health.clear(Concern::StorageRefused);
                    }
                    return done;
                }
                Err(error) => {
                    tracing::warn!(%error, attempt, "writing again");
                    // A stream that is gone gives no answer either, where somebody else listens on its subject.
                    if attempt > 0 || matches!(error, StoreError::Refused { .. }) {
                        self.raise_unless_away(Concern::StorageRefused, &error);
                    }
                    self.metrics.publish_retried();
                }
            }
            tokio::time::sleep(pause(attempt)).await;
            attempt += 1;
        }
    }

    /// Says so on `/readyz`, and so has the streams looked at; a broker that is away explains enough.
    fn raise_unless_away(&self, concern: Concern, error: &dyn std::fmt::Display) {
        if !self.health.is_raised(Concern::NatsDisconnected) {
            self.health.raise(concern, error.to_string());
        }
    }

    /// On a lapsed hold another worker may have recorded an outcome that has been dropped since. Unknown counts as so.
    async fn may_be_answered_already(&self, delivery: &Delivery) -> bool {
        match self.ledger.may_have_dropped_since(delivery.published()).await {
            Ok(may_have_dropped) => may_have_dropped,
            Err(error) => {
                tracing::warn!(%error, "cannot tell whether a late outcome is still wanted");
                true
            }
        }
    }

    fn note_overload(&self) {
        let stuck = Pool::ALL.into_iter().find(|pool| self.schedule.stuck_for(*pool) >= OVERLOADED);
        match stuck {
            Some(pool) => self.health.raise(Concern::PoolOverloaded, format!("work waits for {} slots", pool.as_str())),
            None => self.health.clear(Concern::PoolOverloaded),
        }
        match self.holds_too_much() {
            true => self.health.raise(Concern::MemoryFull, "payloads and results wait to be settled"),
            false => self.health.clear(Concern::MemoryFull),
        }
    }

    fn holds_too_much(&self) -> bool {
        self.load.bytes() as u64 >= self.settings.max_memory_bytes
    }

    fn is_dead_letter(&self, fault: &Fault) -> bool {
        fault.cause.is_dead_letter() || (self.settings.dlq_exhausted && fault.cause.is_retried_here())
    }

    fn receive_span(&self, delivery: &Delivery, assignment: &Assignment) -> Span {
        let trace_id = assignment.correlation.trace_id.as_deref();
        telemetry::receive_span(telemetry::remote_parent(delivery.headers(), trace_id), &self.span_ids(assignment))
    }

    fn span_ids<'a>(&'a self, assignment: &'a Assignment) -> SpanIds<'a> {
        SpanIds {
            tenant_id: assignment.key.tenant.as_str(),
            trace_id: assignment.correlation.trace_id.as_deref(),
            run_id: assignment.correlation.run_id.as_deref(),
            block_type: assignment.block.kind().as_str(),
            worker_id: &self.settings.worker_id,
        }
    }

    fn note_outcome(&self, assignment: &Assignment, step: &StepResult) {
        let kind = assignment.block.kind();
        self.metrics.finished(kind, step.status, step.latency, step.cpu_time);
        (0..step.retries_used()).for_each(|_| self.metrics.retried(kind));
        tracing::info!(
            assignment_id = %assignment.key.assignment_id,
            tenant_id = assignment.key.tenant.as_str(),
            trace_id = assignment.correlation.trace_id,
            run_id = assignment.correlation.run_id,
            block_type = kind.as_str(),
            status = step.status.as_str(),
            code = step.error_code(),
            latency_ms = report::millis(step.latency),
            retries_used = step.retries_used(),
            "Step execution completed"
        );
    }
}

impl Rejection {
    fn undecodable(undecodable: Undecodable) -> Self {
        let Undecodable { addressee, invalid } = undecodable;
        let fault = Fault::new(invalid.cause, invalid.to_string());
        Self { addressee, fault, ends: RejectionEnd::DeadLetter(Stage::Decode) }
    }

    fn refused(assignment: &Assignment, refusal: Refusal) -> Self {
        let ends = match refusal.cause.is_retryable() {
            true => RejectionEnd::Refused(assignment.key.clone()),
            false => RejectionEnd::DeadLetter(Stage::Admit),
        };
        Self { addressee: assignment.addressee(), fault: Fault::new(refusal.cause, refusal.message), ends }
    }
}

/// Whether a delivery is executed although there is a record: it is a new publication, and either the recorded error
/// says that a retry may help, or the Router asks for it.
fn may_replace(record: &Record, delivery: &Delivery) -> bool {
    !record.answers(delivery.publication()) && (record.is_retryable() || delivery.is_replay())
}

/// Between two tries of a write: doubles from 50 ms to 5 s, half of it at random.
fn pause(attempt: u32) -> Duration {
    let ceiling = Duration::from_millis(50).saturating_mul(1 << attempt.min(7)).min(Duration::from_secs(5));
    ceiling.mul_f64(0.5 + 0.5 * execute::random())
}

/// Samples what changes by itself, ten times a second, until the worker has stopped.
pub async fn observe(pipeline: Arc<Pipeline>, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(Duration::from_millis(100));
    let mut last = Instant::now();
    while !stop.is_cancelled() {
        ticks.tick().await;
        pipeline.load.sample(last.elapsed());
        last = Instant::now();
        for pool in Pool::ALL {
            pipeline.metrics.set_queue_depth(pool, pipeline.schedule.waiting(pool));
            pipeline.metrics.set_slots(pool, pipeline.schedule.size(pool));
            pipeline.metrics.set_slots_busy(pool, pipeline.schedule.busy(pool));
        }
        pipeline.metrics.set_memory_held(pipeline.load.bytes());
        pipeline.note_overload();
        pipeline.metrics.set_nats_connected(!pipeline.health.is_raised(Concern::NatsDisconnected));
    }
}
