//! When an assignment runs: what is called off before its turn is not begun.

use futures::FutureExt;
use jiff::Timestamp;

use super::cancel::Stop;
use super::deaths::Suspicion;
use super::parking::NotYet;
use super::quarantine::Isolation;
use super::{Arrival, Pipeline, rebalance};
use crate::admission::ceiling::Unit;
use crate::broker::Expected;
use crate::execute::Execution;
use crate::fault::{Cause, Fault};
use crate::schedule::{Closed, Slot};

/// The right to run a block, and whether it runs alone: until its delivery is settled.
pub(super) struct Turn<'a> {
    pub(super) slot: Slot,
    pub(super) isolation: Option<Isolation<'a>>,
    /// Of its tenant's ceiling.
    pub(super) unit: Option<Unit>,
}

/// Why it has no turn here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NoTurn {
    /// It shall not start here.
    Closed,
    /// Its tenant may not have it run yet.
    NotYet,
}

impl From<Closed> for NoTurn {
    fn from(_: Closed) -> Self {
        Self::Closed
    }
}

impl From<NotYet> for NoTurn {
    fn from(_: NotYet) -> Self {
        Self::NotYet
    }
}

impl Pipeline {
    /// Waits for a turn and runs the block in it; what is cancelled before is not begun.
    pub(super) async fn execute_in_turn(
        &self,
        mut arrival: Box<Arrival>,
        expected: Expected,
        suspicion: Suspicion,
        cancelled: impl Future<Output = Fault>,
    ) {
        let mut cancelled = std::pin::pin!(cancelled);
        let turn = tokio::select! {
            biased;
            fault = &mut cancelled => Err(fault),
            turn = self.turn(&mut arrival, suspicion) => Ok(turn),
        };
        match turn {
            // What waits for its turn is small, for there may be much of it; what runs has a place of its own.
            Ok(Ok(turn)) => Box::pin(self.execute(arrival, expected, turn, cancelled)).await,
            Ok(Err(NoTurn::Closed)) => Box::pin(self.hand_back(arrival.delivery)).await,
            Ok(Err(NoTurn::NotYet)) => Box::pin(self.park_for_later(arrival, cancelled)).await,
            Err(fault) => {
                arrival.delivery.started();
                let queued = arrival.delivery.received().elapsed();
                Box::pin(self.finish(arrival, expected, queued, Execution::not_begun(fault))).await;
            }
        }
    }

    /// Waits for a slot among others, or until there are no others.
    async fn turn(&self, arrival: &mut Arrival, suspicion: Suspicion) -> Result<Turn<'_>, NoTurn> {
        let unit = self.within_ceilings(arrival).await?;
        let assignment = &arrival.assignment;
        if suspicion == Suspicion::Quarantined {
            let isolation = Some(Box::pin(self.isolate(arrival)).await?);
            let slot = self.schedule.slot_alone(assignment.pool, &assignment.key.tenant)?;
            return Ok(Turn { slot, isolation, unit });
        }
        let patience = rebalance::patience(arrival.delivery.delivered());
        let slot = self.schedule.slot(assignment.pool, &assignment.key.tenant, assignment.priority, patience).await?;
        Ok(Turn { slot, isolation: None, unit })
    }

    pub(super) fn is_cut_off(&self) -> bool {
        self.hands_back() && self.cut.is_cancelled()
    }

    /// Returns when the work shall not go on: it is cancelled, or nobody would do it after this worker's end.
    pub(super) fn called_off(&self, stop: &Stop, since: Option<Timestamp>) -> impl Future<Output = Fault> {
        let cancelled = stop.requested(since);
        if self.hands_back() {
            return cancelled.left_future();
        }
        let either = async move {
            tokio::select! {
                fault = cancelled => fault,
                () = self.cut.cancelled() => {
                    Fault::new(Cause::Overloaded, "the worker stops and cannot end it in time: send it again")
                }
            }
        };
        Box::pin(either).right_future()
    }
}
