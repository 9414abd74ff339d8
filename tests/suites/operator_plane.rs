//! The operator on a control plane of the tests' own, with nodes and pods that are fake: killed around each of its writes,
//! with a bug, with an API server in trouble, at rest, and with no right too many.
//!
//! `make campaign-operator` runs the same at length.

#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "helpers of tests: a failure here is a test's failure"
)]

#[path = "operator_plane/api_trouble.rs"]
mod api_trouble; // an API server that fails: first by its name, since nobody waits for longer
#[path = "operator_plane/autoscaler.rs"]
mod autoscaler; // mode HPA, and what it asks the operator
#[path = "operator_plane/cast.rs"]
mod cast; // workers that are played
#[path = "operator_plane/certificate.rs"]
mod certificate; // what is shown to the API server
#[path = "operator_plane/crash.rs"]
mod crash; // killed before and after each write
#[path = "operator_plane/decides.rs"]
mod decides; // mode Operator, as the API server sees it
#[path = "operator_plane/keda.rs"]
mod keda; // mode KEDA, without KEDA and with it
#[path = "operator_plane/lacks.rs"]
mod lacks; // what it may not do
#[path = "operator_plane/level.rs"]
mod level; // the Pod Security level of pods
#[path = "operator_plane/matrix.rs"]
mod matrix; // signals that are missing, old or wrong
#[path = "operator_plane/modes.rs"]
mod modes; // who decides changes, or may have fewer
#[path = "operator_plane/panics.rs"]
mod panics; // bugs
#[path = "operator_plane/parked.rs"]
mod parked; // work that waits for its tenant's next window
#[path = "operator_plane/process.rs"]
mod process; // how the program starts and stops
#[path = "operator_plane/refusals.rs"]
mod refusals; // what the API server does not let through
#[path = "operator_plane/rest.rs"]
mod rest; // nothing to do
#[path = "operator_plane/rights.rs"]
mod rights; // what it may do, and what it does
#[path = "operator_plane/scenario.rs"]
mod scenario; // what a user does to a pool
#[path = "operator_plane/stage.rs"]
mod stage; // one case of the crash sweep
#[path = "operator_plane/strangers.rs"]
mod strangers; // objects and rules of others
#[path = "operator_plane/told.rs"]
mod told; // what a pool's author is told, and what is left alone meanwhile
#[path = "operator_plane/versions.rs"]
mod versions; // the type missing, older, newer

use std::sync::OnceLock;
use std::time::Duration;

use beamline_tests::api::Api;
use beamline_tests::plane::ControlPlane;
use beamline_tests::pool::Pool;
use beamline_tests::wait::within;
use serde_json::{Value, json};

/// How long anything may take to converge that takes seconds on an idle machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A control plane that most tests share: each has operators of its own, which watch a namespace of its own.
fn plane() -> &'static ControlPlane {
    static PLANE: OnceLock<ControlPlane> = OnceLock::new();
    PLANE.get_or_init(start_plane)
}

/// One more, with a type that the operator makes objects of where it is there.
fn start_plane() -> ControlPlane {
    let plane = ControlPlane::start();
    plane.kubectl(&["create", "-f", "-"], Some(&pod_monitors().to_string()));
    plane
}

/// A condition of a pool; null while it is not there.
async fn condition(api: &Api, pool: &Pool, kind: &str) -> Value {
    let pool = api.get(&pool.path()).await.unwrap_or_default();
    let all = pool["status"]["conditions"].as_array().into_iter().flatten();
    all.into_iter().find(|one| one["type"] == kind).cloned().unwrap_or_default()
}

/// Waits until this count has stayed the same for some seconds.
async fn calm(count: impl Fn() -> usize) {
    const CALM: u32 = 5;
    let (mut last, mut calm) = (count(), 0);
    within(PATIENCE, "the last write is over", async || {
        tokio::time::sleep(Duration::from_secs(1)).await;
        calm = if count() == last { calm + 1 } else { 0 };
        last = count();
        (calm >= CALM).then_some(())
    })
    .await;
}

/// Whether an entry of the audit log is of a write.
fn is_write(event: &Value) -> bool {
    !matches!(event["verb"].as_str(), Some("get" | "list" | "watch"))
}

/// Whether there is time for all of it.
#[expect(clippy::disallowed_methods, reason = "what a test may take is no flag of a program")]
fn is_campaign() -> bool {
    std::env::var_os("BEAMLINE_CAMPAIGN").is_some()
}

fn pod_monitors() -> Value {
    let any = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "podmonitors.monitoring.coreos.com"},
        "spec": {
            "group": "monitoring.coreos.com",
            "names": {"kind": "PodMonitor", "plural": "podmonitors"},
            "scope": "Namespaced",
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": any}}],
        },
    })
}
