//! How many pods a voluntary disruption may take.

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::KubeSchema;
use serde::{Deserialize, Serialize};

use crate::embedded;

/// Limits what node drains and upgrades may evict at once: a number or a percentage of the pool. Name one of the two.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!(has(self.maxUnavailable) && has(self.minAvailable))")
        .message("disruption: set maxUnavailable or minAvailable, not both")
)]
pub struct Disruption {
    /// How many workers may be missing, such as 1 or "25%". Default: 1, where minAvailable is not set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "embedded::count_or_percent")]
    pub max_unavailable: Option<IntOrString>,

    /// How many workers must stay, such as 2 or "50%".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "embedded::count_or_percent")]
    pub min_available: Option<IntOrString>,
}
