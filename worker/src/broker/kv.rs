//! Small values by key: a bucket is a stream that keeps one message for each key.
//!
//! Reads go to the stream's leader, never to a replica that lags: whoever stores first and looks second misses nothing.

use std::collections::HashSet;
use std::time::Duration;

use async_nats::header::{NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, NATS_LAST_CONSUMER, NATS_MESSAGE_TTL};
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, push};
use async_nats::jetstream::stream::LastRawMessageErrorKind;
use async_nats::{HeaderMap, StatusCode, Subscriber, jetstream};
use bytes::Bytes;
use futures::StreamExt;
use jiff::Timestamp;
use tokio::sync::mpsc;

use super::last::{LookUpError, header};
use super::{Broker, StoreError, Stored, patience};
use crate::backoff;
use crate::health::{Concern, Health};

const OPERATION: &str = "KV-Operation";
const REMOVAL: &str = "DEL";
/// The broker's own mark for a key whose value it has removed.
const MARKER: &str = "Nats-Marker-Reason";
/// Seconds that the mark of a removed key is kept, for watchers that are away: a bucket may have no age limit.
const REMOVAL_SECONDS: &str = "3600";
/// A silent bucket says that it is there this often.
const HEARTBEAT: Duration = Duration::from_secs(3);
/// How long the broker keeps what follows a bucket for somebody who has gone.
const GONE: Duration = Duration::from_secs(30);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_secs(2);
/// Changes that may wait for whoever watches.
const CHANGES: usize = 1024;

/// A bucket; cheap to clone. A key is made of tokens, each escaped ([`crate::contract::escape`]), with dots between.
#[derive(Clone, Debug)]
pub struct Bucket {
    broker: Broker,
    name: &'static str,
}

/// A value as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key in its bucket.
    pub key: String,
    /// The value, byte for byte.
    pub value: Bytes,
    /// The precondition for replacing or removing it.
    pub revision: u64,
    /// When the broker stored it.
    pub stored: Timestamp,
}

/// What a watcher is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Forget what was known: everything that there is follows. The first change, and again after each break.
    Anew,
    /// The key has this value.
    Put(Entry),
    /// The key has been removed. Nobody says so of a value that was too old.
    Removed(String),
    /// Everything that there was has been told.
    Current,
}

/// The broker could not be asked, or did not answer: ask again.
#[derive(Debug, thiserror::Error)]
#[error("cannot read bucket {bucket}: {reason}")]
pub struct ReadError {
    bucket: &'static str,
    reason: String,
}

/// The stream behind a bucket.
pub fn stream(bucket: &str) -> String {
    format!("KV_{bucket}")
}

/// Where a key of a bucket stands in its stream; the key may be a wildcard.
pub fn subject(bucket: &str, key: &str) -> String {
    format!("$KV.{bucket}.{key}")
}

impl Bucket {
    /// The bucket of this name, which [`super::streams`] looks after.
    pub const fn new(broker: Broker, name: &'static str) -> Self {
        Self { broker, name }
    }

    /// The value of a key.
    ///
    /// # Errors
    /// Not known: ask again.
    pub async fn get(&self, key: &str) -> Result<Option<Entry>, ReadError> {
        Ok(self.last(key).await?.and_then(Kept::value))
    }

    /// Which of these keys have a value: asked with one request, and a replica may answer that lags.
    ///
    /// # Errors
    /// Not known: ask again.
    pub async fn having_values(&self, keys: &[String]) -> Result<HashSet<String>, LookUpError> {
        let found = self.broker.last(&self.stream(), keys.iter().map(|key| self.subject(key)).collect()).await?;
        let values = found.into_iter().filter(|(_, message)| !is_mark(message.headers.as_ref()));
        let prefix = self.subject("");
        Ok(values.filter_map(|(subject, _)| subject.strip_prefix(&prefix).map(str::to_owned)).collect())
    }

    /// Stores a value for a key that has none; [`Stored::Refused`] where it has one.
    ///
    /// # Errors
    /// Not stored or not known, see [`StoreError`]. Asked again, a refusal may mean that the first try was stored.
    pub async fn create(&self, key: &str, value: Bytes) -> Result<Stored, StoreError> {
        match self.update(key, value.clone(), 0).await? {
            Stored::At(revision) => Ok(Stored::At(revision)),
            // The mark of a removed key counts as a message, but not as a value.
            Stored::Refused => match self.last(key).await {
                Ok(Some(Kept::Removed { revision, .. })) => self.update(key, value, revision).await,
                Ok(Some(Kept::Value(_)) | None) => Ok(Stored::Refused),
                Err(error) => Err(StoreError::Unknown { subject: self.subject(key), reason: error.to_string() }),
            },
        }
    }

