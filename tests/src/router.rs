//! The Router's side of the contract: publishes assignments and hears everything that is said about them.

use std::fmt::{self, Display};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::{self, consumer, stream};
use async_nats::{Client, ConnectOptions, Event, HeaderMap};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::watch;

use crate::wait::{SOON, within};

/// Where assignments go in unless a pool has a subject of its own.
pub const ASSIGN: &str = "caf.exec.assign.v1";
/// Where cancels are published.
pub const CANCEL: &str = "caf.exec.cancel.v1";
/// Where results come out.
pub const RESULT: &str = "caf.exec.result.v1";
/// Where dead letters come out.
pub const DLQ: &str = "caf.exec.dlq.v1";
/// Where the original of a dead letter comes out that is too large for its letter.
pub const DLQ_RAW: &str = "caf.exec.dlq.raw.v1";

/// Whose assignment, and which.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// Its `tenant_id`.
    pub tenant: String,
    /// Its `assignment_id`.
    pub id: String,
}

/// What was heard about one assignment, in the order in which it was said.
#[derive(Clone, Debug, Default)]
pub struct Story {
    /// On `….ack`.
    pub verdicts: Vec<Value>,
    /// On `caf.exec.result.v1`, byte for byte.
    pub results: Vec<Bytes>,
    /// On `caf.exec.dlq.v1`.
    pub letters: Vec<Value>,
}

/// Something that was said.
#[derive(Clone, Debug)]
pub struct Heard {
    /// Where.
    pub kind: Kind,
    /// About what, where it says so.
    pub key: Option<Key>,
    /// Byte for byte.
    pub payload: Bytes,
    /// Beside it.
    pub headers: HeaderMap,
}

/// Where something is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// On `….ack`.
    Verdict,
    /// On `caf.exec.result.v1`.
    Result,
    /// On `caf.exec.dlq.v1`.
    Letter,
    /// On `caf.exec.dlq.raw.v1`.
    Original,
}

/// A message of a stream.
#[derive(Clone, Debug)]
pub struct Kept {
    /// Where it was published.
    pub subject: String,
    /// Its place.
    pub sequence: u64,
    /// Byte for byte.
    pub payload: Bytes,
    /// Beside it.
    pub headers: HeaderMap,
}

/// A Router with one intake.
#[derive(Debug)]
pub struct Router {
    client: Client,
    jetstream: jetstream::Context,
    intake: String,
    heard: Arc<Mutex<Vec<Heard>>>,
    changed: watch::Receiver<usize>,
    submitted: Mutex<Vec<Option<Key>>>,
    connects: Arc<AtomicUsize>,
}

impl Router {
    /// A Router that publishes on the usual subject.
    pub async fn connect(url: &str) -> Self {
        Self::on(url, ASSIGN).await
    }

    /// A Router that publishes on another subject.
    pub async fn on(url: &str, intake: &str) -> Self {
        let connects = Arc::new(AtomicUsize::new(0));
        let options = ConnectOptions::new().subscription_capacity(1 << 18).event_callback({
            let connects = Arc::clone(&connects);
            move |event| {
                connects.fetch_add(usize::from(event == Event::Connected), Ordering::Relaxed);
                async {}
            }
        });
        let client = options.connect(url).await.expect("the broker is there");
        let (heard, (changes, changed)) = (Arc::default(), watch::channel(0));
        let verdicts = format!("{intake}.ack");
        // One subscription hears all there is to hear in the order in which the broker has it.
        let mut subjects = vec!["caf.exec.>".to_owned()];
        if !verdicts.starts_with("caf.exec.") {
            subjects.push(verdicts.clone());
        }
        for subject in subjects {
            let messages = client.subscribe(subject).await.expect("a subscription");
            tokio::spawn(listen(messages, verdicts.clone(), Arc::clone(&heard), changes.clone()));
        }
        client.flush().await.expect("the broker answers");
        let jetstream = jetstream::new(client.clone());
        Self { client, jetstream, intake: intake.to_owned(), heard, changed, submitted: Mutex::default(), connects }
    }

