//! The committed manifest is what the types say, and what an API server can live with.

use std::cell::Cell;
use std::path::Path;

use kube::CustomResourceExt;
use serde_json::Value;

use crate::WorkerPool;

/// Client-side apply keeps the whole object in an annotation, as JSON without a space; annotations hold no more.
const LARGEST_ANNOTATION: usize = 262_144;
/// What is left to those who annotate the type themselves, and to fields that are yet to come.
const MARGIN: usize = 65_536;

/// `make crds` rewrites the file and the chart's copy; without it a stale one fails the build.
#[test]
fn committed_manifests_match_the_types() {
    let fresh = serde_saphyr::to_string(&WorkerPool::crd()).expect("a manifest is plain data");
    for file in ["workerpools.yaml", "../charts/beamline/files/workerpools.yaml"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        if std::env::vars().any(|(name, _)| name == "UPDATE") {
            std::fs::write(&path, &fresh).expect("the directory is writable");
        }
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(committed == fresh, "stale CRD: run `make crds` and commit {}", path.display());
    }
}

#[test]
fn client_side_apply_can_keep_the_manifest_in_an_annotation() {
    // kubectl writes these as six characters each.
    let text = manifest().to_string();
    let written = text.len() + 5 * text.matches(['<', '>', '&']).count();
    assert!(written + MARGIN < LARGEST_ANNOTATION, "the annotation would have {written} bytes");
}

#[test]
fn the_file_reads_back_as_the_same_object() {
    let text = serde_saphyr::to_string(&WorkerPool::crd()).expect("a manifest is plain data");
    let read: Value = serde_saphyr::from_str(&text).expect("YAML");
    assert_eq!(read, manifest());
}

#[test]
fn nothing_is_unsigned_and_nothing_unknown_is_kept() {
    each_schema(|path, schema| {
        let format = schema.get("format").and_then(Value::as_str).unwrap_or_default();
        assert!(!format.starts_with("uint"), "{path}: the API server knows no unsigned formats");
        assert!(!schema.contains_key("x-kubernetes-preserve-unknown-fields"), "{path} keeps unknown fields");
    });
}

#[test]
fn every_string_list_and_map_is_bounded() {
    each_schema(|path, schema| {
        let missing = match schema.get("type").and_then(Value::as_str) {
            Some("string") if schema.contains_key("enum") || schema.get("format") == Some(&"date-time".into()) => None,
            Some("string") => Some("maxLength"),
            Some("array") => Some("maxItems"),
            Some("object") if schema.contains_key("additionalProperties") => Some("maxProperties"),
            None if schema.contains_key("x-kubernetes-int-or-string") => Some("maxLength"),
            _ => None,
        };
        if let Some(keyword) = missing {
            assert!(schema.contains_key(keyword), "{path} has no {keyword}");
        }
    });
}

/// Two managers may each have entries of their own, and none is there twice.
#[test]
fn every_list_of_ours_whose_entries_have_names_is_a_map() {
    let count = Cell::new(0);
    each_schema(|path, schema| {
        // Kubernetes' own lists inside of ours are as Kubernetes has them.
        let is_ours = path.starts_with("spec") && !path.contains("[]") && !path.contains("ffinity");
        let fields = schema.get("items").and_then(|items| items.get("properties"));
        let is_named =
            ["name", "id", "path"].iter().any(|name| fields.is_some_and(|fields| fields.get(name).is_some()));
        if is_ours && is_named {
            assert_eq!(schema.get("x-kubernetes-list-type"), Some(&"map".into()), "{path}");
            count.set(count.get() + 1);
        }
    });
    assert!(count.get() > 7, "only {} lists were found", count.get());
}

#[test]
fn every_field_of_ours_is_explained() {
    each_schema(|path, schema| {
        let is_item = path.ends_with("[]") || path.ends_with("{}");
        let description = schema.get("description").and_then(Value::as_str).unwrap_or_default();
        assert!(is_item || !description.is_empty(), "{path} has no description");
        assert!(!description.replace("\n\n", "").contains('\n'), "{path} is wrapped like a source file");
    });
}

fn manifest() -> Value {
    serde_json::to_value(WorkerPool::crd()).expect("a manifest is plain data")
}

fn each_schema(check: impl Fn(&str, &serde_json::Map<String, Value>)) {
    let manifest = manifest();
    let root = &manifest["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    for part in ["spec", "status"] {
        walk(part, &root["properties"][part], &check);
    }
}

#[test]
fn every_value_of_a_choice_in_a_spec_is_explained() {
    each_schema(|path, schema| {
        let Some(Value::Array(values)) = schema.get("enum").filter(|_| path.starts_with("spec")) else { return };
        let text = schema.get("description").and_then(Value::as_str).unwrap_or_default();
        for value in values.iter().filter_map(Value::as_str) {
            assert!(text.contains(&format!("\n\n{value}: ")), "{path}: {text:?} does not say what {value} means");
        }
    });
}

fn walk(path: &str, schema: &Value, check: &impl Fn(&str, &serde_json::Map<String, Value>)) {
    let Value::Object(schema) = schema else { return };
    check(path, schema);
    if let Some(Value::Object(properties)) = schema.get("properties") {
        for (name, property) in properties {
            walk(&format!("{path}.{name}"), property, check);
        }
    }
    for (keyword, suffix) in [("items", "[]"), ("additionalProperties", "{}")] {
        if let Some(inner) = schema.get(keyword) {
            walk(&format!("{path}{suffix}"), inner, check);
        }
    }
}
