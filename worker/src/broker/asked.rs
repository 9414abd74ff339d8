//! What streams were asked to keep and have not answered yet: many requests on their way at once, over one inbox.
//!
//! A request of the client's own costs a random inbox, a timer, and a place in its table.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use async_nats::{Client, HeaderMap, Message, PublishError, Subject, SubscribeError, Subscriber};
use bytes::Bytes;
use futures::StreamExt;
use tokio::sync::oneshot;

use super::REQUEST_TIMEOUT;

/// Requests and their answers. The task that hears them ends with the connection.
#[derive(Debug)]
pub(super) struct Asked {
    client: Client,
    inbox: String,
    next: AtomicU64,
    waiting: Arc<Waiting>,
}

/// Who waits for an answer, by the number at the end of the subject that it comes on.
#[derive(Debug, Default)]
struct Waiting(Mutex<HashMap<u64, Waiter>>);

#[derive(Debug)]
struct Waiter {
    since: Instant,
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
        let waiting = Arc::new(Waiting::default());
        tokio::spawn(hear(answers, Arc::clone(&waiting)));
        Ok(Self { client, inbox, next: AtomicU64::new(0), waiting })
    }

    /// Sends one request. The answer is `None` where none has come in [`REQUEST_TIMEOUT`].
    ///
    /// # Errors
    /// It could not be sent.
    pub(super) async fn ask(
        &self,
        subject: Subject,
        headers: HeaderMap,
        payload: Bytes,
    ) -> Result<Option<Message>, PublishError> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        self.waiting.lock().insert(number, Waiter { since: Instant::now(), answer });
        let reply = format!("{}.{number}", self.inbox);
        self.client.publish_with_reply_and_headers(subject, reply, headers, payload).await.inspect_err(|_| {
            self.waiting.lock().remove(&number);
        })?;
        Ok(answered.await.ok())
    }
}

impl Waiting {
    fn answer(&self, message: Message) {
        let number = message.subject.rsplit('.').next().and_then(|number| number.parse().ok());
        let waiter = number.and_then(|number: u64| self.lock().remove(&number));
        if let Some(waiter) = waiter {
            // Whoever asked may have gone away.
            let _ = waiter.answer.send(message);
        }
    }

    /// Those who have waited for too long are told so.
    fn give_up(&self) {
        self.lock().retain(|_, waiter| waiter.since.elapsed() < REQUEST_TIMEOUT);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Waiter>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn hear(mut answers: Subscriber, waiting: Arc<Waiting>) {
    let mut looks = tokio::time::interval(REQUEST_TIMEOUT / 10);
    loop {
        tokio::select! {
            answer = answers.next() => match answer {
                Some(answer) => waiting.answer(answer),
                None => return,
            },
            _ = looks.tick() => waiting.give_up(),
        }
    }
}
