//! Whether this worker may run an assignment now. Tenants' budgets will be asked here too.

use crate::assignment::{Assignment, Pool};
use crate::blocks::BlockKind;
use crate::fault::Cause;
use crate::schedule::Schedule;

/// Proof that an assignment may wait for a slot here.
#[derive(Debug)]
pub struct Admitted(pub Assignment);

/// Why it may not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// [`Cause::NoSuchPool`] or [`Cause::NeverFits`].
    pub cause: Cause,
    /// For a person.
    pub message: String,
}

/// Admits what there are slots and memory for.
///
/// # Errors
/// There is no such pool here, or the assignment would never fit.
pub fn admit(
    assignment: Assignment,
    schedule: &Schedule,
    max_memory_mb: u64,
) -> Result<Admitted, Box<(Assignment, Refusal)>> {
    match refusal(&assignment, schedule, max_memory_mb) {
        None => Ok(Admitted(assignment)),
        Some(refusal) => Err(Box::new((assignment, refusal))),
    }
}

fn refusal(assignment: &Assignment, schedule: &Schedule, max_memory_mb: u64) -> Option<Refusal> {
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
