//! Which directories file and SQLite blocks may use, and what lies behind them.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::embedded;

/// The directories that file and SQLite blocks may use. Every tenant gets a directory of its own in each.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.roots.all(r, self.roots.exists_one(o, o.path == r.path || o.path.startsWith(r.path + '/')))")
        .message("filesystem.roots: every path must be named once, and none may lie inside another"),
    validation = Rule::new("self.roots.all(r, !['/bin', '/boot', '/dev', '/etc', '/lib', '/proc', '/run', '/sbin', '/sys', '/tmp', '/usr', '/var/run'].exists(p, r.path == p || r.path.startsWith(p + '/')))")
        .message("filesystem.roots: a path must not be in a system directory (/bin, /boot, /dev, /etc, /lib, /proc, /run, /sbin, /sys, /tmp, /usr, /var/run); use one like /data")
)]
pub struct Filesystem {
    /// Default: one root, /data, on 1Gi of scratch space.
    #[schemars(
        length(min = 1, max = 16),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["path"])
    )]
    pub roots: Vec<Root>,
}

/// One directory, mounted into every worker.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.path.matches('^(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+$')")
        .message("filesystem.roots.path: must be absolute, such as /data, with parts of A-Z, a-z, 0-9, '_', '-' and '.' that do not start with '.'")
)]
pub struct Root {
    /// An absolute path such as /data, without '.' or '..' in it.
    #[schemars(length(min = 2, max = 128))]
    pub path: String,

    /// What lies behind the path. Default: emptyDir with 1Gi.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volume: Option<RootVolume>,
}

/// What lies behind a root: scratch space of one pod, or a claim that all pods share.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.emptyDir) != has(self.persistentVolumeClaim)")
        .message("filesystem.roots.volume: set exactly one of emptyDir and persistentVolumeClaim")
)]
pub struct RootVolume {
    /// Scratch space: empty in every new pod and gone with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub empty_dir: Option<EmptyDir>,

    /// A claim in the pool's namespace. All pods mount it, so it needs access mode ReadWriteMany.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim: Option<PersistentVolumeClaim>,
}

/// Scratch space of one pod.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct EmptyDir {
    /// How much a pod may keep there before it is evicted, such as 1Gi. Default: 1Gi.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "embedded::quantity")]
    pub size_limit: Option<Quantity>,
}

/// A claim in the pool's namespace.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct PersistentVolumeClaim {
    /// Name of the PersistentVolumeClaim.
    #[schemars(length(min = 1, max = 253))]
    pub claim_name: String,
}
