//! KEDA on this machine, for one API server: its operator, and what serves `external.metrics.k8s.io` for its autoscalers.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::json;
use tempfile::TempDir;

use crate::api::Api;
use crate::plane::ControlPlane;
use crate::process::{Process, free_port};
use crate::tool;
use crate::trust::Certificate;
use crate::wait::within;

const NAMESPACE: &str = "keda";
const SERVICE: &str = "keda-metrics-apiserver";
const API_SERVICE: &str = "/apis/apiregistration.k8s.io/v1/apiservices/v1beta1.external.metrics.k8s.io";
/// How long it may take until it answers, on a busy machine.
const START: Duration = Duration::from_secs(120);

/// A KEDA that runs. It ends when this is dropped.
#[derive(Debug)]
pub struct Keda {
    _operator: Process,
    _metrics: Process,
    _directory: TempDir,
}

impl Keda {
    /// Its types, as its release has them.
    pub fn types() -> String {
        std::fs::read_to_string(tool::program("keda").with_file_name("crds.yaml")).expect("the types of KEDA")
    }

    /// Installs its types and starts it.
    pub async fn start(plane: &ControlPlane, api: &Api) -> Self {
        plane.kubectl(&["create", "-f", "-"], Some(&Self::types()));
        plane.kubectl(&["wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"], None);
        api.namespace(NAMESPACE).await;
        let directory = tempfile::tempdir().expect("a temporary directory");
        let trust = Certificate::of(&["localhost", &format!("{SERVICE}.{NAMESPACE}.svc")]);
        let in_directory = |name: &str| directory.path().join(name).to_string_lossy().into_owned();
        for (name, pem) in [("ca.crt", &trust.authority), ("tls.crt", &trust.certificate), ("tls.key", &trust.key)] {
            std::fs::write(in_directory(name), pem).expect("a file");
        }
        let (numbers, external) = (free_port(), free_port());
        let kubeconfig = plane.kubeconfig();
        let path = kubeconfig.to_string_lossy();
        let mut operator = program("keda-operator", &kubeconfig);
        operator.args(["--enable-prometheus-metrics=false", "--health-probe-bind-address=0"]);
        operator.arg(format!("--metrics-service-bind-address=127.0.0.1:{numbers}"));
        operator.arg(format!("--cert-dir={}", directory.path().display()));
        let operator = Process::start("KEDA", &mut operator);
        let mut metrics = program("keda-adapter", &kubeconfig);
        metrics.arg(format!("--secure-port={external}")).args(["--bind-address=127.0.0.1", "--port=0"]);
        metrics.arg(format!("--metrics-service-address=localhost:{numbers}"));
        for kind in ["authentication", "authorization", "lister"] {
            metrics.arg(format!("--{kind}-kubeconfig={path}"));
        }
        metrics.arg(format!("--tls-cert-file={}", in_directory("tls.crt")));
        metrics.arg(format!("--tls-private-key-file={}", in_directory("tls.key")));
        metrics.arg(format!("--cert-dir={}", directory.path().display()));
        let metrics = Process::start("KEDA's metrics", &mut metrics);
        register(api, external, &trust.authority).await;
        Self { _operator: operator, _metrics: metrics, _directory: directory }
    }
}

fn program(name: &str, kubeconfig: &Path) -> Command {
    let mut command = Command::new(tool::program("keda").with_file_name(name));
    command.env("KUBECONFIG", kubeconfig).env("WATCH_NAMESPACE", "");
    command.env("POD_NAMESPACE", NAMESPACE).env("KEDA_CLUSTER_OBJECT_NAMESPACE", NAMESPACE);
    command
}

/// There is no network of services: the API server finds it by name.
async fn register(api: &Api, port: u16, authority: &str) {
    let by_name = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": SERVICE},
        "spec": {"type": "ExternalName", "externalName": "localhost"}});
    api.apply(&format!("/api/v1/namespaces/{NAMESPACE}/services/{SERVICE}"), &by_name).await;
    let service = json!({
        "apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService",
        "metadata": {"name": "v1beta1.external.metrics.k8s.io"},
        "spec": {
            "group": "external.metrics.k8s.io", "version": "v1beta1", "groupPriorityMinimum": 100,
            "versionPriority": 100, "caBundle": BASE64_STANDARD.encode(authority),
            "service": {"namespace": NAMESPACE, "name": SERVICE, "port": port},
        },
    });
    api.apply(API_SERVICE, &service).await;
    within(START, "KEDA answers for external.metrics.k8s.io", async || {
        let service = api.get(API_SERVICE).await?;
        let conditions = service["status"]["conditions"].as_array()?;
        conditions.iter().any(|one| one["type"] == "Available" && one["status"] == "True").then_some(())
    })
    .await;
}
