//! What the author of a pool is told by conditions and events, and that what runs is left alone meanwhile.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use beamline_tests::api::Api;
use beamline_tests::nats::NatsServer;
use beamline_tests::operator::Operator;
use beamline_tests::plane::Release;
use beamline_tests::pool::Pool;
use beamline_tests::wait::within;
use futures::future::{join, join_all};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::{PATIENCE, calm, condition, is_write, plane};

#[tokio::test(flavor = "multi_thread")]
async fn a_running_pool_that_is_made_invalid_keeps_its_pods_and_is_told_in_condition_and_event() {
    let stage = Stage::set("invalid").await;
    let pool = stage.pool("default", json!({"replicas": 2})).await;
    pool.converged(&stage.api, PATIENCE).await;
    let before = stage.pods().await;
    pool.change(&stage.api, json!({"replicas": 3, "worker": {"image": "worker:2", "limits": {"memoryMb": 100_000}}}))
        .await;
    let ready = stage.says(&pool, "Ready", "InvalidSpec").await;
    assert!(ready["message"].as_str().unwrap_or_default().contains("worker.limits.memoryMb"), "{ready}");
    let generation = stage.api.get(&pool.path()).await.expect("it is there")["metadata"]["generation"].clone();
    assert_eq!(ready["observedGeneration"], generation);
    let event = stage.event("default", "InvalidSpec").await;
    assert_eq!((&event["type"], &event["note"]), (&json!("Warning"), &ready["message"]));
    stage.calm().await;
    assert_eq!(stage.pods().await, before);
    pool.change(&stage.api, json!({"worker": {"limits": {"memoryMb": null}}})).await;
    pool.converged(&stage.api, PATIENCE).await;
    let events = stage.events("default").await;
    let told = |reason: &str| events.iter().any(|event| event["reason"] == reason && event["type"] == "Normal");
    assert!(told("WorkersReady") && told("ScaledUp"), "{events:#?}");
    // Each change is told of by itself.
    pool.change(&stage.api, json!({"replicas": 5})).await;
    within(PATIENCE, "another event", async || {
        let events = stage.events("default").await;
        events
            .into_iter()
            .find(|event| event["note"].as_str().is_some_and(|note| note.starts_with("from 3 to 5 workers")))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn o15_a_quota_on_a_child_and_a_claim_of_one_node_are_told_by_name_and_pass() {
    let stage = Stage::set("limits").await;
    let namespace = "/api/v1/namespaces/limits";
    let quota = json!({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "few"},
        "spec": {"hard": {"count/services": "0"}}});
    stage.api.apply(&format!("{namespace}/resourcequotas/few"), &quota).await;
    within(PATIENCE, "the quota is counted", async || {
        stage.api.get(&format!("{namespace}/resourcequotas/few")).await?["status"]["used"].is_object().then_some(())
    })
    .await;
    let claim = json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "data"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}},
                 "storageClassName": "", "volumeName": "limits"}});
    stage.api.apply(&format!("{namespace}/persistentvolumeclaims/data"), &claim).await;
    let volume = json!({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "limits"},
        "spec": {"accessModes": ["ReadWriteOnce"], "capacity": {"storage": "1Gi"}, "hostPath": {"path": "/data"},
                 "storageClassName": "", "claimRef": {"namespace": "limits", "name": "data"}}});
    stage.api.apply("/api/v1/persistentvolumes/limits", &volume).await;

    let roots = json!([{"path": "/data", "volume": {"persistentVolumeClaim": {"claimName": "data"}}}]);
    let pool = stage.pool("orders", json!({"replicas": 2, "worker": {"filesystem": {"roots": roots}}})).await;
    let ready = stage.says(&pool, "Ready", "QuotaExceeded").await;
    assert!(ready["message"].as_str().unwrap_or_default().contains("Service `orders`"), "{ready}");
    stage.event("orders", "QuotaExceeded").await;
    stage.api.delete(&format!("{namespace}/resourcequotas/few")).await;
    pool.converged(&stage.api, PATIENCE).await;
    let degraded = stage.says(&pool, "Degraded", "ClaimNotShared").await;
    let message = degraded["message"].as_str().unwrap_or_default();
    assert!(message.contains("worker.filesystem.roots `/data`") && message.contains("`data`"), "{message}");
    pool.change(&stage.api, json!({"replicas": 1})).await;
    stage.says(&pool, "Degraded", "AsAsked").await;
}

/// A change of a pool that runs, and what is said of it.
struct Change {
    pool: &'static str,
    spec: fn() -> Value,
    says: (&'static str, &'static str),
    mended: fn() -> Value,
}

