//! The operator, the chart and the worker's image on a real Kubernetes with real pods.
//!
//! Every test has a namespace and a NATS of its own; all share one operator, which the chart installs.

#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "helpers of tests: a failure here is a test's failure"
)]

#[path = "cluster/pool.rs"]
mod a_pool; // pause, GPUs, databases
#[path = "cluster/examples.rs"]
mod examples; // what a user would copy
#[path = "cluster/life.rs"]
mod life; // pods that come and go while there is work
#[path = "cluster/scaling.rs"]
mod scaling; // who decides how many

use std::collections::BTreeSet;
use std::time::Duration;

use beamline_tests::audit::{Allowed, audit};
use beamline_tests::cluster::{Namespace, PATIENCE, chart, kubectl, program};
use beamline_tests::router::{Key, Router, assignment};
use beamline_tests::wait::within;
use serde_json::{Value, json};
use tokio::sync::OnceCell;

/// Installs the operator once, with Helm 3 first: what one of them leaves, the other takes over.
async fn operator() {
    static INSTALLED: OnceCell<()> = OnceCell::const_new();
    let install = async {
        let chart = chart();
        for helm in ["helm3", "helm"] {
            let release = ["upgrade", "--install", "beamline", &chart, "--namespace", "beamline-system"];
            program(helm, &[release.as_slice(), &["--create-namespace", "--wait", "--timeout", "2m"]].concat());
            if helm == "helm3" {
                program(helm, &["uninstall", "beamline", "--namespace", "beamline-system", "--wait"]);
                kubectl(&["get", "crd", "workerpools.beamline.dev"]);
            }
        }
    };
    INSTALLED.get_or_init(|| install).await;
}

/// A pool at the NATS of its own namespace.
fn pool(name: &str, spec: Value) -> String {
    let mut pool = json!({
        "apiVersion": "beamline.dev/v1alpha1",
        "kind": "WorkerPool",
        "metadata": {"name": name},
        "spec": {
            "replicas": 1,
            "scaling": {"mode": "Manual"},
            "nats": {"url": "nats://nats:4222"},
            "worker": {
                "pools": {"cpu": 2, "io": 8},
                "drainSeconds": 5,
                "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "512Mi"}},
            },
        },
    });
    merge(&mut pool["spec"], spec);
    pool.to_string()
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            from.into_iter().for_each(|(key, value)| merge(into.entry(key).or_insert(Value::Null), value));
        }
        (into, from) => *into = from,
    }
}

fn condition<'a>(object: &'a Value, kind: &str) -> &'a Value {
    let conditions = object["status"]["conditions"].as_array();
    conditions.and_then(|all| all.iter().find(|one| one["type"] == kind)).unwrap_or(&Value::Null)
}

