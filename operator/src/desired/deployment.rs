//! The workers: how many, and how one generation of pods replaces another.

use std::collections::BTreeMap;

use beamline_crds::Scaling;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment};
use k8s_openapi::api::core::v1::{ConfigMap, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use sha2::{Digest, Sha256};

use super::{names, pod};
use crate::pool::{Rollout, ValidPool};

pub(super) fn deployment(pool: &ValidPool, scaling: &Scaling, config: &ConfigMap) -> Deployment {
    Deployment {
        metadata: names::metadata(pool, pool.name.clone()),
        spec: Some(DeploymentSpec {
            replicas: Some(scaling.desired),
            revision_history_limit: Some(3),
            selector: names::selector(&pool.name),
            strategy: Some(strategy(&pool.rollout)),
            template: PodTemplateSpec { metadata: Some(template_metadata(pool, config)), spec: Some(pod::pod(pool)) },
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

fn template_metadata(pool: &ValidPool, config: &ConfigMap) -> ObjectMeta {
    let mut labels = pool.worker.pod_labels.clone();
    labels.extend(names::all_labels(&pool.name));
    let mut annotations = pool.worker.pod_annotations.clone();
    annotations.insert(names::CONFIG_HASH.to_owned(), hash(config.data.as_ref()));
    ObjectMeta { labels: Some(labels), annotations: Some(annotations), ..ObjectMeta::default() }
}

fn hash(data: Option<&BTreeMap<String, String>>) -> String {
    let mut hash = Sha256::new();
    for (name, value) in data.into_iter().flatten() {
        hash.update(format!("{name}={value}\n"));
    }
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}
