//! The streams, buckets and consumers of a pool: what they must be, what is created, what is compared. Nothing here deletes,
//! and of what exists only `max_ack_pending` is ever altered, upwards.
//!
//! A worker that is started alone creates the same ones. Subjects, retention, storage, discard, `max_msgs_per_subject`,
//! `allow_direct`, `no_ack`, `allow_msg_ttl` and the consumers' filter, ack policy, `ack_wait` and `max_deliver` must match; replicas,
//! ages and sizes are the administrator's once a stream exists.

use std::time::Duration;

use async_nats::jetstream::consumer::{self, AckPolicy};
use async_nats::jetstream::context::{ConsumerInfoErrorKind, Context, GetStreamErrorKind};
use async_nats::jetstream::stream::{
    Config, ConsumerCreateStrictErrorKind, DiscardPolicy, RetentionPolicy, StorageType, Stream,
};
use async_nats::jetstream::{ErrorCode, consumer::pull};
use futures::TryStreamExt;

use crate::broker::BrokerError;
use crate::pool::{Nats, Storage};

/// The intake that needs no stream of its own.
const DEFAULT_SUBJECT: &str = "caf.exec.assign.v1";
/// One record for each assignment: the result, or the refusal.
pub const RESULTS: &str = "CAF_EXEC_RESULT";
/// What failed for good.
pub const DEAD_LETTERS: &str = "CAF_EXEC_DLQ";
/// Subject of the dead letters themselves; very large originals travel beside them.
pub const DEAD_LETTER_SUBJECT: &str = "caf.exec.dlq.v1";

/// Cancels and answers to approvals, of all pools.
const CONTROL: &str = "CAF_EXEC_CONTROL";
/// What all workers of all pools take them from.
const CONTROL_CONSUMER: &str = "caf-control";

/// A control message is of no use after the longest deadline that an assignment can have.
const CONTROL_RETENTION: Duration = Duration::from_secs(30 * 24 * 3600);
/// What is known about one assignment, beside its record.
const NOTE_RETENTION: Duration = Duration::from_secs(24 * 3600);

/// How long a worker holds a delivery before another gets it.
const ACK_WAIT: Duration = Duration::from_secs(10);
/// No limit: one on deliveries would strand messages where nobody sees them.
const UNLIMITED: i64 = -1;
/// Open pulls over all workers. The broker's default of 512 would leave every further worker idle, and unlike
/// `max_ack_pending` it cannot be raised later.
const MAX_WAITING: i64 = 16_384;

/// The stream that this pool's assignments wait in.
pub fn intake_stream(subject: &str) -> String {
    if subject == DEFAULT_SUBJECT { "CAF_EXEC_ASSIGN".to_owned() } else { format!("CAF_POOL_{}", escaped(subject)) }
}

/// One token of a subject or name: every byte outside A–Z a–z 0–9 `_` `-` becomes `=` and two upper-case hex digits.
fn escaped(text: &str) -> String {
    let mut token = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-' => token.push(char::from(byte)),
            _ => token.push_str(&format!("={byte:02X}")),
        }
    }
    token
}

/// All streams that a pool depends on.
pub fn streams(nats: &Nats) -> [Config; 8] {
    [
        intake(nats),
        results(nats),
        dead_letters(nats),
        control(nats),
        bucket(nats, "caf-cancel", NOTE_RETENTION),
        bucket(nats, "caf-approvals", Duration::ZERO),
        bucket(nats, "caf-answers", NOTE_RETENTION),
        bucket(nats, "caf-deliveries", NOTE_RETENTION),
    ]
}

/// Assignments: each for one worker, never dropped to make room.
fn intake(nats: &Nats) -> Config {
    let routes = if nats.subject == DEFAULT_SUBJECT {
        "caf.exec.route.*.v1".to_owned()
    } else {
        format!("{}.route.*", nats.subject)
    };
    Config {
        name: intake_stream(&nats.subject),
        // The subject itself and never a wildcard: verdicts are published below it.
        subjects: vec![nats.subject.clone(), routes],
        retention: RetentionPolicy::WorkQueue,
        discard: DiscardPolicy::New,
        ..stream(nats)
    }
}

