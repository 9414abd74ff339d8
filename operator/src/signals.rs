//! What the broker and the workers say about each pool: one small task for each, which looks twice a second and asks for
//! a reconcile only when the answer changed. Where nothing waits, one question tells.
//!
//! It also keeps the streams, since the same connection does both. An unreadable queue is not an empty one: the last
//! numbers stay, marked as old.

pub mod queue; // the numbers
mod tenants; // and those of tenants

use std::any::Any;
use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use beamline_crds::Queue;
use futures::FutureExt;
use futures::channel::mpsc::{UnboundedReceiver, UnboundedSender, unbounded};
use kube::runtime::reflector::{ObjectRef, Store};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::broker::{Broker, Brokers, Rest, Shared, is_of_use};
use crate::error::BrokerError;
use crate::lock::lock;
use crate::memory::Memory;
use crate::pool::{Delivery, Kind, Nats, ValidPool};
use crate::rates::Ended;
use crate::reports::Crew;
use crate::scale::{Decisions, Flow};
use crate::streams::{self, Demand, Neighbours, Refusals, Remark};
use crate::telemetry::spans;
use crate::tenants::Tenants;
use crate::watched::Watched;

/// How often a healthy broker is asked how much waits: more workers are asked for within a second.
const POLL: Duration = Duration::from_millis(500);
/// How often a broker that does not answer is tried.
const RETRY: Duration = Duration::from_secs(5);
/// How long a connection is used before its Secrets are read again.
const SECRETS_AGE: Duration = Duration::from_secs(60);

/// How long a broker may take to answer all that is asked at once: one that answers forever is left, too.
const ASKED: Duration = Duration::from_secs(60);

/// Who was told to go on so lately may be at work already, and what it said before is no news.
const GOES_ON: Duration = Duration::from_secs(5);

/// How often streams that were in order are looked at again.
const STREAMS_AGE: Duration = Duration::from_secs(10);

/// What the broker said about a pool; `None` where it was not asked yet.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reading {
    /// The queue when it was last readable.
    pub queue: Option<Queue>,
    /// What came into it lately, and what has left it.
    pub arrived: Arrived,
    /// The GPU route when it was last readable.
    pub route: Option<Route>,
    /// Cancels, answers and approvals past their deadline; `None` where they are not known.
    pub due: Option<i64>,
    /// What tenants do and use; `None` where that is not known.
    pub tenants: Option<Tenants>,
    /// The workers without GPUs of their own, as they were heard a moment ago.
    pub general: Crew,
    /// The workers with GPUs.
    pub gpu: Crew,
    /// Whether there is a queue, and whether it is readable now.
    pub readable: Option<Result<Readable, BrokerError>>,
    /// Whether streams and consumers are as they must be, with what is worth saying when they are.
    pub streams: Option<Result<Vec<Remark>, BrokerError>>,
}

/// Whose numbers a queue's are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readable {
    /// The pool's own.
    Own,
    /// Of these pools too, by namespace/name.
    Shared(Vec<String>),
    /// Nobody's: a core queue group keeps nothing.
    NoQueue,
}

/// What came into a queue, and what has left it: it changes with every look.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Arrived {
    /// Within seconds.
    pub recently: Flow,
    /// Within half a minute.
    pub lately: Flow,
    /// All that has ended.
    pub ended: Ended,
}

/// The work that waits for GPU slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// That no worker has taken yet.
    pub pending: i64,
    /// That workers hold.
    pub in_flight: i64,
}

impl Reading {
    /// Whether work is on the GPU route. Where it cannot be read, there may be.
    fn may_have_gpu_work(&self) -> bool {
        match &self.readable {
            Some(Ok(Readable::NoQueue)) => false,
            Some(Ok(_)) => self.route.is_some_and(|route| route.pending > 0 || route.in_flight > 0),
            Some(Err(_)) | None => true,
        }
    }
}

struct Followed {
    demand: watch::Sender<Demand>,
    reading: Arc<Mutex<Reading>>,
    line: Arc<Mutex<Option<Shared>>>,
    /// When workers were told to go on.
    gone_on: HashMap<String, Instant>,
}

impl Followed {
    fn reading(&self) -> Reading {
        let mut reading = lock(&self.reading).clone();
        for worker in reading.general.workers.iter_mut().chain(&mut reading.gpu.workers) {
            let since = self.gone_on.get(&worker.name);
            worker.has_stopped &= since.is_none_or(|since| since.elapsed() >= GOES_ON);
        }
        reading
    }
}

