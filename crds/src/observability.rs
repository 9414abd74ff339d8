//! Where traces go, and who collects metrics.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where traces are sent, and who collects metrics: every worker serves them on its port `metrics`.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Observability {
    /// OTLP over HTTP endpoint of a trace collector, such as http://otel-collector.observability:4318.
    /// Default: no traces.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(max = 512),
        regex(
            pattern = "^https?://([A-Za-z0-9._-]+|\\[[0-9A-Fa-f:.]+\\])(:([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?(/[^ ]*)?$"
        )
    )]
    pub otlp_endpoint: Option<String>,

    /// Whether the pods get a PodMonitor, by which a Prometheus Operator finds their metrics. Its type must be
    /// installed. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_monitor: Option<bool>,
}
