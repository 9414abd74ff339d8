//! What each tenant of a pool gets.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What tenants get. A pool that says nothing about tenants treats all alike, and one of them may hold every slot.
/// Changes reach running workers within seconds, without a restart.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Tenants {
    /// What a tenant gets that is not named below.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub defaults: Option<TenantTerms>,

    /// Tenants that get something else. What an entry leaves out is as in defaults.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 1000),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["id"])
    )]
    pub named: Vec<NamedTenant>,
}

/// What one tenant gets.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct TenantTerms {
    /// How much of the slots' time it gets beside other tenants that want some: twice the weight, twice the time.
    /// Default: 1; of a named tenant, that of defaults.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub weight: Option<i32>,

    /// Priority of its assignments that name none, 0 to 9, higher first. Default: 4; of a named
    /// tenant, that of defaults.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 9))]
    pub priority: Option<i32>,

    /// Per cent of a worker's slots, pool by pool, that it may hold at once (one slot at least). Default: 75; of a
    /// named tenant, that of defaults.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub max_slot_share: Option<i32>,
}

/// What one tenant gets.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct NamedTenant {
    /// The tenant_id of its assignments.
    #[schemars(length(min = 1, max = 256))]
    pub id: String,

    /// What it gets; what is left out is as in defaults.
    #[serde(flatten)]
    pub terms: TenantTerms,
}
