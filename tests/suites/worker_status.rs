//! What a worker says of itself: probes, metrics, log lines; and how it goes when it is told to.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use beamline_tests::nats::NatsServer;
use beamline_tests::rig::Rig;
use beamline_tests::router::assignment;
use beamline_tests::wait::{SOON, until, within};
use beamline_tests::worker::Worker;
use jiff::Timestamp;
use serde_json::{Value, json};

/// The broker gives work away 10 s after the last word about it, and a worker says one every 3 s: what another worker
/// has sooner than the difference was handed over.
const HAND_OVER: Duration = Duration::from_secs(6);

/// By name: a task that only a test of its own would miss is one of them too.
const VITAL_TASKS: [&str; 20] = [
    "show that the runtime moves",
    "read the tenants file",
    "publish results",
    "observe",
    "settle budgets",
    "renew holds",
    "rebalance",
    "report",
    "obey",
    "follow the policy",
    "keep the streams",
    "hear cancels",
    "answer cancels",
    "take control messages",
    "note cancels",
    "watch approvals",
    "take assignments",
    "take up parked work",
    "keep ceilings",
    "process assignments",
];

// Probes.

#[tokio::test]
async fn a_healthy_worker_says_so_as_published() {
    let rig = Rig::start(&[]).await;
    let (code, body) = rig.worker.get("/_health").await.unwrap();
    let health: Value = serde_json::from_str(&body).unwrap();
    let timestamp = health["timestamp"].as_str().unwrap();
    assert_eq!((code, &health), (200, &json!({"status": "healthy", "timestamp": timestamp})));
    assert_eq!((timestamp.len(), timestamp.parse::<Timestamp>().is_ok()), ("2025-01-27T12:00:00Z".len(), true));
    for probe in ["/livez", "/readyz"] {
        assert_eq!(rig.worker.get(probe).await.unwrap(), (200, "ok\n".to_owned()), "{probe}");
    }
}

#[tokio::test]
async fn without_its_broker_a_worker_lives_and_is_not_ready_until_the_broker_is_back() {
    let mut rig = Rig::start(&[]).await;
    rig.nats.kill();
    let reasons = rig.worker.unready("NATS disconnected").await;
    assert!(reasons.lines().all(|reason| reason.starts_with("NATS disconnected")), "{reasons}");
    assert_eq!(rig.worker.get("/livez").await.unwrap().0, 200);
    let (code, body) = rig.worker.get("/_health").await.unwrap();
    let health: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((code, &health["status"]), (503, &json!("unhealthy")));
    assert!(health["reasons"][0].as_str().unwrap().starts_with("NATS disconnected"), "{body}");
    until("the metric follows", async || rig.worker.metric("worker_nats_connected").await == 0.0).await;

    rig.nats.restart();
    rig.worker.ready().await;
    assert_eq!(rig.worker.get("/_health").await.unwrap().0, 200);
    let payload = assignment("acme", "after", rig.put("after", "x"));
    rig.router.submit(&payload).await;
    assert_eq!(rig.router.result(&payload).await["status"], "success");
    until("the metric follows", async || rig.worker.metric("worker_nats_connected").await == 1.0).await;
}

#[tokio::test]
async fn a_pool_that_starts_nothing_for_half_a_minute_is_overloaded_and_its_worker_stays_ready() {
    let rig = Rig::start(&["--io-pool-size=1"]).await;
    let health = async || {
        let (code, body) = rig.worker.get("/_health").await.unwrap();
        (code, serde_json::from_str::<Value>(&body).unwrap())
    };
    let mut running = assignment("acme", "running", rig.call("/gate/slot"));
    running["job"]["timeout_ms"] = json!(600_000);
    rig.router.submit(&running).await;
    rig.peer.arrived("/gate/slot", 1).await;
    let waiting = assignment("acme", "waiting", rig.call("/ok"));
    rig.router.submit(&waiting).await;
    rig.router.verdict(&waiting).await;
    let since = Instant::now();
    let unhealthy = within(SOON * 4, "the pool is overloaded", async || {
        let (code, health) = health().await;
        (code == 503).then_some(health)
    })
    .await;
    let after = since.elapsed();
    assert!(after >= Duration::from_secs(25), "after {after:?}");
    assert_eq!(
        (&unhealthy["status"], &unhealthy["reasons"]),
        (&json!("unhealthy"), &json!(["pool overloaded: work waits for io slots"]))
    );
    rig.worker.ready().await;
    rig.peer.open("slot");
    rig.router.result(&waiting).await;
    until("it is healthy again", async || health().await.0 == 200).await;
}

