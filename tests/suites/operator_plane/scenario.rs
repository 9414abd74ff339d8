//! What a user does to a pool, and what there is before: what the crash sweep goes through.

use beamline_tests::plane::ControlPlane;
use serde_json::{Value, json};

use super::stage::CREDENTIALS;

/// What a user does to a pool.
#[derive(Clone, Copy)]
pub(super) struct Scenario {
    pub(super) name: &'static str,
    pub(super) before: Before,
    pub(super) act: Act,
}

/// The pool before, where there is one.
#[derive(Clone, Copy)]
pub(super) enum Before {
    Nothing,
    Ready(fn() -> Value),
    /// Its workers never start, for this reason.
    Stuck(fn() -> Value, &'static str),
}

#[derive(Clone, Copy)]
pub(super) enum Act {
    Create(fn() -> Value),
    Change(fn() -> Value),
    Delete,
    Replace,
    EndNamespace,
    /// The Secret has other credentials, the broker takes the old ones no more, and something is missing there.
    Rotate,
    /// The type has more than when the pool was made, and the pool uses it.
    Upgrade(&'static ControlPlane, fn() -> Value),
}

use Act::{Change, Create, Delete, EndNamespace, Replace, Rotate};
use Before::{Nothing, Ready, Stuck};

pub(super) fn plain() -> Value {
    json!({"replicas": 2})
}

pub(super) fn with_gpu() -> Value {
    json!({"gpu": {"replicas": 1, "poolSize": 2}})
}

fn unschedulable() -> Value {
    json!({"worker": {"nodeSelector": {"no": "such-node"}}})
}

fn with_credentials() -> Value {
    json!({"nats": {"credentialsSecretRef": {"name": CREDENTIALS, "key": CREDENTIALS}}})
}

/// What was needed before is forgotten at once, so that it does not matter when that was.
fn by_operator() -> Value {
    json!({"scaling": {"mode": "Operator", "minReplicas": 3, "scaleDown": {"stabilizationSeconds": 0}}})
}

fn acme(executions: u32) -> Value {
    json!({"tenants": {"named": [{"id": "acme", "weight": 2, "quotas": {"executions": executions, "window": "1m"}}]}})
}

pub(super) const CREATE_GPU: Scenario = Scenario { name: "create-gpu", before: Nothing, act: Create(with_gpu) };

/// A selector cannot change: nothing in the API of pools leads to another one. What comes nearest is `labels`.
pub(super) const SCENARIOS: [Scenario; 24] = [
    Scenario { name: "create", before: Nothing, act: Create(plain) },
    CREATE_GPU,
    Scenario { name: "image", before: Ready(plain), act: Change(|| json!({"worker": {"image": "worker:2"}})) },
    Scenario { name: "labels", before: Ready(plain), act: Change(|| json!({"worker": {"podLabels": {"team": "a"}}})) },
    Scenario { name: "scale", before: Ready(plain), act: Change(|| json!({"replicas": 5})) },
    Scenario { name: "scale-down", before: Ready(|| json!({"replicas": 5})), act: Change(plain) },
    Scenario { name: "to-zero", before: Ready(plain), act: Change(|| json!({"replicas": 0})) },
    Scenario { name: "add-gpu", before: Ready(plain), act: Change(with_gpu) },
    Scenario { name: "edit-gpu", before: Ready(with_gpu), act: Change(|| json!({"gpu": {"poolSize": 3}})) },
    Scenario { name: "drop-gpu", before: Ready(with_gpu), act: Change(|| json!({"gpu": null})) },
    Scenario {
        name: "gpu-quota",
        before: Ready(|| json!({"gpu": {"replicas": 3, "maxTotal": 3}})),
        act: Change(|| json!({"gpu": {"maxTotal": 1}})),
    },
    Scenario { name: "tenant-quota", before: Ready(|| acme(100)), act: Change(|| acme(10)) },
    Scenario {
        name: "tenants",
        before: Ready(|| acme(100)),
        act: Change(|| json!({"tenants": {"named": [{"id": "globex", "weight": 3}]}})),
    },
    Scenario { name: "rotate", before: Ready(with_credentials), act: Rotate },
    Scenario { name: "pause", before: Ready(plain), act: Change(|| json!({"paused": true})) },
    Scenario { name: "operator-on", before: Ready(plain), act: Change(by_operator) },
    Scenario {
        name: "operator-off",
        before: Ready(by_operator),
        act: Change(|| json!({"scaling": {"mode": "Manual"}})),
    },
    Scenario { name: "hpa-on", before: Ready(plain), act: Change(|| json!({"scaling": {"mode": "HPA"}})) },
    Scenario {
        name: "hpa-off",
        before: Ready(|| json!({"replicas": 2, "scaling": {"mode": "HPA"}})),
        act: Change(|| json!({"scaling": {"mode": "Manual"}})),
    },
    Scenario {
        name: "surround",
        before: Ready(plain),
        act: Change(|| {
            let streams = json!({"resultRetention": "2h"});
            json!({"networkPolicy": "Off", "observability": {"podMonitor": true}, "nats": {"streams": streams}})
        }),
    },
    Scenario { name: "delete", before: Ready(plain), act: Delete },
    Scenario { name: "delete-unready", before: Stuck(unschedulable, "Unschedulable"), act: Delete },
    Scenario { name: "end-namespace", before: Ready(plain), act: EndNamespace },
    Scenario { name: "replace", before: Ready(plain), act: Replace },
];
