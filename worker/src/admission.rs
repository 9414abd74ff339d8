//! Whether this worker may run an assignment, and whether its tenant may now.

pub mod account; // what a tenant has used of its budget
pub mod lease; // what this worker may use of it without asking
pub mod ceiling; // how much of a tenant's work runs at once
pub mod memory; // how many bytes of it are here

use std::time::Duration;

use jiff::Timestamp;

use crate::assignment::Assignment;
use crate::blocks::BlockKind;
use crate::fault::Cause;
use crate::ids::TenantId;
use crate::pool::Pool;
use crate::schedule::Schedule;
use account::{Spent, Window};
use lease::Charge;

/// Whether a tenant's work may run now.
#[derive(Debug)]
pub enum Admission {
    /// It may, for this.
    Admit(Payment),
    /// It is refused.
    Refuse(Refusal),
    /// It may not now: it waits where it holds up nobody.
    Park,
    /// It may not now, nor be refused: it is delivered again after this.
    PutOff(Duration),
}

/// What an execution costs its tenant.
#[derive(Debug)]
pub enum Payment {
    /// The tenant has no budget.
    None,
    /// This unit.
    Now(Charge),
    /// Nothing more: it was paid for at this moment, in Unix milliseconds, when it had come before.
    Before(i64),
}

impl Payment {
    /// A moment of the window that paid for it, in Unix milliseconds.
    pub fn moment(&self) -> Option<i64> {
        match self {
            Self::None => None,
            Self::Now(charge) => Some(charge.moment()),
            Self::Before(moment) => Some(*moment),
        }
    }

    /// The unit that is used up now, unless it is given back.
    pub fn charge(self) -> Option<Charge> {
        match self {
            Self::Now(charge) => Some(charge),
            Self::None | Self::Before(_) => None,
        }
    }
}

/// Why an assignment may not wait for a slot here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// [`Cause::NoSuchPool`], [`Cause::NeverFits`], [`Cause::NoJetStream`], [`Cause::OverBudget`] or
    /// [`Cause::Overloaded`].
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

/// For what is larger than all that its tenant may have held here; `most` in megabytes.
pub fn over_its_memory(assignment: &Assignment, payload_bytes: usize, most: Option<u64>) -> Option<Refusal> {
    let most = most?;
    let wanted = assignment.memory_mb.unwrap_or_default().max((payload_bytes as u64).div_ceil(1 << 20));
    let message = || format!("it needs {wanted} MB, and its tenant may have {most} held by a worker");
    (wanted > most).then(|| Refusal { cause: Cause::NeverFits, message: message() })
}

/// For what comes, unasked for, to a worker without room.
pub fn no_room() -> Refusal {
    Refusal { cause: Cause::Overloaded, message: "this worker has no room left: send it again".to_owned() }
}

/// For what comes when its tenant has used up its budget.
pub fn over_budget(tenant: &TenantId, spent: Spent, window: Window) -> Refusal {
    let what = match spent {
        Spent::Executions(limit) => format!("{limit} executions"),
        Spent::CpuTime(limit) => format!("{} ms of CPU time", limit.as_millis()),
    };
    let length = length(window.length());
    let end = Timestamp::from_millisecond(window.end()).unwrap_or(Timestamp::MAX);
    let message = format!("tenant {} has used its {what} of this {length} window: it ends at {end}", tenant.as_str());
    Refusal { cause: Cause::OverBudget, message }
}

/// `1m`, `90s`: in the largest unit that divides it.
fn length(time: Duration) -> String {
    const UNITS: [(u128, &str); 5] = [(86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1_000, "s"), (1, "ms")];
    let millis = time.as_millis();
    let unit = UNITS.into_iter().find(|(unit, _)| millis.is_multiple_of(*unit));
    unit.map_or_else(String::new, |(unit, name)| format!("{}{name}", millis / unit))
}

/// For what has to be kept where nothing is.
pub fn no_jetstream(kind: BlockKind) -> Refusal {
    let message = format!("{} needs JetStream, which this broker does not have", kind.as_str());
    Refusal { cause: Cause::NoJetStream, message }
}

fn no_such_pool(pool: Pool, kind: BlockKind) -> String {
    format!("this worker has no {} slots for {}", pool.as_str(), kind.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_which_budget_is_used_up_and_when_its_window_ends() {
        let tenant = TenantId::parse("acme").expect("a tenant id");
        let window = Window::at(1_700_000_041_000, Duration::from_secs(60));
        let refusal = over_budget(&tenant, Spent::Executions(1000), window);
        assert_eq!(
            refusal.message,
            "tenant acme has used its 1000 executions of this 1m window: it ends at 2023-11-14T22:15:00Z"
        );
        assert!(refusal.cause.is_retryable() && !refusal.cause.is_dead_letter() && !refusal.cause.is_retried_here());
        let window = Window::at(1_700_000_041_000, Duration::from_secs(90));
        let refusal = over_budget(&tenant, Spent::CpuTime(Duration::from_secs(60)), window);
        let said = "tenant acme has used its 60000 ms of CPU time of this 90s window";
        assert!(refusal.message.starts_with(said), "{}", refusal.message);
    }
}
