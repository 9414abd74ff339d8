//! Results on their way to the Router. A result counts as published when the broker has certainly read it.
//!
//! Results are core messages, which nobody acknowledges. But the broker reads one connection in order: when a message
//! that we send to ourselves comes back over the same session, it has read everything sent before. So results go out
//! in batches, each followed by such a fence.

use std::time::Duration;

use async_nats::Subscriber;
use bytes::Bytes;
use futures::StreamExt;
use tokio::sync::{mpsc, oneshot};

use crate::broker::Broker;
use crate::contract;

/// A fence that has not come back after this may be lost: the batch is sent again, the same bytes.
const FENCE_TIMEOUT: Duration = Duration::from_secs(5);
/// Results in one batch; also how many may wait for the next.
const BATCH: usize = 1024;

/// Publishes results in the order in which they were handed in.
#[derive(Clone, Debug)]
pub struct Outbox(mpsc::Sender<Outgoing>);

#[derive(Debug)]
struct Outgoing {
    result: Bytes,
    published: oneshot::Sender<()>,
}

impl Outbox {
    /// Starts the task that publishes; it ends when the last handle is dropped.
    pub fn start(broker: Broker) -> Self {
        let (sender, waiting) = mpsc::channel(BATCH);
        tokio::spawn(publish(broker, waiting));
        Self(sender)
    }

    /// Returns when the broker has the result, however long that takes.
    pub async fn publish(&self, result: Bytes) {
        let (published, done) = oneshot::channel();
        if self.0.send(Outgoing { result, published }).await.is_ok() {
            let _ = done.await;
        }
    }
}

async fn publish(broker: Broker, mut waiting: mpsc::Receiver<Outgoing>) {
    let mut batch = Vec::with_capacity(BATCH);
    while waiting.recv_many(&mut batch, BATCH).await > 0 {
        while !send(&broker, &batch).await {
            tracing::warn!(results = batch.len(), "not sure that the broker has the results: sending them again");
        }
        for outgoing in batch.drain(..) {
            let _ = outgoing.published.send(());
        }
    }
}

/// Whether the broker certainly has the batch.
async fn send(broker: &Broker, batch: &[Outgoing]) -> bool {
    let session = broker.session();
    let inbox = broker.client().new_inbox();
    let Ok(fence) = broker.client().subscribe(inbox.clone()).await else { return false };
    for outgoing in batch {
        broker.say(contract::RESULT, outgoing.result.clone()).await;
    }
    broker.say(inbox, Bytes::new()).await;
    came_back(fence).await && broker.session() == session
}

async fn came_back(mut fence: Subscriber) -> bool {
    tokio::time::timeout(FENCE_TIMEOUT, fence.next()).await.is_ok_and(|message| message.is_some())
}