    /// The connection, for what a Router does not do.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// JetStream's management API.
    pub fn jetstream(&self) -> &jetstream::Context {
        &self.jetstream
    }

    /// Publishes an assignment, and returns its place in the stream.
    pub async fn submit(&self, assignment: &Value) -> u64 {
        self.submit_with(assignment, HeaderMap::new()).await
    }

    /// Publishes an assignment with headers.
    pub async fn submit_with(&self, assignment: &Value, headers: HeaderMap) -> u64 {
        self.publish(assignment.to_string().into(), headers).await
    }

    /// Publishes bytes, whatever they are.
    pub async fn submit_bytes(&self, payload: impl Into<Bytes>) -> u64 {
        self.submit_bytes_with(payload, HeaderMap::new()).await
    }

    /// The same, with headers.
    pub async fn submit_bytes_with(&self, payload: impl Into<Bytes>, headers: HeaderMap) -> u64 {
        self.publish(payload.into(), headers).await
    }

    /// Publishes an assignment to whoever listens: for workers that no stream stands before.
    pub async fn send(&self, assignment: &Value) {
        self.send_with(assignment, HeaderMap::new()).await;
    }

    /// The same, with headers.
    pub async fn send_with(&self, assignment: &Value, headers: HeaderMap) {
        let sent = self.client.publish_with_headers(self.intake.clone(), headers, assignment.to_string().into()).await;
        sent.expect("the client takes it");
        self.client.flush().await.expect("the broker takes it");
    }

    async fn publish(&self, payload: Bytes, headers: HeaderMap) -> u64 {
        let key = Key::read(&payload);
        within(SOON, "the broker takes an assignment", async || {
            // A try whose answer is lost may be a publication all the same.
            self.submitted.lock().unwrap().push(key.clone());
            let sent = self.jetstream.publish_with_headers(self.intake.clone(), headers.clone(), payload.clone()).await;
            Some(sent.ok()?.await.ok()?.sequence)
        })
        .await
    }

    /// What each publication was about, where it can be read.
    pub fn submissions(&self) -> Vec<Option<Key>> {
        self.submitted.lock().unwrap().clone()
    }

    /// Everything that was heard.
    pub fn heard(&self) -> Vec<Heard> {
        self.heard.lock().unwrap().clone()
    }

    /// Whether nothing can have been missed: the connection was never lost.
    pub fn heard_all(&self) -> bool {
        self.connects.load(Ordering::Relaxed) <= 1
    }

    /// What was heard about one assignment.
    pub fn story(&self, key: impl Into<Key>) -> Story {
        let key = Some(key.into());
        let mut story = Story::default();
        for heard in self.heard.lock().unwrap().iter().filter(|heard| heard.key == key) {
            match heard.kind {
                Kind::Verdict => story.verdicts.push(json(&heard.payload)),
                Kind::Result => story.results.push(heard.payload.clone()),
                Kind::Letter => story.letters.push(json(&heard.payload)),
                Kind::Original => {}
            }
        }
        story
    }

    /// Waits until what was heard about an assignment makes something known.
    pub async fn learn<T>(&self, key: impl Into<Key>, what: &str, known: impl Fn(&Story) -> Option<T>) -> T {
        let key = key.into();
        match self.known(|| known(&self.story(&key))).await {
            Some(known) => known,
            None => panic!("no {what} of {key}; heard: {:#?}", self.story(&key)),
        }
    }

    /// Looks each time that something was heard, until there is what is looked for; `None` after a while.
    async fn known<T>(&self, look: impl Fn() -> Option<T>) -> Option<T> {
        let mut changed = self.changed.clone();
        let known = async {
            loop {
                changed.borrow_and_update();
                if let Some(known) = look() {
                    return known;
                }
                changed.changed().await.expect("the listener lives as long as the Router");
            }
        };
        tokio::time::timeout(SOON * 2, known).await.ok()
    }

