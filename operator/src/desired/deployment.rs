//! The workers of a class: how many, and how one generation of pods replaces another.

use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment};
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::pod;
use crate::names;
use crate::pool::{Class, Rollout, ValidPool};

pub(super) fn deployment(pool: &ValidPool, class: &Class, replicas: i32) -> Deployment {
    Deployment {
        metadata: names::class_metadata(pool, class.kind),
        spec: Some(DeploymentSpec {
            replicas: Some(replicas),
            revision_history_limit: Some(3),
            selector: names::selector(&pool.name, class.kind),
            strategy: Some(strategy(&class.rollout)),
            template: PodTemplateSpec {
                metadata: Some(template_metadata(pool, class)),
                spec: Some(pod::pod(pool, class)),
            },
            ..DeploymentSpec::default()
        }),
        status: None,
    }
}

fn strategy(rollout: &Rollout) -> DeploymentStrategy {
    DeploymentStrategy {
        type_: Some("RollingUpdate".to_owned()),
        rolling_update: Some(RollingUpdateDeployment {
            max_surge: Some(rollout.max_surge.clone()),
            max_unavailable: Some(rollout.max_unavailable.clone()),
        }),
    }
}

fn template_metadata(pool: &ValidPool, class: &Class) -> ObjectMeta {
    let mut labels = pool.worker.pod_labels.clone();
    labels.extend(names::class_labels(&pool.name, class.kind));
    let annotations = pool.worker.pod_annotations.clone();
    ObjectMeta {
        labels: Some(labels),
        annotations: (!annotations.is_empty()).then_some(annotations),
        ..ObjectMeta::default()
    }
}
