//! Looks after the streams, buckets and consumers that the contract needs. Creates what is missing; never alters or
//! deletes.

mod compare; // whether what is there will do
mod wanted; // how each must be

use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use async_nats::RequestErrorKind;
use async_nats::datetime::DateTime;
use async_nats::jetstream::consumer::{self, pull};
use async_nats::jetstream::context::{
    ConsumerInfoError, ConsumerInfoErrorKind, CreateStreamError, CreateStreamErrorKind, GetStreamErrorKind,
};
use async_nats::jetstream::stream::{Config, Stream};
use async_nats::jetstream::{self, ErrorCode};
use async_nats::{Message, StatusCode};
use bytes::Bytes;
use serde::Deserialize;
use tokio::sync::watch;

use super::Broker;
use super::version::{self, Version};
use crate::health::{Concern, Health};

pub use wanted::{
    ACK_WAIT, ANSWER_BUCKET, APPROVAL_BUCKET, ASSIGN_STREAM, CANCEL_BUCKET, CONTROL_CONSUMER, CONTROL_STREAM,
    DELIVERY_BUCKET, DLQ_STREAM, Intake, PARKED_STREAM, QUOTA_BUCKET, RESULT_STREAM, assignments, buckets, consumer,
    control, control_consumer, dead_letters, parked, parked_consumer, results, route_consumer,
};

/// Between two looks at streams that are missing or cannot be asked for.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Between two looks when nothing seems wrong, for what an idle worker would not miss: a dozen small requests.
const LOOK_ANYWAY: Duration = Duration::from_secs(5);
/// Between two looks for JetStream where there was none: one request.
const LOOK_FOR_JETSTREAM: Duration = Duration::from_secs(3);
/// Between two looks for the route, on a worker that only passes work on to it: one request.
const LOOK_FOR_ROUTE: Duration = Duration::from_secs(3);

/// How long a payload is that is not handed out with its headers.
const PAYLOAD_SIZE: &str = "Nats-Msg-Size";

/// The places that a pool's deliveries come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// What the Router publishes.
    Intake,
    /// What waits for workers with GPU slots.
    GpuRoute,
    /// What has come in before and could not run then, in a stream of its own.
    Parked(Parked),
}

/// Which workers parked work waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parked {
    /// Those with slots for work that needs no accelerator.
    General,
    /// Those with GPU slots.
    Gpu,
}

/// Which of them a worker pulls from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sources {
    /// It has slots for work that needs no accelerator.
    pub intake: bool,
    /// It has GPU slots.
    pub gpu_route: bool,
}

/// How assignments come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Through a stream: each at least once, whoever dies.
    JetStream,
    /// Through a queue group of core NATS: each at most once.
    Core,
}

impl Mode {
    /// The public word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::JetStream => "jetstream",
            Self::Core => "core",
        }
    }
}

/// What was found of what this worker needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ready {
    /// Whether the broker keeps anything; only core mode goes on without that.
    pub has_jetstream: bool,
    /// Where assignments wait; in core mode nowhere.
    pub assignments: Option<Assignments>,
}

/// Where assignments are pulled from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignments {
    /// The stream that they wait in.
    pub stream: String,
    /// When that stream was made, RFC 3339: with a sequence it names a publication for ever.
    pub created: String,
    /// The durable consumer that hands them out.
    pub consumer: Outlet,
    /// The durable consumer of the GPU route, where there is that route.
    pub route: Option<Outlet>,
    /// The stream of what may not run yet.
    pub parked: ParkedWork,
}

/// A durable consumer that workers share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outlet {
    /// What it is called.
    pub name: String,
    /// What may be asked of it; `None` while it hands out nothing of use.
    pub limits: Option<Limits>,
}

/// What may be asked of a consumer with one pull.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// The most messages.
    pub batch: Option<usize>,
    /// The longest wait for them.
    pub expires: Option<Duration>,
}

impl Limits {
    /// As they are set; 0 is none.
    pub fn of(config: &consumer::Config) -> Self {
        let batch = usize::try_from(config.max_batch).ok().filter(|batch| *batch > 0);
        Self { batch, expires: Some(config.max_expires).filter(|expires| !expires.is_zero()) }
    }

    /// So many messages, or as many of them as may be.
    pub fn batch(self, wanted: usize) -> usize {
        self.batch.map_or(wanted, |most| most.min(wanted))
    }

