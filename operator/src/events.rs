//! Kubernetes events: one for each change of what a pool says about itself. One recorder, which counts repetitions.

use beamline_crds::{Mode, WorkerPool, WorkerPoolStatus};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource};

use crate::error::{Error, explain};
use crate::failpoint;
use crate::names;
use crate::reason;
use crate::watched::Watched;

/// Writes events.
pub struct Events {
    recorder: Recorder,
}

impl Events {
    /// Events in the name of the operator.
    pub fn new(client: Client) -> Self {
        Self { recorder: Recorder::new(client, Reporter::from(names::OPERATOR)) }
    }

    /// Tells what the pool now says about itself, as far as that is something else than before.
    pub async fn announce(&self, pool: &WorkerPool, before: &WorkerPoolStatus, after: &WorkerPoolStatus) {
        let about = pool.object_ref(&());
        for Told { reason, action, note } in scaling(before, after) {
            self.record(EventType::Normal, reason, action, &note, &about).await;
        }
        if let Some(now) = after.condition("Degraded").filter(|now| now.status == "True") {
            let was = before.condition("Degraded");
            if was.is_none_or(|was| (&was.status, &was.reason) != (&now.status, &now.reason)) {
                self.write(EventType::Warning, &now.reason, &now.message, &about).await;
            }
        }
        let Some(now) = after.condition("Ready") else { return };
        let was = before.condition("Ready");
        if was.is_some_and(|was| (&was.status, &was.reason) == (&now.status, &now.reason)) {
            return;
        }
        let starting = matches!(now.reason.as_str(), reason::ASKING_NATS | reason::WORKERS_STARTING);
        let type_ = if now.status == "True" || starting { EventType::Normal } else { EventType::Warning };
        self.write(type_, &now.reason, &now.message, &about).await;
    }

    /// Tells about a pool whose status cannot be written.
    pub async fn unreadable(&self, pool: &Watched, error: &Error) {
        self.write(EventType::Warning, error.reason(), &error.to_string(), &pool.object_ref(&())).await;
    }

    async fn write(&self, type_: EventType, reason: &str, note: &str, about: &ObjectReference) {
        self.record(type_, reason, "Reconcile".to_owned(), note, about).await;
    }

    /// An event that cannot be written is worth a log line and nothing more.
    async fn record(&self, type_: EventType, reason: &str, action: String, note: &str, about: &ObjectReference) {
        let note = note.get(..note.floor_char_boundary(1000)).map(str::to_owned);
        let event = Event { type_, reason: reason.to_owned(), note, action, secondary: None };
        if let Err(error) = failpoint::around("record", "Event", reason, self.recorder.publish(&event, about)).await {
            tracing::warn!("an event was not written: {}", explain(&error));
        }
    }
}

/// An event to be.
#[derive(Debug, PartialEq)]
struct Told {
    reason: &'static str,
    /// Another one is an event of its own: of the same, repetitions are counted and their notes are lost.
    action: String,
    note: String,
}

/// What is to be told of how many workers there are to be.
fn scaling(before: &WorkerPoolStatus, after: &WorkerPoolStatus) -> Vec<Told> {
    let mut told = Vec::new();
    let mut tell = |whom: &str, was: i32, is: i32, why: &str| {
        let reason = if is > was { reason::SCALED_UP } else { reason::SCALED_DOWN };
        if is != was {
            let change = format!("from {was} to {is} {whom}");
            told.push(Told { reason, note: format!("{change}: {why}"), action: format!("Scale {change}") });
        }
    };
    if let (Some(was), Some(is)) = (&before.scaling, &after.scaling) {
        tell("workers", was.desired, is.desired, &is.reason);
    }
    if let (Some(was), Some(is)) = (&before.gpu, &after.gpu) {
        let why = is.reason.as_deref().unwrap_or_default();
        tell("workers with GPUs", was.desired_replicas, is.desired_replicas, why);
    }
    if let (Some(was), Some(is)) = (&before.scaling, &after.scaling)
        && (was.mode, is.mode) == (Mode::Operator, Mode::Operator)
        && let (Some(was), Some(is)) = (was.spec_replicas, is.spec_replicas)
        && was != is
    {
        let note = format!("spec.replicas was set to {is} and has no effect: scaling.mode Operator decides");
        told.push(Told { reason: reason::REPLICAS_IGNORED, action: format!("Ignore {is}"), note });
    }
    told
}

#[cfg(test)]
mod tests {
    use beamline_crds::{Decision, Learned, LimitedBy};

    use super::*;

    fn status(desired: i32, spec_replicas: i32, mode: Mode) -> WorkerPoolStatus {
        let reason = "because".to_owned();
        let (limited_by, learned, last_scale_time) = (LimitedBy::None, Learned::default(), None);
        let spec_replicas = Some(spec_replicas);
        let scaling = Decision { mode, desired, reason, limited_by, last_scale_time, learned, spec_replicas };
        WorkerPoolStatus { scaling: Some(scaling), ..WorkerPoolStatus::default() }
    }

    fn told(reason: &'static str, action: &str, note: &str) -> [Told; 1] {
        [Told { reason, action: action.to_owned(), note: note.to_owned() }]
    }

    #[test]
    fn each_change_of_the_number_is_told_with_its_reason() {
        let up = scaling(&status(0, 1, Mode::Operator), &status(7, 1, Mode::Operator));
        let note = "from 0 to 7 workers: because";
        assert_eq!(up, told(reason::SCALED_UP, "Scale from 0 to 7 workers", note));
        let down = scaling(&status(7, 1, Mode::Manual), &status(3, 3, Mode::Manual));
        let note = "from 7 to 3 workers: because";
        assert_eq!(down, told(reason::SCALED_DOWN, "Scale from 7 to 3 workers", note));
        assert_eq!(scaling(&WorkerPoolStatus::default(), &status(3, 3, Mode::Manual)), []);
    }

    #[test]
    fn a_number_that_has_no_effect_is_told() {
        let ignored = scaling(&status(2, 1, Mode::Operator), &status(2, 5, Mode::Operator));
        let note = "spec.replicas was set to 5 and has no effect: scaling.mode Operator decides";
        assert_eq!(ignored, told(reason::REPLICAS_IGNORED, "Ignore 5", note));
        assert_eq!(scaling(&status(2, 1, Mode::Operator), &status(2, 5, Mode::Manual)), []);
    }
}
