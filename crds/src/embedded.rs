//! Kubernetes' own types inside ours: a chosen part of each, with every string and list bounded.
//!
//! Their full schemas would make the manifest larger than client-side apply allows, and offer fields (node
//! directories) that a pool must not have.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Affinity, Container, EnvVar, LocalObjectReference, Toleration, TopologySpreadConstraint, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::{Map, Value, json};

const QUANTITY: &str = r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$";

pub(crate) fn quantity(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "x-kubernetes-int-or-string": true, "maxLength": 32, "pattern": QUANTITY })
}

pub(crate) fn quantities(generator: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "object", "maxProperties": 16, "additionalProperties": quantity(generator) })
}

pub(crate) fn count_or_percent(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "x-kubernetes-int-or-string": true,
        "minimum": 0,
        "maximum": i32::MAX,
        "maxLength": 4,
        "pattern": "^([0-9]|[1-9][0-9]|100)%$",
    })
}

pub(crate) fn strings(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 64,
        "additionalProperties": { "type": "string", "maxLength": 4096 },
    })
}

pub(crate) fn conditions(generator: &mut SchemaGenerator) -> Schema {
    let mut schema = bounded::<Vec<Condition>>(generator);
    keyed_by(&mut schema, "type");
    schema
}

pub(crate) fn image_pull_secrets(generator: &mut SchemaGenerator) -> Schema {
    let mut schema = bounded::<Vec<LocalObjectReference>>(generator);
    keyed_by(&mut schema, "name");
    schema
}

pub(crate) fn env(generator: &mut SchemaGenerator) -> Schema {
    let mut schema = bounded::<Vec<EnvVar>>(generator);
    few_with_short_names(&mut schema, 100);
    keyed_by(&mut schema, "name");
    keep(
        &mut schema,
        "/items/properties/valueFrom/properties",
        &["configMapKeyRef", "fieldRef", "resourceFieldRef", "secretKeyRef"],
    );
    schema
}

pub(crate) fn tolerations(generator: &mut SchemaGenerator) -> Schema {
    bounded::<Vec<Toleration>>(generator)
}

pub(crate) fn affinity(generator: &mut SchemaGenerator) -> Schema {
    bounded::<Affinity>(generator)
}

pub(crate) fn topology_spread_constraints(generator: &mut SchemaGenerator) -> Schema {
    bounded::<Vec<TopologySpreadConstraint>>(generator)
}

/// The sources that the Pod Security level `restricted` allows and that workers have a use for.
pub(crate) fn volumes(generator: &mut SchemaGenerator) -> Schema {
    let mut schema = bounded::<Vec<Volume>>(generator);
    few_with_short_names(&mut schema, 32);
    keyed_by(&mut schema, "name");
    keep(
        &mut schema,
        "/items/properties",
        &["name", "configMap", "csi", "emptyDir", "persistentVolumeClaim", "projected", "secret"],
    );
    keep(
        &mut schema,
        "/items/properties/projected/properties/sources/items/properties",
        &["configMap", "downwardAPI", "secret", "serviceAccountToken"],
    );
    schema
}

pub(crate) fn volume_mounts(generator: &mut SchemaGenerator) -> Schema {
    let mut schema = bounded::<Vec<VolumeMount>>(generator);
    few_with_short_names(&mut schema, 32);
    keyed_by(&mut schema, "mountPath");
    schema
}

/// Containers that start before the worker and stop after it. What a pod of level `restricted` must not have is kept in the
/// schema where its refusal can say so.
pub(crate) fn sidecars(generator: &mut SchemaGenerator) -> Schema {
    let mut schema = bounded::<Vec<Container>>(generator);
    few_with_short_names(&mut schema, 8);
    keyed_by(&mut schema, "name");
    let container = "/items/properties";
    keep(
        &mut schema,
        container,
        &[
            "args",
            "command",
            "env",
            "envFrom",
            "image",
            "imagePullPolicy",
            "lifecycle",
            "livenessProbe",
            "name",
            "ports",
            "readinessProbe",
            "resources",
            "securityContext",
            "startupProbe",
            "volumeMounts",
            "workingDir",
        ],
    );
    keep(&mut schema, "/items/properties/lifecycle/properties", &["postStart", "preStop"]);
    keep(
        &mut schema,
        "/items/properties/securityContext/properties",
        &[
            "allowPrivilegeEscalation",
            "capabilities",
            "privileged",
            "readOnlyRootFilesystem",
            "runAsGroup",
            "runAsNonRoot",
            "runAsUser",
            "seccompProfile",
        ],
    );
    // Another host would be called by the kubelet, from the node and past every NetworkPolicy.
    for handler in [
        "livenessProbe",
        "readinessProbe",
        "startupProbe",
        "lifecycle/properties/postStart",
        "lifecycle/properties/preStop",
    ] {
        for call in ["httpGet", "tcpSocket"] {
            drop(&mut schema, &format!("{container}/{handler}/properties/{call}/properties"), "host");
        }
    }
    for list in ["ports", "volumeMounts"] {
        limit_items(&mut schema, &format!("{container}/{list}"), 32);
    }
    if let Some(Value::Object(item)) = schema.pointer_mut("/items") {
        let rules = SIDECAR_RULES.map(|(rule, message)| json!({ "rule": rule, "message": message }));
        item.insert("x-kubernetes-validations".to_owned(), rules.to_vec().into());
    }
    schema
}

