//! What is on its way to the Router. A result or a refusal counts as published when the broker has certainly read it.
//!
//! They are core messages, which nobody acknowledges. But the broker reads one connection in order: when a message
//! that we send to ourselves comes back over the same session, it has read everything sent before. So they go out in
//! batches, each followed by such a fence. The verdict that came before a result was said in the same session, or it is
//! said again: a session that breaks takes with it what nobody knows the broker has read. So it is with what the broker
//! has read and refused, since it is not permitted: it says so before the fence comes back.

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
/// After the broker refused a message, before the same one is tried again.
const REFUSED_PAUSE: Duration = Duration::from_secs(1);
/// Results in one batch; also how many may wait for the next.
const BATCH: usize = 1024;

/// Publishes in the order in which it was handed in.
#[derive(Clone, Debug)]
pub struct Outbox(mpsc::Sender<Outgoing>);

/// A verdict that was said.
#[derive(Clone, Debug)]
pub struct Said {
    /// The message, byte for byte.
    pub verdict: Bytes,
    /// The session at that time; a later one may have carried it.
    pub session: Session,
    /// The last refusal of a verdict before that; a later one may have been its own.
    pub refusal: u64,
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
    Parked { announcement: Option<Bytes>, said: Option<Said> },
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

    /// Returns when the broker has the verdict on what waits for a person or for its tenant's turn, and what approvers are
    /// told of it.
    pub async fn park(&self, announcement: Option<Bytes>, said: Option<Said>, trace: Option<TraceContext>) {
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
        let mut at_once = batch.len();
        while !batch.is_empty() {
            let next = at_once.min(batch.len());
            match send(&broker, &verdicts, batch.split_at(next).0).await {
                Sent::Certainly => batch.drain(..next).for_each(|outgoing| {
                    let _ = outgoing.published.send(());
                }),
                Sent::Perhaps => {
                    tracing::warn!(messages = next, "not sure that the broker has the results: sending them again");
                }
                // Which of several it was cannot be told.
                Sent::Refused if next > 1 => at_once = 1,
                Sent::Refused => tokio::time::sleep(REFUSED_PAUSE).await,
            }
        }
    }
}

/// What became of a batch.
enum Sent {
    /// The broker has all of it.
    Certainly,
    /// It may have some of it.
    Perhaps,
    /// It does not let this worker publish some of it.
    Refused,
}

async fn send(broker: &Broker, verdicts: &Subject, batch: &[Outgoing]) -> Sent {
    let session = broker.session();
    let is_lost = |said: &&Said| said.session != session || broker.last_refusal(&[verdicts]) > said.refusal;
    let lost: Vec<_> = batch.iter().filter_map(|one| Some((one, one.message.said().filter(is_lost)?))).collect();
    if !lost.is_empty() {
        let again = async {
            for (outgoing, said) in lost {
                broker.publish_in(outgoing.trace.as_ref(), verdicts.clone(), said.verdict.clone()).await;
            }
        };
        // The broker may take a result and refuse the verdict before it.
        match fenced(broker, verdicts, &session, again).await {
            Sent::Certainly => {}
            other => return other,
        }
    }
    let all = async {
        for outgoing in batch {
            say(broker, verdicts, outgoing).await;
        }
    };
    fenced(broker, verdicts, &session, all).await
}

/// Publishes, and says what became of it; certain it is only where all of it was said in that session.
async fn fenced(broker: &Broker, verdicts: &Subject, session: &Session, publishing: impl Future<Output = ()>) -> Sent {
    let subjects = [verdicts.as_str(), contract::RESULT, contract::APPROVAL_REQUEST];
    let refusal = broker.last_refusal(&subjects);
    let inbox = broker.client().new_inbox();
    let Ok(fence) = broker.client().subscribe(inbox.clone()).await else { return Sent::Perhaps };
    publishing.await;
    broker.publish(inbox, Bytes::new()).await;
    let is_back = came_back(fence).await;
    // The client tells refusals by a task of its own, which has been woken before this one where they came first.
    tokio::task::yield_now().await;
    if broker.last_refusal(&subjects) > refusal {
        Sent::Refused
    } else if is_back && broker.session() == *session {
        Sent::Certainly
    } else {
        Sent::Perhaps
    }
}

impl Message {
    /// The verdict that came before it.
    fn said(&self) -> Option<&Said> {
        match self {
            Self::Result { said, .. } | Self::Parked { said, .. } => said.as_ref(),
            Self::Refusal { .. } => None,
        }
    }
}

async fn say(broker: &Broker, verdicts: &Subject, outgoing: &Outgoing) {
    let trace = outgoing.trace.as_ref();
    match &outgoing.message {
        Message::Result { result, id: None, .. } => broker.publish_in(trace, contract::RESULT, result.clone()).await,
        Message::Result { result, id: Some(id), .. } => say_as(broker, id, trace, result.clone()).await,
        Message::Parked { announcement: Some(announcement), .. } => {
            broker.publish_in(trace, contract::APPROVAL_REQUEST, announcement.clone()).await;
        }
        Message::Parked { announcement: None, .. } => {}
        Message::Refusal { verdict } => broker.publish_in(trace, verdicts.clone(), verdict.clone()).await,
    }
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
