//! Waiting for a fact instead of for a time.

use std::time::{Duration, Instant};

/// How long anything may take that takes milliseconds on an idle machine.
pub const SOON: Duration = Duration::from_secs(15);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(10);

/// Looks until there is something, and returns it.
///
/// # Panics
/// `what` has not happened within `limit`.
pub async fn within<T>(limit: Duration, what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(started.elapsed() < limit, "not within {limit:?}: {what}");
        tokio::time::sleep(LOOK).await;
    }
}

/// Looks until it is so.
///
/// # Panics
/// It is not so within [`SOON`].
pub async fn until(what: &str, mut look: impl AsyncFnMut() -> bool) {
    within(SOON, what, async || look().await.then_some(())).await;
}