/// What a sidecar must have and must not have.
const SIDECAR_RULES: [(&str, &str); 9] = [
    (
        "self.name.matches('^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$') && self.name != 'worker' && !self.name.startsWith('beamline-')",
        "sidecars.name: use at most 63 of a-z, 0-9 and '-'; 'worker' and names starting with 'beamline-' are taken",
    ),
    ("has(self.image) && self.image != ''", "sidecars.image: is required"),
    (
        "!has(self.securityContext) || !has(self.securityContext.privileged) || !self.securityContext.privileged",
        "sidecars.securityContext.privileged: must not be true: pods meet the Pod Security level restricted",
    ),
    (
        "!has(self.securityContext) || !has(self.securityContext.allowPrivilegeEscalation) || !self.securityContext.allowPrivilegeEscalation",
        "sidecars.securityContext.allowPrivilegeEscalation: must not be true: pods meet the Pod Security level restricted",
    ),
    (
        "!has(self.securityContext) || ((!has(self.securityContext.runAsNonRoot) || self.securityContext.runAsNonRoot) && (!has(self.securityContext.runAsUser) || self.securityContext.runAsUser != 0))",
        "sidecars.securityContext: must not run as root: leave runAsNonRoot out and set runAsUser to the image's user",
    ),
    (
        "!has(self.securityContext) || !has(self.securityContext.capabilities) || !has(self.securityContext.capabilities.add) || self.securityContext.capabilities.add.all(c, c == 'NET_BIND_SERVICE')",
        "sidecars.securityContext.capabilities.add: only NET_BIND_SERVICE may be added",
    ),
    (
        "!has(self.securityContext) || !has(self.securityContext.seccompProfile) || self.securityContext.seccompProfile.type != 'Unconfined'",
        "sidecars.securityContext.seccompProfile.type: must not be Unconfined",
    ),
    (
        "!has(self.ports) || self.ports.all(p, !has(p.hostPort))",
        "sidecars.ports.hostPort: must not be set: pods do not use ports of the node",
    ),
    (
        "!has(self.ports) || self.ports.all(p, p.containerPort != 9090 && (!has(p.name) || p.name != 'metrics'))",
        "sidecars.ports: port 9090 and the name 'metrics' are the worker's; choose another",
    ),
];

/// Rules look through these lists; the API server refuses a rule that could become slow.
fn few_with_short_names(schema: &mut Schema, max_items: u32) {
    schema.insert("maxItems".to_owned(), max_items.into());
    if let Some(Value::Object(name)) = schema.pointer_mut("/items/properties/name") {
        name.insert("maxLength".to_owned(), 253.into());
    }
}

fn limit_items(schema: &mut Schema, pointer: &str, max_items: u32) {
    if let Some(Value::Object(list)) = schema.pointer_mut(pointer) {
        list.insert("maxItems".to_owned(), max_items.into());
    }
}

/// No two entries have the same key, and appliers that own different entries do not meet.
fn keyed_by(schema: &mut Schema, key: &str) {
    schema.insert("x-kubernetes-list-type".to_owned(), "map".into());
    schema.insert("x-kubernetes-list-map-keys".to_owned(), json!([key]));
}

fn bounded<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    let mut schema = T::json_schema(generator);
    bound(schema.ensure_object());
    schema
}

/// Gives every string, list and map a size limit, and keeps the first sentence of every description.
fn bound(schema: &mut Map<String, Value>) {
    if let Some(Value::String(description)) = schema.get_mut("description")
        && let Some(end) = description.find(". ")
    {
        description.truncate(end + 1);
    }
    if schema.contains_key("x-kubernetes-int-or-string") {
        schema.insert("maxLength".to_owned(), 64.into());
    }
    let limit = match schema.get("type").and_then(Value::as_str) {
        Some("string") => Some(("maxLength", 4096)),
        Some("array") => Some(("maxItems", 64)),
        Some("object") if schema.contains_key("additionalProperties") => Some(("maxProperties", 64)),
        _ => None,
    };
    if let Some((keyword, limit)) = limit {
        schema.entry(keyword).or_insert_with(|| limit.into());
    }
    for child in schema.values_mut() {
        bound_inside(child);
    }
}

fn bound_inside(value: &mut Value) {
    match value {
        Value::Object(schema) => bound(schema),
        Value::Array(values) => values.iter_mut().for_each(bound_inside),
        _ => {}
    }
}

fn drop(schema: &mut Schema, pointer: &str, name: &str) {
    if let Some(Value::Object(properties)) = schema.pointer_mut(pointer) {
        properties.remove(name);
    }
}

fn keep(schema: &mut Schema, pointer: &str, names: &[&str]) {
    if let Some(Value::Object(properties)) = schema.pointer_mut(pointer) {
        let mut all: BTreeMap<String, Value> = std::mem::take(properties).into_iter().collect();
        properties.extend(names.iter().filter_map(|name| all.remove_entry(*name)));
    }
}
