//! Whoever sends a cancel with a reply subject is told by one worker what has come of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::Semaphore;

use super::Desk;
use crate::broker::streams::CONTROL_CONSUMER;
use crate::cancel::Cancel;
use crate::contract::{self, CancelAnswer, CancelError, CancelOutcome, Refused};
use crate::fault::{Cause, Invalid};
use crate::ids::AssignmentKey;
use crate::report::ledger::Record;

/// How long an answer waits for a record.
const PATIENCE: Duration = Duration::from_millis(250);
/// Between the first looks at the record; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// How long a requester can be expected to wait for the cancel to be kept.
const KEEPING: Duration = Duration::from_secs(5);
/// Requests that are worked on at once.
const AT_ONCE: usize = 1024;

/// Answers requests: each goes to one of all workers.
pub(super) async fn answer(desk: Arc<Desk>) {
    let subscribed = desk.broker.listen(contract::CANCEL, Some(CONTROL_CONSUMER)).await;
    let Ok(mut messages) = subscribed.inspect_err(|error| tracing::error!(%error, "cannot answer cancels")) else {
        return;
    };
    let places = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let message = messages.next().await;
        let Some(reply) = message.reply else { continue };
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let desk_here = Arc::clone(&desk);
        desk.tasks.spawn(async move {
            if let Some(answer) = desk_here.answer(&message.payload).await {
                desk_here.broker.publish(reply, answer).await;
            }
            drop(place);
        });
    }
}

impl Desk {
    /// `None` where the cancel could not be kept in time: it still waits in the stream.
    async fn answer(&self, payload: &[u8]) -> Option<Bytes> {
        let cancel = match Cancel::decode(payload) {
            Ok(cancel) => cancel,
            Err(invalid) => return Some(refusal(&invalid)),
        };
        tokio::time::timeout(KEEPING, self.keep_heard(&cancel)).await.ok()?;
        let outcome = self.outcome(&cancel.key).await;
        Some(contract::encode(&CancelAnswer { assignment_id: &cancel.key.assignment_id, outcome }))
    }

    /// What stands in the record when it is cancelled, or when the time is up: an older record may still be replaced by a
    /// run that is being stopped.
    async fn outcome(&self, key: &AssignmentKey) -> CancelOutcome {
        let started = Instant::now();
        let (mut first, mut pause) = (None, FIRST_PAUSE);
        loop {
            // Unknown is as good as none: the cancel is kept.
            let record = self.pipeline.recorded(key).await;
            let first = *first.get_or_insert(record.as_ref().map(|record| record.place));
            match &record {
                Some(record) if is_cancelled(record) => return CancelOutcome::Cancelled,
                Some(record) if first != Some(record.place) => return CancelOutcome::Finished,
                Some(_) if started.elapsed() >= PATIENCE => return CancelOutcome::Finished,
                None if started.elapsed() >= PATIENCE => return CancelOutcome::Recorded,
                Some(_) | None => {}
            }
            tokio::time::sleep(pause.min(PATIENCE.saturating_sub(started.elapsed()))).await;
            pause *= 2;
        }
    }
}

fn is_cancelled(record: &Record) -> bool {
    record.fault.as_ref().is_some_and(|fault| fault.code == Cause::Cancelled.code())
}

fn refusal(invalid: &Invalid) -> Bytes {
    let message = match invalid.pointer.as_str() {
        "" => format!("the cancel {}", invalid.reason),
        _ => invalid.to_string(),
    };
    let error = Refused { code: invalid.cause.code(), message: &message, retryable: false };
    contract::encode(&CancelError { error })
}
