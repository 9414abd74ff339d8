//! Where the work comes from.

use std::time::Duration;

use beamline_crds as crds;
use beamline_crds::{Delivery, SecretKeyRef, Storage, Tls};

use super::InvalidPool;

const SUBJECT: &str = "caf.exec.assign.v1";
const QUEUE_GROUP: &str = "caf-workers";
const STREAM_REPLICAS: usize = 1;
const RESULT_RETENTION: Duration = Duration::from_secs(3600);
const RESULT_MAX_MESSAGES: i64 = 2_000_000;
const DEAD_LETTER_RETENTION: Duration = Duration::from_secs(720 * 3600);

/// Where the work comes from.
#[derive(Clone, Debug, PartialEq)]
pub struct Nats {
    /// Address of the servers.
    pub url: String,
    /// What workers connect with.
    pub credentials: Option<SecretKeyRef>,
    /// What the operator connects with.
    pub operator_credentials: Option<SecretKeyRef>,
    /// TLS material of both.
    pub tls: Tls,
    /// How assignments are handed out.
    pub delivery: Delivery,
    /// Subject of the assignments.
    pub subject: String,
    /// Durable consumer on the subject, or core queue group.
    pub queue_group: String,
    /// How streams are created.
    pub streams: Streams,
}

impl Nats {
    /// The field that says what the operator connects with.
    pub fn operator_credentials_field(&self) -> &'static str {
        let is_the_workers = self.operator_credentials == self.credentials;
        if is_the_workers { "nats.credentialsSecretRef" } else { "nats.operatorCredentialsSecretRef" }
    }
}

/// How streams are created.
#[derive(Clone, Debug, PartialEq)]
pub struct Streams {
    /// Whether the operator creates what is missing.
    pub manage: bool,
    /// Servers that keep each stream.
    pub replicas: usize,
    /// Where they keep it.
    pub storage: Storage,
    /// Age at which a result goes.
    pub result_retention: Duration,
    /// Results kept at most.
    pub result_max_messages: i64,
    /// Age at which a dead letter goes.
    pub dead_letter_retention: Duration,
    /// What the spec itself says of them.
    pub explicit: Explicit,
}

/// What a spec says about streams that may exist already; the rest of them is the administrator's.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Explicit {
    /// Servers that keep each stream.
    pub replicas: Option<usize>,
    /// Age at which a result goes.
    pub result_retention: Option<Duration>,
    /// Results kept at most.
    pub result_max_messages: Option<i64>,
    /// Age at which a dead letter goes.
    pub dead_letter_retention: Option<Duration>,
}

/// Where a pool's workers meet: subject and queue group.
pub fn meeting_point(nats: &crds::Nats) -> (&str, &str) {
    (nats.subject.as_deref().unwrap_or(SUBJECT), nats.queue_group.as_deref().unwrap_or(QUEUE_GROUP))
}

/// A name without dots means a Service of the pool's namespace, as its workers see it; from here it needs the rest.
pub fn qualified(url: &str, namespace: &str) -> String {
    let Some((scheme, address)) = url.split_once("://") else { return url.to_owned() };
    let (host, port) =
        address.split_once(':').map_or((address, String::new()), |(host, port)| (host, format!(":{port}")));
    if host.contains(['.', '[']) || host == "localhost" {
        return url.to_owned();
    }
    format!("{scheme}://{host}.{namespace}.svc{port}")
}

pub(super) fn nats(nats: crds::Nats) -> Result<Nats, InvalidPool> {
    let crds::Nats {
        url,
        credentials_secret_ref,
        operator_credentials_secret_ref,
        tls,
        delivery,
        subject,
        queue_group,
        streams,
    } = nats;
    Ok(Nats {
        url,
        operator_credentials: operator_credentials_secret_ref.or_else(|| credentials_secret_ref.clone()),
        credentials: credentials_secret_ref,
        tls: tls.unwrap_or_default(),
        delivery: delivery.unwrap_or(Delivery::JetStream),
        subject: subject.unwrap_or_else(|| SUBJECT.to_owned()),
        queue_group: queue_group.unwrap_or_else(|| QUEUE_GROUP.to_owned()),
        streams: kept(streams.unwrap_or_default())?,
    })
}

fn kept(streams: crds::Streams) -> Result<Streams, InvalidPool> {
    let crds::Streams { manage, replicas, storage, result_retention, result_max_messages, dead_letter_retention } =
        streams;
    let explicit = Explicit {
        replicas: replicas.and_then(|replicas| usize::try_from(replicas).ok()),
        result_retention: duration("nats.streams.resultRetention", result_retention)?,
        result_max_messages,
        dead_letter_retention: duration("nats.streams.deadLetterRetention", dead_letter_retention)?,
    };
    Ok(Streams {
        manage: manage.unwrap_or(true),
        replicas: explicit.replicas.unwrap_or(STREAM_REPLICAS),
        storage: storage.unwrap_or(Storage::File),
        result_retention: explicit.result_retention.unwrap_or(RESULT_RETENTION),
        result_max_messages: result_max_messages.unwrap_or(RESULT_MAX_MESSAGES),
        dead_letter_retention: explicit.dead_letter_retention.unwrap_or(DEAD_LETTER_RETENTION),
        explicit,
    })
}

fn duration(field: &'static str, value: Option<String>) -> Result<Option<Duration>, InvalidPool> {
    let Some(value) = value else { return Ok(None) };
    humantime::parse_duration(&value).map(Some).map_err(|_| InvalidPool::Duration { field, value })
}
