//! Pods that come and go while there is work: evictions, rollouts, GPUs that are given up.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use beamline_tests::audit::{Allowed, audit};
use beamline_tests::cluster::{Namespace, PATIENCE, pretend_gpus};
use beamline_tests::router::{Router, assignment};
use beamline_tests::wait::within;
use serde_json::{Value, json};

use super::{condition, is, names, operator, pool};

const PODS: &str = "beamline.dev/pool=orders";

/// Publishes slow work, ten in a second, until it is told to stop; how much.
async fn keep_busy(router: &Router, enough: &AtomicBool) -> usize {
    let mut count = 0;
    while !enough.load(Ordering::Relaxed) {
        let job = json!({"type": "http.request", "url": "http://peer/slow/1500"});
        router.submit(&assignment("acme", &format!("slow-{count}"), job)).await;
        count += 1;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    count
}

/// How often the peer was asked for each assignment.
fn effects(namespace: &Namespace) -> BTreeMap<String, u64> {
    let path = format!("/api/v1/namespaces/{}/services/peer:http/proxy/hits", namespace.name());
    serde_json::from_str(&namespace.kubectl(&["get", "--raw", &path])).expect("JSON")
}

/// All of it succeeded, in one attempt each, and the peer was asked once for each.
async fn nothing_was_cut_or_done_twice(namespace: &Namespace, router: &Router, count: usize) {
    router.settled(PATIENCE).await;
    let violations = audit(router, &[], Allowed { attempts: 1 }).await;
    assert!(violations.is_empty(), "{violations:#?}");
    for number in 0..count {
        let result = router.result(("acme", format!("slow-{number}").as_str())).await;
        assert_eq!((&result["status"], &result["metadata"]["attempts"]), (&json!("success"), &json!(1)), "{result}");
    }
    let effects = effects(namespace);
    let twice: Vec<_> = effects.iter().filter(|(_, count)| **count != 1).collect();
    assert!(twice.is_empty(), "asked for more than once: {twice:?}");
    assert_eq!(effects.len(), count);
}

fn ready_replicas(namespace: &Namespace) -> i64 {
    let deployment = namespace.get("deployment/orders").expect("it is there");
    deployment["status"]["readyReplicas"].as_i64().unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollout_under_load_cuts_nothing_and_does_nothing_twice() {
    operator().await;
    let namespace = Namespace::create("beamline-rollout");
    namespace.start_nats();
    namespace.start_peer();
    let spec = |generation: u32| {
        let env = json!([{"name": "GENERATION", "value": generation.to_string()}]);
        pool("orders", json!({"replicas": 2, "worker": {"drainSeconds": 15, "pools": {"io": 12}, "env": env}}))
    };
    namespace.apply(&spec(0));
    namespace.until("workerpool/orders", "2 workers are ready", |pool| pool["status"]["readyReplicas"] == 2).await;
    let first = names(&namespace.list("pods", PODS));
    let forward = namespace.forward("nats", 4222).await;
    let router = Router::connect(&forward.nats_url()).await;

    let enough = AtomicBool::new(false);
    let roll = async {
        let mut fewest = i64::MAX;
        for generation in 1..=2 {
            namespace.apply(&spec(generation));
            let is_new = |pods: &[Value]| {
                let of = |pod: &Value| pod["spec"]["containers"][0]["env"].to_string();
                pods.len() == 2
                    && pods.iter().all(|pod| of(pod).contains(&format!("\"GENERATION\",\"value\":\"{generation}\"")))
            };
            within(PATIENCE, "all pods are new", async || {
                fewest = fewest.min(ready_replicas(&namespace));
                is_new(&namespace.list("pods", PODS)).then_some(())
            })
            .await;
        }
        enough.store(true, Ordering::Relaxed);
        fewest
    };
    let (count, fewest) = tokio::join!(keep_busy(&router, &enough), roll);
    assert!(names(&namespace.list("pods", PODS)).is_disjoint(&first));
    assert!(fewest >= 2, "only {fewest} workers were ready meanwhile");
    nothing_was_cut_or_done_twice(&namespace, &router, count).await;
}

/// Evicts all of them, asking again as `kubectl drain` does; returns how often that was refused.
async fn drain(namespace: &Namespace, pods: &BTreeSet<String>) -> usize {
    let (mut left, mut refused) = (pods.clone(), 0);
    within(PATIENCE, "all are evicted", async || {
        left.retain(|pod| match evict(namespace, pod) {
            Ok(_) => false,
            Err(said) => {
                assert!(said.contains("disruption budget"), "{pod}: {said}");
                refused += 1;
                true
            }
        });
        left.is_empty().then_some(())
    })
    .await;
    let are_gone = async || names(&namespace.list("pods", PODS)).is_disjoint(pods).then_some(());
    within(PATIENCE, "all are gone", are_gone).await;
    refused
}

fn evict(namespace: &Namespace, pod: &str) -> Result<String, String> {
    let path = format!("/api/v1/namespaces/{}/pods/{pod}/eviction", namespace.name());
    let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}});
    namespace.try_kubectl(&["create", "--raw", &path, "-f", "-"], &eviction.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_takes_one_worker_at_a_time_and_ends() {
    operator().await;
    let namespace = Namespace::create("beamline-drain");
    namespace.start_nats();
    namespace.start_peer();
    let spec = json!({"replicas": 2, "worker": {"drainSeconds": 15, "pools": {"io": 16}}});
    namespace.apply(&pool("orders", spec));
    namespace.until("workerpool/orders", "2 workers are ready", |pool| pool["status"]["readyReplicas"] == 2).await;
    let first = names(&namespace.list("pods", PODS));
    namespace
        .until("poddisruptionbudget/orders", "one may go", |budget| budget["status"]["disruptionsAllowed"] == 1)
        .await;
    let forward = namespace.forward("nats", 4222).await;
    let router = Router::connect(&forward.nats_url()).await;

    let enough = AtomicBool::new(false);
    let drain = async {
        let refused = drain(&namespace, &first).await;
        enough.store(true, Ordering::Relaxed);
        refused
    };
    let (count, refused) = tokio::join!(keep_busy(&router, &enough), drain);
    assert!(refused > 0, "both were let go at once");
    nothing_was_cut_or_done_twice(&namespace, &router, count).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_that_do_not_work_keep_no_node_from_being_drained() {
    operator().await;
    let namespace = Namespace::create("beamline-drain-broken");
    namespace.start_nats();
    let env = json!([{"name": "WORKER_LOG", "value": "no=such=level"}]);
    namespace.apply(&pool("orders", json!({"replicas": 2, "worker": {"env": env}})));
    let crashes = |pool: &Value| condition(pool, "Ready")["reason"] == "CrashLoopBackOff";
    namespace.until("workerpool/orders", "its workers crash", crashes).await;
    let budget = namespace.get("poddisruptionbudget/orders").expect("a budget");
    assert_eq!(budget["status"]["disruptionsAllowed"], 0);
    // One that changes at that very moment is to be asked for again.
    drain(&namespace, &names(&namespace.list("pods", PODS))).await;
}

/// A condition names what is wrong within this.
const SAID_WITHIN: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn o16_while_nobody_has_a_new_image_the_old_workers_go_on_and_the_pool_says_why() {
    operator().await;
    let namespace = Namespace::create("beamline-no-image");
    namespace.start_nats();
    let spec = |image: &str| pool("orders", json!({"replicas": 2, "worker": {"image": image}}));
    namespace.apply(&pool("orders", json!({"replicas": 2})));
    namespace.until("workerpool/orders", "2 workers are ready", |pool| pool["status"]["readyReplicas"] == 2).await;
    let workers = namespace.list("pods", PODS);
    let image = workers[0]["spec"]["containers"][0]["image"].as_str().expect("an image").to_owned();
    let (before, nowhere) = (names(&workers), "localhost/nowhere:1");

    let changed = Instant::now();
    namespace.apply(&spec(nowhere));
    let says_so = |pool: &Value| {
        let moves = condition(pool, "Progressing");
        moves["reason"] == "ImagePullBackOff" && moves["message"].as_str().is_some_and(|said| said.contains(nowhere))
    };
    let said = namespace.until("workerpool/orders", "it says which image", says_so).await;
    assert!(changed.elapsed() < SAID_WITHIN, "after {:?}", changed.elapsed());
    assert!(is(&said, "Ready", "True") && said["status"]["readyReplicas"] == 2, "{said}");
    // The kubelet has tried several times by now: nobody goes, and it is still at work.
    let forward = namespace.forward("nats", 4222).await;
    let router = Router::connect(&forward.nats_url()).await;
    let tried =
        |events: &[Value]| events.iter().any(|event| event["reason"] == "Failed" && event["count"].as_i64() > Some(2));
    let events = async || tried(&namespace.list("events", "")).then_some(());
    within(PATIENCE, "it is tried again", events).await;
    assert!(before.is_subset(&names(&namespace.list("pods", PODS))), "an old worker is gone");
    let put = assignment("acme", "meanwhile", json!({"type": "fs.put", "path": "/data/a.txt", "content": "a"}));
    router.submit(&put).await;
    assert_eq!(router.result(&put).await["status"], "success");

    namespace.apply(&spec(&image));
    let is_well = |pool: &Value| is(pool, "Ready", "True") && condition(pool, "Progressing")["reason"] == "Complete";
    namespace.until("workerpool/orders", "all is well again", is_well).await;
    let only_they = async || (names(&namespace.list("pods", PODS)) == before).then_some(());
    within(PATIENCE, "what ran all the time is what is left", only_they).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gpus_that_a_pool_gives_up_finish_what_waits_for_them() {
    operator().await;
    pretend_gpus("example.com/gpu", 4);
    let namespace = Namespace::create("beamline-gpu-leaves");
    namespace.start_nats();
    namespace.start_peer();
    let gpu = json!({"resourceName": "example.com/gpu", "replicas": 1, "poolSize": 1});
    namespace.apply(&pool("orders", json!({ "gpu": gpu })));
    let ready = |pool: &Value| pool["status"]["gpu"]["readyReplicas"] == 1 && is(pool, "Ready", "True");
    namespace.until("workerpool/orders", "a worker with GPUs is ready", ready).await;
    let before = names(&namespace.list("pods", "beamline.dev/class=gpu"));
    let forward = namespace.forward("nats", 4222).await;
    let router = Router::connect(&forward.nats_url()).await;
    let work: Vec<_> = (0..6)
        .map(|number| {
            let job = json!({"type": "http.request", "url": "http://peer/slow/4000"});
            let mut work = assignment("acme", &format!("gpu-{number}"), job);
            work["resources"] = json!({"pool": "gpu"});
            work
        })
        .collect();
    for work in &work {
        router.submit(work).await;
    }
    let all_wait = |pool: &Value| {
        let gpu = &pool["status"]["gpu"];
        gpu["pending"].as_i64().unwrap_or(0) + gpu["inFlight"].as_i64().unwrap_or(0) >= 4
    };
    namespace.until("workerpool/orders", "work waits for GPUs", all_wait).await;

    namespace.apply(&pool("orders", json!({"gpu": null})));
    let drains = |pool: &Value| {
        condition(pool, "Progressing")["reason"] == "RouteDraining"
            && pool["status"]["gpu"]["desiredReplicas"] == 0
            && is(pool, "Ready", "True")
    };
    let pool = namespace.until("workerpool/orders", "its GPUs finish first", drains).await;
    let message = condition(&pool, "Progressing")["message"].as_str().unwrap_or_default();
    assert!(message.contains("caf.exec.route.gpu.v1"), "{message}");
    assert_eq!(condition(&pool, "StreamsReady")["reason"], "StreamsMatch", "nothing is stranded");
    for work in &work {
        let result = router.result(work).await;
        assert_eq!((&result["status"], &result["metadata"]["attempts"]), (&json!("success"), &json!(1)), "{result}");
        let worker = result["metadata"]["worker_id"].as_str().unwrap_or_default();
        assert!(before.contains(worker), "{worker} is none of {before:?}");
    }
    namespace.gone("deployment/orders-gpu").await;
    namespace.gone("poddisruptionbudget/orders-gpu").await;
    let without = |pool: &Value| pool["status"]["gpu"].is_null() && is(pool, "Progressing", "False");
    namespace.until("workerpool/orders", "it has no GPU class", without).await;
    let stream = router.stream("CAF_EXEC_ASSIGN").await;
    let route_is_gone = async || stream.consumer_info("caf-workers-gpu").await.is_err().then_some(());
    within(PATIENCE, "the route is gone", route_is_gone).await;
    assert!(effects(&namespace).values().all(|count| *count == 1));
}
