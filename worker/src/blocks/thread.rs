//! Work elsewhere: on a thread that may wait for a disk, where it holds up no other.

use tokio::task::JoinError;

use super::{Output, Scope};
use crate::fault::{Cause, Fault};

/// Runs `work` on a thread of its own; the CPU time there counts like any other. A panic goes on to whoever waits.
pub(super) async fn on_thread(
    scope: Scope,
    work: impl FnOnce(&Scope) -> Result<Output, Fault> + Send + 'static,
) -> Result<Output, Fault> {
    let cpu_time = scope.cpu_time.clone();
    let done = tokio::task::spawn_blocking(move || scope.cpu_time.count(|| work(&scope))).await;
    outcome(done).and_then(|output| cpu_time.check().map(|()| output))
}

/// What came of work elsewhere. A panic goes on to whoever waits.
pub(super) fn outcome<T>(done: Result<Result<T, Fault>, JoinError>) -> Result<T, Fault> {
    match done {
        Ok(outcome) => outcome,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(Fault::new(Cause::ResourceUnavailable, "the worker is shutting down")),
    }
}
