//! The connection to NATS: the only place that knows how to reach it and what its answers mean.

mod asked; // requests to keep something, and their answers
pub mod creds; // who we are there
pub mod kv; // small values by key
pub mod last; // what streams keep of many subjects
mod patience; // how long an answer is waited for that may be large
pub mod permissions; // what it does not let this worker do
pub mod streams; // what the worker needs there, and how it must be set
pub mod unreadable; // what the client loses its connection over
pub mod version; // how old a server may be

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use async_nats::Subject;
use async_nats::header::NATS_EXPECTED_LAST_SUBJECT_SEQUENCE;
use async_nats::jetstream::{self, ErrorCode};
use async_nats::{
    Auth, AuthError, Client, ConnectOptions, Event, HeaderMap, PublishErrorKind, ServerAddr, StatusCode, SubscribeError,
};
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::backoff;
use crate::health::{Concern, Health};
use crate::trace_context::TraceContext;
use asked::Asked;
use creds::InAddress;
use permissions::{ASK_AGAIN, Listener, Permission, Refusals};
use version::Version;

/// Begins the subjects that answers come on: other programs' answers are not for workers.
const INBOX: &str = "_INBOX_WORKER";
/// Two missed pings end a connection, so a silent broker is noticed within three of these. More would help no slow link: a
/// delivery that takes as long to come is given to somebody else after [`streams::ACK_WAIT`].
const PING_INTERVAL: Duration = Duration::from_secs(3);
/// How long the answer to a small request may take, and to a write since the broker has read it, before its outcome counts
/// as unknown.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
const FIRST_RECONNECT_DELAY: Duration = Duration::from_millis(50);
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(2);
/// Messages that may wait between the socket and their reader. A full channel loses messages, so it is larger than
/// everything that is ever asked for at once: 1 000 look-ahead and 4 096 slots of each pool.
const SUBSCRIPTION_CAPACITY: usize = 1 << 18;

/// How to reach the broker.
#[derive(Clone, Debug)]
pub struct Address {
    /// Any of these; all with the same credentials, or without any.
    pub servers: Vec<ServerAddr>,
    /// A credentials file, read again on each connect.
    pub creds: Option<PathBuf>,
    /// A private CA; requires TLS.
    pub tls_ca: Option<PathBuf>,
    /// The client's certificate and key; requires TLS.
    pub tls_identity: Option<(PathBuf, PathBuf)>,
    /// How the broker names this connection.
    pub name: String,
    /// Where this worker's assignments come in.
    pub intake: String,
}

/// A connection that comes back by itself, and a second one for look-ups, renewals and settlements: a large answer never
/// delays a delivery, and a large result none of these.
///
/// Cheap to clone: every delivery has one.
#[derive(Clone, Debug)]
pub struct Broker(Arc<Connections>);

#[derive(Debug)]
struct Connections {
    /// Made anew when its client has failed: work comes on it, and so does whatever others have put on a message.
    line: RwLock<Arc<Line>>,
    lookups: Client,
    connects: watch::Receiver<u64>,
    refusals: Refusals,
}

/// The connection that everything but look-ups, renewals and settlements uses.
#[derive(Debug)]
struct Line {
    client: Client,
    asked: Asked,
    jetstream: jetstream::Context,
}

impl Line {
    async fn of(client: Client) -> Result<Self, String> {
        let asked = Asked::new(client.clone()).await.map_err(|error| error.to_string())?;
        let mut jetstream = jetstream::new(client.clone());
        jetstream.set_timeout(REQUEST_TIMEOUT);
        Ok(Self { client, asked, jetstream })
    }
}

/// One connection to one server, from its greeting to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    server: Arc<str>,
    connection: u64,
}

/// What must be the last on a subject for a stream to keep a message there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Expected(u64);

impl Expected {
    /// Nothing has been kept there.
    pub const NOTHING: Self = Self(0);

    /// The message of this sequence; 0 for none.
    pub const fn last(sequence: u64) -> Self {
        Self(sequence)
    }

    /// The sequence; 0 for none.
    pub const fn sequence(self) -> u64 {
        self.0
    }

    /// Has the broker hold a message to it.
    pub fn add_to(self, headers: &mut HeaderMap) {
        headers.insert(NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, self.0.to_string());
    }
}