/// The tasks of all pools, and what they last heard.
pub struct Signals {
    brokers: Brokers,
    pools: Store<Watched>,
    neighbours: Neighbours,
    memory: Arc<Memory>,
    followed: Mutex<HashMap<ObjectRef<Watched>, Followed>>,
    changed: UnboundedSender<ObjectRef<Watched>>,
    since: Instant,
}

impl Signals {
    /// No pool is followed yet. The stream names each pool whose reading changed.
    pub fn new(
        brokers: Brokers,
        pools: Store<Watched>,
        neighbours: Neighbours,
        memory: Arc<Memory>,
    ) -> (Arc<Self>, UnboundedReceiver<ObjectRef<Watched>>) {
        let (changed, changes) = unbounded();
        let (followed, since) = (Mutex::default(), Instant::now());
        (Arc::new(Self { brokers, pools, neighbours, memory, followed, changed, since }), changes)
    }

    /// What was last heard about a pool.
    pub fn reading(&self, pool: &ObjectRef<Watched>) -> Reading {
        let followed = lock(&self.followed);
        followed.get(pool).map(Followed::reading).unwrap_or_default()
    }

    /// Whether a pool that asks for no GPU slots had some, and work is left for them that nobody else takes.
    pub fn needs_gpus_still(&self, pool: &ValidPool) -> bool {
        if pool.classes().any(|class| class.slots.gpu > 0) {
            return false;
        }
        let followed = lock(&self.followed);
        // One that is not followed yet has not been asked about.
        followed.get(&ObjectRef::new(&pool.name).within(&pool.namespace)).is_none_or(|followed| {
            lock(&followed.reading).may_have_gpu_work() && !self.neighbours.take_gpu_work(&followed.demand.borrow())
        })
    }

    /// Keeps asking about this pool until it is gone; takes over what changed in it.
    pub fn follow(self: &Arc<Self>, pool: &ValidPool, decisions: &Decisions) {
        let reference = ObjectRef::new(&pool.name).within(&pool.namespace);
        let demand = Demand {
            namespace: pool.namespace.clone(),
            name: pool.name.clone(),
            nats: pool.nats.clone(),
            max_ack_pending: streams::max_ack_pending(pool, decisions),
            limits: pool.limits.clone(),
        };
        let mut all = lock(&self.followed);
        if let Some(followed) = all.get(&reference) {
            followed.demand.send_if_modified(|current| {
                let differs = *current != demand;
                *current = demand;
                differs
            });
            return;
        }
        let (sender, receiver) = watch::channel(demand);
        let reading = Arc::<Mutex<Reading>>::default();
        let line = Arc::<Mutex<Option<Shared>>>::default();
        tokio::spawn(Arc::clone(self).guarded(reference.clone(), receiver, Arc::clone(&reading), Arc::clone(&line)));
        all.insert(reference, Followed { demand: sender, reading, line, gone_on: HashMap::new() });
    }

    /// Tells workers of this pool to take work, or not to.
    pub async fn tell(&self, pool: &ObjectRef<Watched>, workers: &[String], pull: bool) {
        let shared = {
            let mut followed = lock(&self.followed);
            let Some(followed) = followed.get_mut(pool) else { return };
            followed.gone_on.retain(|_, since| since.elapsed() < GOES_ON);
            if pull {
                followed.gone_on.extend(workers.iter().map(|worker| (worker.clone(), Instant::now())));
            }
            lock(&followed.line).clone()
        };
        let Some(broker) = shared.as_ref().and_then(|shared| shared.get()) else { return };
        for worker in workers {
            broker.reports().tell(worker, pull).await;
        }
    }

    /// Listens until the pool is gone. A bug leaves nothing but an error that is read meanwhile, and a new start.
    async fn guarded(
        self: Arc<Self>,
        pool: ObjectRef<Watched>,
        mut demand: watch::Receiver<Demand>,
        reading: Arc<Mutex<Reading>>,
        shared: Arc<Mutex<Option<Shared>>>,
    ) {
        loop {
            let listen = self.listen(&pool, &mut demand, &reading, Arc::clone(&shared));
            let unwound: Result<(), Box<dyn Any + Send>> = AssertUnwindSafe(listen).catch_unwind().await;
            if unwound.is_ok() {
                return;
            }
            *lock(&shared) = None;
            let pause = self.unheard(&pool, &reading, &BrokerError::Panicked);
            tokio::time::sleep(pause).await;
        }
    }

