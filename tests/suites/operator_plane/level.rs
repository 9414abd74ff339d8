//! What a pool may ask of its pods fits into a namespace of the Pod Security level `restricted`.

use beamline_tests::nats::NatsServer;
use beamline_tests::operator::Operator;
use beamline_tests::pool::Pool;
use beamline_tests::wait::within;
use serde_json::{Value, json};

use super::{PATIENCE, plane};

#[tokio::test(flavor = "multi_thread")]
async fn pods_of_a_pool_that_asks_for_all_it_may_meet_the_level_restricted() {
    let (plane, nats) = (plane(), NatsServer::start());
    let release = plane.install("level", &["watchNamespace=level"]);
    let enforce = "pod-security.kubernetes.io/enforce=restricted";
    plane.kubectl(&["label", "namespace", "level", enforce, "pod-security.kubernetes.io/enforce-version=latest"], None);
    let api = plane.api().await;
    let _operator = Operator::of(&release.kubeconfig, "level").start().await;
    let spec = json!({"worker": worker(), "gpu": {"replicas": 1, "sidecars": [sidecar("triton")]}});
    says_all_that_there_is(
        &spec,
        &api.get("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/workerpools.beamline.dev")
            .await
            .expect("the type"),
    );
    Pool::new("level", "full", &nats).create(&api, spec).await;

    for name in ["full", "full-gpu"] {
        let path = format!("/apis/apps/v1/namespaces/level/deployments/{name}");
        let deployment = within(PATIENCE, "the Deployment is there", async || api.get(&path).await).await;
        let template = &deployment["spec"]["template"];
        let mut pod =
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": template["metadata"], "spec": template["spec"]});
        pod["metadata"]["name"] = json!(format!("{name}-by-hand"));
        let create = ["create", "--namespace=level", "--dry-run=server", "-f", "-"];
        if let Err(said) = plane.try_kubectl(&create, Some(&pod.to_string())) {
            panic!("{name}: {said}");
        }
        pod["spec"]["hostNetwork"] = json!(true);
        let said = plane.try_kubectl(&create, Some(&pod.to_string())).expect_err("the namespace enforces nothing");
        assert!(said.contains("violates PodSecurity \"restricted:latest\""), "{said}");
    }
}

/// All fields of a container, so that one which is let through some day is looked at here.
fn says_all_that_there_is(spec: &Value, crd: &Value) {
    let properties = |path: &str| {
        let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"];
        let found = schema.pointer(path).and_then(Value::as_object).unwrap_or_else(|| panic!("no {path} in the type"));
        found.keys().cloned().collect::<Vec<_>>()
    };
    let container = "/worker/properties/sidecars/items/properties";
    let handlers = ["livenessProbe", "readinessProbe", "startupProbe", "lifecycle/properties/postStart"];
    let mut wanted = vec![
        (container.to_owned(), "/worker/sidecars/0".to_owned()),
        (format!("{container}/securityContext/properties"), "/worker/sidecars/0/securityContext".to_owned()),
    ];
    for (handler, call) in handlers.into_iter().zip(["httpGet", "tcpSocket", "httpGet", "httpGet"]) {
        let given = handler.replace("properties/", "");
        wanted.push((
            format!("{container}/{handler}/properties/{call}/properties"),
            format!("/worker/sidecars/0/{given}/{call}"),
        ));
    }
    for (schema, given) in wanted {
        let given = spec.pointer(&given).unwrap_or_else(|| panic!("{given} is not asked for"));
        let missing: Vec<_> = properties(&schema).into_iter().filter(|field| given.get(field).is_none()).collect();
        assert!(missing.is_empty(), "{schema} may have {missing:?}: ask for it here");
    }
}

fn worker() -> Value {
    json!({
        "podLabels": {"team": "shop"},
        "podAnnotations": {"example.com/note": "kept"},
        "volumes": [
            {"name": "scratch", "emptyDir": {}},
            {"name": "settings", "configMap": {"name": "settings", "optional": true}},
            {"name": "certs", "secret": {"secretName": "certs", "optional": true}},
            {"name": "claim", "persistentVolumeClaim": {"claimName": "data"}},
            {"name": "driver", "csi": {"driver": "example.com"}},
            {"name": "all", "projected": {"sources": [{"downwardAPI": {"items": [
                {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
            ]}}]}},
        ],
        "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
        "sidecars": [sidecar("proxy")],
    })
}

fn sidecar(name: &str) -> Value {
    let call = json!({
        "path": "/", "port": 8000, "scheme": "HTTP", "httpHeaders": [{"name": "A", "value": "b"}],
    });
    json!({
        "name": name,
        "image": "proxy:1",
        "imagePullPolicy": "IfNotPresent",
        "command": ["proxy"],
        "args": ["--all"],
        "workingDir": "/",
        "env": [{"name": "A", "value": "b"}],
        "envFrom": [{"configMapRef": {"name": "settings", "optional": true}}],
        "ports": [{"containerPort": 8000}],
        "resources": {"limits": {"memory": "64Mi"}},
        "livenessProbe": {"httpGet": call},
        "readinessProbe": {"tcpSocket": {"port": 8000}},
        "startupProbe": {"httpGet": call},
        "lifecycle": {"postStart": {"httpGet": call}, "preStop": {"exec": {"command": ["true"]}}},
        "securityContext": {
            "allowPrivilegeEscalation": false, "privileged": false, "readOnlyRootFilesystem": true,
            "runAsGroup": 1000, "runAsNonRoot": true, "runAsUser": 1000,
            "capabilities": {"add": ["NET_BIND_SERVICE"], "drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
    })
}
