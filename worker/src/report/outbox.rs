//! What is on its way to the Router. A result or a refusal counts as published when the broker has certainly read it.
//!
//! They are core messages, which nobody acknowledges. But the broker reads one connection in order: when a message
//! that we send to ourselves comes back over the same session, it has read everything sent before. So they go out in
//! batches, each followed by such a fence. The verdict that came before a result was said in the same session, or it is
//! said again: a session that breaks takes with it what nobody knows the broker has read. So it is with what the broker
//! has read and refused, since it is not permitted: it says so before the fence comes back.

use std::time::Duration;

use async_nats::header::NATS_MESSAGE_ID;
use async_nats::{HeaderMap, Subject};
use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use crate::assignment::Assignment;
use crate::broker::{Broker, Session, Unread};
use crate::contract;
use crate::report;
use crate::trace_context::TraceContext;
use crate::vital::Vital;

/// A fence that has not come back after this may be lost: another one is sent.
const FENCE_TIMEOUT: Duration = Duration::from_secs(5);
/// After the broker refused a message, before the same one is tried again.
const REFUSED_PAUSE: Duration = Duration::from_secs(1);
/// Until there is another client.
const MOMENT: Duration = Duration::from_millis(100);
/// Results in one batch; also how many may wait for the next.
const BATCH: usize = 1024;
/// Bytes in one batch, unless a message has more: as many as the largest message usually has. On a slow link the client
/// gives a connection up on which nothing comes back for long, so each batch has its fence before more follow.
const BATCH_BYTES: usize = 1024 * 1024;

/// Publishes in the order in which it was handed in.
#[derive(Clone, Debug)]
pub struct Outbox(mpsc::Sender<Outgoing>);

/// A verdict that was said.
#[derive(Clone, Debug)]
pub struct Said {
    /// When, by its own words, in milliseconds of Unix time.
    pub at: i64,
    /// The session at that time; a later one may have carried it.
    pub session: Session,
    /// The last refusal of a verdict before that; a later one may have been its own.
    pub refusal: u64,
}

/// The verdict that the Router hears before a message. Its bytes are needed again so rarely that nobody keeps them.
#[derive(Clone, Copy)]
pub struct Before<'a> {
    /// When it was said, and how.
    pub said: &'a Said,
    /// What it is about.
    pub assignment: &'a Assignment,
    /// Who has said it.
    pub worker_id: &'a str,
}

impl Before<'_> {
    fn again(&self) -> Bytes {
        report::accepted(self.assignment, self.worker_id, self.said.at)
    }
}

#[derive(Debug)]
struct Outgoing {
    words: Box<Words>,
    verdict: Verdict,
    answer: oneshot::Sender<Answer>,
}

#[derive(Debug)]
struct Words {
    message: Message,
    trace: Option<TraceContext>,
}

#[derive(Debug)]
enum Message {
    Result { result: Bytes, id: Option<String> },
    Waiting { announcement: Option<Bytes> },
    Refusal { verdict: Bytes },
}

impl Message {
    fn len(&self) -> usize {
        match self {
            Self::Result { result, .. } => result.len(),
            Self::Waiting { announcement } => announcement.as_ref().map_or(0, Bytes::len),
            Self::Refusal { verdict } => verdict.len(),
        }
    }
}

/// The verdict that comes before a message.
#[derive(Debug)]
enum Verdict {
    /// There is none, or the broker has it.
    Settled,
    Said(Said),
    Again(Bytes),
}

#[derive(Debug)]
enum Answer {
    Published,
    /// Nothing was published: the broker may not have the verdict.
    VerdictIsLost(Box<Words>),
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
    pub async fn publish(
        &self,
        result: Bytes,
        before: Option<Before<'_>>,
        id: Option<String>,
        trace: Option<TraceContext>,
    ) {
        self.hand_in(Message::Result { result, id }, before, trace).await;
    }

    /// Returns when the broker has the verdict on what waits for a person or for its tenant's turn, and what approvers are
    /// told of it.
    pub async fn announce(&self, announcement: Option<Bytes>, before: Option<Before<'_>>, trace: Option<TraceContext>) {
        self.hand_in(Message::Waiting { announcement }, before, trace).await;
    }

    /// Returns when the broker has the verdict on what will not run.
    pub async fn refuse(&self, verdict: Bytes, trace: Option<TraceContext>) {
        self.hand_in(Message::Refusal { verdict }, None, trace).await;
    }

    async fn hand_in(&self, message: Message, before: Option<Before<'_>>, trace: Option<TraceContext>) {
        let mut words = Box::new(Words { message, trace });
        let mut verdict = before.map_or(Verdict::Settled, |before| Verdict::Said(before.said.clone()));
        loop {
            let (answer, answered) = oneshot::channel();
            if self.0.send(Outgoing { words, verdict, answer }).await.is_err() {
                return;
            }
            match (answered.await, before) {
                (Ok(Answer::VerdictIsLost(unsaid)), Some(before)) => {
                    (words, verdict) = (unsaid, Verdict::Again(before.again()));
                }
                _ => return,
            }
        }
    }
}

