//! Where traces go.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where traces are sent. Metrics need no setting: every worker serves them on its port `metrics`.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Observability {
    /// OTLP over HTTP endpoint of a trace collector, such as http://otel-collector.observability:4318.
    /// Default: no traces.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(max = 512),
        regex(pattern = "^https?://([A-Za-z0-9._-]+|\\[[0-9A-Fa-f:.]+\\])(:[1-9][0-9]{0,4})?(/[^ ]*)?$")
    )]
    pub otlp_endpoint: Option<String>,
}
