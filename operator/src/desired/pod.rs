//! One worker pod: what runs, what it sees, and that it meets the Pod Security level `restricted`.

use k8s_openapi::api::core::v1::{
    Capabilities, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, HTTPGetAction,
    PersistentVolumeClaimVolumeSource, PodResourceClaim, PodSecurityContext, PodSpec, Probe, ResourceClaim,
    ResourceRequirements, SeccompProfile, SecurityContext, TopologySpreadConstraint, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::environment::environment;
use super::secrets;
use crate::names;
use crate::pool::{Class, Devices, ImagePullPolicy, Root, RootVolume, Source, ValidPool, Worker};

/// Port of metrics and probes, as in the seed's `--prometheus-endpoint`.
pub(super) const METRICS_PORT: i32 = 9090;
/// Where the ConfigMap is mounted: the whole of it, for a single file of it would never be updated.
pub(super) const CONFIG_DIRECTORY: &str = "/etc/beamline/config";
/// Volume of the ConfigMap.
const CONFIG_VOLUME: &str = "beamline-config";
/// The unprivileged user that the image is built for.
const USER: i64 = 65532;
/// What a worker needs after its drain to flush and exit.
const EXIT_SECONDS: i32 = 5;
/// What the pod calls its claim on devices.
const DEVICE_CLAIM: &str = "beamline-gpu";

pub(super) fn pod(pool: &ValidPool, class: &Class) -> PodSpec {
    let worker = &pool.worker;
    let spread = worker.topology_spread_constraints.clone().unwrap_or_else(|| spread(&pool.name, class));
    let mut pod = PodSpec {
        containers: vec![container(pool, class)],
        // Native sidecars: they start before the worker, are restarted by themselves, and stop after it.
        init_containers: non_empty(class.sidecars.iter().cloned().map(sidecar).collect::<Vec<_>>()),
        volumes: Some(volumes(pool)),
        service_account_name: Some(names::service_account(&pool.name)),
        automount_service_account_token: Some(false),
        // A namespace with many Services would otherwise fill the environment.
        enable_service_links: Some(false),
        image_pull_secrets: non_empty(worker.image_pull_secrets.clone()),
        termination_grace_period_seconds: Some(i64::from(worker.drain_seconds + EXIT_SECONDS)),
        security_context: Some(pod_security()),
        runtime_class_name: class.runtime_class_name.clone(),
        node_selector: non_empty(class.node_selector.clone()),
        tolerations: non_empty(class.tolerations.clone()),
        affinity: worker.affinity.clone(),
        topology_spread_constraints: non_empty(spread),
        priority_class_name: worker.priority_class_name.clone(),
        ..PodSpec::default()
    };
    if let Some(devices) = &class.devices {
        give(&mut pod, devices);
    }
    pod
}

/// Gives the devices to the container that is to have them.
fn give(pod: &mut PodSpec, devices: &Devices) {
    let mut containers = pod.containers.iter_mut().chain(pod.init_containers.iter_mut().flatten());
    let Some(container) = containers.find(|container| container.name == devices.container) else { return };
    let resources = container.resources.get_or_insert_default();
    match &devices.source {
        Source::Plugin(resource) => {
            let count = Quantity(devices.count.to_string());
            resources.limits.get_or_insert_default().insert(resource.clone(), count);
        }
        Source::ClaimTemplate(template) => {
            let claim = ResourceClaim { name: DEVICE_CLAIM.to_owned(), request: None };
            resources.claims.get_or_insert_default().push(claim);
            pod.resource_claims = Some(vec![PodResourceClaim {
                name: DEVICE_CLAIM.to_owned(),
                resource_claim_template_name: Some(template.clone()),
                resource_claim_name: None,
            }]);
        }
    }
}

/// What its author left open is as tight as the worker's.
fn sidecar(mut sidecar: Container) -> Container {
    sidecar.restart_policy = Some("Always".to_owned());
    let SecurityContext { allow_privilege_escalation, capabilities, read_only_root_filesystem, .. } =
        container_security();
    let security = sidecar.security_context.get_or_insert_default();
    security.allow_privilege_escalation = allow_privilege_escalation;
    security.read_only_root_filesystem = security.read_only_root_filesystem.or(read_only_root_filesystem);
    security.capabilities.get_or_insert_default().drop = capabilities.and_then(|capabilities| capabilities.drop);
    sidecar
}

fn container(pool: &ValidPool, class: &Class) -> Container {
    let worker = &pool.worker;
    Container {
        name: names::CONTAINER.to_owned(),
        image: Some(worker.image.clone()),
        image_pull_policy: worker.image_pull_policy.map(|policy| pull_policy(policy).to_owned()),
        command: Some(vec!["/beamline_worker".to_owned()]),
        env: Some(environment(pool, class)),
        ports: Some(vec![ContainerPort {
            name: Some(names::METRICS_PORT.to_owned()),
            container_port: METRICS_PORT,
            ..ContainerPort::default()
        }]),
        resources: Some(ResourceRequirements {
            requests: non_empty(class.resources.requests.clone()),
            limits: non_empty(class.resources.limits.clone()),
            claims: None,
        }),
        startup_probe: Some(Probe { period_seconds: Some(1), failure_threshold: Some(60), ..probe("/livez") }),
        liveness_probe: Some(Probe { period_seconds: Some(10), failure_threshold: Some(3), ..probe("/livez") }),
        readiness_probe: Some(Probe { period_seconds: Some(5), failure_threshold: Some(2), ..probe("/readyz") }),
        security_context: Some(container_security()),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
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
    let config = Volume {
        name: CONFIG_VOLUME.to_owned(),
        config_map: Some(ConfigMapVolumeSource { name: pool.name.clone(), ..ConfigMapVolumeSource::default() }),
        ..Volume::default()
    };
    let Worker { roots, volumes, .. } = &pool.worker;
    std::iter::once(config)
        .chain(roots.iter().enumerate().map(|(index, root)| root_volume(index, root)))
        .chain(secrets::all(pool).map(|file| file.volume()))
        .chain(volumes.iter().cloned())
        .collect()
}

fn mounts(pool: &ValidPool) -> Vec<VolumeMount> {
    let config = VolumeMount {
        name: CONFIG_VOLUME.to_owned(),
        mount_path: CONFIG_DIRECTORY.to_owned(),
        read_only: Some(true),
        ..VolumeMount::default()
    };
    let Worker { roots, volume_mounts, .. } = &pool.worker;
    let roots = roots.iter().enumerate().map(|(index, root)| VolumeMount {
        name: root_name(index),
        mount_path: root.path.clone(),
        ..VolumeMount::default()
    });
    std::iter::once(config)
        .chain(roots)
        .chain(secrets::all(pool).map(|file| file.mount()))
        .chain(volume_mounts.iter().cloned())
        .collect()
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

/// Evenly over nodes and zones as far as that is possible: a pool must still start on one node.
fn spread(pool: &str, class: &Class) -> Vec<TopologySpreadConstraint> {
    ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
        .map(|key| TopologySpreadConstraint {
            topology_key: key.to_owned(),
            max_skew: 1,
            when_unsatisfiable: "ScheduleAnyway".to_owned(),
            label_selector: Some(names::selector(pool, class.kind)),
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
