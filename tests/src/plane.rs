//! A control plane of a test's own: the real etcd, API server, controllers and scheduler; nodes and pods are fake. Several
//! run side by side, and beside the cluster.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::api::Api;
use crate::process::free_port;
use crate::tool;

/// A running control plane. It ends when this is dropped, and with the process that started it.
#[derive(Debug)]
pub struct ControlPlane {
    script: Child,
    directory: PathBuf,
    /// Set when the API is installed: it is large, and the same for all.
    has_type: OnceLock<()>,
}

/// What the chart gives an operator: an identity and its rights.
#[derive(Debug)]
pub struct Release {
    /// Namespace of the operator.
    pub namespace: String,
    /// Whom the API server takes it for.
    pub user: String,
    /// How it reaches the API server.
    pub kubeconfig: PathBuf,
}

impl ControlPlane {
    /// Starts one, which takes some seconds.
    pub fn start() -> Self {
        let mut command = Command::new("bash");
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster/control-plane.sh"));
        command.args([free_port(), free_port(), free_port()].map(|port| port.to_string()));
        let mut script = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("bash runs");
        let mut directory = String::new();
        let mut said = BufReader::new(script.stdout.take().expect("a pipe"));
        said.read_line(&mut directory).expect("it says where it is");
        assert!(!directory.is_empty(), "the control plane does not start");
        Self { script, directory: PathBuf::from(directory.trim_end()), has_type: OnceLock::new() }
    }

    /// The admin's.
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.join("kubeconfig")
    }

    /// The API, with all rights.
    pub async fn api(&self) -> Api {
        Api::by(&self.kubeconfig()).await
    }

    /// Installs the API, and the rights of an operator in a namespace of this name, as the chart says with these values.
    pub fn install(&self, name: &str, values: &[&str]) -> Release {
        self.has_type.get_or_init(|| self.install_type());
        let mut templates = vec!["service-account", "rbac"];
        if values.contains(&"externalMetrics.enabled=true") {
            templates.push("external-metrics");
        }
        let manifest = render(name, &templates, values);
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        self.kubectl(&["apply", "-f", "-"], Some(&namespace.to_string()));
        self.apply(&manifest);
        let accounts = self.kubectl(&["get", "serviceaccounts", "--namespace", name, "--output=name"], None);
        let account = accounts.lines().filter_map(|line| line.strip_prefix("serviceaccount/"));
        let account = account.into_iter().find(|account| *account != "default").expect("the chart has an account");
        let token = self.kubectl(&["create", "token", account, "--namespace", name, "--duration=8h"], None);
        Release {
            namespace: name.to_owned(),
            user: format!("system:serviceaccount:{name}:{account}"),
            kubeconfig: self.write_kubeconfig(name, token.trim()),
        }
    }

    fn install_type(&self) {
        self.apply(&render("type", &["crd"], &[]));
        self.types_are_known();
    }

    /// Installs the types of a file.
    pub fn install_types(&self, file: &Path) {
        self.kubectl(&["create", "-f", &file.to_string_lossy()], None);
        self.types_are_known();
    }

    fn types_are_known(&self) {
        // kubectl gives up on a type that is so new that it has no conditions yet.
        let established = ["wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"];
        let are_there = (0..20).any(|_| self.try_kubectl(&established, None).is_ok());
        assert!(are_there, "types are not established");
    }

    /// An API server that is busy gives up.
    fn apply(&self, manifest: &str) {
        let apply = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
        let is_applied = (0..5).any(|_| self.try_kubectl(&apply, Some(manifest)).is_ok());
        assert!(is_applied, "the chart is not applied");
    }

    /// What helm says when it looks at this API server and does not install the chart with these values.
    pub fn refusal(&self, name: &str, values: &[&str]) -> String {
        let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/beamline");
        let mut helm = Command::new(tool::program("helm"));
        helm.args(["template", name, &chart.to_string_lossy(), "--namespace", name, "--dry-run=server"]);
        helm.args(values.iter().map(|value| format!("--set={value}"))).env("KUBECONFIG", self.kubeconfig());
        let output = helm.output().expect("helm runs");
        assert!(!output.status.success(), "it is not refused");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// What the API server was asked by this user and how it answered, from the audit log, oldest first.
    pub fn asked_by(&self, user: &str) -> Vec<Value> {
        let log = std::fs::read_to_string(self.directory.join("audit.log")).unwrap_or_default();
        // All tests of a plane share this log: to parse what others asked for would be most of the work.
        let lines = log.lines().filter(|line| line.contains(user));
        // The last line may still be written.
        let events = lines.filter_map(|line| serde_json::from_str::<Value>(line).ok());
        events.filter(|event| event["user"]["username"] == user).collect()
    }

    /// kubectl with all rights; its output.
    ///
    /// # Panics
    /// It failed.
    pub fn kubectl(&self, arguments: &[&str], input: Option<&str>) -> String {
        self.try_kubectl(arguments, input).unwrap_or_else(|said| panic!("kubectl {arguments:?}: {said}"))
    }

    /// kubectl with all rights; its output, or what it said when it failed.
    pub fn try_kubectl(&self, arguments: &[&str], input: Option<&str>) -> Result<String, String> {
        let mut kubectl = Command::new(tool::program("kubernetes").with_file_name("kubectl"));
        try_output(kubectl.env("KUBECONFIG", self.kubeconfig()).args(arguments), input)
    }

    fn write_kubeconfig(&self, name: &str, token: &str) -> PathBuf {
        let config = self.kubectl(&["config", "view", "--raw", "--output=json"], None);
        let mut config: Value = serde_json::from_str(&config).expect("kubectl prints JSON");
        config["users"][0]["user"] = json!({"token": token});
        let path = self.directory.join(format!("{name}.kubeconfig"));
        std::fs::write(&path, config.to_string()).expect("a file");
        path
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        // This is what it waits for.
        drop(self.script.stdin.take());
        let _ = self.script.wait();
    }
}

/// These templates of the chart.
fn render(name: &str, templates: &[&str], values: &[&str]) -> String {
    let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/beamline");
    let mut helm = Command::new(tool::program("helm"));
    helm.args(["template", name, &chart.to_string_lossy(), "--namespace", name]);
    helm.args(templates.iter().map(|template| format!("--show-only=templates/{template}.yaml")));
    helm.args(values.iter().map(|value| format!("--set={value}")));
    output(&mut helm, None)
}

fn output(command: &mut Command, input: Option<&str>) -> String {
    try_output(command, input).unwrap_or_else(|said| panic!("{command:?}: {said}"))
}

fn try_output(command: &mut Command, input: Option<&str>) -> Result<String, String> {
    use std::io::Write;
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(input.unwrap_or_default().as_bytes()).expect("it reads");
    drop(stdin);
    let output = child.wait_with_output().expect("it ends");
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