    /// So long, or as long as may be.
    pub fn expires(self, wanted: Duration) -> Duration {
        self.expires.map_or(wanted, |longest| longest.min(wanted))
    }
}

/// Where work waits that may not run yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParkedWork {
    /// The stream that it waits in.
    pub stream: String,
    /// When that stream was made, RFC 3339.
    pub created: String,
    /// Whether there was none at the last look.
    pub is_empty: bool,
}

impl Ready {
    /// The consumer of the GPU route, where there is that route.
    pub fn route(&self) -> Option<&Outlet> {
        self.assignments.as_ref().and_then(|assignments| assignments.route.as_ref())
    }

    /// Nothing is asked of this consumer until it has been looked at again; whether something was.
    fn close(&mut self, consumer: &str) -> bool {
        let outlets = self.assignments.iter_mut().flat_map(|known| [Some(&mut known.consumer), known.route.as_mut()]);
        let closed =
            outlets.flatten().filter(|outlet| outlet.name == consumer).filter_map(|outlet| outlet.limits.take());
        closed.count() > 0
    }
}

impl Assignments {
    /// The consumer to pull from, where there is one for all tenants.
    pub fn consumer_of(&self, source: Source) -> Option<&Outlet> {
        match source {
            Source::Intake => Some(&self.consumer),
            Source::GpuRoute => self.route.as_ref(),
            Source::Parked(_) => None,
        }
    }
}

/// Looks after the streams for as long as the worker runs: they may vanish, or be made anew by somebody else.
#[derive(Debug)]
pub struct Keeper {
    broker: Broker,
    needs: Needs,
    ready: watch::Sender<Ready>,
}

/// What a worker needs of the broker.
#[derive(Clone, Debug)]
pub struct Needs {
    /// How assignments come in.
    pub mode: Mode,
    /// From where.
    pub intake: Intake,
    /// Which of its two places.
    pub sources: Sources,
    /// Whether what is missing is made.
    pub create: bool,
}

