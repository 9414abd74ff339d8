//! The whole story of an assignment in three functions: [`Pipeline::accept`], [`Pipeline::execute`] and
//! [`Pipeline::finish`].
//!
//! The only place that records metrics and writes outcome logs: everything that it calls returns facts.

mod parts; // what it is put together from
mod take; // where it comes from
mod judge; // whether it runs here
mod charge; // whether its tenant may run it now
mod rejection; // what does not run
mod approvals; // what waits for a person
mod elsewhere; // what goes on in another place
mod route; // what runs on another class of workers
mod parking; // what its tenant may not have run yet
mod in_flight; // which assignments run here
mod look_up; // what is known of them
mod turn; // when they run
mod cancel; // what is wanted no more
mod deaths; // how often one has killed its worker
mod quarantine; // what may do so again runs alone
mod rebalance; // what waits here while another worker has room
mod durable; // writes that must become definite
mod room; // how much more may come
mod activity; // what this worker does at the moment
mod tenants; // and for whom
mod drain; // the steps of a stop

use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, Span};

use crate::admission::ceiling::Ceilings;
use crate::admission::lease::{Budgets, Charge, Kept};
use crate::admission::memory::{self, Memory};
use crate::admission::{Admission, Payment};
use crate::approval::Approvals;
use crate::approval::deadlines::Deadlines;
use crate::assignment::Assignment;
use crate::blocks::Block;
use crate::blocks::cpu::CpuTime;
use crate::broker::streams::{Mode, Ready};
use crate::broker::{Broker, Expected};
use crate::cancel::Tombstones;
use crate::contract;
use crate::execute::{self, Ended, Engine, Execution, Limits, Links};
use crate::failpoint::{self, Point};
use crate::fault::Fault;
use crate::gate::Gate;
use crate::health::Health;
use crate::identity::Identity;
use crate::intake::{Delivery, Holds, Load, Parking, Settlement};
use crate::metrics::Metrics;
use crate::publication::Publication;
use crate::report::dead_letter::DeadLetters;
use crate::report::ledger::{Ledger, Record};
use crate::report::outbox::{Before, Outbox, Said};
use crate::report::{self, StepResult};
use crate::schedule::Schedule;
use crate::telemetry::{self, SpanIds};
use crate::throttle::Throttle;
use crate::trace_context::TraceContext;
use cancel::Stop;
use deaths::{Deaths, DeliveryId, Suspicion};
use durable::{Recorded, may_replace};
use in_flight::{Flight, InFlight, Landed};
use judge::Judged;
use quarantine::Quarantine;
use rejection::Rejection;
use turn::Turn;

pub(crate) use activity::Activity;
pub use parts::{Parts, Settings};
pub use rebalance::rebalance;
pub use room::observe;
pub(crate) use tenants::TenantActivity;

/// Look-ups on their way at once; the records of one chunk are read while the next one arrives.
const LOOK_UPS: usize = 8;

/// What is put off is delivered again after no less than this, and no more: what has to wait for longer does so again.
const PUT_OFF_LEAST: Duration = Duration::from_millis(100);
const PUT_OFF_MOST: Duration = Duration::from_secs(60);

/// How long after its deadline a block that hangs keeps its delivery.
const GRACE: Duration = Duration::from_secs(30);

/// Everything that an assignment meets between the broker's delivery and its settlement.
#[derive(Debug)]
pub struct Pipeline {
    settings: Settings,
    identity: Arc<Identity>,
    broker: Broker,
    streams: watch::Receiver<Ready>,
    ledger: Ledger,
    approvals: Approvals,
    /// Requests that wait, as far as this worker has been told.
    deadlines: Mutex<Deadlines>,
    outbox: Outbox,
    dead_letters: DeadLetters,
    schedule: Schedule,
    ceilings: Ceilings,
    memory: Memory,
    parking: Arc<Parking>,
    gate: Arc<Gate>,
    engine: Engine,
    metrics: Arc<Metrics>,
    health: Health,
    load: Arc<Load>,
    holds: Holds,
    /// Everything that still has a delivery.
    tasks: TaskTracker,
    /// What has ended here and is recorded nowhere yet; in core mode, what is not published.
    outcomes: TaskTracker,
    /// Those of them that lie on the disk.
    on_disk: TaskTracker,
    /// Ends what still runs when the drain's time is up.
    cut: CancellationToken,
    tombstones: Tombstones,
    in_flight: InFlight,
    deaths: Deaths,
    quarantine: Quarantine,
    budgets: Budgets<Kept>,
    silence: charge::Silence,
    /// Of blocks that have ended.
    meters: charge::Meters,
    /// Who answers requests without having been asked.
    strangers: Throttle,
    tallies: tenants::Tallies,
}