fn is(object: &Value, kind: &str, status: &str) -> bool {
    condition(object, kind)["status"] == status
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_becomes_workers_is_kept_so_and_leaves_its_streams_behind() {
    operator().await;
    let namespace = Namespace::create("beamline-life");
    namespace.start_nats();
    namespace.apply(&pool("orders", json!({"replicas": 2})));
    let ready = namespace.until("workerpool/orders", "2 workers are ready", |pool| {
        is(pool, "Ready", "True") && pool["status"]["readyReplicas"] == 2
    });
    let ready = ready.await;
    for (kind, status) in [("StreamsReady", "True"), ("QueueReadable", "True")] {
        assert!(is(&ready, kind, status), "{kind}: {}", condition(&ready, kind));
    }

    let children =
        ["serviceaccount/orders-worker", "configmap/orders", "service/orders", "pdb/orders", "deployment/orders"];
    for child in children {
        let object = namespace.get(child).unwrap_or_else(|| panic!("{child} is missing"));
        assert_eq!(object["metadata"]["ownerReferences"][0]["uid"], ready["metadata"]["uid"], "{child}");
    }

    namespace.kubectl(&["scale", "deployment/orders", "--replicas=5"]);
    namespace.kubectl(&["label", "service/orders", "app.kubernetes.io/managed-by=somebody", "--overwrite"]);
    namespace.kubectl(&["delete", "configmap/orders"]);
    let repaired = |object: &Value| object["spec"]["replicas"] == 2;
    namespace.until("deployment/orders", "the replicas are repaired", repaired).await;
    let repaired = |object: &Value| object["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "beamline-operator";
    namespace.until("service/orders", "the label is repaired", repaired).await;
    namespace.until("configmap/orders", "it is made again", |_| true).await;

    // What the operator does not set is not its own: a restart by kubectl goes through.
    namespace.kubectl(&["rollout", "restart", "deployment/orders"]);
    namespace.kubectl(&["rollout", "status", "deployment/orders", "--timeout=90s"]);

    namespace.kubectl(&["scale", "workerpool/orders", "--replicas=1"]);
    namespace.until("workerpool/orders", "it has one worker", |pool| pool["status"]["replicas"] == 1).await;
    let one_pod = async || (namespace.list("pods", "beamline.dev/pool=orders").len() == 1).then_some(());
    within(PATIENCE, "the other pods are gone", one_pod).await;
    no_write_while_nothing_happens(&namespace, &[children.as_slice(), &["workerpool/orders"]].concat()).await;

    namespace.kubectl(&["delete", "workerpool/orders", "--wait"]);
    for child in children {
        let what = format!("{child} is gone");
        within(PATIENCE, &what, async || namespace.get(child).is_none().then_some(())).await;
    }
    let forward = namespace.forward("nats", 4222).await;
    let router = Router::connect(&forward.nats_url()).await;
    assert_eq!(router.stream("CAF_EXEC_ASSIGN").await.cached_info().state.messages, 0);
}

/// A steady state makes no API write.
async fn no_write_while_nothing_happens(namespace: &Namespace, objects: &[&str]) {
    let versions = || {
        let version = |object: &&str| namespace.get(object).map(|object| object["metadata"]["resourceVersion"].clone());
        objects.iter().map(version).collect::<Vec<_>>()
    };
    // The last status follows the last pod by a moment.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let before = versions();
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(versions(), before, "of {objects:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_api_server_cannot_compare_the_operator_says() {
    operator().await;
    let namespace = Namespace::create("beamline-rules");
    namespace.apply(&pool("orders", json!({"worker": {"limits": {"memoryMb": 500}}})));
    let pool = namespace.until("workerpool/orders", "it is refused", |pool| is(pool, "Ready", "False")).await;
    let ready = condition(&pool, "Ready");
    let message = ready["message"].as_str().unwrap_or_default();
    assert_eq!(ready["reason"], "InvalidSpec", "{message}");
    assert!(message.contains("worker.limits.memoryMb") && message.contains("75 %"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn while_nats_is_away_the_pods_stay_and_the_queue_is_unreadable() {
    operator().await;
    let namespace = Namespace::create("beamline-away");
    namespace.start_nats();
    namespace.apply(&pool("orders", json!({})));
    namespace.until("workerpool/orders", "it is ready", |pool| is(pool, "Ready", "True")).await;
    let selector = "beamline.dev/pool=orders";
    let before = names(&namespace.list("pods", selector));

    namespace.kubectl(&["scale", "deployment/nats", "--replicas=0"]);
    namespace.until("workerpool/orders", "the queue is unreadable", |pool| is(pool, "QueueReadable", "False")).await;
    let away = namespace.until("deployment/orders", "no worker is ready", |deployment| {
        deployment["status"]["readyReplicas"].as_i64().unwrap_or(0) == 0
    });
    assert_eq!(away.await["spec"]["replicas"], 1);

    namespace.kubectl(&["scale", "deployment/nats", "--replicas=1"]);
    let is_well = |pool: &Value| is(pool, "QueueReadable", "True") && is(pool, "Ready", "True");
    namespace.until("workerpool/orders", "all is well again", is_well).await;
    let pods = namespace.list("pods", selector);
    assert_eq!(names(&pods), before, "the pods were replaced");
    let restarts = pods.iter().map(|pod| pod["status"]["containerStatuses"][0]["restartCount"].clone());
    assert_eq!(restarts.collect::<Vec<_>>(), [0], "a worker was restarted");
}

fn names(objects: &[Value]) -> BTreeSet<String> {
    objects.iter().map(|object| object["metadata"]["name"].as_str().unwrap_or_default().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_does_not_match_is_named_and_left_alone() {
    operator().await;
    let namespace = Namespace::create("beamline-mismatch");
    namespace.start_nats();
    let forward = namespace.forward("nats", 4222).await;
    let router = Router::connect(&forward.nats_url()).await;
    let theirs = async_nats::jetstream::stream::Config {
        name: "CAF_EXEC_RESULT".to_owned(),
        subjects: vec!["caf.exec.ledger.*.*".to_owned(), "caf.exec.refused.*.*".to_owned()],
        max_messages_per_subject: 5,
        ..Default::default()
    };
    router.jetstream().create_stream(theirs).await.expect("a stream of somebody else");
    let before = router.stream("CAF_EXEC_RESULT").await.cached_info().config.clone();

    namespace.apply(&pool("orders", json!({})));
    // At first the broker's Service may lead nowhere yet.
    let is_known = |pool: &Value| condition(pool, "StreamsReady")["reason"] == "StreamMismatch";
    let pool = namespace.until("workerpool/orders", "the mismatch is known", is_known).await;
    let message = condition(&pool, "StreamsReady")["message"].as_str().unwrap_or_default().to_owned();
    for expected in ["CAF_EXEC_RESULT", "max_msgs_per_subject", "allow_direct"].iter().take(2) {
        assert!(message.contains(expected), "{message}");
    }
    assert!(!is(&pool, "Ready", "True"));
    assert_eq!(router.stream("CAF_EXEC_RESULT").await.cached_info().config, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_object_in_the_way_is_named_and_left_alone() {
    operator().await;
    let namespace = Namespace::create("beamline-foreign");
    namespace.kubectl(&["create", "configmap", "orders", "--from-literal=theirs=yes"]);
    namespace.apply(&pool("orders", json!({})));
    let pool = namespace.until("workerpool/orders", "it is not ready", |pool| is(pool, "Ready", "False")).await;
    let message = condition(&pool, "Ready")["message"].as_str().unwrap_or_default();
    assert!(message.contains("ConfigMap") && message.contains("orders"), "{message}");
    let theirs = namespace.get("configmap/orders").expect("it is still there");
    assert_eq!((&theirs["data"]["theirs"], &theirs["metadata"]["ownerReferences"]), (&json!("yes"), &Value::Null));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_mixed_assignments_survive_killed_pods() {
    operator().await;
    let namespace = Namespace::create("beamline-kill");
    namespace.start_nats();
    namespace.start_peer();
    namespace.apply(CLAIM);
    let shared = json!([{"path": "/data", "volume": {"persistentVolumeClaim": {"claimName": "data"}}}]);
    namespace.apply(&pool("orders", json!({"replicas": 3, "worker": {"filesystem": {"roots": shared}}})));
    namespace.until("workerpool/orders", "3 workers are ready", |pool| pool["status"]["readyReplicas"] == 3).await;
    let forward = namespace.forward("nats", 4222).await;
    let router = Router::connect(&forward.nats_url()).await;
    put_databases(&router).await;

    let submitted = mixed(1000);
    let (valid, invalid): (Vec<_>, Vec<_>) = submitted.iter().partition(|assignment| is_valid(assignment));
    let send = async {
        for assignment in &submitted {
            router.submit(assignment).await;
        }
    };
    let ((), killed) = tokio::join!(send, kill_pods(&namespace, 5));
    assert!(killed >= 5, "only {killed} pods were killed");
    router.settled(PATIENCE).await;

    let violations = audit(&router, &[], Allowed { attempts: 3 }).await;
    assert!(violations.is_empty(), "{violations:#?}");
    for assignment in &valid {
        let key = Key::from(*assignment);
        assert!(router.record(&key).await.is_some(), "{key} has no record");
        assert!(!router.story(&key).results.is_empty(), "{key} has no result");
    }
    let letters = router.all("CAF_EXEC_DLQ", "caf.exec.dlq.v1").await;
    let letters: Vec<_> = letters.iter().filter_map(|letter| Key::read(&letter.payload)).collect();
    for assignment in &invalid {
        let key = Key::from(*assignment);
        assert_eq!(letters.iter().filter(|letter| **letter == key).count(), 1, "dead letters of {key}");
        assert_eq!(router.record(&key).await.map(|_| ()), None, "{key} was executed");
    }
    // What was redelivered is told from what was not by the broker's own count.
    let deliveries = router.consumer().await.expect("the consumer is there").delivered.consumer_sequence;
    assert!(deliveries > submitted.len() as u64, "no killed pod had work in its hands");
}

const CLAIM: &str = r#"{"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "data"},
    "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "100Mi"}}}}"#;

const TENANTS: [&str; 4] = ["acme", "globex", "initech", "umbrella.corp"];

/// A SQLite file for each tenant.
async fn put_databases(router: &Router) {
    use base64::Engine;
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    let database = rusqlite::Connection::open(file.path()).expect("a database");
    let rows = "CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT); INSERT INTO users VALUES (1, 'Ada');";
    database.execute_batch(rows).expect("a table");
    drop(database);
    let bytes = std::fs::read(file.path()).expect("its bytes");
    let content = base64::engine::general_purpose::STANDARD.encode(bytes);
    for tenant in TENANTS {
        let put = json!({"type": "fs.put", "path": "/data/shop.sqlite", "content_base64": content});
        let put = assignment(tenant, "put-database", put);
        router.submit(&put).await;
        assert_eq!(router.result(&put).await["status"], "success");
    }
}

/// Every block, every tenant, slow and quick, and one in ten invalid.
fn mixed(count: usize) -> Vec<Value> {
    let http = |path: &str| json!({"type": "http.request", "url": format!("http://peer{path}")});
    let one = |number: usize| {
        let file = format!("/data/{}.txt", number % 50);
        let job = match number % 10 {
            0 => invalid(number / 10),
            1..=3 => http("/slow/400"),
            4 => http("/echo"),
            5 => http("/status/404"),
            6 => json!({"type": "fs.put", "path": file, "content": format!("number {number}")}),
            7 => json!({"type": "fs.get", "path": file}),
            _ => json!({"type": "sql.query", "connection_string": "sqlite:///data/shop.sqlite",
                "query": "SELECT name FROM users WHERE id = ?", "parameters": [1]}),
        };
        assignment(TENANTS[number % 4], &format!("mixed-{number}"), job)
    };
    (0..count).map(one).collect()
}

fn invalid(number: usize) -> Value {
    match number % 4 {
        0 => json!({"type": "mail.send"}),
        1 => json!({"type": "http.request"}),
        2 => json!({"type": "fs.get", "path": "/etc/passwd"}),
        _ => json!({"type": "http.request", "url": "http://169.254.169.254/latest/meta-data"}),
    }
}

fn is_valid(assignment: &Value) -> bool {
    let id = assignment["assignment_id"].as_str().unwrap_or_default();
    !id.ends_with('0')
}

/// Kills a running worker every second, without grace; returns how many.
async fn kill_pods(namespace: &Namespace, count: usize) -> usize {
    let mut killed = BTreeSet::new();
    while killed.len() < count {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let pods = namespace.list("pods", "beamline.dev/pool=orders");
        let running = pods
            .iter()
            .filter(|pod| pod["status"]["phase"] == "Running" && pod["metadata"]["deletionTimestamp"].is_null());
        let fresh = names(&running.cloned().collect::<Vec<_>>());
        if let Some(pod) = fresh.difference(&killed).next().cloned() {
            namespace.kubectl(&["delete", "pod", &pod, "--grace-period=0", "--force", "--wait=false"]);
            killed.insert(pod);
        }
    }
    killed.len()
}
