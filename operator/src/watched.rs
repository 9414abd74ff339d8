//! A pool as the API server shows it: read as far as this operator knows its type, and named where it does not.

use std::borrow::Cow;

use beamline_crds::WorkerPool;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::core::DeserializeGuard;
use kube::core::error_boundary::InvalidObject;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// One object that does not fit the types must not stop the watch of all others.
#[derive(Clone, Debug)]
pub struct Watched {
    /// The pool, or why it cannot be read.
    pub pool: Readable,
    /// Fields of its spec that this operator does not know, by their paths.
    pub unknown: Vec<String>,
}

type Readable = Result<WorkerPool, InvalidObject>;

impl<'de> Deserialize<'de> for Watched {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let object = Value::deserialize(deserializer)?;
        let spec = object.get("spec").cloned().unwrap_or_default();
        let DeserializeGuard(pool) = DeserializeGuard::deserialize(object).map_err(serde::de::Error::custom)?;
        let unknown = pool.as_ref().map(|pool: &WorkerPool| unknown_of(&spec, pool)).unwrap_or_default();
        Ok(Self { pool, unknown })
    }
}

impl Resource for Watched {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        WorkerPool::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        WorkerPool::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        WorkerPool::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        WorkerPool::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        self.pool.as_ref().map_or_else(|invalid| &invalid.metadata, WorkerPool::meta)
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        self.pool.as_mut().map_or_else(|invalid| &mut invalid.metadata, WorkerPool::meta_mut)
    }
}

/// What is written in a spec and was not read.
fn unknown_of(written: &Value, pool: &WorkerPool) -> Vec<String> {
    let mut unknown = Vec::new();
    compare("spec", written, &serde_json::to_value(&pool.spec).unwrap_or_default(), &mut unknown);
    unknown.sort();
    unknown.dedup();
    unknown
}

fn compare(path: &str, written: &Value, read: &Value, unknown: &mut Vec<String>) {
    match (written, read) {
        (Value::Object(written), Value::Object(read)) => {
            for (key, value) in written {
                match read.get(key) {
                    Some(read) => compare(&format!("{path}.{key}"), value, read, unknown),
                    None if says_nothing(value) => {}
                    None => unknown.push(format!("{path}.{key}")),
                }
            }
        }
        (Value::Array(written), Value::Array(read)) => {
            written.iter().zip(read).for_each(|(written, read)| compare(path, written, read, unknown));
        }
        // A value that is read as something else, such as another way to write a quantity.
        _ => {}
    }
}

/// What is read as if it were not there.
fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(says_nothing),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn watched(spec: Value) -> Watched {
        let pool = json!({"apiVersion": "beamline.dev/v1alpha1", "kind": "WorkerPool",
            "metadata": {"name": "orders", "namespace": "shop"}, "spec": spec});
        serde_json::from_value(pool).expect("an object with metadata")
    }

    #[test]
    fn a_field_of_a_later_type_is_named_once_and_the_rest_is_read() {
        let sidecars = json!([{"name": "a", "image": "a:1", "later": 1}, {"name": "b", "image": "b:1", "later": 2}]);
        let watched = watched(json!({
            "nats": {"url": "nats://nats:4222", "later": {"deep": [1]}},
            "worker": {"sidecars": sidecars, "env": [], "nodeSelector": {}},
            "future": true,
            "nothing": {"of": null},
        }));
        assert_eq!(watched.unknown, ["spec.future", "spec.nats.later", "spec.worker.sidecars.later"]);
        assert_eq!(watched.pool.expect("it is read").spec.nats.url, "nats://nats:4222");
    }

    #[test]
    fn of_what_users_would_copy_all_is_known() {
        let examples = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/examples")).expect("examples");
        let mut count = 0;
        for file in examples {
            let text = std::fs::read_to_string(file.expect("a file").path()).expect("a text");
            let objects: Vec<Value> = serde_saphyr::from_multiple(&text).expect("YAML");
            for object in objects.into_iter().filter(|object| object["kind"] == "WorkerPool") {
                let watched: Watched = serde_json::from_value(object).expect("an object");
                assert!(watched.pool.is_ok() && watched.unknown.is_empty(), "{watched:?}");
                count += 1;
            }
        }
        assert!(count >= 5, "only {count} pools were found");
    }

    #[test]
    fn an_object_that_does_not_fit_keeps_its_name() {
        let watched = watched(json!({"nats": 7}));
        assert!(watched.pool.is_err() && watched.unknown.is_empty());
        assert_eq!(watched.meta().name.as_deref(), Some("orders"));
    }
}