async fn publish(broker: Broker, verdicts: Subject, mut waiting: mpsc::Receiver<Outgoing>) {
    let mut batch = Vec::with_capacity(BATCH);
    while waiting.recv_many(&mut batch, BATCH).await > 0 {
        let mut at_once = batch.len();
        loop {
            ask_for_lost_verdicts(&broker, &verdicts, &mut batch);
            let next = at_once.min(fitting(&batch));
            if next == 0 {
                break;
            }
            match send(&broker, &verdicts, batch.split_at(next).0).await {
                Sent::Certainly => batch.drain(..next).for_each(|outgoing| {
                    let _ = outgoing.answer.send(Answer::Published);
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

/// Gives those back whose verdict was said in an earlier session, or may have been refused: it has to be said again first.
fn ask_for_lost_verdicts(broker: &Broker, verdicts: &Subject, batch: &mut Vec<Outgoing>) {
    let (session, refusal) = (broker.session(), broker.last_refusal(&[verdicts]));
    let is_lost = |outgoing: &mut Outgoing| match &outgoing.verdict {
        Verdict::Said(said) => said.session != session || refusal > said.refusal,
        Verdict::Settled | Verdict::Again(_) => false,
    };
    for Outgoing { words, answer, .. } in batch.extract_if(.., is_lost) {
        let _ = answer.send(Answer::VerdictIsLost(words));
    }
}

/// How many of these make one batch: one at least, where there is any.
fn fitting(waiting: &[Outgoing]) -> usize {
    let mut bytes = 0;
    let fits = |outgoing: &&Outgoing| {
        bytes += outgoing.words.message.len();
        bytes <= BATCH_BYTES
    };
    waiting.iter().take_while(fits).count().max(1).min(waiting.len())
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
    let again = |outgoing: &'_ Outgoing| match &outgoing.verdict {
        Verdict::Again(verdict) => Some((outgoing.words.trace.clone(), verdict.clone())),
        Verdict::Settled | Verdict::Said(_) => None,
    };
    let lost: Vec<_> = batch.iter().filter_map(again).collect();
    if !lost.is_empty() {
        let again = async {
            for (trace, verdict) in lost {
                broker.publish_in(trace.as_ref(), verdicts.clone(), verdict).await;
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
    publishing.await;
    let is_read = is_read(broker, session).await;
    // The client tells refusals by a task of its own, which has been woken before this one where they came first.
    tokio::task::yield_now().await;
    if broker.last_refusal(&subjects) > refusal {
        Sent::Refused
    } else if is_read {
        Sent::Certainly
    } else {
        Sent::Perhaps
    }
}

async fn say(broker: &Broker, verdicts: &Subject, outgoing: &Outgoing) {
    let Words { message, trace } = &*outgoing.words;
    let trace = trace.as_ref();
    match message {
        Message::Result { result, id: None } => broker.publish_in(trace, contract::RESULT, result.clone()).await,
        Message::Result { result, id: Some(id) } => say_as(broker, id, trace, result.clone()).await,
        Message::Waiting { announcement: Some(announcement) } => {
            broker.publish_in(trace, contract::APPROVAL_REQUEST, announcement.clone()).await;
        }
        Message::Waiting { announcement: None } => {}
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

/// Whether the broker has read, in that session, what was published before this; however long that takes. A link may be
/// slow: what is on its way is not sent again behind itself.
async fn is_read(broker: &Broker, session: &Session) -> bool {
    while broker.session() == *session {
        match broker.read_within(FENCE_TIMEOUT).await {
            Ok(()) => return broker.session() == *session,
            Err(Unread::Late) => {}
            Err(Unread::ClientFailed) => {
                tokio::time::sleep(MOMENT).await;
                return false;
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_ends_at_a_megabyte_unless_one_message_is_larger() {
        let outgoing = |bytes: usize| {
            let message = Message::Result { result: vec![0; bytes].into(), id: None };
            let words = Box::new(Words { message, trace: None });
            Outgoing { words, verdict: Verdict::Settled, answer: oneshot::channel().0 }
        };
        for (sizes, fit) in [
            (&[][..], 0),
            (&[500; 3], 3),
            (&[900_000, 900_000], 1),
            (&[2 * BATCH_BYTES, 500], 1),
            (&[500, 2 * BATCH_BYTES], 1),
        ] {
            let waiting: Vec<_> = sizes.iter().map(|bytes| outgoing(*bytes)).collect();
            assert_eq!(fitting(&waiting), fit, "{sizes:?}");
        }
    }
}
