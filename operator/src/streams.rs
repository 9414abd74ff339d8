//! The streams, buckets and consumers of a pool: what is missing is created, what exists is compared.
//!
//! Subjects, retention, storage, discard, `max_msgs_per_subject`, `allow_direct`, `no_ack`, `allow_msg_ttl` and the consumers'
//! filter, ack policy, `ack_wait` and `max_deliver` must match. Of what exists only `max_ack_pending` is altered, upwards, and what
//! a pool says about a stream that it [governs](governance). Nothing is deleted, but for the GPU route's consumer that no
//! pool needs any more.

pub mod governance; // whose word counts
mod neighbours; // other pools on the same broker
mod wanted; // what must be there

use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::consumer;
use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::context::{ConsumerInfoErrorKind, Context, GetStreamErrorKind};
use async_nats::jetstream::stream::{Config, ConsumerCreateStrictErrorKind, Stream};
use futures::TryStreamExt;

use crate::error::BrokerError;
use crate::failpoint;
use crate::pool::{Delivery, Limits, Nats};
use crate::reason;

pub use governance::Refusals;
use neighbours::GpuSlots;
pub use neighbours::{Neighbours, this_cluster};
use wanted::UNLIMITED;
pub use wanted::{
    ACCOUNTS, CONTROL, CONTROL_CONSUMER, DEAD_LETTER_SUBJECT, DEAD_LETTERS, MaxAckPending, RESULTS, account_subject,
    consumer, control_consumer, intake_stream, max_ack_pending, parked_stream, parked_subject, route_consumer,
    route_group, route_subject, streams, unescaped,
};

/// What a pool needs of the broker.
#[derive(Clone, Debug, PartialEq)]
pub struct Demand {
    /// Namespace of the pool.
    pub namespace: String,
    /// Name of the pool.
    pub name: String,
    /// Where its work comes from.
    pub nats: Nats,
    /// How many deliveries its workers may hold.
    pub max_ack_pending: MaxAckPending,
    /// What its tenants may use.
    pub limits: Limits,
}

impl Demand {
    /// As namespace/name.
    pub fn pool(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// What does no harm, and is worth saying.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remark {
    /// A stream has another setting than this pool says.
    Differs {
        /// Which stream.
        stream: String,
        /// The broker's name of the setting.
        field: &'static str,
        /// What it is.
        found: String,
        /// What the pool says.
        wanted: String,
        /// Why that is not done.
        why: String,
    },
    /// Work waits for GPU slots that no pool has any more.
    Stranded {
        /// Subject that it waits on.
        subject: String,
    },
}

impl Remark {
    /// Reason of a condition: a closed set.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Differs { .. } => reason::SETTINGS_DIFFER,
            Self::Stranded { .. } => reason::ROUTE_NOT_DRAINED,
        }
    }
}

impl std::fmt::Display for Remark {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Differs { stream, field, found, wanted, why } => {
                write!(formatter, "stream {stream}: {field} stays {found}, this pool says {wanted}: {why}")
            }
            Self::Stranded { subject } => write!(
                formatter,
                "work waits on {subject} for GPU slots, and no pool has any: set spec.gpu again, or purge that subject"
            ),
        }
    }
}

/// Creates what is missing, compares what exists, and alters what this pool may.
pub async fn ensure(
    jetstream: &Context,
    demand: &Demand,
    neighbours: &Neighbours,
    refusals: &mut Refusals,
) -> Result<Vec<Remark>, BrokerError> {
    let mut remarks = Vec::new();
    for wanted in streams(&demand.nats) {
        remarks.extend(ensure_stream(jetstream, wanted, demand, neighbours, refusals).await?);
    }
    ensure_consumer(jetstream, demand, neighbours, CONTROL, control_consumer()).await?;
    let intake = intake_stream(&demand.nats.subject);
    if demand.nats.delivery == Delivery::Core {
        return uncaptured(jetstream, demand, &intake).await.map(|()| remarks);
    }
    let MaxAckPending { intake: held, route } = demand.max_ack_pending;
    ensure_consumer(jetstream, demand, neighbours, &intake, consumer(&demand.nats, held)).await?;
    match route {
        Some(held) => {
            ensure_consumer(jetstream, demand, neighbours, &intake, route_consumer(&demand.nats, held)).await?;
        }
        None => remarks.extend(leave_route(jetstream, demand, neighbours, &intake).await?),
    }
    Ok(remarks)
}

