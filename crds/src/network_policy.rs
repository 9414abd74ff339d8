//! Whether the pods get a NetworkPolicy.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Whether the pods get a NetworkPolicy.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetworkPolicy {
    /// One that follows worker.egress.
    Auto,
    /// None.
    Off,
}