#[tokio::test]
async fn a_worker_that_loses_a_task_on_which_everything_rests_ends_and_says_which() {
    let nats = NatsServer::start();
    let directory = tempfile::tempdir().unwrap();
    let tenants = directory.path().join("tenants.yaml");
    std::fs::write(&tenants, "paused: false").unwrap();
    let endings = VITAL_TASKS.map(|task| {
        Worker::named("fragile")
            .flag(format!("--nats-url={}", nats.url()))
            .flag(format!("--tenants-file={}", tenants.display()))
            .env("BEAMLINE_ENDS", task)
            .end()
    });
    for (task, ending) in VITAL_TASKS.iter().zip(futures::future::join_all(endings).await) {
        assert_eq!(ending.code, Some(1), "{task}: {}", ending.said);
        assert!(ending.said.contains(&format!("`{task}` has ended")), "{task}: {}", ending.said);
    }
}

#[tokio::test]
async fn a_worker_waits_for_a_broker_that_is_not_there_yet() {
    let mut nats = NatsServer::start();
    nats.kill();
    let worker = Worker::named("early").flag(format!("--nats-url={}", nats.url())).spawn();
    let reasons = worker.unready("NATS disconnected").await;
    assert!(reasons.contains("starting"), "{reasons}");
    assert_eq!(worker.get("/livez").await.unwrap().0, 200);
    nats.restart();
    worker.ready().await;
}

#[tokio::test]
async fn a_broker_that_wants_to_know_who_asks_is_told_by_its_url() {
    for (wanted, given) in [
        (r#"user: worker, password: "p@ss:/%""#, "worker:p%40ss%3A%2F%25"),
        (r#"user: worker, password: plain"#, "worker:plain"),
        (r#"token: "t@ken""#, "t%40ken"),
    ] {
        let nats = NatsServer::with(&format!("authorization {{ {wanted} }}"));
        let url = format!("nats://{given}@127.0.0.1:{}", nats.port());
        let worker = Worker::named("known").flag(format!("--nats-url={url}")).spawn();
        worker.ready().await;
        assert!(!worker.lines().iter().any(|line| line.contains(given)), "{:#?}", worker.lines());
    }
}

#[tokio::test]
async fn a_worker_that_waits_for_its_broker_ends_when_it_is_told_to() {
    let mut nats = NatsServer::start();
    nats.kill();
    let mut worker = Worker::named("early").flag(format!("--nats-url={}", nats.url())).spawn();
    worker.unready("NATS disconnected").await;
    worker.terminate();
    assert_eq!(worker.ended().await, Some(0));
}

// Metrics.

/// A scrape by series name: labels and value of each sample.
async fn scrape(worker: &Worker) -> BTreeMap<String, Vec<(BTreeMap<String, String>, f64)>> {
    let (_, text) = worker.get("/metrics").await.unwrap();
    let mut series: BTreeMap<String, Vec<_>> = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (id, value) = line.rsplit_once(' ').unwrap();
        let (name, labels) = id.split_once('{').unwrap_or((id, "}"));
        let label = |pair: &str| {
            let (name, value) = pair.split_once('=').unwrap();
            (name.to_owned(), value.trim_matches('"').to_owned())
        };
        let labels = labels.trim_end_matches('}').split(',').filter(|pair| !pair.is_empty()).map(label).collect();
        series.entry(name.to_owned()).or_default().push((labels, value.parse().unwrap()));
    }
    series
}

fn labels(samples: &[(BTreeMap<String, String>, f64)]) -> BTreeSet<Vec<&str>> {
    samples.iter().map(|(labels, _)| labels.keys().map(String::as_str).collect()).collect()
}

fn values<'a>(samples: &'a [(BTreeMap<String, String>, f64)], label: &str) -> BTreeSet<&'a str> {
    samples.iter().filter_map(|(labels, _)| labels.get(label)).map(String::as_str).collect()
}