/// A delivery whose assignment may run here, and the Router has been told so.
#[derive(Debug)]
struct Arrival {
    delivery: Delivery,
    assignment: Assignment,
    /// The unit of its tenant's budget that it was admitted for.
    charge: Option<Charge>,
    /// The verdict; `None` where it was said before the assignment was parked.
    said: Option<Said>,
    /// Whether it has to wait for its tenant's budget.
    is_deferred: bool,
    /// What counts for its tenant's ceiling.
    memory: Option<memory::Held>,
    /// Whether it is still wanted.
    stop: Arc<Stop>,
    /// The trace that it came with.
    trace: Option<TraceContext>,
    /// `worker.assignment.receive`: from its arrival to its settlement.
    span: Span,
}

/// An arrival that nothing else here works on, with what is recorded of it.
#[derive(Debug)]
struct Accepted {
    /// In a place of its own: each step that it is handed on to would have room for all of it, and many may wait.
    arrival: Box<Arrival>,
    record: Option<Box<Record>>,
    /// Whether a request for approval waits under its id.
    is_asked: bool,
    /// Workers that have died of it; looked up only where it is to be executed.
    deaths: u32,
    flight: Flight,
}

impl Arrival {
    /// Nothing is executed for it.
    fn costs_nothing(&mut self) {
        self.charge.take().into_iter().for_each(Charge::give_back);
    }
}

impl Pipeline {
    /// Gives the slots' shares out anew each time that the policy changes.
    pub async fn follow_policy(self: Arc<Self>) {
        self.schedule.follow_policy().await;
    }

    /// Renews what is leased of tenants' ceilings, and gives back what is not used, for as long as the worker runs.
    pub async fn keep_ceilings(self: Arc<Self>) {
        self.ceilings.keep().await;
    }

    /// Takes chunks of deliveries until there are no more, and leaves each to a task of its own.
    pub async fn run(self: Arc<Self>, chunks: mpsc::Receiver<Vec<Delivery>>) {
        let chunks = futures::stream::unfold(chunks, |mut chunks| async { Some((chunks.recv().await?, chunks)) });
        let accepted = chunks.map(|chunk| self.accept(chunk)).buffered(LOOK_UPS);
        accepted.for_each(|accepted| async { self.start(accepted) }).await;
    }

    /// Decodes each delivery, says the verdict, sets copies of running work aside, and reads with one
    /// request what is recorded of the rest. A redelivery that was refused before is refused again.
    async fn accept(self: &Arc<Self>, chunk: Vec<Delivery>) -> Vec<Accepted> {
        let mut judged = Vec::with_capacity(chunk.len());
        for delivery in chunk {
            if delivery.delivered() > 1 {
                self.metrics.redelivered();
            }
            failpoint::reach(Point::Pulled).await;
            let judgement = self.judge(&delivery);
            judged.push((delivery, judgement));
        }
        let now = self.saying_now();
        let said = |at| Said { at, ..now.clone() };
        let mut arrivals = Vec::with_capacity(judged.len());
        let judged = self.repeat_refusals(judged).await;
        // Empty where no tenant is bounded.
        let admissions = self.admit(&judged).await;
        self.note_charges(&judged, &admissions).await;
        let mut admissions = admissions.into_iter();
        for (mut delivery, judgement) in judged {
            let admission = admissions.next().unwrap_or(Admission::Admit(Payment::None));
            match judgement {
                Ok(Judged::PassesOn(assignment)) => self.spawn(Self::pass_on, (delivery, assignment)),
                Ok(Judged::Runs(assignment)) => {
                    let (payment, is_deferred) = match admission {
                        Admission::Admit(payment) => (payment, false),
                        Admission::Park => (Payment::None, true),
                        Admission::Refuse(refusal) => {
                            self.spawn(Self::reject, (delivery, Rejection::refused(&assignment, refusal)));
                            continue;
                        }
                        Admission::PutOff(wait) => {
                            self.spawn(Self::put_off, (delivery, assignment, wait));
                            continue;
                        }
                    };
                    delivery.reserve(assignment.memory_mb.unwrap_or_default());
                    let at = payment.moment().unwrap_or_else(|| Timestamp::now().as_millisecond());
                    let mut arrival = self.arrival(delivery, assignment);
                    (arrival.charge, arrival.is_deferred) = (payment.charge(), is_deferred);
                    self.say_accepted(&mut arrival, said(at)).await;
                    arrivals.push(arrival);
                }
                Ok(Judged::Ends(assignment, fault)) => {
                    let mut arrival = self.arrival(delivery, assignment);
                    self.say_accepted(&mut arrival, said(Timestamp::now().as_millisecond())).await;
                    self.spawn(Self::end_refused, (Box::new(arrival), fault));
                }
                Err(rejection) => self.spawn(Self::reject, (delivery, rejection)),
            }
        }
        self.look_up(arrivals).await
    }