impl Keeper {
    /// Finds or makes the streams; waits for those that are missing, and says so in `health`.
    ///
    /// # Errors
    /// A mismatch, or a server that is too old: neither heals by waiting.
    pub async fn start(broker: Broker, needs: Needs, health: &Health) -> Result<Self, StreamsError> {
        let mut told = None;
        loop {
            match ensure(&broker, &needs, None).await {
                Ok(ready) => {
                    health.clear(Concern::StreamsUnavailable);
                    return Ok(Self { broker, needs, ready: watch::Sender::new(ready) });
                }
                Err(error @ (StreamsError::Mismatch { .. } | StreamsError::TooOld(_))) => return Err(error),
                Err(error) => tell(&error, &mut told, health),
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// What was found last.
    pub fn watch(&self) -> watch::Receiver<Ready> {
        self.ready.subscribe()
    }

    /// Looks again from time to time, and at once when something else has noticed that a stream is missing.
    pub async fn run(self, health: Health) {
        let (mut last, mut last_for_route) = (Instant::now(), Instant::now());
        let mut told = None;
        loop {
            tokio::time::sleep(LOOK_AGAIN).await;
            let is_urgent =
                [Concern::StreamsUnavailable, Concern::StorageRefused].map(|concern| health.is_raised(concern));
            let look_anyway = if self.ready.borrow().has_jetstream { LOOK_ANYWAY } else { LOOK_FOR_JETSTREAM };
            if !is_urgent.contains(&true) && last.elapsed() < look_anyway {
                if !self.needs.sources.gpu_route && last_for_route.elapsed() >= LOOK_FOR_ROUTE {
                    last_for_route = Instant::now();
                    self.look_for_route().await;
                }
                continue;
            }
            last = Instant::now();
            let known = self.ready.borrow().clone();
            match ensure(&self.broker, &self.needs, Some(known)).await {
                Ok(ready) => {
                    health.clear(Concern::StreamsUnavailable);
                    told = None;
                    self.ready.send_if_modified(|known| std::mem::replace(known, ready.clone()) != ready);
                }
                Err(StreamsError::Unavailable { .. }) if health.is_raised(Concern::NatsDisconnected) => {}
                Err(error) => {
                    if let StreamsError::Unusable { consumer, .. } = &error {
                        self.ready.send_if_modified(|known| known.close(consumer));
                    }
                    tell(&error, &mut told, &health);
                }
            }
        }
    }

    /// A route comes and goes with its consumer. What cannot be asked for stays as it was known last.
    async fn look_for_route(&self) {
        if self.needs.mode == Mode::Core {
            return;
        }
        let Ok(stream) = self.broker.jetstream().get_stream_no_info(self.needs.intake.stream()).await else { return };
        match find_route(&stream, &self.needs.intake).await {
            Ok(route) => {
                self.ready.send_if_modified(|known| match &mut known.assignments {
                    Some(known) => std::mem::replace(&mut known.route, route.clone()) != route,
                    None => false,
                });
            }
            Err(error) => tracing::debug!(%error, "cannot look for the GPU route"),
        }
    }
}

/// On `/readyz`, and once in the log.
fn tell(error: &StreamsError, told: &mut Option<String>, health: &Health) {
    let words = error.to_string();
    if told.as_ref() != Some(&words) {
        tracing::warn!(error = words, "the streams are not as they must be");
        *told = Some(words.clone());
    }
    health.raise(Concern::StreamsUnavailable, words);
}

/// Why the worker cannot use what is there.
#[derive(Debug, thiserror::Error)]
pub enum StreamsError {
    /// It exists with a setting that breaks the contract; nothing was changed.
    #[error("{what} has {differences}: change it, or let another name be used")]
    Mismatch {
        /// `stream X` or `consumer Y of stream X`.
        what: String,
        /// Every setting that differs: as it is, and as it must be.
        differences: String,
    },
    /// It keeps the contract, and hands out nothing that a worker could use until somebody changes it.
    #[error("{what} has {differences}: change it, or delete it and it is made anew")]
    Unusable {
        /// `consumer Y of stream X`.
        what: String,
        /// Its name alone.
        consumer: String,
        /// As of a mismatch.
        differences: String,
    },
    /// The server lacks what the contract rests on.
    #[error("nats-server {0} is too old: JetStream of nats-server {floor} or later is needed", floor = version::FLOOR)]
    TooOld(Version),
    /// It is missing and this worker was told not to create it.
    #[error("{0} does not exist (yet)")]
    Missing(String),
    /// The broker could not be asked; it may work later.
    #[error("cannot look at {what}: {reason}")]
    Unavailable {
        /// What was asked for.
        what: String,
        /// What the broker or the network said.
        reason: String,
    },
}

/// Finds or, where `create` says so, makes everything that this worker needs.
///
/// # Errors
/// See [`StreamsError`]; a mismatch never heals by waiting.
async fn ensure(broker: &Broker, needs: &Needs, known: Option<Ready>) -> Result<Ready, StreamsError> {
    let (js, create) = (&broker.jetstream(), needs.create);
    if needs.mode == Mode::Core {
        // What has been there once is only away.
        let had_jetstream = known.is_some_and(|known| known.has_jetstream);
        if !had_jetstream && !has_jetstream(broker).await? {
            return Ok(Ready { has_jetstream: false, assignments: None });
        }
        check_version(broker)?;
        ensure_notes(js, create).await?;
        return Ok(Ready { has_jetstream: true, assignments: None });
    }
    check_version(broker)?;
    ensure_stream(js, results(), create).await?;
    ensure_notes(js, create).await?;
    let assignments = Some(ensure_assignments(js, needs, known).await?);
    Ok(Ready { has_jetstream: true, assignments })
}

/// What an older server lacks, it leaves out without a word.
fn check_version(broker: &Broker) -> Result<(), StreamsError> {
    match broker.version() {
        Some(version) if version < version::FLOOR => Err(StreamsError::TooOld(version)),
        _ => Ok(()),
    }
}

/// Dead letters, control messages, and what workers note for each other.
async fn ensure_notes(js: &jetstream::Context, create: bool) -> Result<(), StreamsError> {
    ensure_stream(js, dead_letters(), create).await?;
    for wanted in buckets() {
        ensure_stream(js, wanted, create).await?;
    }
    let stream = ensure_stream(js, control(), create).await?;
    ensure_consumer(&stream, control_consumer(), create).await.map(drop)
}

async fn ensure_assignments(
    js: &jetstream::Context,
    needs: &Needs,
    known: Option<Ready>,
) -> Result<Assignments, StreamsError> {
    let Needs { intake, sources, create, .. } = needs;
    let stream = ensure_stream(js, assignments(intake), *create).await?;
    let consumer = ensure_consumer(&stream, consumer(intake), *create).await?;
    let route = if sources.gpu_route {
        ensure_route(&stream, intake, *sources, *create).await?
    } else {
        // Whoever may not even look for it works without it.
        match find_route(&stream, intake).await {
            Ok(route) => route,
            Err(_) => known.and_then(|known| known.route().cloned()),
        }
    };
    let parked = ensure_stream(js, parked(intake), *create).await?;
    let (info, parked) = (stream.cached_info(), parked.cached_info());
    Ok(Assignments {
        stream: info.config.name.clone(),
        created: rfc3339(&info.created),
        consumer,
        route,
        parked: ParkedWork {
            stream: parked.config.name.clone(),
            created: rfc3339(&parked.created),
            is_empty: parked.state.messages == 0,
        },
    })
}

/// Whether the broker has JetStream for this account.
async fn has_jetstream(broker: &Broker) -> Result<bool, StreamsError> {
    #[derive(Deserialize)]
    struct Answer {
        error: Option<jetstream::Error>,
    }
    let answer = broker.client().request(format!("$JS.API.STREAM.INFO.{DLQ_STREAM}"), Bytes::new()).await;
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) if error.kind() == RequestErrorKind::NoResponders => return Ok(false),
        Err(error) => return Err(unavailable("JetStream", &error)),
    };
    let error = serde_json::from_slice(&answer.payload).ok().and_then(|answer: Answer| answer.error);
    let code = error.map(|error| error.error_code());
    Ok(!matches!(code, Some(ErrorCode::JETSTREAM_NOT_ENABLED | ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT)))
}

async fn ensure_stream(js: &jetstream::Context, wanted: Config, create: bool) -> Result<Stream, StreamsError> {
    let what = format!("stream {}", wanted.name);
    match js.get_stream(&wanted.name).await {
        Ok(stream) => {
            let found = &stream.cached_info().config;
            // Where an operator creates the streams, the pool says where they are kept.
            let wanted = if create { wanted } else { Config { storage: found.storage, ..wanted } };
            compare::stream(&what, found, &wanted)?;
            Ok(stream)
        }
        Err(error) if is_missing(&error.kind()) && create => {
            tracing::info!(stream = wanted.name, "creating a stream");
            let made = js.create_stream(wanted.clone()).await;
            made.map_err(|error| explain(&what, &error))?;
            js.get_stream(&wanted.name).await.map_err(|error| unavailable(&what, &error))
        }
        Err(error) if is_missing(&error.kind()) => Err(StreamsError::Missing(what)),
        Err(error) => Err(unavailable(&what, &error)),
    }
}

fn is_missing(kind: &GetStreamErrorKind) -> bool {
    matches!(kind, GetStreamErrorKind::JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND)
}

/// Another stream may already capture one of the subjects: the administrator has to choose, waiting does not help.
fn explain(what: &str, error: &CreateStreamError) -> StreamsError {
    let overlaps = |error: &jetstream::Error| error.error_code() == ErrorCode::STREAM_SUBJECT_OVERLAP;
    if matches!(error.kind(), CreateStreamErrorKind::JetStream(error) if overlaps(&error)) {
        return StreamsError::Mismatch {
            what: what.to_owned(),
            differences: "subjects that another stream captures already, but the contract needs them for itself"
                .to_owned(),
        };
    }
    unavailable(what, error)
}

/// Finds or makes the consumer of a tenant's parked work; what may be asked of it.
///
/// # Errors
/// See [`StreamsError`]: it is not as it must be, or cannot be looked at.
pub async fn ensure_parked_consumer(
    broker: &Broker,
    stream: &str,
    wanted: pull::Config,
) -> Result<Limits, StreamsError> {
    let found = broker.jetstream().get_stream_no_info(stream).await;
    let found = found.map_err(|error| unavailable(&format!("stream {stream}"), &error))?;
    match look_at_consumer(&found, stream, &wanted).await {
        Ok(Some(limits)) => Ok(limits),
        Ok(None) => make_consumer(&found, stream, wanted).await,
        Err(StreamsError::Mismatch { what, differences }) => {
            let consumer = wanted.durable_name.unwrap_or_default();
            Err(StreamsError::Unusable { what, consumer, differences })
        }
        Err(error) => Err(error),
    }
}

async fn ensure_consumer(stream: &Stream, wanted: pull::Config, create: bool) -> Result<Outlet, StreamsError> {
    let (name, of) = (wanted.durable_name.clone().unwrap_or_default(), &stream.cached_info().config.name);
    let limits = match look_at_consumer(stream, of, &wanted).await? {
        Some(limits) => limits,
        None if create => {
            tracing::info!(consumer = name, "creating a consumer");
            make_consumer(stream, of, wanted).await?
        }
        None => return Err(StreamsError::Missing(called(&name, of))),
    };
    Ok(Outlet { name, limits: Some(limits) })
}

/// What may be asked of it; `None` where there is no such consumer.
async fn look_at_consumer<I>(
    stream: &Stream<I>,
    of: &str,
    wanted: &pull::Config,
) -> Result<Option<Limits>, StreamsError> {
    let name = wanted.durable_name.as_deref().unwrap_or_default();
    let what = called(name, of);
    match stream.consumer_info(name).await {
        Ok(info) => {
            compare::consumer(&what, &info.config, wanted)?;
            compare::usable(&what, &info).map(Some)
        }
        Err(error) if is_no_consumer(&error) => Ok(None),
        Err(error) => Err(unavailable(&what, &error)),
    }
}

async fn make_consumer<I>(stream: &Stream<I>, of: &str, wanted: pull::Config) -> Result<Limits, StreamsError> {
    let what = called(wanted.durable_name.as_deref().unwrap_or_default(), of);
    let made = stream.create_consumer_strict(wanted).await;
    made.map(|_| Limits::default()).map_err(|error| unavailable(&what, &error))
}

fn called(consumer: &str, stream: &str) -> String {
    format!("consumer {consumer} of stream {stream}")
}

/// The route's consumer, for whoever pulls from it.
async fn ensure_route(
    stream: &Stream,
    intake: &Intake,
    sources: Sources,
    create: bool,
) -> Result<Option<Outlet>, StreamsError> {
    match ensure_consumer(stream, route_consumer(intake), create).await {
        // A pool may have no route; only a worker that has nothing else to pull from must wait for one.
        Err(StreamsError::Missing(_)) if sources.intake => Ok(None),
        ensured => ensured.map(Some),
    }
}

async fn find_route<I>(stream: &Stream<I>, intake: &Intake) -> Result<Option<Outlet>, StreamsError> {
    let name = intake.route_group();
    match stream.consumer_info(&name).await {
        // One with another filter would never hand out what is passed on.
        Ok(info) if info.config.filter_subject != intake.route_subject() => Ok(None),
        Ok(info) => Ok(Some(Outlet { name, limits: Some(Limits::of(&info.config)) })),
        Err(error) if is_no_consumer(&error) => Ok(None),
        Err(error) => Err(unavailable(&called(&name, &intake.stream()), &error)),
    }
}

/// Whether a consumer hands messages out without their payloads; where it cannot be asked, that is possible.
pub async fn withholds_payloads(broker: &Broker, stream: &str, consumer: &str) -> bool {
    let info = async { broker.jetstream().get_stream_no_info(stream).await.ok()?.consumer_info(consumer).await.ok() };
    info.await.is_none_or(|info| info.config.headers_only)
}

/// Whether a message may have had a payload that its consumer withholds: then a header says how long it is.
pub fn may_lack_its_payload(payload: &Bytes, headers: Option<&HeaderMap>) -> bool {
    payload.is_empty() && headers.is_some_and(|headers| headers.get(PAYLOAD_SIZE).is_some())
}

/// What the broker itself says of a pull. A publisher may have put a status on a message too; that has a reply subject.
pub fn status_of(message: &Message) -> Option<StatusCode> {
    message.status.filter(|_| message.reply.is_none())
}

fn is_no_consumer(error: &ConsumerInfoError) -> bool {
    matches!(error.kind(), ConsumerInfoErrorKind::NotFound)
}

fn unavailable(what: &str, error: &dyn std::error::Error) -> StreamsError {
    StreamsError::Unavailable { what: what.to_owned(), reason: error.to_string() }
}

fn rfc3339(time: &DateTime) -> String {
    let nanos = time.unix_timestamp_nanos();
    jiff::Timestamp::from_nanosecond(nanos).map_or_else(|_| nanos.to_string(), |time| time.to_string())
}
