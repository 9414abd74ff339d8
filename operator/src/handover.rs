//! From one who decides to another, without a dip: whoever leaves mode Operator finds in `spec.replicas` what runs, and who
//! decides on pods with GPUs from now on finds it in `gpu.replicas`. In mode HPA the operator also writes the steps that an
//! autoscaler cannot make.

use beamline_crds::{WorkerPool, WorkerPoolStatus};
use kube::api::Patch;
use kube::{Api, ResourceExt};
use serde_json::json;

use crate::clients::in_our_name;
use crate::context::Context;
use crate::error::Error;
use crate::failpoint;
use crate::pool::{Mode, ValidPool};
use crate::scale::{Decision, Decisions, Need, fixed};

/// What runs, where it must be written before the spec decides. Where the number changed together with the mode, it is
/// what somebody wants.
pub fn due(pool: &ValidPool, written: i32, before: &WorkerPoolStatus, runs: Option<i32>) -> Option<i32> {
    let last = before.scaling.as_ref()?;
    let leaves = last.mode == Mode::Operator && pool.scaling.mode != Mode::Operator;
    left(leaves, last.spec_replicas, written, runs)
}

/// The same of pods with GPUs: the operator has decided on them in mode HPA, too.
pub fn gpu_due(pool: &ValidPool, written: i32, before: &WorkerPoolStatus, runs: Option<i32>) -> Option<i32> {
    let last = before.scaling.as_ref()?.mode;
    let leaves = last != Mode::Manual && pool.scaling.mode == Mode::Manual;
    left(leaves, before.gpu.as_ref()?.spec_replicas, written, runs)
}

fn left(leaves: bool, seen: Option<i32>, written: i32, runs: Option<i32>) -> Option<i32> {
    (leaves && seen == Some(written)).then_some(runs?).filter(|runs| *runs != written)
}

/// Writes how many pods with GPUs run, unless the pool has changed meanwhile and is to be looked at again.
pub async fn write_gpu(ctx: &Context, pool: &WorkerPool, runs: i32) -> Result<Decision, Error> {
    let patch = json!({"metadata": {"resourceVersion": pool.resource_version()}, "spec": {"gpu": {"replicas": runs}}});
    let (api, name) = (pools(ctx, pool), pool.name_any());
    let (params, patch) = (in_our_name(), Patch::Merge(patch));
    let written = failpoint::around("scale", "WorkerPool", &name, api.patch(&name, &params, &patch)).await;
    let is_written = unless_changed(written.map(drop), name)?;
    Ok(handed_over("gpu.replicas", runs, is_written))
}

/// Writes what runs as if by `kubectl scale`, unless somebody has written to the pool meanwhile: then it is looked at again,
/// for it may be a number. As long as the watch does not show what was written, mode Operator has not ended.
pub async fn write(ctx: &Context, pool: &WorkerPool, runs: i32, gpu: Option<Decision>) -> Result<Decisions, Error> {
    let is_written = scale(ctx, pool, runs).await?;
    Ok(Decisions { mode: Mode::Operator, general: handed_over("spec.replicas", runs, is_written), gpu })
}

/// As many as run, which waits for another look where it could not be written.
fn handed_over(field: &'static str, runs: i32, is_written: bool) -> Decision {
    Decision { is_waiting: !is_written, ..fixed(runs, Need::Spec(field, runs), None) }
}

/// Whether it is the step that is left to the operator: an autoscaler leaves a pool alone that has none, and never asks for
/// none.
pub const fn is_step(written: i32, decided: i32) -> bool {
    matches!((written, decided), (0, 1) | (1, 0))
}

/// Writes a number through `/scale`, unless the pool has changed meanwhile and is to be looked at again: whether it did.
pub async fn scale(ctx: &Context, pool: &WorkerPool, replicas: i32) -> Result<bool, Error> {
    let patch = json!({"metadata": {"resourceVersion": pool.resource_version()}, "spec": {"replicas": replicas}});
    let (api, name) = (pools(ctx, pool), pool.name_any());
    let (params, patch) = (in_our_name(), Patch::Merge(patch));
    let written = failpoint::around("scale", "WorkerPool", &name, api.patch_scale(&name, &params, &patch)).await;
    unless_changed(written.map(drop), name)
}

