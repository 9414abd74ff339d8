//! A message that waits belongs to the pool, not to a busy worker: it is handed back while another worker has room.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::Pipeline;
use crate::broker::streams::{Assignments, Ready, Source};

/// How long a first delivery waits here before others are asked for.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two looks; the broker is asked only when something has lost its patience.
const LOOK: Duration = Duration::from_millis(300);
/// What is handed back has been taken after this, where somebody takes it.
const TAKEN: Duration = Duration::from_millis(50);
/// Between two hand-overs: while one lasts, this worker pulls nothing.
const REST: Duration = Duration::from_secs(3);

/// How long a delivery waits here before it may be handed back. Idle pulls do not say what for: where those who take it
/// are as busy in its pool, it must not wander about for ever.
pub(super) fn patience(delivered: i64) -> Duration {
    let doublings = u32::try_from(delivered - 1).unwrap_or_default().min(6);
    PATIENCE * 2_u32.pow(doublings)
}

/// Looks until the worker has stopped.
pub async fn rebalance(pipeline: Arc<Pipeline>, streams: watch::Receiver<Ready>, stop: CancellationToken) {
    while !stop.is_cancelled() {
        tokio::time::sleep(LOOK).await;
        if pipeline.schedule.impatient() == 0 {
            continue;
        }
        let Some(ready) = streams.borrow().assignments.clone() else { continue };
        if pipeline.idle_pulls(&ready).await > pipeline.load.flow(Source::Intake).pulls() {
            pipeline.hand_over(&ready).await;
            tokio::time::sleep(REST).await;
        }
    }
}

impl Pipeline {
    /// Hands back as much as others take: one for each idle pull, as long as there are any.
    async fn hand_over(&self, ready: &Assignments) {
        // While pulls of our own are open, it would come back to them.
        let _yielding = self.load.stop_asking();
        self.pulls_ended().await;
        let mut handed_over = 0;
        loop {
            let sent = self.schedule.send_away(self.idle_pulls(ready).await);
            if sent == 0 {
                break;
            }
            handed_over += sent;
            tokio::time::sleep(TAKEN).await;
        }
        if handed_over > 0 {
            tracing::debug!(handed_over, "another worker has room for what waited here");
        }
    }

    /// Open pulls that the broker has nothing for, of all workers; none where it cannot be asked.
    async fn idle_pulls(&self, ready: &Assignments) -> usize {
        let info = async {
            let stream = self.broker.jetstream().get_stream_no_info(&ready.stream).await.ok()?;
            stream.consumer_info(&ready.consumer.name).await.ok()
        };
        info.await.filter(|info| info.num_pending == 0).map_or(0, |info| info.num_waiting)
    }
}
