//! Requests that wait, as far as this worker knows, and the watch of their deadlines.

use std::collections::HashSet;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::end::{CONCLUSION_GRACE_MS, Reason};
use crate::approval::deadlines::Deadlines;
use crate::approval::request::{Request, State};
use crate::broker::kv::{Change, Entry};
use crate::ids::AssignmentKey;
use crate::pipeline::Pipeline;
use crate::vital::Vital;

/// Requests that are looked at at once when many are due.
const LOOKS: usize = 16;
/// So many workers do not all look at the same moment.
const SPREAD_MS: i64 = 250;
/// Workers of the request's own pool come first; those of others help when none has come for so long.
const OTHER_POOLS_GRACE_MS: i64 = 60_000;
/// A request that is still there is looked at again.
const LOOK_AGAIN_MS: i64 = 10_000;
/// The clock may be set: the next deadline is looked at no later than this.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

/// Ends requests at their deadlines, and concludes what a worker left behind, until `stop`.
async fn watch(pipeline: Arc<Pipeline>, stop: CancellationToken) {
    tokio::select! {
        () = pipeline.jetstream() => {}
        () = stop.cancelled() => return,
    }
    let mut changes = pipeline.approvals.requests().watch(pipeline.health.clone());
    let mut looks = FuturesUnordered::new();
    loop {
        let now = Timestamp::now().as_millisecond();
        let due_in = {
            let mut deadlines = pipeline.deadlines();
            pipeline.metrics.set_approvals_open(deadlines.len());
            while looks.len() < LOOKS
                && let Some(key) = deadlines.take(now)
            {
                looks.push(pipeline.look_at(key));
            }
            deadlines.next().map_or(i64::MAX, |due| due.saturating_sub(now)).max(0).unsigned_abs()
        };
        tokio::select! {
            change = changes.recv() => match change {
                Some(Change::Anew) => pipeline.deadlines().clear(),
                Some(Change::Put(entry)) => pipeline.note_open(&entry),
                Some(Change::Removed(key)) => pipeline.deadlines().remove(&key),
                Some(Change::Current) => pipeline.deadlines().complete(),
                None => return,
            },
            Some((key, is_there)) = looks.next() => {
                let mut deadlines = pipeline.deadlines();
                if is_there {
                    deadlines.again(&key, Timestamp::now().as_millisecond() + LOOK_AGAIN_MS);
                } else {
                    deadlines.forget(&key);
                }
            }
            () = tokio::time::sleep(Duration::from_millis(due_in).min(LONGEST_SLEEP)), if looks.len() < LOOKS => {}
            () = stop.cancelled() => break,
        }
    }
    // Whatever is dropped here, another worker does: but what has begun is better finished.
    while looks.next().await.is_some() {}
}

impl Pipeline {
    /// Has a task watch the deadlines of approvals until `stop`. A drain waits for it.
    pub fn watch_approvals(self: &Arc<Self>, stop: CancellationToken, vital: &Vital) {
        self.tasks.spawn(vital.watched("watch approvals", watch(Arc::clone(self), stop)));
    }

    /// Which of these have a request that waits, in their order; nothing where none has. What this worker has not been told
    /// yet is asked for. To be asked before their records are read: a request goes when there is its record.
    pub(in crate::pipeline) async fn waiting_for_a_person(&self, keys: &[AssignmentKey]) -> Vec<bool> {
        if self.deadlines().has_none() || !self.has_jetstream() {
            return Vec::new();
        }
        let tokens: Vec<_> = keys.iter().map(AssignmentKey::token).collect();
        let known: Vec<_> = {
            let deadlines = self.deadlines();
            tokens.iter().map(|token| deadlines.has(token)).collect()
        };
        let unknown = tokens.iter().zip(&known).filter(|(_, known)| known.is_none());
        let unknown: Vec<_> = unknown.map(|(token, _)| token.clone()).collect();
        let found = if unknown.is_empty() { HashSet::new() } else { self.ask_which_wait(&unknown).await };
        tokens.iter().zip(known).map(|(token, known)| known.unwrap_or_else(|| found.contains(token))).collect()
    }

    /// Without an answer they count as none: whatever runs, the record decides.
    async fn ask_which_wait(&self, tokens: &[String]) -> HashSet<String> {
        let found = self.approvals.requests().having_values(tokens).await;
        found.inspect_err(|error| tracing::debug!(%error, "cannot tell what waits for a person")).unwrap_or_default()
    }

    /// The request of an entry waits, as far as this worker knows.
    pub(super) fn note_open(&self, entry: &Entry) {
        let due = self.due(entry, Timestamp::now().as_millisecond());
        self.deadlines().set(&entry.key, due);
    }

    pub(super) fn deadlines(&self) -> MutexGuard<'_, Deadlines> {
        self.deadlines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// And whether it was there.
    async fn look_at(&self, key: Arc<str>) -> (Arc<str>, bool) {
        let entry = self.read_request(&key).await;
        let is_there = entry.is_some();
        if let Some(entry) = entry {
            self.bring_forward(entry, Reason::Due).await;
        }
        (key, is_there)
    }

    /// When this worker should look at a request, in Unix milliseconds.
    fn due(&self, entry: &Entry, now: i64) -> i64 {
        let Some(request) = Request::decode(entry) else { return i64::MAX };
        let due = match request.state {
            State::Open(_) => request.expires_at.as_millisecond(),
            State::Ended { .. } => now + CONCLUSION_GRACE_MS,
        };
        let grace = if request.pool == self.identity.pool { 0 } else { OTHER_POOLS_GRACE_MS };
        due + grace + fastrand::i64(0..SPREAD_MS)
    }
}
