//! What the numbers of a queue are called in `external.metrics.k8s.io`, by those who give them and those who ask.

/// The API's name.
pub const GROUP: &str = "external.metrics.k8s.io";
/// The only version that there is.
pub const VERSION: &str = "v1beta1";
/// Both.
pub const GROUP_VERSION: &str = "external.metrics.k8s.io/v1beta1";
/// Says whose queue it is.
pub const POOL_LABEL: &str = "workerpool";

/// Assignments waiting and running.
pub const DEPTH: &str = "beamline_queue_depth";
/// Assignments that no worker has taken yet.
pub const PENDING: &str = "beamline_queue_pending";
/// Assignments that workers hold.
pub const IN_FLIGHT: &str = "beamline_queue_in_flight";
/// Seconds since the oldest unfinished assignment arrived.
pub const OLDEST_AGE: &str = "beamline_queue_oldest_age_seconds";
