//! Pools that cannot go on: each says why within half a minute, costs nothing meanwhile, and goes on by itself. And what an
//! operator tells of all that in its traces.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use beamline_tests::cluster::{Namespace, PATIENCE, kubectl, pretend_gpus};
use beamline_tests::wait::within;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Attribute;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use serde_json::{Value, json};

use super::{Release, condition, is_ready, operators, pool, scrape};

/// A condition names what is wrong within this.
const SAID_WITHIN: Duration = Duration::from_secs(30);
/// How long it is counted what a stuck pool costs.
const WATCHED: Duration = Duration::from_secs(15);

fn nats() -> Value {
    json!({"url": "nats://nats:4222"})
}

/// A pool whose worker has something that it cannot have, or whose spec has more.
fn with(name: &str, worker: Value, spec: Value) -> String {
    let mut pool: Value = serde_json::from_str(&pool(name, nats())).expect("JSON");
    for (part, more) in [("worker", worker), ("", spec)] {
        let into = if part.is_empty() { &mut pool["spec"] } else { &mut pool["spec"][part] };
        for (key, value) in more.as_object().expect("an object") {
            into[key] = value.clone();
        }
    }
    pool.to_string()
}

/// The sum of a series over all operators.
fn counted(series: &str) -> u64 {
    let text: String = operators().iter().map(|pod| scrape("beamline-system", pod, 8080)).collect();
    let values = text.lines().filter(|line| line.starts_with(series));
    values.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>() as u64
}

struct Stuck {
    name: &'static str,
    worker: Value,
    spec: Value,
    reason: &'static str,
    message: &'static str,
}