    async fn listen(
        &self,
        pool: &ObjectRef<Watched>,
        demand: &mut watch::Receiver<Demand>,
        reading: &Mutex<Reading>,
        shared: Arc<Mutex<Option<Shared>>>,
    ) {
        let mut line = Line { shared, ..Line::default() };
        while !self.has_left(pool) {
            let asked = demand.borrow_and_update().clone();
            let answer = tokio::time::timeout(ASKED, self.ask(&asked, &mut line)).await;
            let slow =
                || BrokerError::Unanswered { what: "to the end".to_owned(), why: format!("not within {ASKED:?}") };
            let pause = match answer.unwrap_or_else(|_| Err(slow())) {
                Ok(answer) => self.heard(pool, reading, answer),
                Err(error) => {
                    line.hang_up();
                    self.unheard(pool, reading, &error)
                }
            };
            // A changed demand is looked at at once; the sender lives as long as this pool is followed.
            let _ = tokio::time::timeout_at(self.after(pause), demand.changed()).await;
        }
    }

    /// The moment in which all pools ask that have paused for as long, or a little less: what is asked together travels
    /// together, and costs each of them a fraction.
    fn after(&self, pause: Duration) -> Instant {
        let polls = (self.since.elapsed() + pause).as_millis() / POLL.as_millis();
        self.since + POLL.saturating_mul(u32::try_from(polls).unwrap_or(u32::MAX))
    }

    async fn ask(&self, demand: &Demand, line: &mut Line) -> Result<Answer, BrokerError> {
        let shared = line.open(&self.brokers, demand).await?;
        let Some(broker) = shared.get() else {
            return Err(BrokerError::Unreachable { url: demand.nats.url.clone(), why: "not connected".to_owned() });
        };
        let jetstream = broker.jetstream()?;
        if demand.nats.delivery == Delivery::Core && !broker.has_jetstream() {
            let (general, gpu) = crews(broker, demand);
            let (streams, queue, readable) = (Ok(Vec::new()), Ok(None), Readable::NoQueue);
            let tenants = tenants::read(broker, jetstream, demand, &mut line.tenants, [&general, &gpu]).await;
            return Ok(Answer { streams, queue, readable, due: None, tenants, general, gpu });
        }
        let sharing = self.neighbours.sharing(demand);
        let streams = match line.still_in_order(demand) {
            Some(remarks) => Ok(remarks),
            None => {
                let all = self.with_those_of(demand, &sharing);
                let span = spans::streams(&demand.namespace, &demand.name);
                let ensure = streams::ensure(jetstream, &all, &self.neighbours, &mut line.refusals);
                spans::within(span, BrokerError::reason, ensure).await
            }
        };
        let (queue, control) = match demand.nats.delivery {
            Delivery::Core => (Ok(None), None),
            Delivery::JetStream => match broker.rest().await {
                Ok(Rest { dead_letters, control }) => {
                    let queue = queue::read(jetstream, &demand.nats, &mut line.past, dead_letters).await;
                    (queue.map(Some), control)
                }
                Err(error) => (Err(error), None),
            },
        };
        line.found(demand, streams.as_ref().ok().filter(|_| queue.is_ok()));
        let due = control.zip(broker.due_approvals(&demand.pool())).map(|(control, due)| control.saturating_add(due));
        let (general, gpu) = crews(broker, demand);
        let tenants = tenants::read(broker, jetstream, demand, &mut line.tenants, [&general, &gpu]).await;
        let readable = match queue {
            Ok(None) => Readable::NoQueue,
            _ if sharing.is_empty() => Readable::Own,
            _ => Readable::Shared(sharing),
        };
        let streams = streams.map_err(|error| self.naming_the_pool(error, demand));
        Ok(Answer { streams, queue, readable, due, tenants, general, gpu })
    }

    /// The broker counts what the workers of all pools hold that take from one queue.
    fn with_those_of(&self, demand: &Demand, sharing: &[String]) -> Demand {
        let all = lock(&self.followed);
        let others = all.iter().filter(|(pool, _)| {
            let name = format!("{}/{}", pool.namespace.as_deref().unwrap_or_default(), pool.name);
            sharing.contains(&name)
        });
        let max_ack_pending =
            others.fold(demand.max_ack_pending, |sum, (_, other)| sum.plus(other.demand.borrow().max_ack_pending));
        Demand { max_ack_pending, ..demand.clone() }
    }

    /// A subject that is taken is usually taken by another pool of ours.
    fn naming_the_pool(&self, error: BrokerError, demand: &Demand) -> BrokerError {
        let BrokerError::Taken { subject, group, pool: None } = error else { return error };
        let pool = self.neighbours.holder(demand, &group);
        BrokerError::Taken { subject, group, pool }
    }

