//! A namespace of a real cluster, driven as a person would: with kubectl, helm and the scripts of `cluster/`.
//!
//! Which cluster is the caller's decision: `KUBECONFIG` and `PATH` come from `run.sh`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::process::Process;
use crate::wait::within;

/// How long pods, rollouts and conditions may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// A namespace of a test's own: deleted when it is dropped.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Made anew. Pods in it must pass Pod Security `restricted`.
    pub fn create(name: &str) -> Self {
        let namespace = Self { name: name.to_owned() };
        kubectl(&["delete", "namespace", name, "--ignore-not-found", "--timeout=90s"]);
        kubectl(&["create", "namespace", name]);
        kubectl(&["label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted"]);
        namespace
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// kubectl in this namespace; its output.
    ///
    /// # Panics
    /// It failed.
    pub fn kubectl(&self, arguments: &[&str]) -> String {
        kubectl(&[&["--namespace", &self.name], arguments].concat())
    }

    /// kubectl in this namespace, with this input: its output, or what it said when it failed.
    pub fn try_kubectl(&self, arguments: &[&str], input: &str) -> Result<String, String> {
        let arguments = [&["--namespace", &self.name], arguments].concat();
        run(command("kubectl").args(&arguments), Some(input))
    }

    /// Applies a manifest.
    pub fn apply(&self, manifest: &str) {
        let applied = run(command("kubectl").args(["--namespace", &self.name, "apply", "-f", "-"]), Some(manifest));
        applied.unwrap_or_else(|error| panic!("kubectl apply: {error}\n{manifest}"));
    }

    /// One object, or nothing where there is none.
    pub fn get(&self, object: &str) -> Option<Value> {
        let json = self.kubectl(&["get", object, "--ignore-not-found", "--output=json"]);
        (!json.trim().is_empty()).then(|| serde_json::from_str(&json).expect("kubectl prints JSON"))
    }

    /// The same, where even its type may not be there.
    fn try_get(&self, object: &str) -> Option<Value> {
        let json = self.try_kubectl(&["get", object, "--ignore-not-found", "--output=json"], "").ok()?;
        serde_json::from_str(&json).ok()
    }

    /// The objects of a kind with a label.
    pub fn list(&self, kind: &str, selector: &str) -> Vec<Value> {
        let json = self.kubectl(&["get", kind, "--selector", selector, "--output=json"]);
        let list: Value = serde_json::from_str(&json).expect("kubectl prints JSON");
        list["items"].as_array().cloned().unwrap_or_default()
    }

    /// Waits until an object is so, and returns it.
    pub async fn until(&self, object: &str, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        let mut last = None;
        let started = std::time::Instant::now();
        while started.elapsed() < PATIENCE {
            last = self.try_get(object);
            if let Some(object) = last.as_ref().filter(|object| is_so(object)) {
                return object.clone();
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        panic!("{object} in {}: not within {PATIENCE:?}: {what}; it is {last:#?}", self.name)
    }

    /// Waits until an object is no more, or its type is not.
    pub async fn gone(&self, object: &str) {
        within(PATIENCE, &format!("{object} is gone"), async || {
            let found = self.try_kubectl(&["get", object, "--ignore-not-found", "--output=name"], "");
            found.is_ok_and(|name| name.is_empty()).then_some(())
        })
        .await;
    }

    /// A NATS server with JetStream in this namespace.
    pub fn start_nats(&self) {
        script("cluster/nats.sh", &[&self.name]);
    }

    /// The HTTP server that blocks call.
    pub fn start_peer(&self) {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/peer.yaml");
        self.kubectl(&["apply", "-f", &manifest.to_string_lossy()]);
        self.kubectl(&["rollout", "status", "deployment/peer", "--timeout=60s"]);
    }

    /// A way to a port of a Deployment, from this host, by the API server.
    pub async fn forward(&self, deployment: &str, port: u16) -> Forward {
        let mut kubectl = command("kubectl");
        let (target, port) = (format!("deployment/{deployment}"), format!(":{port}"));
        kubectl.args(["--namespace", &self.name, "port-forward", &target, &port]);
        let process = Process::start("kubectl port-forward", &mut kubectl);
        let local = within(PATIENCE, "the port is forwarded", async || {
            let lines = process.lines();
            let line = lines.iter().find_map(|line| line.strip_prefix("Forwarding from 127.0.0.1:"))?;
            line.split_whitespace().next()?.parse().ok()
        });
        Forward { port: local.await, _process: process }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let shown = ["get", "workerpools,deployments,pods,events", "--output=wide"];
            eprintln!("---- namespace {}:\n{}", self.name, self.kubectl(&shown));
        }
        let _ = run(command("kubectl").args(["delete", "namespace", &self.name, "--wait=false"]), None);
    }
}

/// A forwarded port; closed when it is dropped.
#[derive(Debug)]
pub struct Forward {
    port: u16,
    _process: Process,
}

impl Forward {
    /// Where it is on this host.
    pub fn nats_url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }
}

/// kubectl; its output.
///
/// # Panics
/// It failed.
pub fn kubectl(arguments: &[&str]) -> String {
    run(command("kubectl").args(arguments), None).unwrap_or_else(|error| panic!("kubectl {arguments:?}: {error}"))
}

/// Devices that no machine of a test has; the scheduler and the kubelet count them all the same.
pub fn pretend_gpus(resource: &str, count: u32) {
    let node = kubectl(&["get", "nodes", "--output=jsonpath={.items[0].metadata.name}"]);
    let path = format!("/status/capacity/{}", resource.replace('/', "~1"));
    let patch = json!([{"op": "add", "path": path, "value": count.to_string()}]).to_string();
    kubectl(&["patch", "node", &node, "--subresource=status", "--type=json", "-p", &patch]);
}

/// A program of `run.sh`'s PATH, such as `helm` or `helm3`; its output.
///
/// # Panics
/// It failed.
pub fn program(name: &str, arguments: &[&str]) -> String {
    try_program(name, arguments).unwrap_or_else(|error| panic!("{name} {arguments:?}: {error}"))
}

/// The same: its output, or what it said when it failed.
pub fn try_program(name: &str, arguments: &[&str]) -> Result<String, String> {
    run(command(name).args(arguments), None)
}

/// The chart.
pub fn chart() -> String {
    root().join("charts/beamline").to_string_lossy().into_owned()
}

fn script(name: &str, arguments: &[&str]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    let done = run(Command::new("bash").arg(path).args(arguments), None);
    done.unwrap_or_else(|error| panic!("{name}: {error}"));
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn command(program: &str) -> Command {
    Command::new(program)
}

/// Runs to the end: its standard output, or its standard error where it failed.
fn run(command: &mut Command, input: Option<&str>) -> Result<String, String> {
    let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
    let spawned = command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = spawned.map_err(|error| format!("cannot start it ({error}): make test-cluster sets PATH"))?;
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        use std::io::Write;
        stdin.write_all(input.as_bytes()).map_err(|error| error.to_string())?;
    }
    let output = child.wait_with_output().map_err(|error| error.to_string())?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}
