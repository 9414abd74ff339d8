//! Waiting for a fact instead of for a time.

use std::time::{Duration, Instant};

/// How long anything may take that takes milliseconds on an idle machine.
pub const SOON: Duration = Duration::from_secs(15);
/// Between two looks: a thousandth of what it may take, and no less or more than this. What may take minutes is asked of an
/// API server that has others to answer.
const LOOK: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(100));

/// Looks until there is something, and returns it.
///
/// # Panics
/// `what` has not happened within `limit`.
pub async fn within<T>(limit: Duration, what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let (started, pause) = (Instant::now(), (limit / 1000).clamp(LOOK.0, LOOK.1));
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(started.elapsed() < limit, "not within {limit:?}: {what}");
        tokio::time::sleep(pause).await;
    }
}

/// Looks until it is so.
///
/// # Panics
/// It is not so within [`SOON`].
pub async fn until(what: &str, mut look: impl AsyncFnMut() -> bool) {
    within(SOON, what, async || look().await.then_some(())).await;
}