async fn ensure_stream(
    jetstream: &Context,
    wanted: Config,
    demand: &Demand,
    neighbours: &Neighbours,
    refusals: &mut Refusals,
) -> Result<Vec<Remark>, BrokerError> {
    let name = wanted.name.clone();
    let met = |stream: &Stream| {
        if name == intake_stream(&demand.nats.subject) {
            neighbours.meets(demand, stream.cached_info().created.unix_timestamp_nanos());
        }
    };
    match jetstream.get_stream(&name).await {
        Ok(found) => {
            met(&found);
            let found = &found.cached_info().config;
            compare_stream(&wanted, found)?;
            Ok(governance::settle(jetstream, found, demand, neighbours, refusals).await)
        }
        Err(error) if is_missing(&error.kind()) => {
            if !demand.nats.streams.manage {
                return Err(BrokerError::Unmanaged { what: format!("stream {name}") });
            }
            let metadata = neighbours.mark(&demand.pool());
            let create = jetstream.create_stream(Config { metadata, ..wanted });
            let made = failpoint::around("create", "stream", &name, create)
                .await
                .map_err(|error| BrokerError::refused(format!("stream {name} cannot be created"), &error))?;
            met(&made);
            tracing::info!(stream = %name, "created the stream");
            Ok(Vec::new())
        }
        Err(error) => Err(BrokerError::unanswered(format!("for stream {name}"), &error)),
    }
}

/// Whether the broker answered, and said that there is no such stream.
pub(crate) fn is_missing(kind: &GetStreamErrorKind) -> bool {
    matches!(kind, GetStreamErrorKind::JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND)
}

async fn ensure_consumer(
    jetstream: &Context,
    demand: &Demand,
    neighbours: &Neighbours,
    stream: &str,
    wanted: pull::Config,
) -> Result<(), BrokerError> {
    let name = wanted.durable_name.clone().unwrap_or_default();
    let manage = demand.nats.streams.manage;
    let handle = handle(jetstream, stream).await?;
    match find_consumer(&handle, stream, &name).await? {
        Some(found) => {
            compare_consumer(stream, &wanted, &found.config)?;
            if manage && found.config.max_ack_pending < wanted.max_ack_pending {
                grow(jetstream, stream, found.config, wanted.max_ack_pending).await?;
            }
            Ok(())
        }
        None => {
            if !manage {
                return Err(BrokerError::Unmanaged { what: format!("consumer {name} of stream {stream}") });
            }
            let metadata = neighbours.mark(&demand.pool());
            create_consumer(&handle, stream, pull::Config { metadata, ..wanted }).await
        }
    }
}

/// The consumer of this name, if there is one.
pub(crate) async fn find_consumer<I>(
    handle: &Stream<I>,
    stream: &str,
    name: &str,
) -> Result<Option<consumer::Info>, BrokerError> {
    match handle.consumer_info(name).await {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == ConsumerInfoErrorKind::NotFound => Ok(None),
        Err(error) => Err(BrokerError::unanswered(format!("for consumer {name} of stream {stream}"), &error)),
    }
}

pub(crate) async fn handle(jetstream: &Context, stream: &str) -> Result<Stream<()>, BrokerError> {
    jetstream
        .get_stream_no_info(stream)
        .await
        .map_err(|error| BrokerError::unanswered(format!("for stream {stream}"), &error))
}

async fn create_consumer(handle: &Stream<()>, stream: &str, wanted: pull::Config) -> Result<(), BrokerError> {
    let name = wanted.durable_name.clone().unwrap_or_default();
    let subject = wanted.filter_subject.clone();
    let created = failpoint::around("create", "consumer", &name, handle.create_consumer_strict(wanted)).await;
    let Err(error) = created else {
        tracing::info!(%stream, consumer = %name, "created the consumer");
        return Ok(());
    };
    let rival = if is_not_unique(&error.kind()) { rival(handle, &subject).await } else { None };
    Err(match rival {
        Some(group) => BrokerError::Taken { subject, group, pool: None },
        None => BrokerError::refused(format!("consumer {name} of stream {stream} cannot be created"), &error),
    })
}

fn is_not_unique(kind: &ConsumerCreateStrictErrorKind) -> bool {
    matches!(kind, ConsumerCreateStrictErrorKind::JetStream(error)
        if error.error_code() == ErrorCode::CONSUMER_WQ_CONSUMER_NOT_UNIQUE)
}

/// The consumer that already takes this subject.
async fn rival(stream: &Stream<()>, subject: &str) -> Option<String> {
    let mut consumers = stream.consumers();
    while let Ok(Some(consumer)) = consumers.try_next().await {
        if consumer.config.filter_subject == subject || consumer.config.filter_subjects.iter().any(|it| it == subject) {
            return Some(consumer.name);
        }
    }
    None
}

async fn grow(
    jetstream: &Context,
    stream: &str,
    found: consumer::Config,
    max_ack_pending: i64,
) -> Result<(), BrokerError> {
    let name = found.durable_name.clone().unwrap_or_default();
    let grown = consumer::Config { max_ack_pending, ..found };
    let updated = jetstream.update_consumer_on_stream(grown, stream);
    failpoint::around("update", "consumer", &name, updated).await.map_err(|error| {
        BrokerError::refused(format!("max_ack_pending of consumer {name} of stream {stream} cannot be raised"), &error)
    })?;
    tracing::info!(%stream, consumer = %name, max_ack_pending, "raised max_ack_pending to the size of the pool");
    Ok(())
}

