//! CPU time, whatever becomes of the block that uses it: counted when the block has ended, and for as long as a thread of its
//! own goes on after that.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::blocks::cpu::CpuTime;
use crate::ids::TenantId;
use crate::pipeline::Pipeline;

/// Those of blocks that have ended, and of which something may still work.
#[derive(Debug, Default)]
pub(in crate::pipeline) struct Meters(Mutex<Vec<Meter>>);

/// The CPU time of one block.
#[derive(Debug)]
struct Meter {
    tenant: TenantId,
    cpu_time: CpuTime,
    counted: Duration,
}

impl Meters {
    fn lock(&self) -> MutexGuard<'_, Vec<Meter>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Meter {
    /// What has been used since the last look.
    fn read(&mut self) -> Duration {
        let used = self.cpu_time.used();
        used.saturating_sub(std::mem::replace(&mut self.counted, used))
    }
}

impl Pipeline {
    /// Counts the CPU time of a block that has ended, in whatever way.
    pub(in crate::pipeline) fn count_cpu_time(&self, tenant: &TenantId, cpu_time: CpuTime) {
        let mut meter = Meter { tenant: tenant.clone(), cpu_time, counted: Duration::ZERO };
        if self.count(&mut meter) {
            self.meters.lock().push(meter);
        }
    }

    /// Counts what has been used since the end of blocks: a thread is in a function that nothing interrupts.
    pub(super) fn count_later_cpu_time(&self) {
        self.meters.lock().retain_mut(|meter| self.count(meter));
    }

    /// Whether more may follow.
    fn count(&self, meter: &mut Meter) -> bool {
        // Asked first: whoever works no more has counted everything.
        let goes_on = meter.cpu_time.is_shared();
        let time = meter.read();
        self.charge_cpu_time(&meter.tenant, time);
        self.metrics.used_cpu_time(self.gate.policy().label(&meter.tenant), time);
        goes_on
    }
}
