//! The pods of one class, counted.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;

use crate::converged::Converged;
use crate::pool::Kind;
use crate::seen::of_class;

/// The pods of one class: what is asked for, and what is there.
pub(super) struct ClassState<'a> {
    pub(super) kind: Kind,
    /// Nobody asks for it any more, and it has work left.
    pub(super) is_leaving: bool,
    pub(super) desired: i32,
    pub(super) exist: i32,
    pub(super) ready: i32,
    pub(super) updated: i32,
    /// Whether the numbers answer the Deployment's latest change.
    pub(super) is_current: bool,
    pub(super) deployment: &'a Deployment,
    pods: &'a [Arc<Pod>],
}

impl<'a> ClassState<'a> {
    pub(super) fn general(converged: &'a Converged) -> Self {
        let desired = converged.decisions.general.desired;
        Self::new(Kind::General, Some(desired), &converged.applied.general, &converged.pods)
    }

    pub(super) fn gpu(converged: &'a Converged) -> Option<Self> {
        let deployment = converged.applied.gpu.as_deref()?;
        let desired = converged.decisions.gpu.as_ref().map(|decision| decision.desired);
        Some(Self::new(Kind::Gpu, desired, deployment, &converged.pods))
    }

    /// The general class, then the one with GPUs.
    pub(super) fn all(converged: &'a Converged) -> Vec<Self> {
        std::iter::once(Self::general(converged)).chain(Self::gpu(converged)).collect()
    }

    fn new(kind: Kind, asked: Option<i32>, deployment: &'a Deployment, pods: &'a [Arc<Pod>]) -> Self {
        let status = deployment.status.as_ref();
        Self {
            kind,
            is_leaving: asked.is_none(),
            desired: asked.unwrap_or(0),
            exist: status.and_then(|status| status.replicas).unwrap_or(0),
            ready: status.and_then(|status| status.ready_replicas).unwrap_or(0),
            updated: status.and_then(|status| status.updated_replicas).unwrap_or(0),
            is_current: status.and_then(|status| status.observed_generation) >= deployment.metadata.generation,
            deployment,
            pods,
        }
    }

    /// Its pods, one by one.
    pub(super) fn pods(&self) -> impl Iterator<Item = &'a Pod> {
        of_class(self.pods, self.kind)
    }

    /// Whether there is as much as is asked for, all of the latest kind.
    pub(super) fn is_complete(&self) -> bool {
        self.is_current && [self.exist, self.ready, self.updated] == [self.desired; 3]
    }

    /// "3 of 4 workers ready".
    pub(super) fn in_words(&self) -> String {
        let whom = match self.kind {
            Kind::General => "workers",
            Kind::Gpu => "workers with GPUs",
        };
        if self.is_leaving {
            return format!("{} {whom} finish what waits for them", self.exist);
        }
        format!("{} of {} {whom} ready", self.ready, self.desired)
    }
}