    /// A verdict that is said at this moment.
    fn saying_now(&self) -> Said {
        let refusal = self.broker.last_refusal(&[&self.settings.verdict_subject]);
        Said { at: Timestamp::now().as_millisecond(), session: self.broker.session(), refusal }
    }

    /// What was parked has been told so when it was.
    async fn say_accepted(&self, arrival: &mut Arrival, said: Said) {
        if !arrival.delivery.is_parked() {
            let verdict = report::accepted(&arrival.assignment, &self.identity.worker_id, said.at);
            let subject = self.settings.verdict_subject.clone();
            self.broker.publish_in(arrival.trace.as_ref(), subject, verdict).await;
            failpoint::reach(Point::Accepted).await;
            arrival.said = Some(said);
        }
    }

    /// The verdict that comes before whatever else is said of it.
    fn before<'a>(&'a self, said: Option<&'a Said>, assignment: &'a Assignment) -> Option<Before<'a>> {
        said.map(|said| Before { said, assignment, worker_id: &self.identity.worker_id })
    }

    fn arrival(&self, delivery: Delivery, assignment: Assignment) -> Arrival {
        let trace = TraceContext::of(delivery.headers(), assignment.correlation.trace_id.as_deref());
        let span = telemetry::receive_span(trace.as_ref(), &self.span_ids(&assignment));
        Arrival {
            delivery,
            assignment,
            charge: None,
            said: None,
            is_deferred: false,
            memory: None,
            stop: Arc::default(),
            trace,
            span,
        }
    }

    /// Executes what is accepted, or repeats what is recorded; then takes up the copies that waited for it.
    async fn carry_out(self: Arc<Self>, accepted: Accepted) {
        let Accepted { mut arrival, record, is_asked, deaths, flight } = accepted;
        let mut comes_again = None;
        failpoint::reach(Point::LookedUp).await;
        let expected = record.as_ref().map_or(Expected::NOTHING, |record| record.place);
        match (record, Suspicion::after(deaths)) {
            (Some(record), _) if !may_replace(&record, &arrival.delivery) => {
                self.metrics.result_replayed();
                arrival.costs_nothing();
                Box::pin(self.answer(arrival, *record)).await;
            }
            (_, Suspicion::Poison(deaths)) => {
                let poison = Execution::not_begun(deaths::too_many(deaths));
                Box::pin(self.finish(arrival, expected, Duration::ZERO, poison)).await;
            }
            (record, suspicion) => match (&*arrival.assignment.block, &self.engine) {
                (Block::Human(approval), Engine::Real(_)) if !arrival.is_deferred => {
                    let approval = approval.clone();
                    Box::pin(self.ask(arrival, &approval, record.map(|record| *record))).await;
                }
                _ if is_asked => comes_again = Box::pin(self.join(arrival)).await,
                _ => {
                    let since = self.cancels_since(&arrival.delivery, record.is_some());
                    let stop = Arc::clone(&arrival.stop);
                    self.execute_in_turn(arrival, expected, suspicion, self.called_off(&stop, since)).await;
                }
            },
        }
        let Landed { mut copies, outcome } = flight.land();
        copies.extend(comes_again.map(|arrival| *arrival));
        if !copies.is_empty() {
            let mut accepted = Box::pin(self.look_up(copies)).await;
            accepted.iter_mut().for_each(|copy| copy.record = copy.record.take().or_else(|| outcome.clone()));
            self.start(accepted);
        }
    }

    /// Runs the block in its turn; the broker gets back what may not start, or was cut off.
    async fn execute(
        &self,
        mut arrival: Box<Arrival>,
        expected: Expected,
        turn: Turn<'_>,
        cancelled: impl Future<Output = Fault>,
    ) {
        let Turn { slot, isolation: _isolation, unit } = turn;
        arrival.delivery.started();
        self.deaths.begins(&DeliveryId::of(&arrival.delivery)).await;
        let begun = Instant::now();
        failpoint::reach(Point::SlotTaken).await;
        let queued = arrival.delivery.received().elapsed();
        let cpu_time = CpuTime::new(self.settings.max_cpu_time);
        let limits = Limits { cpu_time: cpu_time.clone(), max_output_bytes: self.largest_output() };
        let may_start = || !arrival.delivery.is_lapsed() && !self.is_cut_off();
        arrival.delivery.must_end_by(Some(Instant::now() + arrival.assignment.timeout + GRACE));
        let span = telemetry::execute_span(&arrival.span, &self.span_ids(&arrival.assignment));
        let links = Links {
            trace: telemetry::context_of(&span).or_else(|| arrival.trace.clone()),
            sink: report::stream::sink(&self.broker, &arrival.assignment, arrival.trace.as_ref()),
        };
        let work = execute::execute(&self.engine, &arrival.assignment, limits, links, may_start, cancelled)
            .instrument(span.clone());
        let ended = tokio::select! {
            ended = work => ended,
            () = self.cut.cancelled(), if self.hands_back() => Ended::Abandoned,
        };
        drop((slot, unit));
        self.count_cpu_time(&arrival.assignment.key.tenant, cpu_time);
        arrival.delivery.must_end_by(None);
        self.load.flow(arrival.delivery.source()).finished(begun.elapsed());
        if matches!(&ended, Ended::Executed(execution) if execution.outcome.is_err()) {
            [&span, &arrival.span].into_iter().for_each(telemetry::mark_failed);
        }
        match ended {
            Ended::Executed(execution) => self.finish(arrival, expected, queued, execution).await,
            Ended::Abandoned => self.hand_back(arrival.delivery).await,
        }
    }

    /// Whether the broker gives to another worker what this one does not do. In core mode it has forgotten it: then what is
    /// accepted is done here, or the Router is told to send it again.
    pub(crate) fn hands_back(&self) -> bool {
        self.settings.mode == Mode::JetStream
    }

    /// Gives a delivery to another worker. Nobody has died of it: where that could be thought, it is noted.
    async fn hand_back(&self, delivery: Delivery) {
        let which = DeliveryId::of(&delivery);
        if delivery.is_lapsed() {
            self.deaths.lapsed(which);
        } else if which.delivered == 1 || delivery.has_begun() {
            self.deaths.handed_back(&which).await;
        }
        delivery.settle(Settlement::HandBack).await;
    }

    /// Gives a delivery back that may not run before so much time has passed, unless it is not wanted any more. What runs
    /// here under the same id knows what stands.
    async fn put_off(self: Arc<Self>, (delivery, assignment, wait): (Delivery, Assignment, Duration)) {
        let key = &assignment.key;
        if !self.in_flight.has(key)
            && let Some(cancelled) = self.standing_cancel(&delivery, key).await
        {
            return Box::pin(self.end_cancelled(delivery, assignment, cancelled)).await;
        }
        if delivery.delivered() == 1 {
            self.deaths.handed_back(&DeliveryId::of(&delivery)).await;
        }
        delivery.settle(Settlement::PutOff(wait.clamp(PUT_OFF_LEAST, PUT_OFF_MOST))).await;
    }

    /// Outcome recorded, dead letter kept, result published, delivery settled, in this order.
    async fn finish(&self, mut arrival: Box<Arrival>, expected: Expected, queued: Duration, execution: Execution) {
        let Arrival { delivery, assignment, memory, .. } = &mut *arrival;
        if delivery.is_lapsed() && Box::pin(self.may_be_answered_already(delivery.published())).await {
            tracing::warn!(assignment_id = %assignment.key.assignment_id, "discarded a late outcome");
            return self.hand_back(arrival.delivery).await;
        }
        let outcome = self.outcomes.token();
        let failed = execution.failed.clone();
        let mut step = StepResult::of(execution, assignment.block.kind(), queued);
        let result = self.encode(&mut step, assignment);
        let beyond = delivery.beyond_reserved(result.len());
        let _held = self.load.hold_bytes(beyond);
        if let Some(memory) = memory {
            memory.add(beyond);
        }
        let Arrival { delivery, assignment, .. } = &*arrival;
        failpoint::reach(Point::BeforeRecord).await;
        let recorded = self.record(&arrival, expected, &mut step, result).await;
        // Where there is a record, whoever is given the delivery again does the rest.
        let _outcome = (!self.ledger.is_kept()).then_some(outcome);
        match recorded {
            Recorded::Ours(result) => {
                failpoint::reach(Point::AfterRecord).await;
                if let Some(fault) = self.due_letter(&step) {
                    let keeping = self.keep_failure(&arrival, fault, &failed);
                    Box::pin(self.spooled(|| self.unrecorded(delivery, &assignment.key, &result), keeping)).await;
                }
                self.note_outcome(assignment, &step);
                self.publish(arrival, result).await;
            }
            Recorded::Theirs(record) => {
                tracing::info!(assignment_id = %assignment.key.assignment_id, "superseded by a recorded outcome");
                Box::pin(self.answer(arrival, record)).await;
            }
        }
    }

    /// Repeats a recorded outcome, and its dead letter where whoever recorded it may not have come to write it.
    async fn answer(&self, arrival: Box<Arrival>, record: Record) {
        let Arrival { delivery, assignment, .. } = &*arrival;
        if record.publication.as_ref() == Some(delivery.publication())
            && let Some(fault) = record.dead_letter(self.settings.letters)
        {
            let addressee = assignment.addressee();
            failpoint::reach(Point::BeforeDeadLetter).await;
            let came = delivery.into();
            self.until_definite(|| self.dead_letters.rewrite(&came, &addressee, fault)).await;
            failpoint::reach(Point::AfterDeadLetter).await;
        }
        self.publish(arrival, record.result).await;
    }

    /// Settles the delivery once the broker has its result.
    async fn publish(&self, arrival: Box<Arrival>, result: Bytes) {
        let Arrival { delivery, assignment, said, memory: _memory, trace, span, .. } = *arrival;
        let publish = telemetry::publish_span(&span, &self.span_ids(&assignment));
        let id = self.result_id(delivery.publication());
        if id.is_some() {
            self.in_flight.ended(&assignment.key, delivery.publication(), &result);
        }
        failpoint::reach(Point::BeforeResult).await;
        let before = self.before(said.as_ref(), &assignment);
        let publishing = pin!(self.outbox.publish(result.clone(), before, id, trace));
        let unrecorded = || self.unrecorded(&delivery, &assignment.key, &result);
        self.spooled(unrecorded, publishing.instrument(publish)).await;
        failpoint::reach(Point::AfterResult).await;
        delivery.settle(Settlement::Done).await;
        failpoint::reach(Point::AfterSettle).await;
    }

    /// What names a result that no record does.
    fn result_id(&self, publication: &Publication) -> Option<String> {
        (!self.ledger.is_kept()).then(|| publication.to_header())
    }

    /// Whether the broker keeps anything.
    pub(crate) fn has_jetstream(&self) -> bool {
        self.streams.borrow().has_jetstream
    }

    /// Returns when the broker keeps something.
    pub(crate) async fn jetstream(&self) {
        let _ = self.streams.clone().wait_for(|ready| ready.has_jetstream).await;
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

    fn span_ids<'a>(&'a self, assignment: &'a Assignment) -> SpanIds<'a> {
        SpanIds {
            tenant_id: Some(assignment.key.tenant.as_str()),
            trace_id: assignment.correlation.trace_id.as_deref(),
            run_id: assignment.correlation.run_id.as_deref(),
            block_type: Some(assignment.block.kind().as_str()),
            worker_id: &self.identity.worker_id,
        }
    }

    fn note_outcome(&self, assignment: &Assignment, step: &StepResult) {
        let kind = assignment.block.kind();
        self.metrics.finished(kind, step.status, step.latency);
        let tenant = &assignment.key.tenant;
        self.metrics.tenant_executed(self.gate.policy().label(tenant));
        self.tallies.executed(tenant);
        (0..step.retries_used()).for_each(|_| self.metrics.retried(kind));
        tracing::info!(
            assignment_id = %assignment.key.assignment_id,
            tenant_id = assignment.key.tenant.as_str(),
            trace_id = assignment.correlation.trace_id,
            run_id = assignment.correlation.run_id,
            block_type = kind.as_str(),
            status = step.status.as_str(),
            code = step.error_code(),
            latency_ms = contract::millis(step.latency),
            retries_used = step.retries_used(),
            "Step execution completed"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn future_of<A, B, F>(_: impl FnOnce(A, B) -> F) -> usize {
        size_of::<F>()
    }

    /// Each waiting assignment has one of both: what its steps need besides has to be in places of their own.
    #[test]
    fn what_waits_for_its_turn_is_small() {
        let waiting = [future_of(Pipeline::carry_out), size_of::<Arrival>()];
        assert!(
            waiting.iter().zip([1100, 768]).all(|(bytes, most)| *bytes <= most),
            "bytes: {waiting:?}; `make bench` measures what comes of it"
        );
    }
}