/// A pool without GPU slots: the route goes when it is drained, nobody pulls from it, and no other pool has any.
///
/// A worker that passes work on at this very moment stores it where nobody takes it: that is said, too.
async fn leave_route(
    jetstream: &Context,
    demand: &Demand,
    neighbours: &Neighbours,
    stream: &str,
) -> Result<Option<Remark>, BrokerError> {
    let group = route_group(&demand.nats);
    let handle = handle(jetstream, stream).await?;
    let found = find_consumer(&handle, stream, &group).await?;
    let others = neighbours.gpu_slots(demand);
    if others == GpuSlots::Some {
        return Ok(None);
    }
    let subject = route_subject(&demand.nats);
    let Some(found) = found else {
        let waits = messages(&handle, stream, &subject).await? > 0;
        return Ok(waits.then_some(Remark::Stranded { subject }));
    };
    // Made by a worker, or by hand: whoever made it may need it.
    let is_ours = demand.nats.streams.manage && neighbours.knows(&found.config.metadata);
    let is_drained = found.num_pending == 0 && found.num_ack_pending == 0;
    if is_ours && is_drained && found.num_waiting == 0 && others == GpuSlots::None {
        failpoint::around("delete", "consumer", &group, handle.delete_consumer(&group)).await.map_err(|error| {
            BrokerError::refused(format!("consumer {group} of stream {stream} cannot be deleted"), &error)
        })?;
        tracing::info!(%stream, consumer = %group, "deleted the GPU route's consumer: it is drained and no pool has GPU slots");
    }
    let waits = is_ours && found.num_pending > 0 && found.num_waiting == 0;
    Ok(waits.then_some(Remark::Stranded { subject }))
}

/// How many messages a stream keeps of a subject, which has no wildcards.
pub(crate) async fn messages<I>(stream: &Stream<I>, name: &str, subject: &str) -> Result<i64, BrokerError> {
    let unanswered = |error: &dyn std::error::Error| BrokerError::unanswered(format!("for stream {name}"), error);
    let mut counts = stream.info_with_subjects(subject).await.map_err(|error| unanswered(&error))?;
    // One subject has one count, however many pages a server says that there are.
    let count = counts.try_next().await.map_err(|error| unanswered(&error))?;
    Ok(count.map_or(0, |(_, count)| i64::try_from(count).unwrap_or(i64::MAX)))
}

/// Waiting, and held by workers.
pub(crate) fn counts(consumer: &consumer::Info) -> (i64, i64) {
    let number = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
    (number(consumer.num_pending), number(consumer.num_ack_pending as u64))
}

/// A stream that keeps what the queue group gets too would fill, and hand all of it out again some day.
async fn uncaptured(jetstream: &Context, demand: &Demand, intake: &str) -> Result<(), BrokerError> {
    match jetstream.get_stream(intake).await {
        Ok(_) => Err(BrokerError::Captured { subject: demand.nats.subject.clone(), stream: intake.to_owned() }),
        Err(error) if is_missing(&error.kind()) => Ok(()),
        Err(error) => Err(BrokerError::unanswered(format!("for stream {intake}"), &error)),
    }
}

fn compare_stream(wanted: &Config, found: &Config) -> Result<(), BrokerError> {
    let what = format!("stream {}", wanted.name);
    let sorted = |config: &Config| {
        let mut subjects = config.subjects.clone();
        subjects.sort();
        subjects
    };
    same(&what, "subjects", &sorted(wanted), &sorted(found))?;
    same(&what, "retention", &wanted.retention, &found.retention)?;
    same(&what, "storage", &wanted.storage, &found.storage)?;
    same(&what, "discard", &wanted.discard, &found.discard)?;
    let per_subject = |config: &Config| limit(config.max_messages_per_subject);
    same(&what, "max_msgs_per_subject", &per_subject(wanted), &per_subject(found))?;
    same(&what, "allow_direct", &wanted.allow_direct, &found.allow_direct)?;
    same(&what, "no_ack", &wanted.no_ack, &found.no_ack)?;
    same(&what, "allow_msg_ttl", &wanted.allow_message_ttl, &found.allow_message_ttl)
}

fn compare_consumer(stream: &str, wanted: &pull::Config, found: &consumer::Config) -> Result<(), BrokerError> {
    let what = format!("consumer {} of stream {stream}", wanted.durable_name.as_deref().unwrap_or_default());
    same(&what, "deliver_subject", &None, &found.deliver_subject)?;
    same(&what, "filter_subject", &wanted.filter_subject, &found.filter_subject)?;
    same(&what, "ack_policy", &wanted.ack_policy, &found.ack_policy)?;
    same(&what, "ack_wait", &wanted.ack_wait, &found.ack_wait)?;
    same(&what, "max_deliver", &limit(wanted.max_deliver), &limit(found.max_deliver))
}

/// The broker writes "no limit" as 0 or as any negative number.
fn limit(value: i64) -> i64 {
    if value <= 0 { UNLIMITED } else { value }
}

fn same<T: PartialEq + std::fmt::Debug>(
    what: &str,
    field: &'static str,
    wanted: &T,
    found: &T,
) -> Result<(), BrokerError> {
    if wanted == found {
        return Ok(());
    }
    Err(BrokerError::Mismatch {
        what: what.to_owned(),
        field,
        wanted: format!("{wanted:?}"),
        found: format!("{found:?}"),
    })
}

#[cfg(test)]
mod tests;