    /// The first thing that was said there and is so, whomever it is about.
    pub async fn find(&self, kind: Kind, what: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        let found = || {
            let heard = self.heard.lock().unwrap();
            let of_kind = heard.iter().filter(|heard| heard.kind == kind);
            of_kind.map(|heard| json(&heard.payload)).find(|said| is_it(said))
        };
        match self.known(found).await {
            Some(found) => found,
            None => panic!("no {kind:?} about {what}; heard: {:#?}", self.heard()),
        }
    }

    /// The first verdict on an assignment.
    pub async fn verdict(&self, key: impl Into<Key>) -> Value {
        self.learn(key, "verdict", |story| story.verdicts.first().cloned()).await
    }

    /// The first result of an assignment.
    pub async fn result(&self, key: impl Into<Key>) -> Value {
        json(&self.results(key, 1).await[0])
    }

    /// At least so many results of an assignment.
    pub async fn results(&self, key: impl Into<Key>, count: usize) -> Vec<Bytes> {
        let enough = |story: &Story| (story.results.len() >= count).then(|| story.results.clone());
        self.learn(key, &format!("{count} results"), enough).await
    }

    /// The first dead letter about an assignment.
    pub async fn letter(&self, key: impl Into<Key>) -> Value {
        self.learn(key, "dead letter", |story| story.letters.first().cloned()).await
    }

    /// The record of an assignment.
    pub async fn record(&self, key: impl Into<Key>) -> Option<Kept> {
        let subject = format!("caf.exec.ledger.{}", key.into().token());
        self.last("CAF_EXEC_RESULT", &subject).await
    }

    /// The stored refusal of an assignment.
    pub async fn refusal(&self, key: impl Into<Key>) -> Option<Kept> {
        let subject = format!("caf.exec.refused.{}", key.into().token());
        self.last("CAF_EXEC_RESULT", &subject).await
    }

    /// The last message that a stream keeps on a subject.
    pub async fn last(&self, stream: &str, subject: &str) -> Option<Kept> {
        let found = self.stream(stream).await.get_last_raw_message_by_subject(subject).await;
        found.ok().map(Kept::from)
    }

    /// Everything that a stream keeps on a subject, which may have wildcards.
    pub async fn all(&self, stream: &str, subject: &str) -> Vec<Kept> {
        let config = consumer::pull::Config {
            filter_subject: subject.to_owned(),
            ack_policy: consumer::AckPolicy::None,
            inactive_threshold: Duration::from_secs(30),
            ..Default::default()
        };
        let consumer = self.stream(stream).await.create_consumer(config).await.expect("a consumer");
        let pending = usize::try_from(consumer.cached_info().num_pending).expect("a number of messages");
        let mut kept = Vec::with_capacity(pending);
        while kept.len() < pending {
            let batch = consumer.fetch().max_messages(5_000).messages().await.expect("messages");
            let batch: Vec<_> = batch.try_collect().await.expect("messages");
            assert!(!batch.is_empty(), "{stream} gives {} of {pending} messages", kept.len());
            kept.extend(batch.into_iter().map(|message| Kept {
                sequence: message.info().map(|info| info.stream_sequence).expect("a delivery"),
                subject: message.subject.to_string(),
                payload: message.payload.clone(),
                headers: message.headers.clone().unwrap_or_default(),
            }));
        }
        kept
    }

    /// A stream as it is.
    pub async fn stream(&self, name: &str) -> stream::Stream {
        within(SOON, &format!("stream {name} is there"), async || self.jetstream.get_stream(name).await.ok()).await
    }

    /// The stream that this Router's assignments wait in.
    pub fn intake_stream(&self) -> String {
        match self.intake.as_str() {
            ASSIGN => "CAF_EXEC_ASSIGN".to_owned(),
            intake => format!("CAF_POOL_{}", escape(intake)),
        }
    }

    /// What the workers' consumer says of itself.
    pub async fn consumer(&self) -> Option<consumer::Info> {
        let stream = self.jetstream.get_stream(self.intake_stream()).await.ok()?;
        stream.consumer_info("caf-workers").await.ok()
    }

    /// Assignments that are parked, be they waiting or running.
    pub async fn parked(&self) -> u64 {
        let stream = self.jetstream.get_stream("CAF_EXEC_PARKED").await;
        stream.map_or(0, |stream| stream.cached_info().state.messages)
    }

