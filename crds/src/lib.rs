//! The `WorkerPool` API: what users write, what the operator answers. One file per concern, no client here.
//!
//! Doc comments are the text of `kubectl explain`. Defaults named in them are decided by the operator, except where a
//! field says that the API server fills it in.

#![expect(unreachable_pub, reason = "the derive of KubeSchema copies each struct into the body of a function")]

mod worker_pool; // the object: name rules, columns, /scale

mod disruption; // how many pods a node drain may take
mod egress; // which addresses HTTP and SQL blocks may reach
mod filesystem; // which directories file blocks may use
mod gpu; // the pods that have GPUs
mod nats; // where the work comes from
mod network_policy; // whether the pods get a NetworkPolicy
mod observability; // where traces go, and who collects metrics
mod rollout; // how pods are replaced
mod scaling; // how many workers there are
mod sql; // which databases SQL blocks may use
mod tenants; // what each tenant gets
mod worker; // what one pod looks like

mod status; // what the operator reports

mod embedded; // Kubernetes' own types inside ours, bounded
mod prose; // doc comments as `kubectl explain` shows them

#[cfg(test)]
mod manifest; // the promises of workerpools.yaml

pub use disruption::Disruption;
pub use egress::{Egress, EgressPolicy};
pub use filesystem::{EmptyDir, Filesystem, PersistentVolumeClaim, Root, RootVolume};
pub use gpu::{Gpu, GpuTarget};
pub use nats::{Delivery, Nats, SecretKeyRef, Storage, Streams, Tls};
pub use network_policy::NetworkPolicy;
pub use observability::Observability;
pub use rollout::Rollout;
pub use scaling::{Mode, ScaleDown, Scaling, Target};
pub use sql::{InlineConnections, Sql, SqlConnection};
pub use status::{Decision, Exceeded, GpuStatus, Learned, LimitedBy, Queue, TenantStatus, WorkerPoolStatus};
pub use tenants::{NamedTenant, OnExceeded, Quotas, TenantTerms, Tenants};
pub use worker::{ImagePullPolicy, Limits, Pools, Resources, Worker};
pub use worker_pool::{WorkerPool, WorkerPoolSpec};