/// Records: one for each assignment, the oldest dropped first.
fn results(nats: &Nats) -> Config {
    Config {
        name: RESULTS.to_owned(),
        subjects: vec!["caf.exec.ledger.*.*".to_owned(), "caf.exec.refused.*.*".to_owned()],
        retention: RetentionPolicy::Limits,
        discard: DiscardPolicy::Old,
        max_messages_per_subject: 1,
        max_messages: nats.streams.result_max_messages,
        max_age: nats.streams.result_retention,
        allow_direct: true,
        ..stream(nats)
    }
}

/// Dead letters: a full stream refuses, so that none is lost unseen.
fn dead_letters(nats: &Nats) -> Config {
    Config {
        name: DEAD_LETTERS.to_owned(),
        subjects: vec![DEAD_LETTER_SUBJECT.to_owned(), "caf.exec.dlq.raw.v1".to_owned()],
        retention: RetentionPolicy::Limits,
        discard: DiscardPolicy::New,
        max_age: nats.streams.dead_letter_retention,
        allow_direct: true,
        ..stream(nats)
    }
}

/// Control messages: a worker answers whoever asks for an answer, so the broker must not.
fn control(nats: &Nats) -> Config {
    Config {
        name: CONTROL.to_owned(),
        subjects: vec!["caf.exec.cancel.v1".to_owned(), "caf.human.response.v1".to_owned()],
        retention: RetentionPolicy::WorkQueue,
        discard: DiscardPolicy::New,
        max_age: CONTROL_RETENTION,
        no_ack: true,
        ..stream(nats)
    }
}

/// Small values by key, as every client of NATS keeps them.
fn bucket(nats: &Nats, name: &str, max_age: Duration) -> Config {
    Config {
        name: format!("KV_{name}"),
        subjects: vec![format!("$KV.{name}.>")],
        retention: RetentionPolicy::Limits,
        discard: DiscardPolicy::New,
        max_messages_per_subject: 1,
        max_age,
        allow_direct: true,
        allow_rollup: true,
        deny_delete: true,
        allow_message_ttl: true,
        ..stream(nats)
    }
}

fn stream(nats: &Nats) -> Config {
    Config {
        storage: match nats.streams.storage {
            Storage::File => StorageType::File,
            Storage::Memory => StorageType::Memory,
        },
        num_replicas: nats.streams.replicas,
        max_messages: UNLIMITED,
        max_messages_per_subject: UNLIMITED,
        max_bytes: UNLIMITED,
        max_consumers: -1,
        ..Config::default()
    }
}

/// The durable consumer that shares the assignments among the workers.
pub fn consumer(nats: &Nats, max_ack_pending: i64) -> pull::Config {
    pull::Config {
        durable_name: Some(nats.queue_group.clone()),
        filter_subject: nats.subject.clone(),
        ack_policy: AckPolicy::Explicit,
        ack_wait: ACK_WAIT,
        max_deliver: UNLIMITED,
        max_ack_pending,
        max_waiting: MAX_WAITING,
        ..pull::Config::default()
    }
}

