//! The streams, buckets and consumers that the contract needs, and how each must be. Pure.
//!
//! The operator decides the same in a pool's name; a test holds the two together.

use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, pull};
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType};
use sha2::{Digest, Sha256};

use super::Parked;
use crate::broker::kv;
use crate::contract;
use crate::ids::TenantId;

/// Holds results and stored refusals.
pub const RESULT_STREAM: &str = "CAF_EXEC_RESULT";
/// Holds dead letters.
pub const DLQ_STREAM: &str = "CAF_EXEC_DLQ";
/// Holds assignments that came in on [`contract::ASSIGN`].
pub const ASSIGN_STREAM: &str = "CAF_EXEC_ASSIGN";

/// Holds cancels and answers to approvals until a worker takes them: they outlive a pool at zero.
pub const CONTROL_STREAM: &str = "CAF_EXEC_CONTROL";
/// What all workers of all pools take control messages from.
pub const CONTROL_CONSUMER: &str = "caf-control";

/// Holds work that came in on [`contract::ASSIGN`] and may not run yet.
pub const PARKED_STREAM: &str = "CAF_EXEC_PARKED";

/// Cancels that stand.
pub const CANCEL_BUCKET: &str = "caf-cancel";
/// Open requests for approval.
pub const APPROVAL_BUCKET: &str = "caf-approvals";
/// Answers to requests for approval, the first of each approver.
pub const ANSWER_BUCKET: &str = "caf-answers";
/// Notes of deliveries that have begun, or that ended without a death.
pub const DELIVERY_BUCKET: &str = "caf-deliveries";

/// What tenants have used of their budgets.
pub const QUOTA_BUCKET: &str = "caf-quota";

/// A hold on a delivery lasts this long from its last progress ack.
pub const ACK_WAIT: Duration = Duration::from_secs(10);
/// How many deliveries may be unsettled over all workers, where no operator sizes it to its pool.
const MAX_ACK_PENDING: i64 = 50_000;
/// Open pulls over all workers. The broker's default of 512 would leave every further worker idle.
const MAX_WAITING: i64 = 16_384;
/// After a tenant has had no parked work for so long, the broker forgets the consumer of it.
const PARKED_IDLE: Duration = Duration::from_secs(3600);
/// The longest token that a consumer is named by; the broker takes 255 bytes.
const MAX_TOKEN: usize = 200;
const RESULT_RETENTION: Duration = Duration::from_secs(3600);
const RESULT_MAX_MESSAGES: i64 = 2_000_000;
const DEAD_LETTER_RETENTION: Duration = Duration::from_secs(30 * 24 * 3600);
/// A control message is of no use after the longest deadline that an assignment can have.
const CONTROL_RETENTION: Duration = Duration::from_secs(30 * 24 * 3600);
/// What is known about one assignment, beside its record.
const NOTE_RETENTION: Duration = Duration::from_secs(24 * 3600);
/// An account is of no use after its window: two of the longest.
const QUOTA_RETENTION: Duration = Duration::from_secs(62 * 24 * 3600);

/// Where this worker's assignments wait.
#[derive(Clone, Debug)]
pub struct Intake {
    /// The subject that the Router publishes on.
    pub subject: String,
    /// The durable consumer that all workers of a pool share.
    pub queue_group: String,
}

impl Intake {
    /// The stream that captures the subject.
    pub fn stream(&self) -> String {
        if self.subject == contract::ASSIGN {
            ASSIGN_STREAM.to_owned()
        } else {
            format!("CAF_POOL_{}", contract::escape(&self.subject))
        }
    }

    /// Where verdicts about it are published.
    pub fn verdict_subject(&self) -> String {
        format!("{}.ack", self.subject)
    }

    /// Where work waits for workers with GPU slots.
    pub fn route_subject(&self) -> String {
        if self.subject == contract::ASSIGN {
            contract::ROUTE_GPU.to_owned()
        } else {
            format!("{}.route.gpu", self.subject)
        }
    }

    /// The stream of work that may not run yet.
    pub fn parked_stream(&self) -> String {
        if self.subject == contract::ASSIGN {
            PARKED_STREAM.to_owned()
        } else {
            format!("CAF_PARKED_{}", contract::escape(&self.subject))
        }
    }

    /// Where a tenant's work waits that may not run yet; `tenant` is one token.
    pub fn parked_subject(&self, parked: Parked, tenant: &str) -> String {
        match (parked, self.subject == contract::ASSIGN) {
            (Parked::General, true) => format!("{}.{tenant}", contract::PARKED),
            (Parked::Gpu, true) => format!("{}.{tenant}", contract::PARKED_GPU),
            (Parked::General, false) => format!("{}.parked.{tenant}", self.subject),
            (Parked::Gpu, false) => format!("{}.parked-gpu.{tenant}", self.subject),
        }
    }

    /// The durable consumer that all workers of a pool share that a tenant's parked work is for.
    pub fn parked_group(parked: Parked, tenant: &TenantId) -> String {
        // No escaped token has `=_` in it, or ends like that of the GPU slots.
        let token = contract::escape(tenant.as_str());
        let token =
            if token.len() <= MAX_TOKEN { token } else { format!("=_{:x}", Sha256::digest(tenant.as_str())).into() };
        match parked {
            Parked::General => token.into_owned(),
            Parked::Gpu => format!("{token}=gpu"),
        }
    }

