//! Who decides how many workers there are, and within which bounds.

use std::time::Duration;

use beamline_crds as crds;
pub use beamline_crds::Mode;

const MAX_REPLICAS: i32 = 20;
const GPU_MAX_REPLICAS: i32 = 4;
const BACKLOG_SECONDS: i32 = 10;
const QUEUE_DEPTH_PER_REPLICA: i32 = 100;
const STABILIZATION_SECONDS: i32 = 60;
const IDLE_SECONDS_TO_ZERO: i32 = 120;

/// Who decides, and by which rules.
#[derive(Clone, Debug, PartialEq)]
pub struct Scaling {
    /// Who.
    pub mode: Mode,
    /// Within this a backlog is finished.
    pub backlog: Duration,
    /// For so long a need must have been lower before workers go.
    pub stabilization: Duration,
    /// For so long there must have been nothing at all to do before the last worker goes.
    pub idle_to_zero: Duration,
}

/// How many workers of a class there may be, and how much work is one worker's as long as its rate is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// At least.
    pub min: i32,
    /// At most.
    pub max: i32,
    /// Assignments waiting and running for each worker.
    pub queue_depth_per_replica: i32,
}

pub(super) fn scaling(scaling: &crds::Scaling) -> Scaling {
    let crds::Scaling { mode, min_replicas: _, max_replicas: _, target, scale_down } = scaling;
    let down = scale_down.clone().unwrap_or_default();
    let seconds = |given: Option<i32>, default| Duration::from_secs(given.unwrap_or(default).unsigned_abs().into());
    Scaling {
        mode: mode.unwrap_or(Mode::Operator),
        backlog: seconds(target.as_ref().and_then(|target| target.backlog_seconds), BACKLOG_SECONDS),
        stabilization: seconds(down.stabilization_seconds, STABILIZATION_SECONDS),
        idle_to_zero: seconds(down.idle_seconds_to_zero, IDLE_SECONDS_TO_ZERO),
    }
}

pub(super) fn general(scaling: &crds::Scaling) -> Bounds {
    let depth = scaling.target.as_ref().and_then(|target| target.queue_depth_per_replica);
    Bounds {
        min: scaling.min_replicas.unwrap_or(0),
        max: scaling.max_replicas.unwrap_or(MAX_REPLICAS),
        queue_depth_per_replica: depth.unwrap_or(QUEUE_DEPTH_PER_REPLICA),
    }
}

pub(super) fn gpu(gpu: &crds::Gpu, slots: i32) -> Bounds {
    let depth = gpu.target.as_ref().and_then(|target| target.queue_depth_per_replica);
    Bounds {
        min: gpu.min_replicas.unwrap_or(0),
        max: gpu.max_replicas.unwrap_or(GPU_MAX_REPLICAS),
        queue_depth_per_replica: depth.unwrap_or(slots.saturating_mul(2)),
    }
}
