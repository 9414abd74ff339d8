//! How many workers there are.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How many workers there are.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Scaling {
    /// Who decides. Default: Manual.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
}

/// Who decides the number of replicas.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// spec.replicas, written by a person or through /scale.
    Manual,
}
