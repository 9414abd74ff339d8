//! How many workers a pool should have, and why. Pure: no client, no clock. Nothing else decides replicas.

use beamline_crds::{Mode, Scaling};

use crate::pool::ValidPool;

/// The number of workers with its reason in words.
pub fn decide(pool: &ValidPool) -> Scaling {
    Scaling { mode: Mode::Manual, desired: pool.replicas, reason: format!("spec.replicas is {}", pool.replicas) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::tests::valid;

    #[test]
    fn in_mode_manual_the_spec_decides() {
        let scaling = decide(&valid(r#"{"replicas": 7}"#));
        assert_eq!((scaling.desired, scaling.reason.as_str()), (7, "spec.replicas is 7"));
    }
}