#[tokio::test]
async fn the_published_series_have_exactly_the_published_labels() {
    let rig = Rig::start(&[]).await;
    for (id, job) in [("canary-1", rig.call("/ok?canary-2")), ("canary-3", rig.put("canary-4", "x"))] {
        let payload = assignment("canary-tenant", id, job);
        rig.router.submit(&payload).await;
        rig.router.result(&payload).await;
    }
    rig.router.settled(SOON).await;
    let series = scrape(&rig.worker).await;
    let expected: [(&str, &[&str]); 6] = [
        ("worker_tasks_total", &["status", "type"]),
        ("worker_task_latency_ms_bucket", &["le", "type"]),
        ("worker_task_latency_ms_count", &["type"]),
        ("worker_task_latency_ms_sum", &["type"]),
        ("worker_resource_usage", &["type"]),
        ("worker_pool_queue_depth", &["pool"]),
    ];
    for (name, names) in expected {
        assert_eq!(labels(&series[name]), BTreeSet::from([names.to_vec()]), "{name}");
    }
    let (_, text) = rig.worker.get("/metrics").await.unwrap();
    for line in [
        r#"worker_tasks_total{type="http.request",status="success"} 1"#,
        r#"worker_task_latency_ms_bucket{type="http.request",le="+Inf"} 1"#,
    ] {
        assert!(text.lines().any(|other| other == line), "{line}: labels stand as published");
    }
    let types = BTreeSet::from(["http.request", "fs.put", "fs.get", "sql.query", "human.approval"]);
    assert_eq!(values(&series["worker_tasks_total"], "type"), types);
    assert_eq!(values(&series["worker_resource_usage"], "type"), BTreeSet::from(["cpu_time_ms", "memory_mb"]));
    assert_eq!(values(&series["worker_pool_queue_depth"], "pool"), BTreeSet::from(["cpu", "gpu", "io"]));
    let buckets = values(&series["worker_task_latency_ms_bucket"], "le");
    for bound in ["5", "10", "25", "50", "100", "200", "300", "500", "1000", "2500", "5000", "10000", "+Inf"] {
        assert!(buckets.contains(bound), "{bound}: {buckets:?}");
    }
    let finished = |kind: &str| {
        let is_it = |labels: &BTreeMap<String, String>| labels["type"] == kind && labels["status"] == "success";
        series["worker_tasks_total"].iter().find(|(labels, _)| is_it(labels)).map(|(_, value)| *value)
    };
    assert_eq!(
        (finished("http.request"), finished("fs.put"), finished("sql.query")),
        (Some(1.0), Some(1.0), Some(0.0))
    );
    let all = rig.worker.get("/metrics").await.unwrap().1;
    assert!(!all.contains("canary"), "no tenant, id, path or URL is a label");
}

