//! What the broker says about each pool: one small task for each, which looks every two seconds and asks for a
//! reconcile only when the answer changed.
//!
//! It also keeps the streams, since the same connection does both. An unreadable queue is not an empty one: the last
//! numbers stay, marked as old.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::jetstream::Context;
use async_nats::jetstream::context::ConsumerInfoErrorKind;
use async_nats::jetstream::stream::Info;
use beamline_crds::Queue;
use futures::TryStreamExt;
use futures::channel::mpsc::{UnboundedReceiver, UnboundedSender, unbounded};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::runtime::reflector::{ObjectRef, Store};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::broker::{BrokerError, Brokers, Shared};
use crate::controller::Watched;
use crate::memory::Memory;
use crate::pool::{Nats, ValidPool};
use crate::scale::Decisions;
use crate::streams::{self, DEAD_LETTER_SUBJECT, DEAD_LETTERS};

/// How often a healthy broker is asked.
const POLL: Duration = Duration::from_secs(2);
/// How often a broker that does not answer is tried.
const RETRY: Duration = Duration::from_secs(5);
/// How long a connection is used before its Secrets are read again.
const SECRETS_AGE: Duration = Duration::from_secs(60);

/// What the broker said about a pool; `None` where it was not asked yet.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reading {
    /// The queue when it was last readable.
    pub queue: Option<Queue>,
    /// Whether it is readable now.
    pub readable: Option<Result<(), BrokerError>>,
    /// Whether the streams and the consumer are as they must be.
    pub streams: Option<Result<(), BrokerError>>,
}

/// What is asked for a pool.
#[derive(Clone, Debug, PartialEq)]
struct Question {
    namespace: String,
    nats: Nats,
    max_ack_pending: i64,
}

struct Followed {
    question: watch::Sender<Question>,
    reading: Arc<Mutex<Reading>>,
}

/// The tasks of all pools, and what they last heard.
pub struct Signals {
    brokers: Brokers,
    pools: Store<Watched>,
    memory: Arc<Memory>,
    followed: Mutex<HashMap<ObjectRef<Watched>, Followed>>,
    changed: UnboundedSender<ObjectRef<Watched>>,
}

impl Signals {
    /// No pool is followed yet. The stream names each pool whose reading changed.
    pub fn new(
        brokers: Brokers,
        pools: Store<Watched>,
        memory: Arc<Memory>,
    ) -> (Arc<Self>, UnboundedReceiver<ObjectRef<Watched>>) {
        let (changed, changes) = unbounded();
        (Arc::new(Self { brokers, pools, memory, followed: Mutex::default(), changed }), changes)
    }

    /// What was last heard about a pool.
    pub fn reading(&self, pool: &ObjectRef<Watched>) -> Reading {
        let followed = self.followed.lock().unwrap_or_else(PoisonError::into_inner);
        followed.get(pool).map(|followed| lock(&followed.reading).clone()).unwrap_or_default()
    }

    /// Keeps asking about this pool until it is gone; takes over what changed in it.
    pub fn follow(self: &Arc<Self>, pool: &ValidPool, decisions: &Decisions) {
        let reference = ObjectRef::new(&pool.name).within(&pool.namespace);
        let question = Question {
            namespace: pool.namespace.clone(),
            nats: pool.nats.clone(),
            max_ack_pending: streams::max_ack_pending(decisions.general.desired, pool.general.slots.total()),
        };
        let mut all = self.followed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(followed) = all.get(&reference) {
            followed.question.send_if_modified(|current| {
                let differs = *current != question;
                *current = question;
                differs
            });
            return;
        }
        let (sender, receiver) = watch::channel(question);
        let reading = Arc::<Mutex<Reading>>::default();
        tokio::spawn(Arc::clone(self).listen(reference.clone(), receiver, Arc::clone(&reading)));
        all.insert(reference, Followed { question: sender, reading });
    }

    async fn listen(
        self: Arc<Self>,
        pool: ObjectRef<Watched>,
        mut question: watch::Receiver<Question>,
        reading: Arc<Mutex<Reading>>,
    ) {
        let mut line = Line::default();
        while self.pools.get(&pool).is_some() {
            let asked = question.borrow_and_update().clone();
            let pause = match self.ask(&asked, &mut line).await {
                Ok(answer) => self.heard(&pool, &reading, answer),
                Err(error) => self.unheard(&pool, &reading, &error),
            };
            // A changed question is asked at once; the sender lives as long as this pool is followed.
            let _ = tokio::time::timeout(pause, question.changed()).await;
        }
        self.forget(&pool);
    }

    async fn ask(&self, question: &Question, line: &mut Line) -> Result<Answer, BrokerError> {
        let shared = line.open(&self.brokers, question).await?;
        let Some(broker) = shared.get() else {
            return Err(BrokerError::Unreachable { url: question.nats.url.clone(), why: "not connected".to_owned() });
        };
        let jetstream = broker.jetstream()?;
        let streams = streams::ensure(jetstream, &question.nats, question.max_ack_pending).await;
        Ok(Answer {
            streams: streams.map_err(|error| self.naming_the_pool(error, question)),
            queue: queue(jetstream, &question.nats).await,
        })
    }

