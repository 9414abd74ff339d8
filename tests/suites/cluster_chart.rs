//! The chart on a real Kubernetes, release by release, and what needs an operator of its own. Apart from `cluster.rs`, whose tests share one operator: here each
//! test has the only one, with values of its own.

#![expect(clippy::expect_used, clippy::indexing_slicing, clippy::print_stderr, reason = "tests")]

#[path = "cluster/stuck.rs"]
mod stuck; // pools that cannot go on

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use beamline_tests::cluster::{Namespace, PATIENCE, chart, kubectl, program, try_program};
use beamline_tests::wait::within;
use serde_json::{Value, json};
use tokio::sync::{Mutex, MutexGuard};

const HELMS: [&str; 2] = ["helm3", "helm"];
const CRD: &str = "crd/workerpools.beamline.dev";
const ACCOUNT: &str = "--as=system:serviceaccount:beamline-system:beamline";

/// The only release for as long as it is held; then it is removed, so that the next one starts with its own values.
struct Release {
    _turn: MutexGuard<'static, ()>,
}

impl Release {
    async fn none() -> Self {
        static TURN: Mutex<()> = Mutex::const_new(());
        let turn = TURN.lock().await;
        uninstall("helm");
        // The operator and its test pass Pod Security `restricted`, as workers do.
        let _ = try_program("kubectl", &["create", "namespace", "beamline-system"]);
        let restricted = "pod-security.kubernetes.io/enforce=restricted";
        kubectl(&["label", "namespace", "beamline-system", restricted, "--overwrite"]);
        Self { _turn: turn }
    }

    async fn with(values: &[&str]) -> Self {
        let release = Self::none().await;
        let values: Vec<_> = values.iter().map(|value| format!("--set={value}")).collect();
        // The type may be there from another's hand.
        let arguments: Vec<_> = values.iter().map(String::as_str).chain(["--take-ownership"]).collect();
        install("helm", &chart(), &[arguments.as_slice(), &["--force-conflicts"]].concat()).expect("it is installed");
        release
    }
}

impl Drop for Release {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let shown = ["logs", "--namespace=beamline-system", "deployment/beamline", "--tail=20"];
            eprintln!("---- {}", try_program("kubectl", &shown).unwrap_or_default());
        }
        uninstall("helm");
    }
}

fn install(helm: &str, chart: &str, more: &[&str]) -> Result<String, String> {
    let release = ["upgrade", "--install", "beamline", chart, "--namespace=beamline-system", "--create-namespace"];
    try_program(helm, &[release.as_slice(), &["--reset-values", "--wait", "--timeout=2m"], more].concat())
}

fn uninstall(helm: &str) {
    let gone = ["uninstall", "beamline", "--namespace=beamline-system", "--ignore-not-found", "--wait"];
    program(helm, &gone);
}

fn pool(name: &str, nats: Value) -> String {
    let worker = json!({
        "pools": {"cpu": 1, "io": 2},
        "drainSeconds": 1,
        "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "256Mi"}},
    });
    json!({
        "apiVersion": "beamline.dev/v1alpha1",
        "kind": "WorkerPool",
        "metadata": {"name": name},
        "spec": {"replicas": 1, "scaling": {"mode": "Manual"}, "nats": nats, "worker": worker},
    })
    .to_string()
}

fn condition<'a>(object: &'a Value, kind: &str) -> &'a Value {
    let conditions = object["status"]["conditions"].as_array();
    conditions.and_then(|all| all.iter().find(|one| one["type"] == kind)).unwrap_or(&Value::Null)
}

fn is_ready(pool: &Value) -> bool {
    condition(pool, "Ready")["status"] == "True"
}

/// Whether somebody may do something; `arguments` as `kubectl auth can-i` takes them.
fn may(arguments: &str) -> bool {
    let answer =
        try_program("kubectl", &[&["auth", "can-i"], arguments.split(' ').collect::<Vec<_>>().as_slice()].concat());
    // It answers "no" by failing.
    answer.is_ok_and(|answer| answer.trim() == "yes")
}

// The release.