/// The durable consumer that shares the control messages among the workers of all pools.
pub fn control_consumer() -> pull::Config {
    pull::Config {
        durable_name: Some(CONTROL_CONSUMER.to_owned()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: ACK_WAIT,
        max_deliver: UNLIMITED,
        max_waiting: MAX_WAITING,
        ..pull::Config::default()
    }
}

/// Deliveries that this many workers may hold at once: the broker's limit is for all of them together, and one that is
/// too low idles workers silently.
pub fn max_ack_pending(workers: i32, slots_per_worker: i32) -> i64 {
    /// A worker fetches at most this many beyond its slots.
    const LOOK_AHEAD: i64 = 1000;
    let per_worker = 2 * i64::from(slots_per_worker) + LOOK_AHEAD;
    // One more for the pods that a rollout adds, and a floor that lets a pool leave zero.
    (i64::from(workers) + 1) * per_worker
}

/// Creates what is missing and compares what exists.
pub async fn ensure(jetstream: &Context, nats: &Nats, max_ack_pending: i64) -> Result<(), BrokerError> {
    for wanted in streams(nats) {
        ensure_stream(jetstream, wanted, nats.streams.manage).await?;
    }
    ensure_consumer(jetstream, nats, CONTROL, control_consumer()).await?;
    ensure_consumer(jetstream, nats, &intake_stream(&nats.subject), consumer(nats, max_ack_pending)).await
}

async fn ensure_stream(jetstream: &Context, wanted: Config, manage: bool) -> Result<(), BrokerError> {
    let name = wanted.name.clone();
    match jetstream.get_stream(&name).await {
        Ok(found) => compare_stream(&wanted, &found.cached_info().config),
        Err(error) if is_missing(&error.kind()) => {
            if !manage {
                return Err(BrokerError::Unmanaged { what: format!("stream {name}") });
            }
            jetstream
                .create_stream(wanted)
                .await
                .map_err(|error| BrokerError::refused(format!("stream {name} cannot be created"), &error))?;
            tracing::info!(stream = %name, "created the stream");
            Ok(())
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
    nats: &Nats,
    stream: &str,
    wanted: pull::Config,
) -> Result<(), BrokerError> {
    let name = wanted.durable_name.clone().unwrap_or_default();
    let handle = jetstream
        .get_stream_no_info(stream)
        .await
        .map_err(|error| BrokerError::unanswered(format!("for stream {stream}"), &error))?;
    match handle.consumer_info(&name).await {
        Ok(found) => {
            compare_consumer(stream, &wanted, &found.config)?;
            if nats.streams.manage && found.config.max_ack_pending < wanted.max_ack_pending {
                grow(jetstream, stream, found.config, wanted.max_ack_pending).await?;
            }
            Ok(())
        }
        Err(error) if error.kind() == ConsumerInfoErrorKind::NotFound => {
            if !nats.streams.manage {
                return Err(BrokerError::Unmanaged { what: format!("consumer {name} of stream {stream}") });
            }
            create_consumer(&handle, stream, wanted).await
        }
        Err(error) => Err(BrokerError::unanswered(format!("for consumer {name} of stream {stream}"), &error)),
    }
}

async fn create_consumer(handle: &Stream<()>, stream: &str, wanted: pull::Config) -> Result<(), BrokerError> {
    let name = wanted.durable_name.clone().unwrap_or_default();
    let subject = wanted.filter_subject.clone();
    match handle.create_consumer_strict(wanted).await {
        Ok(_) => {
            tracing::info!(%stream, consumer = %name, "created the consumer");
            Ok(())
        }
        Err(error) if is_not_unique(&error.kind()) => Err(match rival(handle, &subject).await {
            Some(group) => BrokerError::Taken { subject, group, pool: None },
            None => BrokerError::refused(format!("consumer {name} of stream {stream} cannot be created"), &error),
        }),
        Err(error) => {
            Err(BrokerError::refused(format!("consumer {name} of stream {stream} cannot be created"), &error))
        }
    }
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
    jetstream.update_consumer_on_stream(grown, stream).await.map_err(|error| {
        BrokerError::refused(format!("max_ack_pending of consumer {name} of stream {stream} cannot be raised"), &error)
    })?;
    tracing::info!(%stream, consumer = %name, max_ack_pending, "raised max_ack_pending to the size of the pool");
    Ok(())
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
mod tests {
    use super::*;
    use crate::pool::tests::valid;

    fn nats(spec: &str) -> Nats {
        valid(&format!(r#"{{"nats": {spec}}}"#)).nats
    }

    #[track_caller]
    fn differs(found: Config, expected: &str) {
        let wanted = streams(&nats("{}")).into_iter().find(|wanted| wanted.name == found.name).expect("a known stream");
        let mismatch = compare_stream(&wanted, &found).expect_err("the stream was accepted");
        assert_eq!(mismatch.to_string(), expected);
    }

    #[test]
    fn the_default_intake_captures_its_subject_and_routes_but_no_verdicts() {
        let intake = intake(&nats("{}"));
        assert_eq!(intake.name, "CAF_EXEC_ASSIGN");
        assert_eq!(intake.subjects, ["caf.exec.assign.v1", "caf.exec.route.*.v1"]);
    }

    #[test]
    fn another_subject_gets_a_stream_of_its_own() {
        let intake = intake(&nats(r#"{"subject": "orders.eu_1.assign"}"#));
        assert_eq!(intake.name, "CAF_POOL_orders=2Eeu_1=2Eassign");
        assert_eq!(intake.subjects, ["orders.eu_1.assign", "orders.eu_1.assign.route.*"]);
    }

    #[test]
    fn an_equal_stream_is_accepted_whatever_the_administrator_decides() {
        for wanted in streams(&nats("{}")) {
            let mut found = wanted.clone();
            found.subjects.reverse();
            found.num_replicas = 3;
            found.max_age = Duration::from_secs(5);
            found.max_messages = 7;
            if found.max_messages_per_subject == UNLIMITED {
                found.max_messages_per_subject = 0;
            }
            assert_eq!(compare_stream(&wanted, &found), Ok(()));
        }
    }

    #[test]
    fn a_mismatch_names_stream_field_and_both_values() {
        let ours = nats("{}");
        differs(
            Config { max_messages_per_subject: 5, ..results(&ours) },
            "stream CAF_EXEC_RESULT: field max_msgs_per_subject is 5 but must be 1; \
             alter or remove it by hand, the operator never alters what exists",
        );
        differs(
            Config { retention: RetentionPolicy::Limits, ..intake(&ours) },
            "stream CAF_EXEC_ASSIGN: field retention is Limits but must be WorkQueue; \
             alter or remove it by hand, the operator never alters what exists",
        );
        differs(
            Config { discard: DiscardPolicy::Old, ..dead_letters(&ours) },
            "stream CAF_EXEC_DLQ: field discard is Old but must be New; \
             alter or remove it by hand, the operator never alters what exists",
        );
    }

    #[test]
    fn each_setting_that_the_contract_names_is_compared() {
        type Alter = fn(&mut Config);
        let wanted = results(&nats("{}"));
        let broken: [(&str, Alter); 8] = [
            ("subjects", |config| config.subjects = vec!["caf.exec.ledger.>".to_owned()]),
            ("retention", |config| config.retention = RetentionPolicy::Interest),
            ("storage", |config| config.storage = StorageType::Memory),
            ("discard", |config| config.discard = DiscardPolicy::New),
            ("max_msgs_per_subject", |config| config.max_messages_per_subject = -1),
            ("allow_direct", |config| config.allow_direct = false),
            ("no_ack", |config| config.no_ack = true),
            ("allow_msg_ttl", |config| config.allow_message_ttl = true),
        ];
        for (name, alter) in broken {
            let mut found = wanted.clone();
            alter(&mut found);
            assert!(
                matches!(compare_stream(&wanted, &found), Err(BrokerError::Mismatch { field, .. }) if field == name),
                "{name} is not compared"
            );
        }
    }

    #[test]
    fn a_consumer_that_gives_up_is_a_mismatch() {
        let nats = nats("{}");
        let wanted = consumer(&nats, 1000);
        let found = consumer::Config {
            filter_subject: nats.subject.clone(),
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            max_deliver: 5,
            ..consumer::Config::default()
        };
        let mismatch = compare_consumer("CAF_EXEC_ASSIGN", &wanted, &found).expect_err("accepted");
        assert!(
            mismatch
                .to_string()
                .starts_with("consumer caf-workers of stream CAF_EXEC_ASSIGN: field max_deliver is 5 but must be -1")
        );
        let equal = consumer::Config { max_deliver: -1, ..found };
        assert_eq!(compare_consumer("CAF_EXEC_ASSIGN", &wanted, &equal), Ok(()));
    }

    #[test]
    fn deliveries_in_flight_grow_with_the_pool() {
        assert_eq!(max_ack_pending(0, 24), 1048);
        assert_eq!(max_ack_pending(7, 24), 8 * 1048);
    }
}