    /// Replaces the value of this revision; [`Stored::Refused`] where the key has another one, or none.
    ///
    /// # Errors
    /// Not stored or not known, see [`StoreError`]. Asked again, a refusal may mean that the first try was stored.
    pub async fn update(&self, key: &str, value: Bytes, revision: u64) -> Result<Stored, StoreError> {
        self.broker.store(self.subject(key), expecting(revision), value).await
    }

    /// Replaces what was found under a key: the value of this revision, or none.
    ///
    /// # Errors
    /// As [`Bucket::update`] and [`Bucket::create`].
    pub async fn replace(&self, key: &str, value: Bytes, found: Option<u64>) -> Result<Stored, StoreError> {
        match found {
            Some(revision) => self.update(key, value, revision).await,
            None => self.create(key, value).await,
        }
    }

    /// Removes the value of this revision; [`Stored::Refused`] where the key has another one, or none.
    ///
    /// # Errors
    /// Not removed or not known, see [`StoreError`]. Asked again, a refusal may mean that the first try did it.
    pub async fn delete(&self, key: &str, revision: u64) -> Result<Stored, StoreError> {
        let mut headers = expecting(revision);
        headers.insert(OPERATION, REMOVAL);
        headers.insert(NATS_MESSAGE_TTL, REMOVAL_SECONDS);
        self.broker.store(self.subject(key), headers, Bytes::new()).await
    }

    /// Tells everything that there is and each change, for as long as the receiver lives. It begins again from the
    /// start when the connection was lost, a message was missed or the bucket was made anew.
    pub fn watch(&self, health: Health) -> mpsc::Receiver<Change> {
        let (changes, receiver) = mpsc::channel(CHANGES);
        let bucket = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = bucket.tell(&changes, &health) => {}
                () = changes.closed() => {}
            }
        });
        receiver
    }

    async fn tell(&self, changes: &mpsc::Sender<Change>, health: &Health) {
        let mut connects = self.broker.connects();
        let mut failures = 0;
        loop {
            connects.mark_unchanged();
            let told = tokio::select! {
                told = self.tell_once(changes, &mut failures) => told,
                _ = connects.changed() => Ok(()),
            };
            if let Err(error) = told {
                tracing::debug!(%error, "watching a bucket anew");
                // Whoever keeps the streams makes a missing one, once it knows.
                if failures > 0 {
                    health.raise_unless_away(Concern::StreamsUnavailable, error.to_string());
                }
                tokio::time::sleep(backoff::doubling(FIRST_PAUSE, MAX_PAUSE, failures, fastrand::f64())).await;
                failures += 1;
            }
        }
    }

    async fn tell_once(&self, changes: &mpsc::Sender<Change>, failures: &mut u32) -> Result<(), ReadError> {
        let mut follower = self.follow().await?;
        *failures = 0;
        let mut change = Change::Anew;
        while changes.send(change).await.is_ok() {
            change = follower.next().await?;
        }
        Ok(())
    }

    async fn follow(&self) -> Result<Follower, ReadError> {
        let client = self.broker.client();
        let inbox = client.new_inbox();
        let messages = client.subscribe(inbox.clone()).await.map_err(|error| self.unread(&error))?;
        let config = push::Config {
            deliver_subject: inbox,
            deliver_policy: DeliverPolicy::LastPerSubject,
            filter_subject: self.subject(">"),
            ack_policy: AckPolicy::None,
            max_deliver: 1,
            idle_heartbeat: HEARTBEAT,
            flow_control: true,
            memory_storage: true,
            num_replicas: 1,
            inactive_threshold: GONE,
            ..push::Config::default()
        };
        let made = self.broker.jetstream().create_consumer_on_stream(config, self.stream()).await;
        let made = made.map_err(|error| self.unread(&error))?;
        // The broker may have sent some before it counted what is left: only each message says that for certain.
        let info = made.cached_info();
        let is_empty = info.num_pending == 0 && info.delivered.consumer_sequence == 0;
        let left = if is_empty { 0 } else { u64::MAX };
        Ok(Follower { bucket: self.clone(), messages, sequence: 0, left, is_current: false })
    }

    /// The last message of a key, a mark included.
    async fn last(&self, key: &str) -> Result<Option<Kept>, ReadError> {
        let mut jetstream = self.broker.jetstream();
        jetstream.set_timeout(patience::LONGEST);
        let stream = jetstream.get_stream_no_info(self.stream()).await.map_err(|error| self.unread(&error))?;
        let subject = self.subject(key);
        let found = patience::wait_for(&self.broker.client(), stream.get_last_raw_message_by_subject(&subject)).await;
        match found.ok_or_else(|| self.unread(&"no answer"))? {
            Ok(message) => {
                let stored = Timestamp::from_nanosecond(message.time.unix_timestamp_nanos()).unwrap_or_default();
                Ok(Some(Kept::read(key.to_owned(), Some(&message.headers), message.payload, message.sequence, stored)))
            }
            Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => Ok(None),
            Err(error) => Err(self.unread(&error)),
        }
    }

    fn stream(&self) -> String {
        stream(self.name)
    }

    fn subject(&self, key: &str) -> String {
        subject(self.name, key)
    }

    fn unread(&self, reason: &dyn std::fmt::Display) -> ReadError {
        ReadError { bucket: self.name, reason: reason.to_string() }
    }
}

