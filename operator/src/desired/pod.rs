//! One worker pod: what runs, what it sees, and that it meets the Pod Security level `restricted`.

use k8s_openapi::api::core::v1::{
    Capabilities, ConfigMapEnvSource, Container, ContainerPort, EmptyDirVolumeSource, EnvFromSource, EnvVar,
    EnvVarSource, HTTPGetAction, KeyToPath, ObjectFieldSelector, PersistentVolumeClaimVolumeSource, PodSecurityContext,
    PodSpec, Probe, ResourceRequirements, SeccompProfile, SecretVolumeSource, SecurityContext,
    TopologySpreadConstraint, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::names;
use crate::pool::{ImagePullPolicy, Root, RootVolume, Scheduling, SecretKeyRef, ValidPool};

/// Port of metrics and probes, as in the seed's `--prometheus-endpoint`.
pub(super) const METRICS_PORT: i32 = 9090;
/// The unprivileged user that the image is built for.
const USER: i64 = 65532;
/// What a worker needs after its drain to flush and exit.
const EXIT_SECONDS: i32 = 5;
/// Secrets are readable by the pod's group, which is how a process that is not root reads them.
const SECRET_MODE: i32 = 0o440;

/// A key of a Secret that workers read as a file.
pub(super) struct SecretFile {
    /// Variable that tells the worker its path.
    pub(super) variable: &'static str,
    volume: &'static str,
    file: &'static str,
    secret: SecretKeyRef,
}

impl SecretFile {
    pub(super) fn path(&self) -> String {
        format!("{}/{}", self.directory(), self.file)
    }

    fn directory(&self) -> String {
        format!("/etc/beamline/{}", self.volume.trim_start_matches("beamline-"))
    }
}

/// The Secrets that workers read. Mounted as files, so that a rotated one reaches running pods.
pub(super) fn secret_files(pool: &ValidPool) -> Vec<SecretFile> {
    let nats = &pool.nats;
    [
        ("NATS_CREDS", "beamline-nats-creds", "nats.creds", &nats.credentials),
        ("NATS_TLS_CA", "beamline-nats-ca", "ca.crt", &nats.tls.ca_secret_ref),
        ("NATS_TLS_CERT", "beamline-nats-cert", "tls.crt", &nats.tls.cert_secret_ref),
        ("NATS_TLS_KEY", "beamline-nats-key", "tls.key", &nats.tls.key_secret_ref),
    ]
    .into_iter()
    .filter_map(|(variable, volume, file, secret)| Some(SecretFile { variable, volume, file, secret: secret.clone()? }))
    .collect()
}

pub(super) fn pod(pool: &ValidPool) -> PodSpec {
    let worker = &pool.worker;
    let Scheduling { node_selector, tolerations, affinity, topology_spread_constraints, priority_class_name } =
        worker.scheduling.clone();
    PodSpec {
        containers: vec![container(pool)],
        volumes: Some(volumes(pool)),
        service_account_name: Some(names::service_account(&pool.name)),
        automount_service_account_token: Some(false),
        // A namespace with many Services would otherwise fill the environment.
        enable_service_links: Some(false),
        image_pull_secrets: non_empty(worker.image_pull_secrets.clone()),
        termination_grace_period_seconds: Some(i64::from(worker.drain_seconds + EXIT_SECONDS)),
        security_context: Some(pod_security()),
        node_selector: non_empty(node_selector),
        tolerations: non_empty(tolerations),
        affinity,
        topology_spread_constraints: non_empty(topology_spread_constraints.unwrap_or_else(|| spread(&pool.name))),
        priority_class_name,
        ..PodSpec::default()
    }
}

fn container(pool: &ValidPool) -> Container {
    let worker = &pool.worker;
    Container {
        name: names::CONTAINER.to_owned(),
        image: Some(worker.image.clone()),
        image_pull_policy: worker.image_pull_policy.map(|policy| pull_policy(policy).to_owned()),
        command: Some(vec!["/beamline_worker".to_owned()]),
        // The operator creates the streams; a worker that did so too would race it with other settings.
        args: Some(vec!["--nats-create-streams=false".to_owned()]),
        env_from: Some(vec![EnvFromSource {
            config_map_ref: Some(ConfigMapEnvSource { name: pool.name.clone(), optional: None }),
            ..EnvFromSource::default()
        }]),
        env: Some(std::iter::once(worker_id()).chain(worker.env.iter().cloned()).collect()),
        ports: Some(vec![ContainerPort {
            name: Some(names::METRICS_PORT.to_owned()),
            container_port: METRICS_PORT,
            ..ContainerPort::default()
        }]),
        resources: Some(ResourceRequirements {
            requests: non_empty(worker.resources.requests.clone()),
            limits: non_empty(worker.resources.limits.clone()),
            claims: None,
        }),
        startup_probe: Some(Probe { period_seconds: Some(1), failure_threshold: Some(60), ..probe("/livez") }),
        liveness_probe: Some(Probe { period_seconds: Some(10), failure_threshold: Some(3), ..probe("/livez") }),
        readiness_probe: Some(Probe { period_seconds: Some(5), failure_threshold: Some(2), ..probe("/readyz") }),
        security_context: Some(container_security()),
        volume_mounts: Some(mounts(pool)),
        ..Container::default()
    }
}

const fn pull_policy(policy: ImagePullPolicy) -> &'static str {
    match policy {
        ImagePullPolicy::Always => "Always",
        ImagePullPolicy::IfNotPresent => "IfNotPresent",
        ImagePullPolicy::Never => "Never",
    }
}