fn columns() -> Vec<Value> {
    let crd: Value = serde_json::from_str(&kubectl(&["get", CRD, "--output=json"])).expect("JSON");
    crd["spec"]["versions"][0]["additionalPrinterColumns"].as_array().expect("columns").clone()
}

/// The chart as it may have been: its type has one column less.
fn older_chart(directory: &Path) -> String {
    let older = directory.join("beamline");
    program("cp", &["-r", &chart(), &older.to_string_lossy()]);
    let path = older.join("files/workerpools.yaml");
    let text = std::fs::read_to_string(&path).expect("the type");
    let column = "    - jsonPath: .status.scaling.mode\n      name: Mode\n      type: string\n";
    assert!(text.contains(column), "the type has another column than this test knows");
    std::fs::write(&path, text.replace(column, "")).expect("it is written");
    older.to_string_lossy().into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_type_that_is_there_is_taken_only_when_told_then_upgraded_and_left_behind() {
    let _release = Release::none().await;
    let directory = tempfile::tempdir().expect("a directory");
    let older = older_chart(directory.path());
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crds/workerpools.yaml");
    for helm in HELMS {
        // As somebody applies it who has no Helm: without the marks that Helm leaves.
        kubectl(&["apply", "--server-side", "--force-conflicts", "-f", &manifest.to_string_lossy()]);
        kubectl(&["annotate", CRD, "meta.helm.sh/release-name-", "meta.helm.sh/release-namespace-"]);
        kubectl(&["label", CRD, "app.kubernetes.io/managed-by-"]);
        let refused = install(helm, &chart(), &[]).expect_err("it takes what it did not make");
        assert!(refused.contains("cannot be imported into the current release"), "{helm}: {refused}");
        uninstall(helm);

        let taking: &[&str] =
            if helm == "helm" { &["--take-ownership", "--force-conflicts"] } else { &["--take-ownership"] };
        install(helm, &older, taking).unwrap_or_else(|error| panic!("{helm}: {error}"));
        let before = columns();
        install(helm, &chart(), &[]).unwrap_or_else(|error| panic!("{helm}: {error}"));
        let after = columns();
        assert_eq!(after.len(), before.len() + 1, "{helm} upgrade does not upgrade the type");
        assert!(after.iter().any(|column| column["name"] == "Mode"), "{after:?}");

        program(helm, &["test", "beamline", "--namespace=beamline-system", "--timeout=90s"]);
        uninstall(helm);
        kubectl(&["get", CRD]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn its_test_fails_while_no_operator_answers_and_its_notes_show_a_pool_that_is_one() {
    let _release = Release::with(&["replicas=0"]).await;
    let test = try_program("helm", &["test", "beamline", "--namespace=beamline-system", "--timeout=90s"]);
    assert!(test.is_err(), "{test:?}");
    kubectl(&["delete", "pod", "beamline-answers", "--namespace=beamline-system", "--ignore-not-found"]);

    let notes = program("helm", &["get", "notes", "beamline", "--namespace=beamline-system"]);
    let (_, rest) = notes.split_once("<<EOF\n").expect("a pool in the notes");
    let (shown, _) = rest.split_once("\nEOF\n").expect("its end");
    let namespace = Namespace::create("beamline-notes");
    namespace.apply(shown);
    let pool = namespace.get("workerpool/default").expect("it is there");
    assert_eq!(pool["spec"]["nats"]["url"], "nats://nats.nats.svc:4222");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_operators_one_leads_and_the_other_follows_it_within_its_lease() {
    let _release = Release::with(&["replicas=2"]).await;
    let leader = async || {
        let leads = |line: &str| line == "beamline_operator_leader 1";
        let mut leading = operators();
        leading.retain(|pod| scrape("beamline-system", pod, 8080).lines().any(leads));
        assert!(leading.len() < 2, "two lead");
        leading.pop()
    };
    let first = within(PATIENCE, "one leads", leader).await;
    let started = std::time::Instant::now();
    // As when its node dies: it gives nothing back.
    kubectl(&["delete", "pod", &first, "--namespace=beamline-system", "--grace-period=0", "--force"]);
    let second = within(PATIENCE, "another one leads", async || leader().await.filter(|pod| *pod != first)).await;
    // The lease's 15 seconds, and time for a busy machine.
    assert!(started.elapsed() < Duration::from_secs(45), "{second} needed {:?}", started.elapsed());
    let budget =
        kubectl(&["get", "pdb", "beamline", "--namespace=beamline-system", "--output=jsonpath={.spec.maxUnavailable}"]);
    assert_eq!(budget, "1");
}

/// The operators that run.
fn operators() -> Vec<String> {
    let selector = "--selector=app.kubernetes.io/component=operator";
    let names =
        "--output=jsonpath={range .items[?(@.status.containerStatuses[0].ready==true)]}{.metadata.name}{\"\\n\"}{end}";
    let names = kubectl(&["get", "pods", "--namespace=beamline-system", selector, names]);
    names.lines().map(str::to_owned).collect()
}

/// What a pod shows on `/metrics`; nothing while it does not answer.
fn scrape(namespace: &str, pod: &str, port: u16) -> String {
    let path = format!("/api/v1/namespaces/{namespace}/pods/{pod}:{port}/proxy/metrics");
    try_program("kubectl", &["get", "--raw", &path]).unwrap_or_default()
}

// Rights.

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_of_one_namespace_works_there_and_can_do_nothing_elsewhere() {
    let (here, elsewhere) = (Namespace::create("beamline-here"), Namespace::create("beamline-elsewhere"));
    let _release = Release::with(&["watchNamespace=beamline-here"]).await;
    here.start_nats();
    elsewhere.apply(&pool("orders", json!({"url": "nats://nats:4222"})));
    here.apply(&pool("orders", json!({"url": "nats://nats:4222"})));
    here.until("workerpool/orders", "it is ready", is_ready).await;
    let untouched = elsewhere.get("workerpool/orders").expect("it is there");
    assert_eq!((&untouched["status"]["conditions"], elsewhere.get("deployment/orders")), (&Value::Null, None));
    for (right, expected) in [
        ("get secrets --namespace=beamline-here", true),
        ("list secrets --namespace=beamline-here", false),
        ("create secrets --namespace=beamline-here", false),
        ("get secrets --namespace=beamline-elsewhere", false),
        ("patch deployments --namespace=beamline-elsewhere", false),
        ("list workerpools --all-namespaces", false),
        ("create pods --namespace=beamline-here", false),
        ("get endpointslices/kubernetes --namespace=default", true),
        ("get secrets --namespace=default", false),
    ] {
        assert_eq!(may(&format!("{right} {ACCOUNT}")), expected, "{right}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_of_a_namespace_that_is_not_listed_is_forbidden() {
    let (listed, other) = (Namespace::create("beamline-listed"), Namespace::create("beamline-other"));
    let _release = Release::with(&["rbac.secretNamespaces={beamline-listed}"]).await;
    let nats = json!({"url": "nats://nats:4222", "credentialsSecretRef": {"name": "nats", "key": "worker.creds"}});
    for namespace in [&listed, &other] {
        namespace.kubectl(&["create", "secret", "generic", "nats", "--from-literal=another=key"]);
        namespace.apply(&pool("orders", nats.clone()));
    }
    // It was read: what is wrong with it is known.
    for (namespace, reason, message) in
        [(&listed, "SecretUnusable", "has no key `worker.creds`"), (&other, "SecretForbidden", "rbac.secretNamespaces")]
    {
        let has_reason = |pool: &Value| condition(pool, "QueueReadable")["reason"] == reason;
        let pool = namespace.until("workerpool/orders", reason, has_reason).await;
        let said = condition(&pool, "QueueReadable")["message"].as_str().unwrap_or_default();
        assert!(said.contains(message), "{said}");
        let ready = condition(&pool, "Ready");
        assert_eq!((&ready["status"], &ready["reason"]), (&"False".into(), &reason.into()), "{ready}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_built_in_roles_know_pools_and_their_scale() {
    let _release = Release::with(&[]).await;
    let namespace = Namespace::create("beamline-users");
    for role in ["view", "edit", "admin"] {
        let binding = ["create", "rolebinding", role, &format!("--clusterrole={role}"), &format!("--user={role}")];
        namespace.kubectl(&binding);
    }
    let may = |user: &str, right: &str| may(&format!("{right} --namespace=beamline-users --as={user}"));
    let is_aggregated = async || may("view", "list workerpools").then_some(());
    within(PATIENCE, "the roles are aggregated", is_aggregated).await;
    for right in ["get workerpools", "watch workerpools", "get workerpools --subresource=scale"] {
        assert!(["view", "edit", "admin"].iter().all(|user| may(user, right)), "{right}");
    }
    for right in
        ["create workerpools", "patch workerpools", "delete workerpools", "patch workerpools --subresource=scale"]
    {
        assert!(may("edit", right) && may("admin", right) && !may("view", right), "{right}");
    }
    assert!(!may("admin", "patch workerpools --subresource=status"), "a user may write a status");
}

// External metrics.

#[tokio::test(flavor = "multi_thread")]
async fn external_metrics_are_answered_by_whichever_operator_and_with_a_new_certificate_too() {
    const SECRET: &str = "secret/beamline-external-metrics";
    let _release = Release::with(&["externalMetrics.enabled=true", "replicas=2"]).await;
    let namespace = Namespace::create("beamline-external");
    namespace.start_nats();
    let mut pool: Value = serde_json::from_str(&pool("orders", json!({"url": "nats://nats:4222"}))).expect("JSON");
    pool["spec"]["scaling"] = json!({"mode": "HPA", "maxReplicas": 2});
    namespace.apply(&pool.to_string());
    let depth = || {
        let path = "/apis/external.metrics.k8s.io/v1beta1/namespaces/beamline-external/beamline_queue_depth";
        let answer = try_program("kubectl", &["get", "--raw", &format!("{path}?labelSelector=workerpool%3Dorders")]);
        let answer: Value = serde_json::from_str(&answer?).expect("JSON");
        Ok::<_, String>(answer["items"][0]["value"].clone())
    };
    let is_answered = async || depth().ok().filter(|depth| depth == "0");
    within(PATIENCE, "an empty queue has a number", is_answered).await;
    let is_active = |pool: &Value| condition(pool, "ScalingActive")["reason"] == "ModeHPA";
    namespace.until("workerpool/orders", "the autoscaler has the number", is_active).await;
    // The API server goes to either, and the one that does not lead may hear later of the one that does.
    let both = async || (0..20).all(|_| depth() == Ok("0".into())).then_some(());
    within(PATIENCE, "whoever is asked has the number", both).await;

    let believed =
        || kubectl(&["get", "apiservice", "v1beta1.external.metrics.k8s.io", "--output=jsonpath={.spec.caBundle}"]);
    let before = believed();
    let lost = r#"[{"op": "remove", "path": "/data"}]"#;
    kubectl(&["patch", SECRET, "--namespace=beamline-system", "--type=json", &format!("--patch={lost}")]);
    within(PATIENCE, "another authority is believed", async || (believed() != before).then_some(())).await;
    within(PATIENCE, "there is a number again", is_answered).await;
    namespace.until("workerpool/orders", "the autoscaler has it", is_active).await;
}

// Alerts and the dashboard.

/// The labels and their values that a series has.
type Labels = BTreeMap<String, BTreeSet<String>>;

#[tokio::test(flavor = "multi_thread")]
async fn alerts_and_dashboard_ask_for_series_that_are_there() {
    let _release = Release::with(&["alerts.enabled=false", "dashboard.enabled=true"]).await;
    let namespace = Namespace::create("beamline-series");
    namespace.start_nats();
    namespace.apply(&pool("orders", json!({"url": "nats://nats:4222"})));
    namespace.until("workerpool/orders", "it is ready", is_ready).await;
    let worker = namespace.list("pods", "beamline.dev/pool=orders");
    let worker = worker[0]["metadata"]["name"].as_str().expect("a name");
    let all_are_there = async || {
        let text: String = operators().iter().map(|pod| scrape("beamline-system", pod, 8080)).collect();
        text.contains("beamline_queue_depth").then_some(text)
    };
    let text =
        within(PATIENCE, "the operator shows the pool", all_are_there).await + &scrape(namespace.name(), worker, 9090);
    let series = series(&text);

    let questions = questions();
    assert!(questions.len() > 35, "only {} questions were found", questions.len());
    for question in questions {
        let asked = asked(&question);
        assert!(!asked.is_empty(), "no series of ours is in: {question}");
        let mut known: BTreeSet<&str> = ["namespace", "pod"].into();
        for Asked { name, matchers } in &asked {
            let labels = series.get(name.as_str()).unwrap_or_else(|| panic!("there is no {name}, but: {question}"));
            known.extend(labels.keys().map(String::as_str));
            for (label, value) in matchers {
                let is_there = known.contains(label.as_str());
                assert!(is_there, "{name} has no label {label}, but: {question}");
                if let Some(value) = value {
                    assert!(labels[label].contains(value), "{name} has no {label}={value}, but: {question}");
                }
            }
        }
        for grouped in question.split("by (").chain(question.split("on (")).skip(1) {
            let labels = grouped.split(')').next().unwrap_or_default();
            let labels =
                labels.split(',').map(str::trim).filter(|label| label.chars().all(|c| c.is_alphanumeric() || c == '_'));
            labels.for_each(|label| assert!(known.contains(label), "nothing has the label {label}, but: {question}"));
        }
    }
    let map = kubectl(&["get", "configmap", "beamline-dashboard", "--namespace=beamline-system", "--output=json"]);
    let map: Value = serde_json::from_str(&map).expect("JSON");
    assert_eq!(map["metadata"]["labels"]["grafana_dashboard"], "1");
}

/// What every alert and every panel asks.
fn questions() -> Vec<String> {
    let file = |name: &str| std::fs::read_to_string(format!("{}/files/{name}", chart())).expect("a file of the chart");
    let alerts: Value = serde_saphyr::from_str(&file("alerts.yaml")).expect("YAML");
    let dashboard: Value = serde_json::from_str(&file("dashboard.json")).expect("JSON");
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let rules = list(&alerts["groups"]).into_iter().flat_map(|group| list(&group["rules"]));
    let targets = list(&dashboard["panels"]).into_iter().flat_map(|panel| list(&panel["targets"]));
    let text = |one: Value| one["expr"].as_str().expect("a question").to_owned();
    rules.chain(targets).map(text).collect()
}

/// Every series of a scrape, by its name.
fn series(text: &str) -> BTreeMap<&str, Labels> {
    let mut all: BTreeMap<&str, Labels> = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some(name) = line.split(['{', ' ']).next() else { continue };
        let labels = all.entry(name).or_default();
        let inside = line.split_once('{').and_then(|(_, rest)| rest.rsplit_once('}')).map_or("", |(inside, _)| inside);
        for pair in inside.split("\",").filter(|pair| !pair.is_empty()) {
            let (label, value) = pair.split_once("=\"").expect("label=\"value\"");
            labels.entry(label.to_owned()).or_default().insert(value.trim_end_matches('"').to_owned());
        }
    }
    all
}

/// A series that a question names, with its matchers: a label, and the value where it must be just that.
struct Asked {
    name: String,
    matchers: Vec<(String, Option<String>)>,
}

fn asked(question: &str) -> Vec<Asked> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut found = Vec::new();
    let mut rest = question;
    while let Some(start) = rest.find(is_part) {
        let word = &rest[start..];
        let end = word.find(|c| !is_part(c)).unwrap_or(word.len());
        let (name, after) = word.split_at(end);
        rest = after;
        if !["worker_", "beamline_", "process_"].iter().any(|prefix| name.starts_with(prefix)) {
            continue;
        }
        let (inside, left) = after.strip_prefix('{').and_then(|inside| inside.split_once('}')).unwrap_or(("", after));
        rest = left;
        let matchers = inside.split(',').filter(|matcher| !matcher.is_empty()).map(|matcher| {
            let label: String = matcher.trim().chars().take_while(|c| is_part(*c)).collect();
            let value = matcher.split_once('"').map(|(operator, value)| (operator.trim(), value.trim_end_matches('"')));
            let is_one = value.filter(|(operator, _)| operator.ends_with(&format!("{label}=")));
            (label, is_one.map(|(_, value)| value.to_owned()))
        });
        found.push(Asked { name: name.to_owned(), matchers: matchers.collect() });
    }
    found
}