#[tokio::test]
async fn what_waits_and_what_runs_is_counted() {
    let rig = Rig::start(&["--io-pool-size=1"]).await;
    for id in ["a", "b", "c"] {
        rig.router.submit(&assignment("acme", id, rig.call("/gate/one"))).await;
    }
    rig.peer.arrived("/gate/one", 1).await;
    let depth = async || rig.worker.metric(r#"worker_pool_queue_depth{pool="io"}"#).await;
    until("one more waits here", async || depth().await >= 1.0).await;
    assert_eq!(rig.worker.metric(r#"worker_slots_busy{pool="io"}"#).await, 1.0);
    assert_eq!(rig.worker.metric(r#"worker_slots{pool="io"}"#).await, 1.0);
    assert_eq!(rig.peer.hits("/gate/one").len(), 1, "one slot, one request");
    rig.peer.open("one");
    for id in ["a", "b", "c"] {
        rig.router.result(("acme", id)).await;
    }
    until("nothing waits", async || depth().await == 0.0).await;
}

#[tokio::test]
async fn refusals_retries_and_dead_letters_are_counted() {
    let rig = Rig::start(&[]).await;
    let mut bad = assignment("acme", "bad", rig.put("x", "x"));
    bad["priority"] = json!(10);
    let mut flaky = assignment("acme", "flaky", rig.call("/flaky/1"));
    flaky["retry_config"] = json!({"base_delay_ms": 1});
    let lost = assignment("acme", "lost", rig.call("/status/404"));
    for payload in [&bad, &flaky, &lost] {
        rig.router.submit(payload).await;
    }
    rig.router.settled(SOON).await;
    for (series, value) in [
        (r#"worker_assignments_rejected_total{code="1003"}"#, 1.0),
        (r#"worker_retries_total{type="http.request"}"#, 1.0),
        (r#"worker_dead_letters_total{stage="decode"}"#, 1.0),
        (r#"worker_dead_letters_total{stage="execute"}"#, 1.0),
        (r#"worker_tasks_total{type="http.request",status="error"}"#, 1.0),
        ("worker_redeliveries_total", 0.0),
    ] {
        assert_eq!(rig.worker.metric(series).await, value, "{series}");
    }
}

// Log lines.

#[tokio::test]
async fn each_log_line_has_the_published_shape() {
    let rig = Rig::start(&[]).await;
    let mut payload = assignment("tenant-789", "assign-123", rig.call("/ok"));
    payload["trace_id"] = json!("trace-abc");
    rig.router.submit(&payload).await;
    rig.router.result(&payload).await;
    let line = rig.worker.says("Step execution completed").await;
    assert_eq!((&line["level"], &line["component"]), (&json!("INFO"), &json!("worker")));
    assert_eq!((&line["trace_id"], &line["tenant_id"]), (&json!("trace-abc"), &json!("tenant-789")));
    let fields = &line["fields"];
    assert_eq!((&fields["assignment_id"], &fields["status"]), (&json!("assign-123"), &json!("success")));
    assert_eq!((&fields["block_type"], fields["latency_ms"].is_u64()), (&json!("http.request"), true));

    let allowed = BTreeSet::from(["timestamp", "level", "component", "message", "fields", "trace_id", "tenant_id"]);
    for line in rig.worker.lines() {
        let parsed: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        let keys: BTreeSet<&str> = parsed.as_object().unwrap().keys().map(String::as_str).collect();
        assert!(keys.is_subset(&allowed), "{line}");
        let timestamp = parsed["timestamp"].as_str().unwrap();
        assert!(timestamp.parse::<Timestamp>().is_ok() && timestamp.len() == "2025-01-27T12:00:00Z".len(), "{line}");
        assert!(["ERROR", "WARN", "INFO"].contains(&parsed["level"].as_str().unwrap()), "{line}");
        assert!(parsed["message"].is_string() && parsed["fields"].is_object(), "{line}");
    }
}

#[tokio::test]
async fn a_text_log_has_the_same_in_one_line_for_a_person() {
    let rig = Rig::start(&["--log-format=text"]).await;
    let mut payload = assignment("tenant-789", "assign-123", rig.call("/ok"));
    payload["trace_id"] = json!("trace abc");
    rig.router.submit(&payload).await;
    rig.router.result(&payload).await;
    let completed = async || rig.worker.lines().into_iter().find(|line| line.contains(": Step execution completed "));
    let line = within(SOON, "the block's end is logged", completed).await;
    for part in [" assignment_id=assign-123 ", " block_type=http.request ", " status=success ", " latency_ms="] {
        assert!(line.contains(part), "{part:?} is in {line}");
    }
    assert!(line.ends_with(r#" trace_id="trace abc" tenant_id=tenant-789"#), "{line}");
    for line in rig.worker.lines() {
        let (timestamp, rest) = line.split_once(' ').unwrap();
        assert!(timestamp.parse::<Timestamp>().is_ok(), "{line}");
        assert!(["ERROR ", "WARN  ", "INFO  "].iter().any(|level| rest.starts_with(level)), "{line}");
    }
}

#[tokio::test]
async fn no_secret_of_a_job_is_logged_or_reported() {
    let rig = Rig::start(&["--log-level=debug"]).await;
    for (id, path) in [("fails", "/status/404?token=s3cret"), ("broken", "/reset?token=s3cret")] {
        let mut job = rig.call(path);
        (job["headers"], job["body"]) = (json!({"Authorization": "Bearer s3cret"}), json!("s3cret"));
        job["retry_config"] = json!({"max_attempts": 1});
        let payload = assignment("acme", id, job);
        rig.router.submit(&payload).await;
        let result = rig.router.result(&payload).await;
        assert!(!result.to_string().contains("s3cret"), "{result}");
    }
    let database = "postgres://me:s3cret@127.0.0.1:1/db";
    let job = json!({"type": "sql.query", "connection_string": database, "query": "SELECT 1", "timeout_ms": 2000});
    rig.router.submit(&assignment("acme", "sql", job)).await;
    rig.router.settled(SOON).await;
    let line = rig.worker.lines().into_iter().find(|line| line.contains("s3cret"));
    assert_eq!(line, None);
}

// The end.

#[tokio::test]
async fn a_worker_that_is_told_to_stop_hands_waiting_work_over_at_once_and_finishes_what_runs() {
    let mut rig = Rig::start(&["--io-pool-size=1"]).await;
    let running = assignment("acme", "running", rig.call("/gate/drain"));
    rig.router.submit(&running).await;
    rig.peer.arrived("/gate/drain", 1).await;
    let waiting = assignment("acme", "waiting", rig.call("/ok"));
    rig.router.submit(&waiting).await;
    rig.router.verdict(&waiting).await;
    let second = rig.another("worker-2").start(&rig.nats).await;

    let told = Instant::now();
    rig.worker.terminate();
    rig.worker.unready("draining").await;
    let result = rig.router.result(&waiting).await;
    assert!(told.elapsed() < HAND_OVER, "handed over, not waited for until the hold lapsed");
    assert_eq!((&result["status"], &result["metadata"]["worker_id"]), (&json!("success"), &json!("worker-2")));
    assert!(rig.router.story(&running).results.is_empty(), "the first one still works on what it had begun");
    assert_eq!(rig.worker.get("/livez").await.unwrap().0, 200);

    let late = assignment("acme", "late", rig.call("/ok"));
    rig.router.submit(&late).await;
    assert_eq!(rig.router.result(&late).await["metadata"]["worker_id"], "worker-2");

    rig.peer.open("drain");
    let result = rig.router.result(&running).await;
    assert_eq!((&result["status"], &result["metadata"]["worker_id"]), (&json!("success"), &json!("worker-1")));
    assert_eq!(rig.worker.ended().await, Some(0));
    rig.router.settled(SOON).await;
    assert_eq!(rig.peer.hits("/").len(), 3, "nothing was executed twice");
    assert_eq!(second.metric("worker_redeliveries_total").await, 1.0, "only what was handed back came again");
}

#[tokio::test]
async fn a_worker_whose_drain_takes_too_long_hands_running_work_back() {
    let mut rig = Rig::start(&["--drain-timeout=300ms"]).await;
    let stuck = assignment("acme", "stuck", rig.call("/gate/stuck"));
    rig.router.submit(&stuck).await;
    rig.peer.arrived("/gate/stuck", 1).await;
    rig.worker.terminate();
    assert_eq!(rig.worker.ended().await, Some(0));
    assert!(rig.router.story(&stuck).results.is_empty());

    let handed_back = Instant::now();
    let _second = rig.another("worker-2").start(&rig.nats).await;
    rig.peer.arrived("/gate/stuck", 2).await;
    assert!(handed_back.elapsed() < HAND_OVER, "handed back, not waited for until the hold lapsed");
    rig.peer.open("stuck");
    assert_eq!(rig.router.result(&stuck).await["metadata"]["worker_id"], "worker-2");
    let hits = rig.peer.hits("/gate/stuck");
    assert!(hits.iter().all(|hit| hit.key() == "acme.stuck"), "both under the same key: {hits:?}");
}

#[tokio::test]
async fn an_idle_worker_ends_at_once() {
    let mut rig = Rig::start(&[]).await;
    let told = Instant::now();
    rig.worker.terminate();
    assert_eq!(rig.worker.ended().await, Some(0));
    assert!(told.elapsed() < Duration::from_secs(5), "{:?}", told.elapsed());
}

#[tokio::test]
async fn help_and_version_are_answers() {
    for flag in ["--help", "--version"] {
        let ending = Worker::named("w").flag(flag).end().await;
        assert_eq!(ending.code, Some(0), "{}", ending.said);
        assert!(ending.said.starts_with("beamline_worker "), "{}", ending.said);
    }
}