/// What became of a message that a stream was asked to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// Kept, with this sequence.
    At(u64),
    /// The subject's last sequence was not the expected one.
    Refused,
}

/// Why it is not known, or not so, that a message is kept.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The broker said no: storage full, stream missing, not permitted.
    #[error("the broker refused to store on {subject}: {reason}")]
    Refused {
        /// Where it should have been stored.
        subject: String,
        /// The broker's words.
        reason: String,
    },
    /// Neither now nor later: the broker or the stream takes no message of this size.
    #[error("the message for {subject} is larger than {limit}: raise it")]
    TooLarge {
        /// Where it should have been stored.
        subject: String,
        /// The setting that bounds it, and whose it is.
        limit: String,
    },
    /// It may or may not be kept: ask again, with the same precondition.
    #[error("no answer from the broker for {subject}: {reason}")]
    Unknown {
        /// Where it should have been stored.
        subject: String,
        /// What happened.
        reason: String,
    },
}

/// Why it is not known that the broker has read something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unread {
    /// It has not said so yet.
    Late,
    /// Nobody hears it any more: there is another client in a moment.
    ClientFailed,
}

impl StoreError {
    /// The broker takes no message of this size, whatever the subject.
    pub fn too_large_for_broker(subject: String) -> Self {
        Self::TooLarge { subject, limit: "max_payload of the broker".to_owned() }
    }
}

impl Session {
    /// Whether both are with the same run of the same server: it has not been started anew in between.
    pub fn is_with_the_server_of(&self, other: &Self) -> bool {
        self.server == other.server
    }
}

impl Broker {
    /// Connects, and waits for as long as it takes; `health` says so meanwhile, and at every later loss.
    ///
    /// # Errors
    /// The connection ended as soon as it had come about; why, for a person.
    pub async fn connect(address: &Address, health: &Health) -> Result<Self, String> {
        let (connected, connects) = watch::channel(0);
        let refusals = Refusals::new(health.clone(), &address.intake);
        tokio::spawn(refusals.clone().look());
        let lines = Lines { address: address.clone(), health: health.clone(), refusals: refusals.clone(), connected };
        let (client, failed) = lines.open("work", Some(lines.connected.clone())).await;
        let (lookups, _) = lines.open("look-ups", None).await;
        let line = RwLock::new(Arc::new(Line::of(client).await?));
        let broker = Self(Arc::new(Connections { line, lookups, connects, refusals }));
        if let Some(creds) = address.creds.clone() {
            tokio::spawn(use_new_credentials(creds, broker.clone()));
        }
        tokio::spawn(lines.make_anew(broker.clone(), failed));
        if let Some(version) = broker.version().filter(Version::has_known_faults) {
            let recommended = version::RECOMMENDED;
            tracing::warn!(%version, recommended, "this nats-server has known security faults");
        }
        Ok(broker)
    }

    /// The connection that everything but look-ups, renewals and settlements uses, as it is at the moment.
    pub fn client(&self) -> Client {
        self.line().client.clone()
    }

    /// The connection for look-ups, renewals, and the word that a delivery is done.
    pub fn lookups(&self) -> &Client {
        &self.0.lookups
    }

    /// JetStream's management API.
    pub fn jetstream(&self) -> jetstream::Context {
        self.line().jetstream.clone()
    }