const CHANGES: [Change; 5] = [
    // The kubelet's words change every second.
    Change {
        pool: "image",
        spec: || json!({"worker": {"image": "nowhere/worker:2"}}),
        says: ("Progressing", "ImagePullBackOff"),
        mended: || json!({"worker": {"image": null}}),
    },
    Change {
        pool: "nodes",
        spec: || json!({"worker": {"nodeSelector": {"no": "such-node"}}}),
        says: ("Progressing", "Unschedulable"),
        mended: || json!({"worker": {"nodeSelector": null}}),
    },
    Change {
        pool: "claim",
        spec: || {
            let volume = json!({"persistentVolumeClaim": {"claimName": "none"}});
            json!({"worker": {"filesystem": {"roots": [{"path": "/data", "volume": volume}]}}})
        },
        says: ("Progressing", "ReferenceMissing"),
        mended: || json!({"worker": {"filesystem": null}}),
    },
    Change {
        pool: "taken",
        spec: || json!({"gpu": {"replicas": 1}, "worker": {"image": "worker:2"}}),
        says: ("Ready", "NameConflict"),
        mended: || json!({"gpu": null}),
    },
    // Of all that is changed this is the last: the quota is the namespace's.
    Change {
        pool: "quota",
        spec: || json!({"worker": {"image": "worker:2"}}),
        says: ("Progressing", "QuotaExceeded"),
        mended: || json!({}),
    },
];

#[tokio::test(flavor = "multi_thread")]
async fn o16_what_cannot_be_made_is_told_within_half_a_minute_and_disturbs_nothing_that_runs() {
    let stage = Stage::set("undisturbed").await;
    let budget = json!({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "taken-gpu"},
        "spec": {"minAvailable": 1, "selector": {"matchLabels": {"not": "ours"}}}});
    stage.api.apply("/apis/policy/v1/namespaces/undisturbed/poddisruptionbudgets/taken-gpu", &budget).await;
    let create = async |change: &Change| {
        let pool = stage.pool(change.pool, json!({"replicas": 2})).await;
        pool.converged(&stage.api, PATIENCE).await;
        pool
    };
    let pools = join_all(CHANGES.iter().map(create)).await;
    let before = stage.pods().await;
    assert_eq!(before.len(), 2 * CHANGES.len());
    let quota = "/api/v1/namespaces/undisturbed/resourcequotas/full";
    for (change, pool) in CHANGES.iter().zip(&pools) {
        if change.pool == "quota" {
            let full = json!({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "full"},
                "spec": {"hard": {"pods": "0"}}});
            stage.api.apply(quota, &full).await;
            let is_counted = async || stage.api.get(quota).await?["status"]["used"].is_object().then_some(());
            within(PATIENCE, "the quota is counted", is_counted).await;
        }
        let changed = Instant::now();
        pool.change(&stage.api, (change.spec)()).await;
        stage.says(pool, change.says.0, change.says.1).await;
        assert!(changed.elapsed() < SAID_WITHIN, "{}: {:?}", change.pool, changed.elapsed());
    }
    stage.calm().await;
    let after = stage.pods().await;
    let gone: Vec<_> = before.iter().filter(|pod| !after.contains(pod)).collect();
    assert!(gone.is_empty(), "{gone:?} are not there any more");
    stage.api.delete(quota).await;
    join_all(CHANGES.iter().zip(&pools).map(|(change, pool)| pool.change(&stage.api, (change.mended)()))).await;
    join_all(pools.iter().map(|pool| pool.converged(&stage.api, PATIENCE))).await;
}