    /// Waits until every submission has been settled: nothing more will be said.
    pub async fn settled(&self, limit: Duration) {
        within(limit, "everything is settled", async || {
            let consumer = self.consumer().await?;
            let is_taken = consumer.num_pending == 0 && consumer.num_ack_pending == 0;
            // In this order: what is parked is there before it is settled here.
            (is_taken && self.parked().await == 0).then_some(())
        })
        .await;
        // What was said before the last settlement has reached the broker before it; a round trip brings it here.
        self.client.flush().await.expect("the broker answers");
    }
}

async fn listen(
    mut messages: async_nats::Subscriber,
    verdicts: String,
    heard: Arc<Mutex<Vec<Heard>>>,
    changes: watch::Sender<usize>,
) {
    while let Some(message) = messages.next().await {
        let kind = match message.subject.as_str() {
            RESULT => Kind::Result,
            DLQ => Kind::Letter,
            DLQ_RAW => Kind::Original,
            subject if subject == verdicts => Kind::Verdict,
            _ => continue,
        };
        let key = Key::read(&message.payload);
        let headers = message.headers.unwrap_or_default();
        heard.lock().unwrap().push(Heard { kind, key, payload: message.payload, headers });
        changes.send_modify(|count| *count += 1);
    }
}

impl Key {
    /// The ids in a message, where it has both.
    pub fn read(payload: &[u8]) -> Option<Self> {
        /// Other fields may hold what no number of ours can.
        #[derive(Deserialize)]
        struct Ids {
            tenant_id: String,
            assignment_id: String,
        }
        let ids: Ids = serde_json::from_slice(payload).ok()?;
        Some(Self { tenant: ids.tenant_id, id: ids.assignment_id })
    }

    /// As two tokens of a subject.
    pub fn token(&self) -> String {
        format!("{}.{}", escape(&self.tenant), escape(&self.id))
    }
}

impl Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.tenant, self.id)
    }
}

/// Of an assignment.
impl From<&Value> for Key {
    fn from(assignment: &Value) -> Self {
        let id = |field: &str| assignment[field].as_str().unwrap_or_default().to_owned();
        Self { tenant: id("tenant_id"), id: id("assignment_id") }
    }
}

/// Tenant and id.
impl From<(&str, &str)> for Key {
    fn from((tenant, id): (&str, &str)) -> Self {
        Self { tenant: tenant.to_owned(), id: id.to_owned() }
    }
}

impl From<&Key> for Key {
    fn from(key: &Key) -> Self {
        key.clone()
    }
}

impl From<StreamMessage> for Kept {
    fn from(message: StreamMessage) -> Self {
        Self {
            subject: message.subject.to_string(),
            sequence: message.sequence,
            payload: message.payload,
            headers: message.headers,
        }
    }
}

/// The least that an assignment must say.
pub fn assignment(tenant: &str, id: &str, job: Value) -> Value {
    serde_json::json!({
        "version": "1",
        "assignment_id": id,
        "request_id": format!("req-{id}"),
        "tenant_id": tenant,
        "executor": { "provider_id": "tests" },
        "job": job,
    })
}

/// A cancel that says no more than whose and which.
pub fn cancel(tenant: &str, id: &str) -> Value {
    serde_json::json!({ "version": "1", "assignment_id": id, "tenant_id": tenant })
}

/// What asks for a new run, whatever is recorded.
pub fn replay() -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert("Beamline-Replay", "true");
    headers
}

/// An id as one token: every byte outside A–Z a–z 0–9 `_` `-` is `=` and two upper-case hex digits.
pub fn escape(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-' => char::from(byte).to_string(),
            byte => format!("={byte:02X}"),
        })
        .collect()
}

/// A message as JSON.
///
/// # Panics
/// It is none.
pub fn json(payload: &[u8]) -> Value {
    serde_json::from_slice(payload)
        .unwrap_or_else(|error| panic!("no JSON ({error}): {}", String::from_utf8_lossy(payload)))
}
