//! What is on its way to the Router. A result or a refusal counts as published when the broker has certainly read it.
//!
//! They are core messages, which nobody acknowledges. But the broker reads one connection in order: when a message
//! that we send to ourselves comes back over the same session, it has read everything sent before. So they go out in
//! batches, each followed by such a fence. The verdict that came before a result was said in the same session, or it is
//! said again: a session that breaks takes with it what nobody knows the broker has read.

use std::time::Duration;

use async_nats::header::NATS_MESSAGE_ID;
use async_nats::{HeaderMap, Subject, Subscriber};
use bytes::Bytes;
use futures::StreamExt;
use tokio::sync::{mpsc, oneshot};

use crate::broker::{Broker, Session};
use crate::contract;
use crate::trace_context::TraceContext;
use crate::vital::Vital;

/// A fence that has not come back after this may be lost: the batch is sent again, the same bytes.
const FENCE_TIMEOUT: Duration = Duration::from_secs(5);
/// Results in one batch; also how many may wait for the next.
const BATCH: usize = 1024;

/// Publishes in the order in which it was handed in.
#[derive(Clone, Debug)]
pub struct Outbox(mpsc::Sender<Outgoing>);

/// A verdict that was said.
#[derive(Clone, Debug)]
pub struct Said {
    /// Its bytes.
    pub verdict: Bytes,
    /// The session at that time; a later one may have carried it.
    pub session: Session,
}

#[derive(Debug)]
struct Outgoing {
    message: Message,
    trace: Option<TraceContext>,
    published: oneshot::Sender<()>,
}

#[derive(Debug)]
enum Message {
    Result { result: Bytes, said: Option<Said>, id: Option<String> },
    Parked { announcement: Option<Bytes>, said: Said },
    Refusal { verdict: Bytes },
}

impl Outbox {
    /// Starts the task that publishes; it ends when the last handle is dropped.
    pub fn start(broker: Broker, verdicts: Subject, vital: &Vital) -> Self {
        let (sender, waiting) = mpsc::channel(BATCH);
        vital.spawn("publish results", publish(broker, verdicts, waiting));
        Self(sender)
    }

    /// Returns when the broker has the result, and before it the verdict where that is not certain yet, however long that
    /// takes. A result that has no record has an `id`: by it a stream of somebody's knows a second try.
    pub async fn publish(&self, result: Bytes, said: Option<Said>, id: Option<String>, trace: Option<TraceContext>) {
        self.hand_in(Message::Result { result, said, id }, trace).await;
    }

    /// Returns when the broker has the verdict on what waits for a person, and what approvers are told of it.
    pub async fn park(&self, announcement: Option<Bytes>, said: Said, trace: Option<TraceContext>) {
        self.hand_in(Message::Parked { announcement, said }, trace).await;
    }

    /// Returns when the broker has the verdict on what will not run.
    pub async fn refuse(&self, verdict: Bytes, trace: Option<TraceContext>) {
        self.hand_in(Message::Refusal { verdict }, trace).await;
    }

    async fn hand_in(&self, message: Message, trace: Option<TraceContext>) {
        let (published, done) = oneshot::channel();
        if self.0.send(Outgoing { message, trace, published }).await.is_ok() {
            let _ = done.await;
        }
    }
}

async fn publish(broker: Broker, verdicts: Subject, mut waiting: mpsc::Receiver<Outgoing>) {
    let mut batch = Vec::with_capacity(BATCH);
    while waiting.recv_many(&mut batch, BATCH).await > 0 {
        while !send(&broker, &verdicts, &batch).await {
            tracing::warn!(messages = batch.len(), "not sure that the broker has the results: sending them again");
        }
        for outgoing in batch.drain(..) {
            let _ = outgoing.published.send(());
        }
    }
}

/// Whether the broker certainly has the batch.
async fn send(broker: &Broker, verdicts: &Subject, batch: &[Outgoing]) -> bool {
    let session = broker.session();
    let inbox = broker.client().new_inbox();
    let Ok(fence) = broker.client().subscribe(inbox.clone()).await else { return false };
    for outgoing in batch {
        let trace = outgoing.trace.as_ref();
        match &outgoing.message {
            Message::Result { result, said, id } => {
                if let Some(lost) = said.as_ref().filter(|said| said.session != session) {
                    broker.say_in(trace, verdicts.clone(), lost.verdict.clone()).await;
                }
                match id {
                    None => broker.say_in(trace, contract::RESULT, result.clone()).await,
                    Some(id) => say_as(broker, id, trace, result.clone()).await,
                }
            }
            Message::Parked { announcement, said } => {
                if said.session != session {
                    broker.say_in(trace, verdicts.clone(), said.verdict.clone()).await;
                }
                if let Some(announcement) = announcement {
                    broker.say_in(trace, contract::APPROVAL_REQUEST, announcement.clone()).await;
                }
            }
            Message::Refusal { verdict } => broker.say_in(trace, verdicts.clone(), verdict.clone()).await,
        }
    }
    broker.say(inbox, Bytes::new()).await;
    came_back(fence).await && broker.session() == session
}

async fn say_as(broker: &Broker, id: &str, trace: Option<&TraceContext>, result: Bytes) {
    let mut headers = HeaderMap::new();
    headers.insert(NATS_MESSAGE_ID, id);
    if let Some(trace) = trace {
        trace.add_to(&mut headers);
    }
    if let Err(error) = broker.send(contract::RESULT, headers, result).await {
        tracing::warn!(%error, "cannot publish");
    }
}

async fn came_back(mut fence: Subscriber) -> bool {
    tokio::time::timeout(FENCE_TIMEOUT, fence.next()).await.is_ok_and(|message| message.is_some())
}
