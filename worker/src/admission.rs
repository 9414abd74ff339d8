//! Whether this worker may run an assignment.

use crate::assignment::Assignment;
use crate::blocks::BlockKind;
use crate::fault::Cause;
use crate::pool::Pool;
use crate::schedule::Schedule;

/// Why an assignment may not wait for a slot here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// [`Cause::NoSuchPool`], [`Cause::NeverFits`], [`Cause::NoJetStream`] or [`Cause::Overloaded`].
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

/// For what comes, unasked for, to a worker without room.
pub fn no_room() -> Refusal {
    Refusal { cause: Cause::Overloaded, message: "this worker has no room left: send it again".to_owned() }
}

/// For what has to be kept where nothing is.
pub fn no_jetstream(kind: BlockKind) -> Refusal {
    let message = format!("{} needs JetStream, which this broker does not have", kind.as_str());
    Refusal { cause: Cause::NoJetStream, message }
}

fn no_such_pool(pool: Pool, kind: BlockKind) -> String {
    format!("this worker has no {} slots for {}", pool.as_str(), kind.as_str())
}
