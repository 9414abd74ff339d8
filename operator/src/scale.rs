//! How many workers a pool should have, and why. Pure: no client, no clock. Nothing else decides replicas.

use beamline_crds::{Decision, LimitedBy, Mode};

use crate::pool::{Class, ValidPool};

/// How many workers of each class.
#[derive(Clone, Debug, PartialEq)]
pub struct Decisions {
    /// Those without GPUs of their own.
    pub general: Decision,
    /// Those with GPUs.
    pub gpu: Option<GpuDecision>,
}

/// How many workers with GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuDecision {
    /// The number decided.
    pub desired: i32,
    /// What keeps it below what is asked for.
    pub limited_by: LimitedBy,
}

/// The numbers of workers with their reasons.
pub fn decide(pool: &ValidPool) -> Decisions {
    let desired = pool.general.replicas;
    Decisions {
        general: Decision { mode: Mode::Manual, desired, reason: format!("spec.replicas is {desired}") },
        gpu: pool.gpu.as_ref().map(within_quota),
    }
}

/// Never more pods than there may be devices for.
fn within_quota(class: &Class) -> GpuDecision {
    let quota = class.devices.as_ref().and_then(|devices| Some(devices.max_total? / devices.count.max(1)));
    match quota {
        Some(quota) if quota < class.replicas => GpuDecision { desired: quota, limited_by: LimitedBy::MaxTotal },
        _ => GpuDecision { desired: class.replicas, limited_by: LimitedBy::None },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::tests::valid;

    #[test]
    fn in_mode_manual_the_spec_decides() {
        let Decisions { general, gpu } = decide(&valid(r#"{"replicas": 7}"#));
        assert_eq!((general.desired, general.reason.as_str(), gpu), (7, "spec.replicas is 7", None));
    }

    #[test]
    fn no_more_pods_are_made_than_there_may_be_devices_for() {
        let gpu =
            |gpu: &str| decide(&valid(&format!(r#"{{"gpu": {gpu}}}"#))).gpu.map(|gpu| (gpu.desired, gpu.limited_by));
        assert_eq!(gpu("{}"), Some((0, LimitedBy::None)));
        assert_eq!(gpu(r#"{"replicas": 3, "count": 2, "maxTotal": 6}"#), Some((3, LimitedBy::None)));
        assert_eq!(gpu(r#"{"replicas": 3, "count": 2, "maxTotal": 5}"#), Some((2, LimitedBy::MaxTotal)));
    }
}
