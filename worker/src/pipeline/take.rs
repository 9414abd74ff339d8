//! Where work comes from, as much of it as there is room for.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::Pipeline;
use crate::broker::streams::{Mode, Parked, Source};
use crate::ids::TenantId;
use crate::intake::{self, Delivery};

impl Pipeline {
    /// What work is taken in with.
    pub fn intake(&self) -> intake::Parts {
        intake::Parts {
            broker: self.broker.clone(),
            health: self.health.clone(),
            gate: Arc::clone(&self.gate),
            load: Arc::clone(&self.load),
            holds: self.holds.clone(),
            parking: Arc::clone(&self.parking),
        }
    }

    /// Takes assignments from there and sends them on, until `stop`.
    pub fn take(
        self: Arc<Self>,
        source: Source,
        out: mpsc::Sender<Vec<Delivery>>,
        stop: CancellationToken,
    ) -> impl Future<Output = ()> {
        // Whoever looks before this has begun finds it so too.
        self.load.flow(source).set_out(self.settings.mode == Mode::Core);
        async move {
            let (parts, room) = (self.intake(), || self.room(source));
            match self.settings.mode {
                Mode::JetStream => intake::take(parts, source, room, self.streams.clone(), out, stop).await,
                Mode::Core => {
                    let has_enough_of = |tenant: &_| self.has_enough_of(source, tenant);
                    intake::join(parts, source, room, has_enough_of, self.settings.intake.clone(), out, stop).await;
                }
            }
        }
    }

    /// Takes parked work up again and sends it on, until `stop`.
    pub async fn take_up(self: Arc<Self>, parked: Parked, out: mpsc::Sender<Vec<Delivery>>, stop: CancellationToken) {
        let allowance = async |tenant: TenantId| self.allowance(parked, &tenant).await;
        let (intake, streams) = (self.settings.intake.clone(), self.streams.clone());
        intake::take_up(self.intake(), parked, allowance, intake, streams, out, stop).await;
    }
}
