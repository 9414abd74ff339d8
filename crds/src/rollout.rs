//! How pods are replaced.

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::KubeSchema;
use serde::{Deserialize, Serialize};

use crate::embedded;

/// How pods are replaced when the pool changes. Work that runs in a leaving pod finishes within worker.drainSeconds.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!(has(self.maxSurge) && string(self.maxSurge) in ['0', '0%'] && (!has(self.maxUnavailable) || string(self.maxUnavailable) in ['0', '0%']))")
        .message("rollout: maxSurge and maxUnavailable cannot both be 0, no pod could ever be replaced; raise one of them")
)]
pub struct Rollout {
    /// How many pods above the desired count may exist meanwhile, a number or a percentage. Default: "25%".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "embedded::count_or_percent")]
    pub max_surge: Option<IntOrString>,

    /// How many pods below the desired count are tolerated meanwhile, a number or a percentage. Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "embedded::count_or_percent")]
    pub max_unavailable: Option<IntOrString>,
}
