//! Which addresses HTTP and SQL blocks may reach.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which addresses blocks may connect to. Loopback, link-local (cloud metadata) and the broker's own address are
/// refused under every policy.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Egress {
    /// Whether private addresses may be reached. Default: Internal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<EgressPolicy>,

    /// Exceptions that lift a refusal: a CIDR, a host or *.suffix, each with an optional :port.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100), inner(length(min = 1, max = 260), regex(pattern = "^[^,\\s]+$")))]
    pub allow: Vec<String>,

    /// Addresses that are refused besides, written like those of allow. Where both match, deny wins.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100), inner(length(min = 1, max = 260), regex(pattern = "^[^,\\s]+$")))]
    pub deny: Vec<String>,
}

/// Whether private networks count as reachable.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum EgressPolicy {
    /// Public and private addresses.
    Internal,
    /// Public addresses only.
    PublicOnly,
}
