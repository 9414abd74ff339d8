//! Which approvals are past their deadline: an open approval holds no pod, and its deadline must wake one.
//!
//! The bucket is followed once for each connection; only deadlines are kept of it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_nats::jetstream::Context;
use async_nats::jetstream::kv::Operation;
use futures::StreamExt;
use jiff::Timestamp;
use serde::Deserialize;
use tokio_util::task::AbortOnDropHandle;

use crate::error::chain;
use crate::lock::lock;

const BUCKET: &str = "caf-approvals";
/// A namespace has 63 bytes at most, a name 253.
const LONGEST_POOL: usize = 63 + 1 + 253;
/// How long a bucket that is missing, or does not answer, is left alone.
const RETRY: Duration = Duration::from_secs(5);
/// A bucket that has nothing to say for so long has said what there is.
const SILENCE: Duration = Duration::from_secs(2);

/// As much of a request as is needed.
#[derive(Debug, Deserialize)]
struct Request {
    /// `<namespace>/<name>`; one of a worker started alone has none, and no operator wakes it.
    pool: String,
    /// Unix time in milliseconds.
    expires_at: i64,
}

impl Request {
    /// `None` for one that no pool can be meant by: whoever may write to the bucket fills no memory with names.
    fn of_a_pool(value: &[u8]) -> Option<Self> {
        serde_json::from_slice::<Self>(value).ok().filter(|request| request.pool.len() <= LONGEST_POOL)
    }
}

#[derive(Default)]
struct Open {
    requests: HashMap<String, Request>,
    is_current: bool,
}

/// The open approvals of one broker. It follows them until it is dropped.
pub struct Approvals {
    open: Arc<Mutex<Open>>,
    _follower: AbortOnDropHandle<()>,
}

impl Approvals {
    /// Follows them from now on.
    pub fn follow(jetstream: Context) -> Self {
        let open = Arc::<Mutex<Open>>::default();
        let follower = tokio::spawn(follow(jetstream, Arc::clone(&open)));
        Self { open, _follower: AbortOnDropHandle::new(follower) }
    }

    /// How many of the pool `<namespace>/<name>` are past their deadline; `None` as long as that is not known.
    pub fn due(&self, pool: &str, now: Timestamp) -> Option<i64> {
        let open = lock(&self.open);
        let is_due = |request: &&Request| request.expires_at <= now.as_millisecond() && request.pool == pool;
        open.is_current.then(|| i64::try_from(open.requests.values().filter(is_due).count()).unwrap_or(i64::MAX))
    }
}

async fn follow(jetstream: Context, open: Arc<Mutex<Open>>) {
    loop {
        if let Err(error) = once(&jetstream, &open).await {
            tracing::debug!("approvals are not followed: {}", chain(error.as_ref()));
        }
        lock(&open).is_current = false;
        tokio::time::sleep(RETRY).await;
    }
}

/// Until something breaks.
async fn once(jetstream: &Context, open: &Mutex<Open>) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let bucket = jetstream.get_key_value(BUCKET).await?;
    let mut changes = bucket.watch_with_history(">").await?;
    *lock(open) = Open::default();
    loop {
        // An empty bucket says nothing, and neither does one whose last message has been told.
        let Ok(change) = tokio::time::timeout(SILENCE, changes.next()).await else {
            if !lock(open).is_current {
                bucket.status().await?;
                lock(open).is_current = true;
            }
            continue;
        };
        let entry = change.ok_or("the bucket is gone")??;
        let mut open = lock(open);
        open.is_current |= entry.seen_current;
        match (entry.operation, Request::of_a_pool(&entry.value)) {
            (Operation::Put, Some(request)) => drop(open.requests.insert(entry.key, request)),
            _ => drop(open.requests.remove(&entry.key)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_a_name_that_a_pool_may_have_is_kept() {
        let kept = |request: serde_json::Value| Request::of_a_pool(request.to_string().as_bytes()).is_some();
        let longest = format!("{}/{}", "n".repeat(63), "p".repeat(253));
        assert!(kept(json!({"pool": "flows/orders", "expires_at": 1, "prompt": "yes?"})));
        assert!(kept(json!({"pool": longest, "expires_at": 1})));
        assert!(!kept(json!({"pool": format!("{longest}s"), "expires_at": 1})));
        assert!(!kept(json!({"pool": "p".repeat(1 << 20), "expires_at": 1})));
        for request in
            [json!({"expires_at": 1}), json!({"pool": null, "expires_at": 1}), json!({"pool": "flows/orders"})]
        {
            assert!(!kept(request.clone()), "{request}");
        }
    }
}