fn worker_id() -> EnvVar {
    EnvVar {
        name: "WORKER_ID".to_owned(),
        value: None,
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector {
                api_version: Some("v1".to_owned()),
                field_path: "metadata.name".to_owned(),
            }),
            ..EnvVarSource::default()
        }),
    }
}

fn probe(path: &str) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String(names::METRICS_PORT.to_owned()),
            ..HTTPGetAction::default()
        }),
        timeout_seconds: Some(2),
        ..Probe::default()
    }
}

fn pod_security() -> PodSecurityContext {
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: Some(USER),
        run_as_group: Some(USER),
        fs_group: Some(USER),
        // Else every start walks a whole shared claim to change its owner.
        fs_group_change_policy: Some("OnRootMismatch".to_owned()),
        seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), localhost_profile: None }),
        ..PodSecurityContext::default()
    }
}

fn container_security() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        read_only_root_filesystem: Some(true),
        capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
        ..SecurityContext::default()
    }
}

fn volumes(pool: &ValidPool) -> Vec<Volume> {
    let roots = pool.worker.roots.iter().enumerate().map(|(index, root)| root_volume(index, root));
    let secrets = secret_files(pool).into_iter().map(secret_volume);
    roots.chain(secrets).chain(pool.worker.volumes.iter().cloned()).collect()
}

fn mounts(pool: &ValidPool) -> Vec<VolumeMount> {
    let roots = pool.worker.roots.iter().enumerate().map(|(index, root)| VolumeMount {
        name: root_name(index),
        mount_path: root.path.clone(),
        ..VolumeMount::default()
    });
    let secrets = secret_files(pool).into_iter().map(|file| VolumeMount {
        name: file.volume.to_owned(),
        mount_path: file.directory(),
        read_only: Some(true),
        ..VolumeMount::default()
    });
    roots.chain(secrets).chain(pool.worker.volume_mounts.iter().cloned()).collect()
}

fn root_name(index: usize) -> String {
    format!("beamline-root-{index}")
}

fn root_volume(index: usize, root: &Root) -> Volume {
    let mut volume = Volume { name: root_name(index), ..Volume::default() };
    match root.volume.clone() {
        RootVolume::Scratch(size) => {
            volume.empty_dir = Some(EmptyDirVolumeSource { size_limit: Some(size), medium: None });
        }
        RootVolume::Claim(claim_name) => {
            volume.persistent_volume_claim = Some(PersistentVolumeClaimVolumeSource { claim_name, read_only: None });
        }
    }
    volume
}

fn secret_volume(file: SecretFile) -> Volume {
    Volume {
        name: file.volume.to_owned(),
        secret: Some(SecretVolumeSource {
            secret_name: Some(file.secret.name),
            default_mode: Some(SECRET_MODE),
            items: Some(vec![KeyToPath { key: file.secret.key, path: file.file.to_owned(), mode: None }]),
            optional: None,
        }),
        ..Volume::default()
    }
}

/// Evenly over nodes and zones as far as that is possible: a pool must still start on one node.
fn spread(pool: &str) -> Vec<TopologySpreadConstraint> {
    ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
        .map(|key| TopologySpreadConstraint {
            topology_key: key.to_owned(),
            max_skew: 1,
            when_unsatisfiable: "ScheduleAnyway".to_owned(),
            label_selector: Some(names::selector(pool)),
            // Each generation of pods on its own, so that a rollout does not end up lopsided.
            match_label_keys: Some(vec!["pod-template-hash".to_owned()]),
            ..TopologySpreadConstraint::default()
        })
        .to_vec()
}

/// An empty list or map is left out: sending one would claim the field.
fn non_empty<C: IntoIterator + Clone>(collection: C) -> Option<C> {
    collection.clone().into_iter().next().is_some().then_some(collection)
}