fn expecting(revision: u64) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, revision.to_string());
    headers
}

/// Whether a message says that its key has been removed.
fn is_mark(headers: Option<&HeaderMap>) -> bool {
    headers.is_some_and(|headers| headers.get(OPERATION).or_else(|| headers.get(MARKER)).is_some())
}

/// The last message of a key.
enum Kept {
    Value(Entry),
    Removed { key: String, revision: u64 },
}

impl Kept {
    fn read(key: String, headers: Option<&HeaderMap>, value: Bytes, revision: u64, stored: Timestamp) -> Self {
        if is_mark(headers) {
            Self::Removed { key, revision }
        } else {
            Self::Value(Entry { key, value, revision, stored })
        }
    }

    fn value(self) -> Option<Entry> {
        match self {
            Self::Value(entry) => Some(entry),
            Self::Removed { .. } => None,
        }
    }
}

/// What the broker sends to one inbox, without a gap: the last message of each key, then each further one.
struct Follower {
    bucket: Bucket,
    messages: Subscriber,
    /// Of the last message.
    sequence: u64,
    /// What had been stored when this began and has not come yet.
    left: u64,
    is_current: bool,
}

impl Follower {
    /// # Errors
    /// A gap, or no sign of life: what has changed since is not known.
    async fn next(&mut self) -> Result<Change, ReadError> {
        loop {
            if self.left == 0 && !self.is_current {
                self.is_current = true;
                return Ok(Change::Current);
            }
            let next = tokio::time::timeout(3 * HEARTBEAT, self.messages.next()).await;
            let message = next.ok().flatten().ok_or_else(|| self.bucket.unread(&"it has gone silent"))?;
            match message.status {
                None => return self.change(message),
                Some(StatusCode::IDLE_HEARTBEAT) => self.heartbeat(message).await?,
                Some(status) => return Err(self.bucket.unread(&status)),
            }
        }
    }

    fn change(&mut self, message: async_nats::Message) -> Result<Change, ReadError> {
        let message = jetstream::Message { message, context: self.bucket.broker.jetstream() };
        let info = message.info().map_err(|error| self.bucket.unread(&error))?;
        if info.consumer_sequence != self.sequence + 1 {
            return Err(self.bucket.unread(&"a message was missed"));
        }
        (self.sequence, self.left) = (info.consumer_sequence, self.left.saturating_sub(1).min(info.pending));
        let stored = Timestamp::from_nanosecond(info.published.unix_timestamp_nanos()).unwrap_or_default();
        let revision = info.stream_sequence;
        let message = message.message;
        let key = message.subject.strip_prefix(&self.bucket.subject("")).unwrap_or_default().to_owned();
        Ok(match Kept::read(key, message.headers.as_ref(), message.payload, revision, stored) {
            Kept::Value(entry) => Change::Put(entry),
            Kept::Removed { key, .. } => Change::Removed(key),
        })
    }

    /// A request to go on sending is answered; a sign of silence shows whether everything has come.
    async fn heartbeat(&mut self, message: async_nats::Message) -> Result<(), ReadError> {
        if let Some(reply) = message.reply.clone() {
            self.bucket.broker.publish(reply, Bytes::new()).await;
            return Ok(());
        }
        if header(&message, "Nats-Consumer-Stalled").is_some() {
            return Ok(());
        }
        let sent = header(&message, NATS_LAST_CONSUMER.as_ref()).and_then(|sent| sent.parse().ok());
        if sent.is_some_and(|sent: u64| sent != self.sequence) {
            return Err(self.bucket.unread(&"a message was missed"));
        }
        // What was too old by now does not come any more.
        self.left = 0;
        Ok(())
    }
}
