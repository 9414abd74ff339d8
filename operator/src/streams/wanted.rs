//! The streams, buckets and consumers that a pool needs, and how each must be. Pure.
//!
//! A worker that is started alone creates the same ones.

use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, pull};
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType};

use crate::pool::{Delivery, Kind, Nats, Slots, Storage, ValidPool};
use crate::scale::Decisions;

/// The intake that needs no stream of its own.
const DEFAULT_SUBJECT: &str = "caf.exec.assign.v1";
/// One record for each assignment: the result, or the refusal.
pub const RESULTS: &str = "CAF_EXEC_RESULT";
/// What failed for good.
pub const DEAD_LETTERS: &str = "CAF_EXEC_DLQ";
/// Subject of the dead letters themselves; very large originals travel beside them.
pub const DEAD_LETTER_SUBJECT: &str = "caf.exec.dlq.v1";

/// Cancels and answers to approvals, of all pools.
pub const CONTROL: &str = "CAF_EXEC_CONTROL";
/// What all workers of all pools take them from.
pub const CONTROL_CONSUMER: &str = "caf-control";

/// A control message is of no use after the longest deadline that an assignment can have.
const CONTROL_RETENTION: Duration = Duration::from_secs(30 * 24 * 3600);
/// What is known about one assignment, beside its record.
const NOTE_RETENTION: Duration = Duration::from_secs(24 * 3600);
/// What a tenant has used of its budget is of no use after its window: two of the longest.
const QUOTA_RETENTION: Duration = Duration::from_secs(62 * 24 * 3600);

/// How long a worker holds a delivery before another gets it.
pub(super) const ACK_WAIT: Duration = Duration::from_secs(10);
/// No limit: one on deliveries would strand messages where nobody sees them.
pub(super) const UNLIMITED: i64 = -1;
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

/// The other way round; `None` where it is no such token.
pub fn unescaped(token: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(token.len());
    let mut rest = token.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'=' => {
                let digits = [rest.next()?, rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

/// Bucket of what tenants have used of their budgets.
pub const ACCOUNTS: &str = "KV_caf-quota";

/// Where a tenant's account in this pool is kept.
pub fn account_subject(pool: &str, tenant: &str) -> String {
    format!("$KV.caf-quota.{}.{}", escaped(pool), escaped(tenant))
}

/// What waits for its tenant's next window, or for room under its ceiling.
pub fn parked_stream(nats: &Nats) -> String {
    match nats.subject.as_str() {
        DEFAULT_SUBJECT => "CAF_EXEC_PARKED".to_owned(),
        subject => format!("CAF_PARKED_{}", escaped(subject)),
    }
}

/// Where that of a tenant waits for a class of workers, by its escaped id.
pub fn parked_subject(nats: &Nats, class: Kind, tenant: &str) -> String {
    match (nats.subject.as_str(), class) {
        (DEFAULT_SUBJECT, Kind::General) => format!("caf.exec.parked.v1.{tenant}"),
        (DEFAULT_SUBJECT, Kind::Gpu) => format!("caf.exec.parked.gpu.v1.{tenant}"),
        (subject, Kind::General) => format!("{subject}.parked.{tenant}"),
        (subject, Kind::Gpu) => format!("{subject}.parked-gpu.{tenant}"),
    }
}

/// All streams that a pool depends on. From a core queue group nothing waits in one.
pub fn streams(nats: &Nats) -> Vec<Config> {
    let shared = [
        results(nats),
        dead_letters(nats),
        control(nats),
        bucket(nats, "caf-cancel", NOTE_RETENTION),
        bucket(nats, "caf-approvals", Duration::ZERO),
        bucket(nats, "caf-answers", NOTE_RETENTION),
        bucket(nats, "caf-deliveries", NOTE_RETENTION),
        bucket(nats, "caf-quota", QUOTA_RETENTION),
    ];
    let waits = match nats.delivery {
        Delivery::JetStream => vec![intake(nats), parked(nats)],
        Delivery::Core => Vec::new(),
    };
    waits.into_iter().chain(shared).collect()
}

/// What work for the gpu pool waits on, where a worker without GPU slots passes it on.
pub fn route_subject(nats: &Nats) -> String {
    if nats.subject == DEFAULT_SUBJECT {
        "caf.exec.route.gpu.v1".to_owned()
    } else {
        format!("{}.route.gpu", nats.subject)
    }
}

/// The consumer that shares it among the workers with GPU slots.
pub fn route_group(nats: &Nats) -> String {
    format!("{}-gpu", nats.queue_group)
}

/// Assignments: each for one worker, never dropped to make room.
pub(super) fn intake(nats: &Nats) -> Config {
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

/// Assignments that their tenants may not have run yet, by tenant; those for GPU slots apart.
fn parked(nats: &Nats) -> Config {
    Config {
        name: parked_stream(nats),
        subjects: [Kind::General, Kind::Gpu].map(|class| parked_subject(nats, class, "*")).to_vec(),
        retention: RetentionPolicy::WorkQueue,
        discard: DiscardPolicy::New,
        ..stream(nats)
    }
}

/// Records: one for each assignment, the oldest dropped first.
pub(super) fn results(nats: &Nats) -> Config {
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
pub(super) fn dead_letters(nats: &Nats) -> Config {
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
    shared(nats.queue_group.clone(), nats.subject.clone(), max_ack_pending)
}

/// The durable consumer that shares what waits for GPU slots among the workers that have some.
pub fn route_consumer(nats: &Nats, max_ack_pending: i64) -> pull::Config {
    shared(route_group(nats), route_subject(nats), max_ack_pending)
}

fn shared(name: String, subject: String, max_ack_pending: i64) -> pull::Config {
    pull::Config {
        durable_name: Some(name),
        filter_subject: subject,
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

/// Deliveries that may be unsettled at once over all workers. The broker's limit is for all of them together, and one
/// that is too low idles workers silently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaxAckPending {
    /// From the intake.
    pub intake: i64,
    /// From the GPU route, where the pool has GPU slots.
    pub route: Option<i64>,
}

impl MaxAckPending {
    /// Of two pools that take from one queue.
    pub fn plus(self, other: Self) -> Self {
        let route = match (self.route, other.route) {
            (None, None) => None,
            (one, another) => Some(one.unwrap_or(0) + another.unwrap_or(0)),
        };
        Self { intake: self.intake + other.intake, route }
    }
}

/// Sized to as many workers as are decided.
pub fn max_ack_pending(pool: &ValidPool, decisions: &Decisions) -> MaxAckPending {
    let general = (decisions.general.desired, pool.general.slots);
    let with_gpus =
        decisions.gpu.as_ref().zip(pool.gpu.as_ref()).map(|(decision, class)| (decision.desired, class.slots));
    let has_gpu_slots = |(_, slots): &(i32, Slots)| slots.gpu > 0;
    let route: Vec<i64> = std::iter::once(general)
        .chain(with_gpus)
        .filter(has_gpu_slots)
        .map(|(workers, slots)| held(workers, slots.gpu))
        .collect();
    MaxAckPending { intake: held(general.0, general.1.total()), route: (!route.is_empty()).then(|| route.iter().sum()) }
}

/// What this many workers hold at most.
fn held(workers: i32, slots_per_worker: i32) -> i64 {
    /// A worker fetches at most this many beyond its slots.
    const LOOK_AHEAD: i64 = 1000;
    let per_worker = 2 * i64::from(slots_per_worker) + LOOK_AHEAD;
    // One more for the pods that a rollout adds, and a floor that lets a pool leave zero.
    (i64::from(workers) + 1) * per_worker
}
