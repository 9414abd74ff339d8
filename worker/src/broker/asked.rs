//! What streams were asked to keep and have not answered yet: many requests on their way at once, over one inbox.
//!
//! A request of the client's own costs a random inbox, a timer, and a place in its table. And it is given up after a fixed
//! time, though it may still be on its way: then whoever asks again sends the same bytes behind themselves, and on a slow
//! link none of them ever arrives in time. But the broker reads one connection in order. So while somebody waits, a mark
//! goes out behind the requests, to this inbox: when it comes back, the broker has read them, and their answers are due.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_nats::connection::State;
use async_nats::{Client, HeaderMap, Message, PublishError, Subject, SubscribeError, Subscriber};
use bytes::Bytes;
use futures::StreamExt;
use tokio::sync::oneshot;

use super::REQUEST_TIMEOUT;

/// Between two looks at who waits. Each sends a mark where the broker may not have read all requests.
const LOOK: Duration = Duration::from_millis(500);
/// Begins the last token of a mark's subject; that of an answer is a number alone.
const MARK: char = 'm';

/// Requests and their answers. The task that hears them ends with the client.
#[derive(Debug)]
pub(super) struct Asked {
    client: Client,
    inbox: String,
    waiting: Arc<Waiting>,
}

/// Who waits for an answer.
#[derive(Debug, Default)]
struct Waiting(Mutex<Waiters>);

#[derive(Debug, Default)]
struct Waiters {
    /// The number of the next request.
    next: u64,
    /// By the number at the end of the subject that the answer comes on.
    by_number: HashMap<u64, Waiter>,
}

#[derive(Debug)]
struct Waiter {
    /// Since when the broker has surely read the request.
    read: Option<Instant>,
    answer: oneshot::Sender<Message>,
}

impl Asked {
    /// Hears answers on an inbox of its own.
    ///
    /// # Errors
    /// The connection is closed.
    pub(super) async fn new(client: Client) -> Result<Self, SubscribeError> {
        let inbox = client.new_inbox();
        let answers = client.subscribe(format!("{inbox}.*")).await?;
        let asked = Self { client, inbox, waiting: Arc::default() };
        let (client, inbox, waiting) = (asked.client.clone(), asked.inbox.clone(), Arc::clone(&asked.waiting));
        tokio::spawn(async move {
            tokio::select! {
                () = hear(answers, &waiting) => {}
                () = look(&client, &inbox, &waiting) => {}
            }
            // Nobody hears answers any more.
            waiting.lock().by_number.clear();
        });
        Ok(asked)
    }

    /// Sends one request. The answer is `None` where none has come in [`REQUEST_TIMEOUT`] since the broker read it.
    ///
    /// # Errors
    /// It could not be sent.
    pub(super) async fn ask(
        &self,
        subject: Subject,
        headers: HeaderMap,
        payload: Bytes,
    ) -> Result<Option<Message>, PublishError> {
        let (answer, answered) = oneshot::channel();
        let number = self.waiting.add(answer);
        let reply = format!("{}.{number}", self.inbox);
        self.client.publish_with_reply_and_headers(subject, reply, headers, payload).await.inspect_err(|_| {
            self.waiting.remove(number);
        })?;
        Ok(answered.await.ok())
    }
}

impl Waiting {
    fn add(&self, answer: oneshot::Sender<Message>) -> u64 {
        let mut waiters = self.lock();
        let number = waiters.next;
        waiters.next += 1;
        waiters.by_number.insert(number, Waiter { read: None, answer });
        number
    }

    fn remove(&self, number: u64) -> Option<Waiter> {
        self.lock().by_number.remove(&number)
    }

    /// An answer or a mark has come.
    fn hear(&self, message: Message) {
        let token = message.subject.rsplit('.').next().unwrap_or_default();
        if let Some(mark) = token.strip_prefix(MARK) {
            mark.parse().into_iter().for_each(|mark| self.is_read_before(mark));
        } else if let Some(waiter) = token.parse().ok().and_then(|number| self.remove(number)) {
            // Whoever asked may have gone away.
            let _ = waiter.answer.send(message);
        }
    }

    /// The number that comes after all requests of which the broker may not have read some.
    fn mark(&self) -> Option<u64> {
        let waiters = self.lock();
        waiters.by_number.values().any(|waiter| waiter.read.is_none()).then_some(waiters.next)
    }

    /// The broker has read all requests before this number.
    fn is_read_before(&self, mark: u64) {
        let now = Instant::now();
        for (_, waiter) in self.lock().by_number.iter_mut().filter(|(number, _)| **number < mark) {
            waiter.read.get_or_insert(now);
        }
    }

    /// Those whose answers have been due for so long are told that there is none.
    fn give_up(&self, patience: Duration) {
        let is_wanted = |waiter: &Waiter| !waiter.answer.is_closed();
        let may_come = |waiter: &Waiter| waiter.read.is_none_or(|read| read.elapsed() < patience);
        self.lock().by_number.retain(|_, waiter| is_wanted(waiter) && may_come(waiter));
    }

    fn lock(&self) -> MutexGuard<'_, Waiters> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn hear(mut answers: Subscriber, waiting: &Waiting) {
    while let Some(answer) = answers.next().await {
        waiting.hear(answer);
    }
}

/// What is sent while there is no connection would wait for the next one: marks have time until then.
async fn look(client: &Client, inbox: &str, waiting: &Waiting) {
    let mut looks = tokio::time::interval(LOOK);
    loop {
        looks.tick().await;
        waiting.give_up(REQUEST_TIMEOUT);
        if let Some(mark) = waiting.mark().filter(|_| client.connection_state() == State::Connected) {
            let _ = client.publish(format!("{inbox}.{MARK}{mark}"), Bytes::new()).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(subject: &str) -> Message {
        let (reply, headers, status, description) = (None, None, None, None);
        Message { subject: subject.into(), reply, payload: Bytes::new(), headers, status, description, length: 0 }
    }

    #[test]
    fn nothing_is_given_up_before_the_broker_has_read_it() {
        let waiting = Waiting::default();
        let mut answers = Vec::new();
        let mut ask = || {
            let (answer, answered) = oneshot::channel();
            answers.push(answered);
            waiting.add(answer)
        };
        assert_eq!([ask(), ask()], [0, 1]);
        assert_eq!(waiting.mark(), Some(2));
        ask();
        waiting.give_up(Duration::ZERO);
        waiting.hear(message("_INBOX_WORKER.x.m2"));
        assert_eq!(waiting.mark(), Some(3), "the last one may still be on its way");
        waiting.hear(message("_INBOX_WORKER.x.1"));
        waiting.give_up(Duration::ZERO);
        let came: Vec<_> = answers.iter_mut().map(|answered| answered.try_recv().map(drop)).collect();
        let (given_up, not_yet) = (Err(oneshot::error::TryRecvError::Closed), Err(oneshot::error::TryRecvError::Empty));
        assert_eq!(came, [given_up, Ok(()), not_yet]);
    }

    #[test]
    fn what_nobody_waits_for_any_more_takes_no_room() {
        let waiting = Waiting::default();
        waiting.add(oneshot::channel().0);
        waiting.give_up(REQUEST_TIMEOUT);
        assert!(waiting.lock().by_number.is_empty());
        for late in ["_INBOX_WORKER.x.0", "_INBOX_WORKER.x.m", "_INBOX_WORKER.x.mx", "x"] {
            waiting.hear(message(late));
        }
    }
}
