//! Every reason that a condition, an event or a metric may have. `docs/operations.md` explains each: `house.rs` looks.

/// Ready: as asked for, or as far as a worker takes work.
pub const WORKERS_READY: &str = "WorkersReady";
/// Ready: nobody is asked for.
pub const IDLE: &str = "Idle";
/// Ready: workers take no work, because the pool says so.
pub const PAUSED: &str = "Paused";
/// Nothing is left to do for the Deployment.
pub const COMPLETE: &str = "Complete";
/// Pods come, go or are replaced.
pub const ROLLING_OUT: &str = "RollingOut";
/// Workers with GPUs that nobody asks for any more finish the work that waits for them.
pub const ROUTE_DRAINING: &str = "RouteDraining";
/// The broker answers.
pub const QUEUE_READ: &str = "QueueRead";
/// Streams and consumer are as they must be.
pub const STREAMS_MATCH: &str = "StreamsMatch";

/// The operator decides how many workers there are.
pub const SCALING: &str = "Scaling";
/// The same, and something keeps it from deciding for as many as the work asks for.
pub const SCALING_LIMITED: &str = "ScalingLimited";
/// The same, and somebody has written a number that has no effect.
pub const REPLICAS_IGNORED: &str = "ReplicasIgnored";
/// The spec decides.
pub const MODE_MANUAL: &str = "ModeManual";
/// A HorizontalPodAutoscaler decides.
pub const MODE_HPA: &str = "ModeHPA";
/// KEDA decides.
pub const MODE_KEDA: &str = "ModeKEDA";
/// It should, and is not installed, or cannot find the operator.
pub const KEDA_MISSING: &str = "KedaMissing";
/// A HorizontalPodAutoscaler or KEDA should decide, and says why it does not.
pub const AUTOSCALER_INACTIVE: &str = "AutoscalerInactive";
/// A HorizontalPodAutoscaler should, and nobody serves what it asks for.
pub const EXTERNAL_METRICS_MISSING: &str = "ExternalMetricsMissing";
/// It should, and whoever serves that does not answer.
pub const EXTERNAL_METRICS_UNAVAILABLE: &str = "ExternalMetricsUnavailable";
/// Nothing is decided, because the queue cannot be read.
pub const QUEUE_UNREADABLE: &str = "QueueUnreadable";
/// Only an event: there are to be more workers.
pub const SCALED_UP: &str = "ScaledUp";
/// Only an event: there are to be fewer.
pub const SCALED_DOWN: &str = "ScaledDown";

/// There is no queue to read: a core queue group keeps nothing.
pub const NO_QUEUE: &str = "NoQueue";
/// The queue is read, and other pools take from it too.
pub const QUEUE_SHARED: &str = "QueueShared";
/// Streams can be used, and one has another setting than the pool says.
pub const SETTINGS_DIFFER: &str = "SettingsDiffer";
/// Streams can be used, and work waits for GPU slots that no pool has any more.
pub const ROUTE_NOT_DRAINED: &str = "RouteNotDrained";

/// The broker was asked for the first time and has not answered.
pub const ASKING_NATS: &str = "AskingNats";
/// A Secret, or a key of it, is missing or holds something else.
pub const SECRET_UNUSABLE: &str = "SecretUnusable";
/// A ConfigMap or a claim that pods need is missing, or a key of it.
pub const REFERENCE_MISSING: &str = "ReferenceMissing";
/// The operator has no right to read Secrets in the pool's namespace.
pub const SECRET_FORBIDDEN: &str = "SecretForbidden";
/// No connection to the broker.
pub const NATS_UNREACHABLE: &str = "NatsUnreachable";
/// A connection to the broker, and no answer.
pub const NATS_NOT_ANSWERING: &str = "NatsNotAnswering";
/// The broker says no.
pub const NATS_REFUSED: &str = "NatsRefused";
/// A stream or the consumer has another setting.
pub const STREAM_MISMATCH: &str = "StreamMismatch";
/// A stream or the consumer is missing, and the operator may not create it.
pub const STREAM_MISSING: &str = "StreamMissing";
/// Another consumer takes the subject already.
pub const SUBJECT_TAKEN: &str = "SubjectTaken";

/// Nothing is to be looked at.
pub const AS_ASKED: &str = "AsAsked";
/// Several pods want a claim that pods of one node can mount.
pub const CLAIM_NOT_SHARED: &str = "ClaimNotShared";
/// Somebody changes again and again what is the operator's.
pub const FIELD_CONTESTED: &str = "FieldContested";
/// Pods cannot be annotated.
pub const PODS_NOT_ANNOTATED: &str = "PodsNotAnnotated";
/// The type has no place for all that the operator says.
pub const TYPE_OUTDATED: &str = "TypeOutdated";
/// The type lets in what the operator does not know.
pub const OPERATOR_OUTDATED: &str = "OperatorOutdated";
/// There is no such type as PodMonitor.
pub const POD_MONITOR_MISSING: &str = "PodMonitorMissing";

/// No worker takes work yet, and nothing speaks against it.
pub const WORKERS_STARTING: &str = "WorkersStarting";
/// The image cannot be had.
pub const IMAGE_PULL_BACK_OFF: &str = "ImagePullBackOff";
/// The container cannot be created.
pub const CREATE_CONTAINER_FAILED: &str = "CreateContainerFailed";
/// Workers end by themselves.
pub const CRASH_LOOP_BACK_OFF: &str = "CrashLoopBackOff";
/// No node takes a worker.
pub const UNSCHEDULABLE: &str = "Unschedulable";
/// A quota of the namespace is used up.
pub const QUOTA_EXCEEDED: &str = "QuotaExceeded";
/// The API server lets no pod in.
pub const PODS_REFUSED: &str = "PodsRefused";

/// The spec cannot be acted on.
pub const INVALID_SPEC: &str = "InvalidSpec";
/// The object does not fit the type.
pub const UNREADABLE_SPEC: &str = "UnreadableSpec";
/// Somebody else's object has the name that a child needs.
pub const NAME_CONFLICT: &str = "NameConflict";
/// A child cannot be read.
pub const OBSERVE_FAILED: &str = "ObserveFailed";
/// A child cannot be written.
pub const APPLY_FAILED: &str = "ApplyFailed";
/// A child that is wanted no more cannot be removed.
pub const REMOVE_FAILED: &str = "RemoveFailed";
/// The operator lacks a right.
pub const FORBIDDEN: &str = "Forbidden";
/// The pool's namespace is being deleted.
pub const NAMESPACE_TERMINATING: &str = "NamespaceTerminating";
/// The status cannot be written.
pub const PUBLISH_FAILED: &str = "PublishFailed";
/// Only logs and metrics: another operator acts, or will.
pub const NOT_LEADING: &str = "NotLeading";
/// A bug.
pub const PANICKED: &str = "Panicked";
