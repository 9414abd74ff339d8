//! Kubernetes events: one for each change of what a pool says about itself. One recorder, which counts repetitions.

use beamline_crds::{WorkerPool, WorkerPoolStatus};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource};

use crate::controller::Watched;
use crate::desired::names;
use crate::error::{Error, explain};
use crate::{failpoint, reason, status};

/// Writes events.
pub struct Events {
    recorder: Recorder,
}

impl Events {
    /// Events in the name of the operator.
    pub fn new(client: Client) -> Self {
        Self { recorder: Recorder::new(client, Reporter::from(names::OPERATOR)) }
    }

    /// Tells what the pool now says about itself, if that is something else than before.
    pub async fn announce(&self, pool: &WorkerPool, before: &WorkerPoolStatus, after: &WorkerPoolStatus) {
        let Some(now) = status::ready(after) else { return };
        let was = status::ready(before);
        if was.is_some_and(|was| (&was.status, &was.reason) == (&now.status, &now.reason)) {
            return;
        }
        let starting = matches!(now.reason.as_str(), reason::ASKING_NATS | reason::WORKERS_STARTING);
        let type_ = if now.status == "True" || starting { EventType::Normal } else { EventType::Warning };
        self.write(type_, &now.reason, &now.message, &pool.object_ref(&())).await;
    }

    /// Tells about a pool whose status cannot be written.
    pub async fn unreadable(&self, pool: &Watched, error: &Error) {
        self.write(EventType::Warning, error.reason(), &error.to_string(), &pool.object_ref(&())).await;
    }

    /// An event that cannot be written is worth a log line and nothing more.
    async fn write(&self, type_: EventType, reason: &str, note: &str, about: &ObjectReference) {
        let note = note.get(..note.floor_char_boundary(1000)).map(str::to_owned);
        let event = Event { type_, reason: reason.to_owned(), note, action: "Reconcile".to_owned(), secondary: None };
        if let Err(error) = failpoint::around("record", "Event", reason, self.recorder.publish(&event, about)).await {
            tracing::warn!("an event was not written: {}", explain(&error));
        }
    }
}
