//! What is kept of an object: caches of every pool's children and pods are most of what the operator holds.

use std::hash::{DefaultHasher, Hash, Hasher};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, PodSpec, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::DynamicObject;
use kube::{Resource, ResourceExt};
use serde::Serialize;

use crate::names;
use crate::watched::Watched;

/// An object of which only a part is read here.
pub trait Slim: Resource {
    /// Drops what nobody reads.
    fn drop_unread(&mut self) {}
}

impl Slim for Watched {}

impl Slim for ServiceAccount {}

impl Slim for ConfigMap {
    fn drop_unread(&mut self) {
        self.data = None;
    }
}

impl Slim for Service {
    fn drop_unread(&mut self) {
        (self.spec, self.status) = (None, None);
    }
}

impl Slim for NetworkPolicy {
    fn drop_unread(&mut self) {
        self.spec = None;
    }
}

impl Slim for PodDisruptionBudget {
    fn drop_unread(&mut self) {
        (self.spec, self.status) = (None, None);
    }
}

impl Slim for HorizontalPodAutoscaler {
    /// Its conditions are read.
    fn drop_unread(&mut self) {
        self.spec = None;
        if let Some(status) = &mut self.status {
            status.current_metrics = None;
        }
    }
}

impl Slim for DynamicObject {
    /// The conditions of one are read.
    fn drop_unread(&mut self) {
        if let Some(data) = self.data.as_object_mut() {
            data.retain(|key, _| key == "status");
        }
    }
}

impl Slim for Deployment {
    fn drop_unread(&mut self) {
        if let Some(spec) = &mut self.spec {
            spec.template = Default::default();
        }
    }
}

impl Slim for Pod {
    /// What a pod refers to is read until it has started.
    fn drop_unread(&mut self) {
        let phase = self.status.as_ref().and_then(|status| status.phase.as_deref());
        if matches!(phase, None | Some("Pending")) {
            return;
        }
        let node_name = self.spec.take().and_then(|spec| spec.node_name);
        self.spec = Some(PodSpec { node_name, ..PodSpec::default() });
    }
}

/// Drops what nobody reads, and keeps of `managedFields` our own entries only, with a fingerprint of the fields in each.
/// Every object goes through this, so that two can be compared.
pub fn slim(object: &mut impl Slim) {
    let entries = object.managed_fields_mut();
    entries.retain(|entry| entry.manager.as_deref() == Some(names::OPERATOR) && entry.subresource.is_none());
    for fields in entries.iter_mut().filter_map(|entry| entry.fields_v1.as_mut()) {
        fields.0 = fingerprint(&fields.0).into();
    }
    // What was retained is a small part of what there was room for.
    entries.shrink_to_fit();
    object.drop_unread();
}

/// The same for values that are the same.
pub fn fingerprint(value: &impl Serialize) -> u64 {
    let mut hasher = DefaultHasher::new();
    // Maps are ordered here, so that the same value has the same text.
    serde_json::to_string(value).unwrap_or_default().hash(&mut hasher);
    hasher.finish()
}