    /// The durable consumer that all workers of a pool share that have GPU slots.
    pub fn route_group(&self) -> String {
        format!("{}-gpu", self.queue_group)
    }

    fn routes(&self) -> String {
        if self.subject == contract::ASSIGN {
            "caf.exec.route.*.v1".to_owned()
        } else {
            format!("{}.route.*", self.subject)
        }
    }
}

/// Where assignments wait.
pub fn assignments(intake: &Intake) -> Config {
    Config {
        name: intake.stream(),
        subjects: vec![intake.subject.clone(), intake.routes()],
        retention: RetentionPolicy::WorkQueue,
        discard: DiscardPolicy::New,
        storage: StorageType::File,
        ..unlimited()
    }
}

/// Where work waits that may not run yet.
pub fn parked(intake: &Intake) -> Config {
    Config {
        name: intake.parked_stream(),
        subjects: [Parked::General, Parked::Gpu].map(|parked| intake.parked_subject(parked, "*")).to_vec(),
        retention: RetentionPolicy::WorkQueue,
        discard: DiscardPolicy::New,
        storage: StorageType::File,
        ..unlimited()
    }
}

/// Where records are kept.
pub fn results() -> Config {
    Config {
        name: RESULT_STREAM.to_owned(),
        subjects: vec![format!("{}.*.*", contract::LEDGER), format!("{}.*.*", contract::REFUSED)],
        retention: RetentionPolicy::Limits,
        discard: DiscardPolicy::Old,
        storage: StorageType::File,
        max_messages_per_subject: 1,
        max_messages: RESULT_MAX_MESSAGES,
        max_age: RESULT_RETENTION,
        allow_direct: true,
        ..unlimited()
    }
}

/// Where dead letters are kept.
pub fn dead_letters() -> Config {
    Config {
        name: DLQ_STREAM.to_owned(),
        subjects: vec![contract::DLQ.to_owned(), contract::DLQ_RAW.to_owned()],
        retention: RetentionPolicy::Limits,
        discard: DiscardPolicy::New,
        storage: StorageType::File,
        max_age: DEAD_LETTER_RETENTION,
        allow_direct: true,
        ..unlimited()
    }
}

/// Where control messages wait. The broker acknowledges none of them: a request is answered by a worker.
pub fn control() -> Config {
    Config {
        name: CONTROL_STREAM.to_owned(),
        subjects: vec![contract::CANCEL.to_owned(), contract::APPROVAL_ANSWER.to_owned()],
        retention: RetentionPolicy::WorkQueue,
        discard: DiscardPolicy::New,
        storage: StorageType::File,
        max_age: CONTROL_RETENTION,
        no_ack: true,
        ..unlimited()
    }
}

/// The streams of all buckets.
pub fn buckets() -> [Config; 5] {
    [
        bucket(CANCEL_BUCKET, NOTE_RETENTION),
        bucket(APPROVAL_BUCKET, Duration::ZERO),
        bucket(ANSWER_BUCKET, NOTE_RETENTION),
        bucket(DELIVERY_BUCKET, NOTE_RETENTION),
        bucket(QUOTA_BUCKET, QUOTA_RETENTION),
    ]
}

/// As every client of NATS keeps a bucket; the mark of a removed key may have an age of its own.
fn bucket(name: &str, max_age: Duration) -> Config {
    Config {
        name: kv::stream(name),
        subjects: vec![kv::subject(name, ">")],
        retention: RetentionPolicy::Limits,
        discard: DiscardPolicy::New,
        storage: StorageType::File,
        max_messages_per_subject: 1,
        max_age,
        allow_direct: true,
        allow_rollup: true,
        deny_delete: true,
        allow_message_ttl: true,
        ..unlimited()
    }
}

fn unlimited() -> Config {
    Config {
        max_bytes: -1,
        max_messages: -1,
        max_messages_per_subject: -1,
        max_consumers: -1,
        num_replicas: 1,
        ..Config::default()
    }
}

/// What hands the assignments out.
pub fn consumer(intake: &Intake) -> pull::Config {
    shared(intake.queue_group.clone(), intake.subject.clone())
}

/// What hands out the work that waits for GPU slots.
pub fn route_consumer(intake: &Intake) -> pull::Config {
    shared(intake.route_group(), intake.route_subject())
}

/// What hands out a tenant's parked work, until it has had none for a while.
pub fn parked_consumer(intake: &Intake, parked: Parked, tenant: &TenantId) -> pull::Config {
    let subject = intake.parked_subject(parked, &contract::escape(tenant.as_str()));
    pull::Config { inactive_threshold: PARKED_IDLE, ..shared(Intake::parked_group(parked, tenant), subject) }
}

fn shared(name: String, subject: String) -> pull::Config {
    pull::Config {
        durable_name: Some(name),
        filter_subject: subject,
        ack_policy: AckPolicy::Explicit,
        ack_wait: ACK_WAIT,
        max_deliver: -1,
        max_ack_pending: MAX_ACK_PENDING,
        max_waiting: MAX_WAITING,
        ..pull::Config::default()
    }
}

/// What hands control messages out.
pub fn control_consumer() -> pull::Config {
    pull::Config {
        durable_name: Some(CONTROL_CONSUMER.to_owned()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: ACK_WAIT,
        max_deliver: -1,
        max_waiting: MAX_WAITING,
        ..pull::Config::default()
    }
}
