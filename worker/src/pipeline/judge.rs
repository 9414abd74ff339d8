//! Whether an assignment runs here.

use super::Pipeline;
use super::rejection::Rejection;
use crate::admission::{self, Refusal};
use crate::assignment::{Assignment, Undecodable};
use crate::blocks::Block;
use crate::fault::{Fault, Invalid};
use crate::intake::Delivery;

/// An assignment that is not refused.
pub(super) enum Judged {
    /// It runs here.
    Runs(Assignment),
    /// It runs on another class of workers.
    PassesOn(Assignment),
    /// It may have been accepted before, and cannot run here.
    Ends(Assignment, Fault),
}

impl Pipeline {
    pub(super) fn judge(&self, delivery: &Delivery) -> Result<Judged, Rejection> {
        let decoded = Assignment::decode(delivery.payload());
        if delivery.has_unreadable_headers() {
            let addressee =
                decoded.map_or_else(|undecodable| undecodable.addressee, |assignment| assignment.addressee());
            let invalid =
                Invalid::input("", "has NATS headers that cannot be read: they are UTF-8, one `Name: value` a line");
            return Err(Rejection::undecodable(Undecodable { addressee, invalid }));
        }
        let assignment = decoded.map_err(Rejection::undecodable)?;
        let rejection = match self.engine.refuses(&assignment) {
            Some(invalid) => Rejection::not_allowed(&assignment, invalid),
            None if self.is_for_the_route(delivery, &assignment) => return Ok(Judged::PassesOn(assignment)),
            None => match self.refusal(delivery, &assignment) {
                None => return Ok(Judged::Runs(assignment)),
                Some(refusal) => Rejection::refused(&assignment, refusal),
            },
        };
        // Whoever has had it before may have had other settings, and accepted it: unless it is known that it was rejected,
        // a result follows.
        if delivery.is_parked() || delivery.delivered() > 1 {
            Ok(Judged::Ends(assignment, rejection.into_fault()))
        } else {
            Err(rejection)
        }
    }

    fn refusal(&self, delivery: &Delivery, assignment: &Assignment) -> Option<Refusal> {
        let refusal = admission::refusal(assignment, &self.schedule, self.settings.max_memory_bytes >> 20);
        let refusal = refusal.or_else(|| {
            let quotas = self.schedule.terms(&assignment.key.tenant).quotas;
            admission::over_its_memory(assignment, delivery.payload().len(), quotas.memory_mb)
        });
        refusal.or_else(|| self.cannot_be_kept(assignment)).or_else(|| delivery.is_surplus().then(admission::no_room))
    }

    /// What waits for a person is kept by the broker.
    fn cannot_be_kept(&self, assignment: &Assignment) -> Option<Refusal> {
        let is_kept = matches!(&*assignment.block, Block::Human(_));
        (is_kept && !self.has_jetstream()).then(|| admission::no_jetstream(assignment.block.kind()))
    }
}