/// Whether it was written, and not to a pool that had changed.
fn unless_changed(written: kube::Result<()>, name: String) -> Result<bool, Error> {
    match written {
        Ok(()) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(source) => Err(Error::Apply { kind: "WorkerPool".to_owned(), name, source }),
    }
}

fn pools(ctx: &Context, pool: &WorkerPool) -> Api<WorkerPool> {
    Api::namespaced(ctx.client.clone(), &pool.namespace().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::pool::tests::valid;

    #[track_caller]
    fn writes(mode: &str, last: (&str, i32), written: i32, runs: i32) -> Option<i32> {
        let before = json!({"scaling": {"mode": last.0, "desired": runs, "reason": "", "specReplicas": last.1}});
        let mut before_status =
            json!({"replicas": 0, "readyReplicas": 0, "desiredReplicas": 0, "selector": "", "conditions": []});
        before_status["scaling"] = before["scaling"].clone();
        let before: WorkerPoolStatus = serde_json::from_value(before_status).expect("a status");
        let pool = valid(&json!({"scaling": {"mode": mode}}).to_string());
        due(&pool, written, &before, Some(runs))
    }

    #[test]
    fn what_runs_is_written_when_only_the_mode_changed() {
        assert_eq!(writes("Manual", ("Operator", 1), 1, 7), Some(7));
        assert_eq!(writes("Manual", ("Operator", 1), 3, 7), None, "both changed: the number counts");
        assert_eq!(writes("Manual", ("Operator", 7), 7, 7), None, "it says so already");
        assert_eq!(writes("Manual", ("Manual", 1), 1, 7), None);
        assert_eq!(writes("Operator", ("Manual", 1), 1, 7), None);
        assert_eq!(writes("HPA", ("Operator", 1), 1, 7), Some(7));
        assert_eq!(writes("HPA", ("Manual", 1), 1, 7), None);
        assert_eq!(writes("Manual", ("HPA", 1), 1, 7), None, "it was the number that counts already");
        assert_eq!(writes("KEDA", ("Operator", 1), 1, 7), Some(7));
        assert_eq!(writes("KEDA", ("HPA", 7), 7, 7), None);
    }

    #[track_caller]
    fn writes_gpu(mode: &str, last: (&str, Option<i32>), written: i32) -> Option<i32> {
        let mut before =
            json!({"replicas": 0, "readyReplicas": 0, "desiredReplicas": 0, "selector": "", "conditions": []});
        before["scaling"] = json!({"mode": last.0, "desired": 1, "reason": "", "specReplicas": 1});
        before["gpu"] = json!({"replicas": 3, "readyReplicas": 3, "desiredReplicas": 3, "limitedBy": "None",
            "specReplicas": last.1});
        let before: WorkerPoolStatus = serde_json::from_value(before).expect("a status");
        let pool = valid(&json!({"scaling": {"mode": mode}, "gpu": {"replicas": written}}).to_string());
        gpu_due(&pool, written, &before, Some(3))
    }

    #[test]
    fn pods_with_gpus_are_handed_over_to_a_person_only() {
        assert_eq!(writes_gpu("Manual", ("Operator", Some(0)), 0), Some(3));
        assert_eq!(writes_gpu("Manual", ("HPA", Some(0)), 0), Some(3));
        assert_eq!(writes_gpu("HPA", ("Operator", Some(0)), 0), None, "the operator still decides");
        assert_eq!(writes_gpu("Manual", ("Operator", Some(0)), 2), None, "both changed: the number counts");
        assert_eq!(writes_gpu("Manual", ("Operator", Some(3)), 3), None, "it says so already");
        assert_eq!(writes_gpu("Manual", ("Manual", Some(0)), 0), None);
    }

    #[test]
    fn the_operator_takes_an_autoscaled_pool_from_zero_and_to_it_and_leaves_the_rest() {
        let steps = |written| (0..3).filter(move |decided| is_step(written, *decided)).collect::<Vec<_>>();
        assert_eq!([steps(0), steps(1), steps(2)], [vec![1], vec![0], vec![]]);
    }
}