    fn line(&self) -> Arc<Line> {
        Arc::clone(&self.0.line.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Counts connects: whoever holds state in the broker's session makes it anew when this changes.
    pub fn connects(&self) -> watch::Receiver<u64> {
        self.0.connects.clone()
    }

    /// Which session the commands of this moment go to. Unchanged between two looks: no reconnect in between.
    pub fn session(&self) -> Session {
        let info = self.line().client.server_info();
        Session { server: info.server_id.into(), connection: info.client_id }
    }

    /// Hears what is published on a subject: all of it, or this worker's part of what a group is given.
    ///
    /// # Errors
    /// There is no connection any more.
    pub async fn listen(&self, subject: &str, group: Option<&str>) -> Result<Listener, SubscribeError> {
        Listener::new(self.clone(), subject.to_owned(), group.map(str::to_owned)).await
    }

    /// Whether the broker refuses to let this worker hear what is published there.
    pub fn may_not_hear(&self, subject: &str) -> bool {
        self.0.refusals.may_not_hear(subject)
    }

    /// Whether the broker refuses something without which no outcome gets out of this worker.
    pub fn keeps_outcomes_here(&self) -> bool {
        self.0.refusals.keep_outcomes_here()
    }

    /// Tells refusals to publish on one of these apart: it grows with each one.
    pub fn last_refusal(&self, subjects: &[&str]) -> u64 {
        self.0.refusals.last_of(subjects)
    }

    /// That of the server that is connected; `None` where it has one of its own kind.
    pub fn version(&self) -> Option<Version> {
        Version::parse(&self.line().client.server_info().version)
    }

    /// The largest message that the broker takes, in bytes, headers included.
    pub fn max_payload(&self) -> usize {
        self.line().client.max_payload()
    }

    /// Asks a stream to keep a message, once.
    ///
    /// # Errors
    /// Refused for another reason than the precondition, or unknown; see [`StoreError`].
    pub async fn store(&self, subject: String, headers: HeaderMap, payload: Bytes) -> Result<Stored, StoreError> {
        let unknown = |subject, reason| Err(StoreError::Unknown { subject, reason });
        let answer = match self.line().asked.ask(subject.as_str().into(), headers, payload).await {
            Ok(Some(answer)) if answer.status == Some(StatusCode::NO_RESPONDERS) => {
                return Err(StoreError::Refused { subject, reason: "no stream listens there".to_owned() });
            }
            Ok(Some(answer)) => answer,
            Ok(None) => return unknown(subject, format!("none in {} s since it was read", REQUEST_TIMEOUT.as_secs())),
            Err(error) => match error.kind() {
                PublishErrorKind::MaxPayloadExceeded => return Err(StoreError::too_large_for_broker(subject)),
                PublishErrorKind::InvalidSubject => {
                    return Err(StoreError::Refused { subject, reason: error.to_string() });
                }
                PublishErrorKind::Send => return unknown(subject, error.to_string()),
            },
        };
        match serde_json::from_slice(&answer.payload) {
            Ok(PubAck { seq: Some(sequence), error: None, .. }) => Ok(Stored::At(sequence)),
            Ok(PubAck { error: Some(error), stream, .. }) => match error.error_code() {
                ErrorCode::STREAM_WRONG_LAST_SEQUENCE => Ok(Stored::Refused),
                ErrorCode::STREAM_MESSAGE_EXCEEDS_MAXIMUM => {
                    let limit = format!("max_msg_size of stream {}", stream.unwrap_or_default());
                    Err(StoreError::TooLarge { subject, limit })
                }
                _ => Err(StoreError::Refused { subject, reason: error.to_string() }),
            },
            _ => unknown(subject, "the answer is no PubAck".to_owned()),
        }
    }

    /// Publishes to whoever listens. Waits only while the connection's own queue is full.
    pub async fn publish(&self, subject: impl Into<Subject>, payload: Bytes) {
        self.publish_in(None, subject, payload).await;
    }

    /// The same, with the trace that it belongs to.
    pub async fn publish_in(&self, trace: Option<&TraceContext>, subject: impl Into<Subject>, payload: Bytes) {
        let said = match trace {
            None => self.line().client.publish(subject.into(), payload).await,
            Some(trace) => self.line().client.publish_with_headers(subject.into(), trace.to_headers(), payload).await,
        };
        if let Err(error) = said {
            tracing::warn!(%error, "cannot publish");
        }
    }

    /// The same, with headers.
    ///
    /// # Errors
    /// It is too large, or there is no connection any more.
    pub async fn send(&self, subject: &str, headers: HeaderMap, payload: Bytes) -> Result<(), StoreError> {
        let sent = self.line().client.publish_with_headers(subject.to_owned(), headers, payload).await;
        sent.map_err(|error| match error.kind() {
            PublishErrorKind::MaxPayloadExceeded => StoreError::too_large_for_broker(subject.to_owned()),
            _ => StoreError::Unknown { subject: subject.to_owned(), reason: error.to_string() },
        })
    }

    /// Waits until what was published has left this process, however long that takes.
    pub async fn flush(&self) {
        if let Err(error) = self.line().client.flush().await {
            tracing::warn!(%error, "cannot flush");
        }
    }

    /// The same on both connections, but not for longer than `limit`.
    pub async fn flush_within(&self, limit: Duration) {
        let client = self.client();
        let both = futures::future::join(client.flush(), self.0.lookups.flush());
        let _ = tokio::time::timeout(limit, both).await;
    }

    /// Returns when the broker has read what was published before this, and this client has heard what it was sent until then.
    ///
    /// # Errors
    /// It has not said so within `limit`, or will not.
    pub async fn read_within(&self, limit: Duration) -> Result<(), Unread> {
        let client = self.client();
        let fence = client.new_inbox();
        let mut fence_back = client.subscribe(fence.clone()).await.map_err(|_| Unread::ClientFailed)?;
        client.publish(fence, Bytes::new()).await.map_err(|_| Unread::ClientFailed)?;
        let back = tokio::time::timeout(limit, fence_back.next()).await.map_err(|_| Unread::Late)?;
        back.map(|_| ()).ok_or(Unread::ClientFailed)
    }
}

/// What headers add to a message: a version line, a line for each, an empty line.
pub(crate) fn wire_len(headers: &HeaderMap) -> usize {
    let lines = headers.iter().flat_map(|(name, values)| values.iter().map(move |value| (name, value)));
    "NATS/1.0\r\n\r\n".len()
        + lines.map(|(name, value)| name.to_string().len() + value.as_str().len() + 4).sum::<usize>()
}

#[derive(Deserialize)]
struct PubAck {
    seq: Option<u64>,
    stream: Option<String>,
    error: Option<jetstream::Error>,
}

/// Files are read again by each connect.
fn options(address: &Address, purpose: &str) -> ConnectOptions {
    let mut options = match address.creds.clone() {
        None => ConnectOptions::new(),
        Some(path) => ConnectOptions::with_auth_callback(move |nonce| {
            let path = path.clone();
            async move { sign(&path, &nonce).map_err(AuthError::new) }
        }),
    };
    if let Some(ca) = &address.tls_ca {
        options = options.add_root_certificates(ca.clone()).require_tls(true);
    }
    if let Some((cert, key)) = &address.tls_identity {
        options = options.add_client_certificate(cert.clone(), key.clone()).require_tls(true);
    }
    options = match address.servers.first().and_then(InAddress::of) {
        Some(InAddress::User(user, password)) => options.user_and_password(user, password),
        Some(InAddress::Token(token)) => options.token(token),
        None => options,
    };
    options
        .name(format!("{} {purpose}", address.name))
        .custom_inbox_prefix(INBOX)
        .ping_interval(PING_INTERVAL)
        .request_timeout(Some(REQUEST_TIMEOUT))
        .subscription_capacity(SUBSCRIPTION_CAPACITY)
        .reconnect_delay_callback(reconnect_delay)
}

fn reconnect_delay(attempt: usize) -> Duration {
    let attempt = u32::try_from(attempt).unwrap_or(u32::MAX);
    backoff::doubling(FIRST_RECONNECT_DELAY, MAX_RECONNECT_DELAY, attempt, fastrand::f64())
}

/// What a connection is opened with.
struct Lines {
    address: Address,
    health: Health,
    refusals: Refusals,
    connected: watch::Sender<u64>,
}

impl Lines {
    /// Connects, however long it takes; the token says that the client has failed and never connects again.
    async fn open(&self, purpose: &str, connected: Option<watch::Sender<u64>>) -> (Client, CancellationToken) {
        let (deaf, failed) = (Arc::new(Notify::new()), CancellationToken::new());
        let ear = Ear {
            health: self.health.clone(),
            refusals: self.refusals.clone(),
            deaf: Arc::clone(&deaf),
            connected,
            _last_words: failed.clone().drop_guard(),
        };
        let options = options(&self.address, purpose).event_callback(move |event| {
            ear.hear(&event);
            std::future::ready(())
        });
        let mut attempt = 0;
        loop {
            match options.clone().connect(self.address.servers.as_slice()).await {
                Ok(client) => {
                    tokio::spawn(failed.clone().run_until_cancelled_owned(listen_again(client.clone(), deaf)));
                    return (client, failed);
                }
                Err(error) => {
                    self.health.raise(Concern::NatsDisconnected, error.to_string());
                    tracing::warn!(%error, attempt, "cannot reach NATS yet");
                }
            }
            tokio::time::sleep(reconnect_delay(attempt)).await;
            attempt += 1;
        }
    }

    /// The client panics over some headers that a publisher may send. What was under way is lost as with any connection.
    async fn make_anew(self, broker: Broker, mut failed: CancellationToken) {
        loop {
            failed.cancelled().await;
            tracing::warn!("the client has failed over what it was sent: connecting to NATS anew");
            self.health.raise(Concern::NatsDisconnected, "the connection was lost");
            let (client, fails_again) = self.open("work", Some(self.connected.clone())).await;
            failed = fails_again;
            if let Ok(line) = Line::of(client).await {
                *broker.0.line.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(line);
                // Whoever has heard of it before has found the old one.
                self.connected.send_modify(|count| *count += 1);
            }
        }
    }
}

/// Hears what the client says of one connection; it lets go of this when it ends.
struct Ear {
    health: Health,
    refusals: Refusals,
    deaf: Arc<Notify>,
    /// Counts connects. The connection for look-ups comes and goes with the other one: one of them speaks.
    connected: Option<watch::Sender<u64>>,
    _last_words: DropGuard,
}

impl Ear {
    fn hear(&self, event: &Event) {
        if !self.is_refusal(event)
            && let Some(connected) = &self.connected
        {
            self.note(event, connected);
        }
    }

    /// Whether it says that something is not permitted that this worker needs. Without its inbox it hears no answer at all.
    fn is_refusal(&self, event: &Event) -> bool {
        let Event::ServerError(error) = event else { return false };
        let Some(permission) = Permission::refused_in(&error.to_string()) else { return false };
        if permission.is_inbox() {
            self.deaf.notify_one();
        }
        self.refusals.note(permission)
    }

    fn note(&self, event: &Event, connected: &watch::Sender<u64>) {
        match event {
            Event::Connected => {
                tracing::info!("connected to NATS");
                self.health.clear(Concern::NatsDisconnected);
                connected.send_modify(|count| *count += 1);
            }
            Event::Disconnected | Event::Closed => {
                let if_again =
                    "where nothing else explains it, the link is too slow for max_payload: lower that of the broker";
                tracing::warn!(if_again, "lost the connection to NATS");
                self.health.raise(Concern::NatsDisconnected, "the connection was lost");
            }
            Event::SlowConsumer(_) | Event::ServerError(_) | Event::ClientError(_) => {
                tracing::warn!(event = %event, "NATS reports a problem");
            }
            Event::LameDuckMode | Event::Draining => tracing::info!(event = %event, "NATS is going away"),
        }
    }
}

/// The broker forgets a subscription that it refused, also when its administrator allows it later: only a new connection
/// asks for it again.
async fn listen_again(client: Client, deaf: Arc<Notify>) {
    loop {
        deaf.notified().await;
        tokio::time::sleep(ASK_AGAIN).await;
        let _ = deaf.notified().now_or_never(); // every inbox is refused by itself
        let _ = client.force_reconnect().await;
    }
}

/// What the broker refuses it may permit to other credentials, which only a new connection is asked for.
async fn use_new_credentials(file: PathBuf, broker: Broker) {
    let mut used = tokio::fs::read(&file).await.ok();
    loop {
        tokio::time::sleep(ASK_AGAIN).await;
        if !broker.0.refusals.stand() {
            continue;
        }
        let Ok(new) = tokio::fs::read(&file).await else { continue };
        if used.as_ref() != Some(&new) {
            tracing::info!("connecting to NATS with new credentials: the old ones are not permitted all");
            used = Some(new);
            for client in [&broker.client(), broker.lookups()] {
                let _ = client.force_reconnect().await;
            }
        }
    }
}

fn sign(path: &Path, nonce: &[u8]) -> Result<Auth, String> {
    let (token, key) = creds::read(path).map_err(|reason| format!("--nats-creds: {}: {reason}", path.display()))?;
    let mut auth = Auth::new();
    auth.signature = Some(key.sign(nonce).map_err(|error| error.to_string())?);
    auth.jwt = Some(token);
    Ok(auth)
}
