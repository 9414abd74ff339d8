//! What reaches a worker besides assignments: cancels, and answers to requests for approval.
//!
//! All of it waits in a stream, from which one of all workers takes each message. A cancel is also heard live by every
//! worker, and kept in a bucket that every worker watches: so it also meets work that arrives later.

mod requests; // whoever wants an answer
mod waiting; // what waits in the stream

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::broker::Broker;
use crate::broker::kv::{Bucket, Change};
use crate::broker::streams::{CANCEL_BUCKET, CONTROL_CONSUMER, CONTROL_STREAM};
use crate::cancel::{Cancel, Tombstone};
use crate::contract;
use crate::fault::Invalid;
use crate::health::Health;
use crate::pipeline::Pipeline;
use crate::throttle::Throttle;
use crate::vital::Vital;

/// Between two looks at what still waits.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// A message that nobody gets done for this long does not keep assignments waiting any longer.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long what has been taken may need at the end.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Everything here that serves control messages.
#[derive(Debug)]
pub struct Control {
    desk: Arc<Desk>,
    stop: CancellationToken,
    vital: Vital,
}

/// What all parts of it share.
#[derive(Debug)]
struct Desk {
    pipeline: Arc<Pipeline>,
    broker: Broker,
    health: Health,
    cancels: Bucket,
    /// Messages that have been taken and are not done.
    tasks: TaskTracker,
    /// Those that could not be read.
    dropped: Throttle,
}

impl Control {
    /// Begins to serve.
    pub fn start(pipeline: Arc<Pipeline>, broker: Broker, health: Health, vital: Vital) -> Self {
        let desk = Arc::new(Desk {
            pipeline,
            cancels: Bucket::new(broker.clone(), CANCEL_BUCKET),
            broker,
            health,
            tasks: TaskTracker::new(),
            dropped: Throttle::new(waiting::TELL_AGAIN),
        });
        let control = Self { desk, stop: CancellationToken::new(), vital };
        control.spawn("hear cancels", hear(Arc::clone(&control.desk)));
        control.spawn("answer cancels", requests::answer(Arc::clone(&control.desk)));
        let desk = Arc::clone(&control.desk);
        control.spawn("take control messages", async move {
            desk.pipeline.jetstream().await;
            waiting::take(desk).await;
        });
        control
    }

    /// Returns when everything that had come in before is done and known here: no assignment may be taken earlier, or
    /// it might run although it was cancelled.
    pub async fn caught_up(&self) {
        let desk = Arc::clone(&self.desk);
        // Where nothing is kept there is nothing to catch up with.
        let changes = if desk.pipeline.has_jetstream() { Some(desk.catch_up().await) } else { None };
        self.spawn("note cancels", async move {
            desk.pipeline.jetstream().await;
            let mut changes = match changes {
                Some(changes) => changes,
                None => desk.catch_up().await,
            };
            while let Some(change) = changes.recv().await {
                desk.note(change);
            }
        });
    }

    /// Starts a task that ends with the others; earlier is too early.
    fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.vital.spawn(name, async move {
            stop.run_until_cancelled(task).await;
        });
    }

    /// Takes no more, and finishes what has been taken. What is lost on the way comes back to another worker.
    pub async fn finish(self) {
        self.stop.cancel();
        self.desk.tasks.close();
        let _ = tokio::time::timeout(LAST_WORDS, self.desk.tasks.wait()).await;
    }
}

impl Desk {
    /// Returns when everything that was there is known, with what comes after it.
    async fn catch_up(&self) -> mpsc::Receiver<Change> {
        self.nothing_waits().await;
        // What others have written before their messages were done is among the first that the bucket tells.
        let mut changes = self.cancels.watch(self.health.clone());
        while let Some(change) = changes.recv().await {
            if change == Change::Current {
                break;
            }
            self.note(change);
        }
        changes
    }

    async fn nothing_waits(&self) {
        let (mut done, mut since) = (None, Instant::now());
        let mut until = None;
        loop {
            if let Ok(stream) = self.broker.jetstream().get_stream(CONTROL_STREAM).await
                && let Ok(consumer) = stream.consumer_info(CONTROL_CONSUMER).await
            {
                let until = *until.get_or_insert(stream.cached_info().state.last_sequence);
                let (pending, unsettled) = (consumer.num_pending, consumer.num_ack_pending);
                let settled = consumer.ack_floor.stream_sequence;
                if (pending == 0 && unsettled == 0) || settled >= until {
                    return;
                }
                if done.replace(settled) != Some(settled) {
                    since = Instant::now();
                } else if since.elapsed() >= PATIENCE {
                    tracing::warn!(pending, unsettled, "control messages do not get done: going on");
                    return;
                }
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// A cancel that stands from now on, or has stood before this worker came.
    fn note(&self, change: Change) {
        if let Change::Put(entry) = change {
            match Tombstone::read(&entry) {
                Ok((key, tombstone)) => self.pipeline.cancel(&key, &tombstone),
                Err(Invalid { pointer: field, reason, .. }) => {
                    let (bucket, key) = (CANCEL_BUCKET, entry.key);
                    tracing::warn!(bucket, key, field, reason, "ignored what stands under this key: it is no cancel");
                }
            }
        }
    }
}

/// Every worker hears each cancel at once, and stops what it has here. One that cannot be read is dropped, and reported,
/// by whoever takes it from the stream.
async fn hear(desk: Arc<Desk>) {
    let subscribed = desk.broker.listen(contract::CANCEL, None).await;
    let Ok(mut messages) = subscribed.inspect_err(|error| tracing::error!(%error, "cannot hear cancels")) else {
        return;
    };
    loop {
        let message = messages.next().await;
        if let Ok(cancel) = Cancel::decode(&message.payload) {
            desk.pipeline.hear_cancel(&cancel.key, &cancel.tombstone(None));
        }
    }
}