    fn heard(&self, pool: &ObjectRef<Watched>, reading: &Mutex<Reading>, answer: Answer) -> Duration {
        let pause = if answer.queue.is_ok() { POLL } else { RETRY };
        self.update(pool, reading, |reading| {
            reading.streams = Some(answer.streams);
            reading.readable = Some(answer.queue.as_ref().map(|_| answer.readable).map_err(Clone::clone));
            (reading.due, reading.general, reading.gpu) = (answer.due, answer.general, answer.gpu);
            reading.tenants = answer.tenants;
            match answer.queue {
                Ok(Some((queue, arrived, route))) => {
                    (reading.queue, reading.arrived, reading.route) = (Some(queue), arrived, route);
                }
                Ok(None) => (reading.queue, reading.route) = (None, None),
                Err(_) => {}
            }
        });
        pause
    }

    fn unheard(&self, pool: &ObjectRef<Watched>, reading: &Mutex<Reading>, error: &BrokerError) -> Duration {
        self.update(pool, reading, |reading| {
            reading.readable = Some(Err(error.clone()));
            // Who may be at work or not is not known any more.
            (reading.due, reading.tenants) = (None, None);
            reading.general.workers.clear();
            reading.gpu.workers.clear();
            // Streams that were found in order are still taken to be: nothing says otherwise.
            if !matches!(reading.streams, Some(Ok(_))) {
                reading.streams = Some(Err(error.clone()));
            }
        });
        RETRY
    }

    fn update(&self, pool: &ObjectRef<Watched>, reading: &Mutex<Reading>, change: impl FnOnce(&mut Reading)) {
        let mut reading = lock(reading);
        let before = reading.clone();
        change(&mut reading);
        // What came lately changes with every look. Where it matters, time is looked at anyway.
        if *reading != (Reading { arrived: reading.arrived, ..before }) {
            // The receiver is gone only when the operator is about to be.
            let _ = self.changed.unbounded_send(pool.clone());
        }
    }

    /// Whether the pool is gone, and with it what was kept of it. One that is made again by the same name is followed anew.
    fn has_left(&self, pool: &ObjectRef<Watched>) -> bool {
        let mut all = lock(&self.followed);
        if self.pools.get(pool).is_some() {
            return false;
        }
        all.remove(pool);
        self.memory.forget(pool);
        true
    }
}

struct Answer {
    streams: Result<Vec<Remark>, BrokerError>,
    queue: Result<Option<(Queue, Arrived, Option<Route>)>, BrokerError>,
    readable: Readable,
    due: Option<i64>,
    tenants: Option<Tenants>,
    general: Crew,
    gpu: Crew,
}

fn crews(broker: &Broker, demand: &Demand) -> (Crew, Crew) {
    let crew = |class| broker.reports().crew(&demand.pool(), class);
    (crew(Kind::General), crew(Kind::Gpu))
}

/// What the task of a pool keeps from one question to the next.
#[derive(Default)]
struct Line {
    current: Option<(Shared, Nats, Instant)>,
    /// The same connection, for whoever has something to tell.
    shared: Arc<Mutex<Option<Shared>>>,
    past: queue::Past,
    tenants: tenants::Past,
    in_order: Option<(Demand, Vec<Remark>, Instant)>,
    refusals: Refusals,
}

impl Line {
    async fn open(&mut self, brokers: &Brokers, demand: &Demand) -> Result<Shared, BrokerError> {
        if let Some((shared, nats, since)) = &self.current
            && *nats == demand.nats
            && since.elapsed() < SECRETS_AGE
            && is_of_use(shared)
        {
            return Ok(Arc::clone(shared));
        }
        self.past.is_over();
        self.tenants = tenants::Past::default();
        let shared = brokers.connection(&demand.namespace, &demand.nats).await?;
        self.current = Some((Arc::clone(&shared), demand.nats.clone(), Instant::now()));
        *lock(&self.shared) = Some(Arc::clone(&shared));
        Ok(shared)
    }

    /// The next question reads the Secrets again: they may have been rotated, and the old ones revoked.
    fn hang_up(&mut self) {
        self.current = None;
        *lock(&self.shared) = None;
    }

    /// What was remarked lately, when nothing was wrong and the same was asked.
    fn still_in_order(&self, demand: &Demand) -> Option<Vec<Remark>> {
        let (asked, remarks, since) = self.in_order.as_ref()?;
        (asked == demand && since.elapsed() < STREAMS_AGE).then(|| remarks.clone())
    }

    fn found(&mut self, demand: &Demand, remarks: Option<&Vec<Remark>>) {
        self.in_order = match (remarks, self.in_order.take()) {
            (None, _) => None,
            (Some(_), Some(known)) if known.0 == *demand && known.2.elapsed() < STREAMS_AGE => Some(known),
            (Some(remarks), _) => Some((demand.clone(), remarks.clone(), Instant::now())),
        };
    }
}
