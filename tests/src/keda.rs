//! KEDA on this machine, for one API server: its operator, and what serves `external.metrics.k8s.io` for its autoscalers.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::json;
use tempfile::TempDir;

use crate::api::Api;
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
        std::fs::read_to_string(types()).expect("the types of KEDA")
    }

    /// Installs its types and starts it. With an address of this machine the API server finds it there, by a Service; else
    /// by the name `localhost`, where there is no network of services.
    pub async fn start(kubeconfig: &Path, api: &Api, address: Option<Ipv4Addr>) -> Self {
        kubectl(kubeconfig, &["create", "-f", &types().to_string_lossy()]);
        kubectl(kubeconfig, &["wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"]);
        api.namespace(NAMESPACE).await;
        let directory = tempfile::tempdir().expect("a temporary directory");
        let trust = Certificate::of(&["localhost", &format!("{SERVICE}.{NAMESPACE}.svc")]);
        let in_directory = |name: &str| directory.path().join(name).to_string_lossy().into_owned();
        for (name, pem) in [("ca.crt", &trust.authority), ("tls.crt", &trust.certificate), ("tls.key", &trust.key)] {
            std::fs::write(in_directory(name), pem).expect("a file");
        }
        let (numbers, external) = (free_port(), free_port());
        let path = kubeconfig.to_string_lossy();
        let mut operator = program("keda-operator", kubeconfig);
        operator.args(["--enable-prometheus-metrics=false", "--health-probe-bind-address=0"]);
        operator.arg(format!("--metrics-service-bind-address=127.0.0.1:{numbers}"));
        operator.arg(format!("--cert-dir={}", directory.path().display()));
        let operator = Process::start("KEDA", &mut operator);
        let mut metrics = program("keda-adapter", kubeconfig);
        metrics.arg(format!("--bind-address={}", address.unwrap_or(Ipv4Addr::LOCALHOST)));
        metrics.arg(format!("--secure-port={external}")).arg("--port=0");
        metrics.arg(format!("--metrics-service-address=localhost:{numbers}"));
        for kind in ["authentication", "authorization", "lister"] {
            metrics.arg(format!("--{kind}-kubeconfig={path}"));
        }
        metrics.arg(format!("--tls-cert-file={}", in_directory("tls.crt")));
        metrics.arg(format!("--tls-private-key-file={}", in_directory("tls.key")));
        metrics.arg(format!("--cert-dir={}", directory.path().display()));
        let metrics = Process::start("KEDA's metrics", &mut metrics);
        register(api, address, external, &trust.authority).await;
        Self { _operator: operator, _metrics: metrics, _directory: directory }
    }
}

fn program(name: &str, kubeconfig: &Path) -> Command {
    let mut command = Command::new(tool::program("keda").with_file_name(name));
    command.env("KUBECONFIG", kubeconfig).env("WATCH_NAMESPACE", "");
    command.env("POD_NAMESPACE", NAMESPACE).env("KEDA_CLUSTER_OBJECT_NAMESPACE", NAMESPACE);
    command
}

fn types() -> PathBuf {
    tool::program("keda").with_file_name("crds.yaml")
}

fn kubectl(kubeconfig: &Path, arguments: &[&str]) {
    let mut kubectl = Command::new(tool::program("kubernetes").with_file_name("kubectl"));
    let output = kubectl.env("KUBECONFIG", kubeconfig).args(arguments).output().expect("kubectl runs");
    assert!(output.status.success(), "kubectl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

async fn register(api: &Api, address: Option<Ipv4Addr>, port: u16, authority: &str) {
    let spec = match address {
        None => json!({"type": "ExternalName", "externalName": "localhost"}),
        Some(_) => json!({"ports": [{"port": port, "protocol": "TCP"}]}),
    };
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": SERVICE}, "spec": spec});
    api.apply(&format!("/api/v1/namespaces/{NAMESPACE}/services/{SERVICE}"), &service).await;
    if let Some(address) = address {
        let labels = json!({"kubernetes.io/service-name": SERVICE});
        let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": SERVICE, "labels": labels}, "addressType": "IPv4",
            "endpoints": [{"addresses": [address]}], "ports": [{"port": port, "protocol": "TCP"}]});
        let path = format!("/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices/{SERVICE}");
        api.apply(&path, &slice).await;
    }
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