/// Each in its own way.
fn stuck() -> Vec<Stuck> {
    let stuck = |name, worker: Value, reason, message| Stuck { name, worker, spec: json!({}), reason, message };
    let volume = |source: Value| {
        let mut volume = json!({"name": "more"});
        volume.as_object_mut().expect("an object").extend(source.as_object().expect("an object").clone());
        json!({"volumes": [volume], "volumeMounts": [{"name": "more", "mountPath": "/more"}]})
    };
    let from =
        |kind: &str, name: &str| json!({"env": [{"name": "MORE", "valueFrom": {kind: {"name": name, "key": "more"}}}]});
    vec![
        stuck("image", json!({"image": "localhost/nowhere:1"}), "ImagePullBackOff", "localhost/nowhere:1"),
        stuck(
            "pull-secret",
            json!({"image": "localhost/nowhere:1", "imagePullSecrets": [{"name": "registry"}]}),
            "SecretUnusable",
            "worker.imagePullSecrets: Secret `registry` does not exist",
        ),
        stuck(
            "crash",
            json!({"env": [{"name": "WORKER_LOG", "value": "no=such=level"}]}),
            "CrashLoopBackOff",
            "workers exited with code 2: ",
        ),
        Stuck {
            spec: json!({"gpu": {"resourceName": "example.com/rare", "replicas": 1}}),
            ..stuck("gpu", json!({}), "Unschedulable", "example.com/rare")
        },
        stuck(
            "secret",
            volume(json!({"secret": {"secretName": "more"}})),
            "SecretUnusable",
            "worker.volumes `more`: Secret `more` does not exist",
        ),
        stuck(
            "map",
            volume(json!({"configMap": {"name": "more-of-it"}})),
            "ReferenceMissing",
            "worker.volumes `more`: ConfigMap `more-of-it` does not exist",
        ),
        stuck(
            "claim",
            volume(json!({"persistentVolumeClaim": {"claimName": "more"}})),
            "ReferenceMissing",
            "worker.volumes `more`: PersistentVolumeClaim `more` does not exist",
        ),
        stuck(
            "secret-key",
            from("secretKeyRef", "empty"),
            "SecretUnusable",
            "worker.env `MORE`: Secret `empty` has no key `more`",
        ),
        stuck(
            "map-key",
            from("configMapKeyRef", "empty"),
            "ReferenceMissing",
            "worker.env `MORE`: ConfigMap `empty` has no key `more`",
        ),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_way_to_be_stuck_is_named_costs_nothing_and_ends_by_itself() {
    let _release = Release::with(&[]).await;
    let (namespace, full) = (Namespace::create("beamline-stuck"), Namespace::create("beamline-full"));
    for namespace in [&namespace, &full] {
        namespace.start_nats();
    }
    namespace.kubectl(&["create", "secret", "generic", "empty"]);
    namespace.kubectl(&["create", "configmap", "empty"]);
    full.kubectl(&["create", "quota", "small", "--hard=pods=1"]);
    let table = stuck();
    let started = Instant::now();
    for Stuck { name, worker, spec, .. } in &table {
        namespace.apply(&with(name, worker.clone(), spec.clone()));
    }
    full.apply(&pool("quota", nats()));
    let quota = ("quota", "QuotaExceeded", "exceeded quota: small");
    let all = table.iter().map(|row| (&namespace, (row.name, row.reason, row.message))).chain([(&full, quota)]);
    let mut slowest = Duration::ZERO;
    for (namespace, (name, reason, message)) in all.clone() {
        let is_said = |pool: &Value| {
            let ready = condition(pool, "Ready");
            let said = ready["message"].as_str().unwrap_or_default();
            (&ready["status"], &ready["reason"]) == (&json!("False"), &json!(reason)) && said.contains(message)
        };
        namespace.until(&format!("workerpool/{name}"), &format!("{reason}: {message}"), is_said).await;
        slowest = slowest.max(started.elapsed());
    }
    assert!(slowest < SAID_WITHIN, "the last of them was said after {slowest:?}");

    // The last that becomes known: it takes two looks at the queue.
    for (namespace, (name, ..)) in all {
        let is_known = |pool: &Value| pool["status"]["queue"]["arrivalsPerSecond"].is_string();
        namespace.until(&format!("workerpool/{name}"), "rates are known", is_known).await;
    }
    let costs = || (counted("beamline_operator_reconciles_total"), counted("beamline_operator_status_writes_total"));
    let before = costs();
    tokio::time::sleep(WATCHED).await;
    let after = costs();
    let pools = table.len() as u64 + 1;
    // A pod that crashes or asks for its image again is looked at; nothing new is to be said about it.
    assert!(after.0 - before.0 <= 4 * pools, "{} reconciles in {WATCHED:?}", after.0 - before.0);
    assert_eq!(after.1 - before.1, 0, "writes of statuses in {WATCHED:?}");

    // What was missing comes, and what was wrong is taken back.
    pretend_gpus("example.com/rare", 1);
    namespace.kubectl(&["create", "secret", "generic", "more"]);
    namespace.kubectl(&["create", "configmap", "more-of-it"]);
    namespace.apply(
        r#"{"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "more"},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}}}"#,
    );
    for kind in ["secret", "configmap"] {
        let patch =
            if kind == "secret" { json!({"stringData": {"more": "1"}}) } else { json!({"data": {"more": "1"}}) };
        namespace.kubectl(&["patch", kind, "empty", "-p", &patch.to_string()]);
    }
    full.kubectl(&["delete", "quota", "small"]);
    for name in ["image", "pull-secret", "crash"] {
        namespace.apply(&pool(name, nats()));
    }
    full.until("workerpool/quota", "it is ready", is_ready).await;
    for Stuck { name, .. } in &table {
        let is_well = |pool: &Value| is_ready(pool) && condition(pool, "Degraded")["status"] == "False";
        namespace.until(&format!("workerpool/{name}"), "it is ready", is_well).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_that_is_taken_away_is_named_and_its_return_is_enough() {
    let _release = Release::with(&[]).await;
    let namespace = Namespace::create("beamline-denied");
    namespace.start_nats();
    namespace.apply(&pool("before", nats()));
    namespace.until("workerpool/before", "it is ready", is_ready).await;
    let role: Value =
        serde_json::from_str(&kubectl(&["get", "clusterrole", "beamline", "--output=json"])).expect("JSON");
    let rules = role["rules"].as_array().expect("rules");
    let at = rules.iter().position(|rule| rule["resources"].to_string().contains("configmaps")).expect("the rule");
    let verbs = |verbs: &Value| {
        let patch = json!([{"op": "replace", "path": format!("/rules/{at}/verbs"), "value": verbs}]);
        kubectl(&["patch", "clusterrole", "beamline", "--type=json", "-p", &patch.to_string()]);
    };
    verbs(&json!(["get", "list", "watch"]));
    let started = Instant::now();
    namespace.apply(&pool("after", nats()));
    let is_denied = |pool: &Value| condition(pool, "Ready")["reason"] == "Forbidden";
    let denied = namespace.until("workerpool/after", "a right is missed", is_denied).await;
    assert!(started.elapsed() < SAID_WITHIN, "after {:?}", started.elapsed());
    let message = condition(&denied, "Ready")["message"].as_str().unwrap_or_default();
    assert!(message.contains("`after-worker`") && message.contains("serviceaccounts"), "{message}");
    let before = counted("beamline_operator_reconciles_total{result=\"Forbidden\"}");
    tokio::time::sleep(WATCHED).await;
    // After 1, 2, 4, 8, 16 and then every 30 seconds.
    let again = counted("beamline_operator_reconciles_total{result=\"Forbidden\"}") - before;
    assert!(again <= 8, "{again} tries in {WATCHED:?}");
    assert!(is_ready(&namespace.get("workerpool/before").expect("it is there")), "one that needed nothing");

    verbs(&rules[at]["verbs"]);
    namespace.until("workerpool/after", "it is ready", is_ready).await;
}

fn attributes(pairs: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |pair: &KeyValue| match pair.value.as_ref().and_then(|value| value.value.as_ref()) {
        Some(Attribute::StringValue(text)) => text.clone(),
        other => format!("{other:?}"),
    };
    pairs.iter().map(|pair| (pair.key.clone(), text(pair))).collect()
}

/// What the operator has sent, read from the peer that takes it.
fn spans(namespace: &Namespace) -> Vec<Span> {
    let path = format!("/api/v1/namespaces/{}/services/peer:http/proxy/kept/v1", namespace.name());
    let bodies: Vec<String> = serde_json::from_str(&namespace.kubectl(&["get", "--raw", &path])).expect("JSON");
    let mut found = Vec::new();
    for body in bodies {
        let body = BASE64_STANDARD.decode(body).expect("base64");
        for resource in ExportTraceServiceRequest::decode(body.as_slice()).expect("OTLP").resource_spans {
            let names = attributes(&resource.resource.expect("a resource").attributes);
            assert_eq!(names["service.name"], "beamline-operator");
            found.extend(resource.scope_spans.into_iter().flat_map(|scope| scope.spans));
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_gets_each_reconcile_with_its_steps() {
    let namespace = Namespace::create("beamline-traces");
    namespace.start_peer();
    namespace.start_nats();
    let _release = Release::with(&["traces.otlpEndpoint=http://peer.beamline-traces.svc:80"]).await;
    namespace.apply(&pool("orders", nats()));
    namespace.until("workerpool/orders", "it is ready", is_ready).await;
    namespace.kubectl(&["create", "configmap", "taken"]);
    namespace.apply(&pool("taken", nats()));

    let find = |spans: &[Span], name: &str, pool: &str, reason: Option<&str>| {
        let is_it = |span: &&Span| {
            let said = attributes(&span.attributes);
            span.name == name
                && said.get("name").is_some_and(|it| it == pool)
                && said.get("reason").map(String::as_str) == reason
        };
        spans.iter().find(is_it).cloned()
    };
    let all = within(PATIENCE, "the spans arrive", async || {
        let spans = spans(&namespace);
        let well = find(&spans, "reconcile", "orders", Some("WorkersReady"))?;
        let failed = find(&spans, "reconcile", "taken", Some("NameConflict"))?;
        let streams = find(&spans, "streams", "orders", None)?;
        Some((spans, well, failed, streams))
    });
    let (spans, well, failed, streams) = all.await;
    let text = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    let expected = |outcome: &str, name: &str, reason: &str| {
        [text("namespace", "beamline-traces"), text("name", name), text("outcome", outcome), text("reason", reason)]
    };
    assert_eq!(attributes(&well.attributes), BTreeMap::from(expected("ok", "orders", "WorkersReady")));
    assert_eq!(attributes(&failed.attributes), BTreeMap::from(expected("error", "taken", "NameConflict")));
    let expected = [text("namespace", "beamline-traces"), text("name", "orders"), text("outcome", "ok")];
    assert_eq!(attributes(&streams.attributes), BTreeMap::from(expected));
    let steps = |of: &Span| {
        let mut steps: Vec<&Span> = spans.iter().filter(|span| span.parent_span_id == of.span_id).collect();
        steps.sort_by_key(|span| span.start_time_unix_nano);
        steps
            .iter()
            .map(|step| (step.name.clone(), attributes(&step.attributes)["outcome"].clone()))
            .collect::<Vec<_>>()
    };
    let all = ["observe", "retire", "apply", "publish"].map(|step| text(step, "ok"));
    assert_eq!(steps(&well), all);
    assert_eq!(steps(&failed), [text("observe", "error"), text("publish", "ok")]);
    let code = |span: &Span| span.status.as_ref().map_or(0, |status| status.code);
    assert_eq!([code(&well), code(&failed), code(&streams)], [0, 2, 0]);
    assert!([&well, &failed, &streams].iter().all(|span| span.parent_span_id.is_empty()));
    let names = ["reconcile", "streams", "observe", "retire", "apply", "publish"];
    assert!(spans.iter().all(|span| names.contains(&span.name.as_str())), "{spans:?}");
}