    /// A subject that is taken is usually taken by another pool of ours.
    fn naming_the_pool(&self, error: BrokerError, question: &Question) -> BrokerError {
        let BrokerError::Taken { subject, group, pool: None } = error else { return error };
        let all = self.followed.lock().unwrap_or_else(PoisonError::into_inner);
        let has_it = |followed: &Followed| {
            let Nats { url, subject, queue_group, .. } = &followed.question.borrow().nats;
            (url, subject, queue_group) == (&question.nats.url, &question.nats.subject, &group)
        };
        // Several may share it. The sentence must not change from one time to the next.
        let pool = all
            .iter()
            .filter(|(_, followed)| has_it(followed))
            .map(|(pool, _)| format!("{}/{}", pool.namespace.as_deref().unwrap_or_default(), pool.name))
            .min();
        BrokerError::Taken { subject, group, pool }
    }

    fn heard(&self, pool: &ObjectRef<Watched>, reading: &Mutex<Reading>, answer: Answer) -> Duration {
        let pause = if answer.queue.is_ok() { POLL } else { RETRY };
        self.update(pool, reading, |reading| {
            reading.streams = Some(answer.streams);
            reading.readable = Some(answer.queue.as_ref().map(|_| ()).map_err(Clone::clone));
            reading.queue = answer.queue.ok().or_else(|| reading.queue.take());
        });
        pause
    }

    fn unheard(&self, pool: &ObjectRef<Watched>, reading: &Mutex<Reading>, error: &BrokerError) -> Duration {
        self.update(pool, reading, |reading| {
            reading.readable = Some(Err(error.clone()));
            // Streams that were found in order are still taken to be: nothing says otherwise.
            if !matches!(reading.streams, Some(Ok(()))) {
                reading.streams = Some(Err(error.clone()));
            }
        });
        RETRY
    }

    fn update(&self, pool: &ObjectRef<Watched>, reading: &Mutex<Reading>, change: impl FnOnce(&mut Reading)) {
        let mut reading = lock(reading);
        let before = reading.clone();
        change(&mut reading);
        if *reading != before {
            // The receiver is gone only when the operator is about to be.
            let _ = self.changed.unbounded_send(pool.clone());
        }
    }

    fn forget(&self, pool: &ObjectRef<Watched>) {
        self.followed.lock().unwrap_or_else(PoisonError::into_inner).remove(pool);
        self.memory.forget(pool);
    }
}

fn lock(reading: &Mutex<Reading>) -> std::sync::MutexGuard<'_, Reading> {
    reading.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Answer {
    streams: Result<(), BrokerError>,
    queue: Result<Queue, BrokerError>,
}

/// The connection that a task uses, and since when.
#[derive(Default)]
struct Line {
    current: Option<(Shared, Nats, Instant)>,
}

impl Line {
    async fn open(&mut self, brokers: &Brokers, question: &Question) -> Result<Shared, BrokerError> {
        if let Some((shared, nats, since)) = &self.current
            && *nats == question.nats
            && since.elapsed() < SECRETS_AGE
        {
            return Ok(Arc::clone(shared));
        }
        let shared = brokers.connection(&question.namespace, &question.nats).await?;
        self.current = Some((Arc::clone(&shared), question.nats.clone(), Instant::now()));
        Ok(shared)
    }
}

async fn queue(jetstream: &Context, nats: &Nats) -> Result<Queue, BrokerError> {
    let (stream_name, group) = (streams::intake_stream(&nats.subject), &nats.queue_group);
    let stream = jetstream.get_stream(&stream_name).await.map_err(|error| match error.kind() {
        kind if streams::is_missing(&kind) => BrokerError::Missing { what: format!("stream {stream_name}") },
        _ => BrokerError::unanswered(format!("for stream {stream_name}"), &error),
    })?;
    let consumer = stream.consumer_info(group).await.map_err(|error| {
        let what = format!("consumer {group} of stream {stream_name}");
        match error.kind() {
            ConsumerInfoErrorKind::NotFound => BrokerError::Missing { what },
            _ => BrokerError::unanswered(format!("for {what}"), &error),
        }
    })?;
    let pending = i64::try_from(consumer.num_pending).unwrap_or(i64::MAX);
    let in_flight = i64::try_from(consumer.num_ack_pending).unwrap_or(i64::MAX);
    let depth = pending.saturating_add(in_flight);
    Ok(Queue {
        depth,
        pending,
        in_flight,
        oldest_since: (depth > 0).then(|| oldest(stream.cached_info())).flatten(),
        dead_letters: dead_letters(jetstream).await?,
        ..Queue::default()
    })
}

/// A work-queue stream keeps nothing that is finished, so that its first message is the oldest unfinished one.
fn oldest(intake: &Info) -> Option<Time> {
    if intake.state.messages == 0 {
        return None;
    }
    jiff::Timestamp::from_second(intake.state.first_timestamp.unix_timestamp()).ok().map(Time)
}

async fn dead_letters(jetstream: &Context) -> Result<i64, BrokerError> {
    let unanswered =
        |error: &dyn std::error::Error| BrokerError::unanswered(format!("for stream {DEAD_LETTERS}"), error);
    let stream = jetstream.get_stream_no_info(DEAD_LETTERS).await.map_err(|error| unanswered(&error))?;
    let counts = stream.info_with_subjects(DEAD_LETTER_SUBJECT).await.map_err(|error| unanswered(&error))?;
    let counts: Vec<(String, usize)> = counts.try_collect().await.map_err(|error| unanswered(&error))?;
    Ok(counts.into_iter().map(|(_, count)| i64::try_from(count).unwrap_or(i64::MAX)).sum())
}
