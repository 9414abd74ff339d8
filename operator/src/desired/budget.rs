//! What a node drain may take away at once.

use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};

use crate::names;
use crate::pool::{Disruption, Kind, ValidPool};

pub(super) fn budget(pool: &ValidPool, class: Kind) -> PodDisruptionBudget {
    let (max_unavailable, min_available) = match pool.disruption.clone() {
        Disruption::MaxUnavailable(count) => (Some(count), None),
        Disruption::MinAvailable(count) => (None, Some(count)),
    };
    PodDisruptionBudget {
        metadata: names::class_metadata(pool, class),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable,
            min_available,
            selector: Some(names::selector(&pool.name, class)),
            // A worker that crashes must not hold up a node drain for ever.
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
        }),
        status: None,
    }
}
