//! Why workers do not start. Sentences stay the same while the cause does: no pod names, no counters, or a stuck pool
//! would be written again and again.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};

use super::class::ClassState;
use crate::names;
use crate::reason;

/// Characters of a worker's last line that are shown.
const MOST_WORDS: usize = 300;

/// A cause that a person can act on. The first in this order wins.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Cause {
    order: u8,
    pub(super) reason: &'static str,
    pub(super) message: String,
}

pub(super) fn cause(class: &ClassState<'_>) -> Option<Cause> {
    not_created(class.deployment).or_else(|| class.pods().filter_map(of_pod).min())
}

/// Pods that the API server does not let the Deployment create.
fn not_created(deployment: &Deployment) -> Option<Cause> {
    let failure = deployment
        .status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .find(|condition| condition.type_ == "ReplicaFailure" && condition.status == "True")?;
    let message = failure.message.clone().unwrap_or_default();
    // `pods "default-5c9-x7k" is forbidden: exceeded quota: …`: the name differs each time.
    let message = message.split_once(" is forbidden: ").map_or(message.as_str(), |(_, why)| why);
    let reason = if message.contains("exceeded quota") { reason::QUOTA_EXCEEDED } else { reason::PODS_REFUSED };
    Some(Cause { order: 0, reason, message: format!("pods cannot be created: {message}") })
}

fn of_pod(pod: &Pod) -> Option<Cause> {
    if pod.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let status = pod.status.as_ref()?;
    let unschedulable =
        status.conditions.iter().flatten().find(|condition| {
            condition.type_ == "PodScheduled" && condition.reason.as_deref() == Some("Unschedulable")
        });
    if let Some(condition) = unschedulable {
        let why = condition.message.clone().unwrap_or_default();
        return Some(Cause {
            order: 4,
            reason: reason::UNSCHEDULABLE,
            message: format!("no node takes a worker: {why}"),
        });
    }
    // Sidecars come first: the worker waits for them.
    status.init_container_statuses.iter().chain(&status.container_statuses).flatten().find_map(of_container)
}

fn of_container(container: &ContainerStatus) -> Option<Cause> {
    if container.ready {
        return None;
    }
    let waiting = container.state.as_ref().and_then(|state| state.waiting.as_ref());
    let why = waiting.and_then(|waiting| waiting.message.as_deref()).unwrap_or_default();
    match waiting.and_then(|waiting| waiting.reason.as_deref()) {
        // The kubelet alternates between trying and backing off.
        Some("ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull") => Some(Cause {
            order: 1,
            reason: reason::IMAGE_PULL_BACK_OFF,
            message: format!("the image {} cannot be had; `kubectl describe pod` says why", container.image),
        }),
        Some("CreateContainerConfigError" | "CreateContainerError" | "RunContainerError") => Some(Cause {
            order: 2,
            reason: reason::CREATE_CONTAINER_FAILED,
            message: format!("the container `{}` cannot be created: {why}", container.name),
        }),
        _ => crash(container),
    }
}

fn crash(container: &ContainerStatus) -> Option<Cause> {
    let ended = container.last_state.as_ref().and_then(|state| state.terminated.as_ref())?;
    let is_worker = container.name == names::CONTAINER;
    let how = match ended.reason.as_deref() {
        Some("OOMKilled") if is_worker => {
            "were killed for using more memory than worker.resources.limits.memory".to_owned()
        }
        Some("OOMKilled") => "were killed for using more memory than their limit".to_owned(),
        _ => format!("exited with code {}", ended.exit_code),
    };
    let message = match (is_worker, ended.message.as_deref().and_then(last_words)) {
        (true, Some(why)) => format!("workers {how}: {why}"),
        (true, None) => format!("workers {how}; `kubectl logs --previous` says why"),
        (false, _) => {
            let name = &container.name;
            format!("sidecars `{name}` {how}; `kubectl logs --previous --container {name}` says why")
        }
    };
    Some(Cause { order: 3, reason: reason::CRASH_LOOP_BACK_OFF, message })
}

/// Why a worker could not go on is the last line that it writes, and in plain words. A line of its log has a time, which
/// would be another one after each restart.
fn last_words(log: &str) -> Option<String> {
    let line = log.lines().map(str::trim).rfind(|line| !line.is_empty())?;
    (!line.starts_with('{')).then(|| line.chars().take(MOST_WORDS).collect())
}
