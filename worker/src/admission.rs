//! Whether this worker may run an assignment.

use crate::assignment::{Assignment, Pool};
use crate::blocks::BlockKind;
use crate::fault::Cause;
use crate::schedule::Schedule;

/// Why an assignment may not wait for a slot here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// [`Cause::NoSuchPool`] or [`Cause::NeverFits`].
    pub cause: Cause,
    /// For a person.
    pub message: String,
}

/// None for what there are slots and memory for.
pub fn refusal(assignment: &Assignment, schedule: &Schedule, max_memory_mb: u64) -> Option<Refusal> {
    if let Some(wanted) = assignment.memory_mb.filter(|wanted| *wanted > max_memory_mb) {
        let message = format!("/resources/memory_mb asks for {wanted} MB, this worker may hold {max_memory_mb}");
        return Some(Refusal { cause: Cause::NeverFits, message });
    }
    (schedule.size(assignment.pool) == 0)
        .then(|| Refusal { cause: Cause::NoSuchPool, message: no_such_pool(assignment.pool, assignment.block.kind()) })
}

fn no_such_pool(pool: Pool, kind: BlockKind) -> String {
    format!("this worker has no {} slots for {}", pool.as_str(), kind.as_str())
}