/// A condition names what is wrong within this.
const SAID_WITHIN: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn o12_what_is_deleted_under_way_stays_deleted() {
    let stage = Stage::set("deleted").await;
    // Made and deleted at once, before the first of its objects is there or while they are made.
    for round in 0..6 {
        let pool = stage.pool(&format!("short-{round}"), json!({"gpu": {"replicas": 1}})).await;
        tokio::time::sleep(Duration::from_millis(40 * round)).await;
        stage.api.delete(&pool.path()).await;
    }
    let children = [
        "/api/v1/namespaces/deleted/configmaps",
        "/apis/apps/v1/namespaces/deleted/deployments",
        "/apis/policy/v1/namespaces/deleted/poddisruptionbudgets",
    ];
    let is_empty = async |path: &str| {
        stage.api.list(path).await.iter().all(|child| child["metadata"]["name"] == "kube-root-ca.crt").then_some(())
    };
    for path in children {
        within(PATIENCE, &format!("nothing is left in {path}"), async || is_empty(path).await).await;
    }
    stage.calm().await;
    for path in children {
        is_empty(path).await.unwrap_or_else(|| panic!("{path} is filled again"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn o12_in_a_namespace_that_ends_nothing_is_made_again_and_the_pool_says_why() {
    let stage = Stage::set("ends").await;
    let pool = stage.pool("orders", json!({})).await;
    pool.converged(&stage.api, PATIENCE).await;
    // Something of somebody else holds the namespace up, and the pool in it.
    let holds = json!({"metadata": {"finalizers": ["tests.beamline.dev/hold"]}});
    stage.api.merge(&pool.path(), &holds).await;
    let other = stage.pool("other", json!({"nats": {"subject": "work.other"}})).await;
    other.converged(&stage.api, PATIENCE).await;
    stage.api.delete("/api/v1/namespaces/ends").await;
    let deployments = "/apis/apps/v1/namespaces/ends/deployments";
    within(PATIENCE, "its Deployments are gone", async || stage.api.list(deployments).await.is_empty().then_some(()))
        .await;
    stage.calm().await;
    assert_eq!(stage.api.list(deployments).await, [] as [Value; 0]);
    stage.api.merge(&pool.path(), &json!({"metadata": {"finalizers": null}})).await;
    within(PATIENCE, "the namespace is gone", async || {
        stage.api.get("/api/v1/namespaces/ends").await.is_none().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn o04_what_happened_while_nobody_watched_is_made_good_by_whoever_comes() {
    let mut stage = Stage::set("missed").await;
    let (kept, gone) = join(stage.pool("kept", json!({})), stage.pool("gone", json!({}))).await;
    join(kept.converged(&stage.api, PATIENCE), gone.converged(&stage.api, PATIENCE)).await;
    stage.operator.kill();
    stage.api.delete("/apis/apps/v1/namespaces/missed/deployments/kept").await;
    stage.api.delete("/api/v1/namespaces/missed/services/kept").await;
    stage.api.delete(&gone.path()).await;
    kept.change(&stage.api, json!({"replicas": 2})).await;
    stage.operator = operator(&stage.release).start().await;
    kept.converged(&stage.api, PATIENCE).await;
    let services = "/api/v1/namespaces/missed/services";
    within(PATIENCE, "only what is wanted is there", async || {
        let names: Vec<_> = stage.api.list(services).await.iter().map(|one| one["metadata"]["name"].clone()).collect();
        (names == ["kept"]).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_pod_is_told_of_a_changed_policy_at_once_and_once_more_when_its_kubelet_has_heard_of_it() {
    let stage = Stage::set("nudged").await;
    let pool = stage.pool("orders", json!({"replicas": 2})).await;
    pool.converged(&stage.api, PATIENCE).await;
    stage.calm().await;
    pool.change(&stage.api, json!({"paused": true})).await;
    // When each pod was told.
    let told = || {
        let mut told = BTreeMap::<String, Vec<Timestamp>>::new();
        for event in plane().asked_by(&stage.release.user) {
            if event["objectRef"]["resource"] == "pods" && is_write(&event) {
                let at = event["requestReceivedTimestamp"].as_str().unwrap_or_default().parse().expect("a time");
                told.entry(event["objectRef"]["name"].to_string()).or_default().push(at);
            }
        }
        told
    };
    let twice = async || (told().len() == 2 && told().values().all(|times| times.len() >= 2)).then_some(());
    within(PATIENCE, "both are told twice", twice).await;
    stage.calm().await;
    for (pod, times) in told() {
        let between = times[times.len() - 1].duration_since(times[0]);
        assert!(between >= SignedDuration::from_secs(2), "{pod}: {times:?}");
    }
}

/// A namespace with an operator and a broker of its own.
struct Stage {
    name: &'static str,
    api: Api,
    release: Release,
    operator: Operator,
    nats: NatsServer,
}

fn operator(release: &Release) -> beamline_tests::operator::Setup {
    Operator::of(&release.kubeconfig, &release.namespace).flag("--leader-election=false")
}

impl Stage {
    async fn set(name: &'static str) -> Self {
        let release = plane().install(name, &[&format!("watchNamespace={name}")]);
        let operator = operator(&release).start().await;
        Self { name, api: plane().api().await, release, operator, nats: NatsServer::start() }
    }

    async fn pool(&self, name: &str, spec: Value) -> Pool {
        let pool = Pool::new(self.name, name, &self.nats);
        pool.create(&self.api, spec).await;
        pool
    }

    /// The pods by uid, with the image of the first container.
    async fn pods(&self) -> Vec<(Value, Value)> {
        let pods = self.api.list(&format!("/api/v1/namespaces/{}/pods", self.name)).await;
        let both = |pod: &Value| (pod["metadata"]["uid"].clone(), pod["spec"]["containers"][0]["image"].clone());
        pods.iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null()).map(both).collect()
    }

    async fn says(&self, pool: &Pool, kind: &str, reason: &str) -> Value {
        within(PATIENCE, &format!("{kind} says {reason}"), async || {
            Some(condition(&self.api, pool, kind).await).filter(|one| one["reason"] == reason)
        })
        .await
    }

    async fn events(&self, pool: &str) -> Vec<Value> {
        let mut events = self.api.list(&format!("/apis/events.k8s.io/v1/namespaces/{}/events", self.name)).await;
        events.retain(|event| event["regarding"]["kind"] == "WorkerPool" && event["regarding"]["name"] == pool);
        events
    }

    async fn event(&self, pool: &str, reason: &str) -> Value {
        within(PATIENCE, &format!("the event {reason}"), async || {
            self.events(pool).await.into_iter().find(|event| event["reason"] == reason)
        })
        .await
    }

    /// Waits until the operator writes nothing any more.
    async fn calm(&self) {
        calm(|| plane().asked_by(&self.release.user).into_iter().filter(is_write).count()).await;
    }
}
