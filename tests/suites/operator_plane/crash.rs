//! The operator is killed before and after each of its writes, one after the other, and started again: what there is in the
//! end is what there is when it is left alone.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream;
use beamline_tests::api::Api;
use beamline_tests::failpoint::{Points, VARIABLE};
use beamline_tests::nats::NatsServer;
use beamline_tests::operator::Operator;
use beamline_tests::pool::{Pool, pools};
use beamline_tests::wait::within;
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::{Map, Value, json};
use tempfile::TempDir;
use tokio::sync::OnceCell;

use super::{PATIENCE, is_campaign, plane};

/// Scenarios of a short run, by chance, and cases of each.
const SOME: usize = 6;
const FEW: usize = 3;
/// More than any scenario has.
const ALL: usize = 1000;
/// Scenarios side by side, and cases of each.
const AT_ONCE: usize = 6;
const OF_EACH: usize = 2;
/// An end that has not changed for so long is one.
const CALM: Duration = Duration::from_secs(4);

/// What a user does to a pool.
#[derive(Clone, Copy)]
struct Scenario {
    name: &'static str,
    /// The pool before, where there is one.
    before: Option<fn() -> Value>,
    act: Act,
}

#[derive(Clone, Copy)]
enum Act {
    Create(fn() -> Value),
    Change(fn() -> Value),
    Delete,
    Replace,
}

fn plain() -> Value {
    json!({"replicas": 2})
}

fn with_gpu() -> Value {
    json!({"gpu": {"replicas": 1, "poolSize": 2}})
}

const SCENARIOS: [Scenario; 13] = [
    Scenario { name: "create", before: None, act: Act::Create(plain) },
    Scenario { name: "create-gpu", before: None, act: Act::Create(with_gpu) },
    Scenario { name: "image", before: Some(plain), act: Act::Change(|| json!({"worker": {"image": "worker:2"}})) },
    Scenario { name: "scale", before: Some(plain), act: Act::Change(|| json!({"replicas": 5})) },
    Scenario { name: "add-gpu", before: Some(plain), act: Act::Change(with_gpu) },
    Scenario { name: "drop-gpu", before: Some(with_gpu), act: Act::Change(|| json!({"gpu": null})) },
    Scenario { name: "to-zero", before: Some(plain), act: Act::Change(|| json!({"replicas": 0})) },
    Scenario {
        name: "quota",
        before: Some(|| json!({"gpu": {"replicas": 3, "maxTotal": 3}})),
        act: Act::Change(|| json!({"gpu": {"maxTotal": 1}})),
    },
    Scenario {
        name: "tenants",
        before: Some(|| json!({"tenants": {"named": [{"id": "acme", "weight": 2}]}})),
        act: Act::Change(|| json!({"tenants": {"named": [{"id": "globex", "weight": 3}]}})),
    },
    Scenario { name: "pause", before: Some(plain), act: Act::Change(|| json!({"paused": true})) },
    Scenario {
        name: "surround",
        before: Some(plain),
        act: Act::Change(|| {
            let streams = json!({"resultRetention": "2h"});
            json!({"networkPolicy": "Off", "observability": {"podMonitor": true}, "nats": {"streams": streams}})
        }),
    },
    Scenario { name: "delete", before: Some(plain), act: Act::Delete },
    Scenario { name: "replace", before: Some(plain), act: Act::Replace },
];

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_that_dies_around_any_of_its_writes_ends_where_it_would_have_ended() {
    let plane = plane();
    let kubeconfig = &plane.install("crash", &[]).kubeconfig;
    let api = &plane.api().await;
    let (some, few) = if is_campaign() { (SCENARIOS.len(), ALL) } else { (SOME, FEW) };
    let scenarios = fastrand::choose_multiple(SCENARIOS, some);
    let results: Vec<_> = stream::iter(scenarios)
        .map(|scenario| async move {
            let reference = &reference(scenario, api, kubeconfig).await;
            let points: BTreeSet<_> = reference.points.iter().map(String::as_str).collect();
            // Nothing is written: it is killed before and after what the user does.
            let points = if points.is_empty() { [BEFORE, AFTER].into() } else { points };
            let points = fastrand::choose_multiple(points, few);
            let cases = stream::iter(points.into_iter().enumerate()).map(|(number, point)| async move {
                let stage = Stage::set(scenario, &number.to_string(), api, kubeconfig).await;
                (format!("{}: killed {point}", scenario.name), stage.killed(&[point], reference).await)
            });
            cases.buffer_unordered(OF_EACH).collect::<Vec<_>>().await
        })
        .buffer_unordered(AT_ONCE)
        .concat()
        .await;
    let mut count = BTreeMap::<_, usize>::new();
    for (name, result) in &results {
        match result {
            Ok(()) => *count.entry("equal").or_default() += 1,
            Err(Failure::NotMet) => {
                eprintln!("{name}: it did not come there this time");
                *count.entry("not met").or_default() += 1;
            }
            Err(Failure::Differs(how)) => {
                eprintln!("{name}: {how}");
                *count.entry("different").or_default() += 1;
            }
        }
    }
    eprintln!("crash: {} cases of {some} scenarios: {count:?}", results.len());
    assert!(!count.contains_key("different"), "{count:?}");
    let not_met = count.get("not met").copied().unwrap_or(0);
    // Whether an event or a nudge is due depends on which of two changes is seen first.
    assert!(not_met * 4 <= results.len(), "{count:?}: too many points were not met");
}

/// Pairs of deaths of a short run, of each scenario.
const FEW_PAIRS: usize = 2;
/// Those that a recovery meets again: it writes whatever it does not remember.
const TWICE: [&str; 3] = ["create-gpu", "add-gpu", "drop-gpu"];

#[tokio::test(flavor = "multi_thread")]
async fn o02_an_operator_that_dies_again_while_it_recovers_ends_where_it_would_have_ended() {
    let plane = plane();
    let kubeconfig = &plane.install("crash-twice", &[]).kubeconfig;
    let api = &plane.api().await;
    let few = if is_campaign() { ALL } else { FEW_PAIRS };
    let twice = SCENARIOS.into_iter().filter(|scenario| TWICE.contains(&scenario.name));
    let results: Vec<_> = stream::iter(twice)
        .map(|scenario| async move {
            let reference = &reference(scenario, api, kubeconfig).await;
            let points = reference.points.iter().filter(|point| point.contains("apply"));
            let points: BTreeSet<_> = points.map(String::as_str).collect();
            let pairs = points.iter().flat_map(|first| points.iter().map(|second| [*first, *second]));
            let pairs = fastrand::choose_multiple(pairs, few);
            let cases = stream::iter(pairs.into_iter().enumerate()).map(|(number, pair)| async move {
                let stage = Stage::set(scenario, &format!("twice-{number}"), api, kubeconfig).await;
                let [first, second] = pair;
                let name = format!("{}: killed {first}, and again {second}", scenario.name);
                match stage.killed(&pair, reference).await {
                    Ok(()) => None,
                    Err(Failure::NotMet) => Some(format!("{name}: it did not come there")),
                    Err(Failure::Differs(how)) => Some(format!("{name}: {how}")),
                }
            });
            cases.buffer_unordered(OF_EACH).collect::<Vec<_>>().await
        })
        .buffer_unordered(AT_ONCE)
        .concat()
        .await;
    let count = results.len();
    let different: Vec<_> = results.into_iter().flatten().collect();
    eprintln!("crash: {count} pairs, {} different", different.len());
    assert!(different.is_empty(), "{different:#?}");
}

const BEFORE: &str = "before all";
const AFTER: &str = "after all";

enum Failure {
    /// The operator did not come to that point.
    NotMet,
    /// The end is another one.
    Differs(String),
}

/// How a scenario goes when nobody disturbs it: found out once, for all that ask.
async fn reference(scenario: Scenario, api: &Api, kubeconfig: &Path) -> Arc<Reference> {
    static KNOWN: [OnceCell<Arc<Reference>>; SCENARIOS.len()] = [const { OnceCell::const_new() }; SCENARIOS.len()];
    let number = SCENARIOS.iter().position(|one| one.name == scenario.name).expect("it is one of them");
    let undisturbed = async || Arc::new(Stage::set(scenario, "ref", api, kubeconfig).await.undisturbed().await);
    Arc::clone(KNOWN[number].get_or_init(undisturbed).await)
}

/// How a scenario goes when nobody disturbs it.
struct Reference {
    before: Value,
    after: Value,
    points: Vec<String>,
}

/// A namespace, a broker and an operator of one case.
struct Stage {
    scenario: Scenario,
    api: Api,
    kubeconfig: PathBuf,
    nats: NatsServer,
    pool: Pool,
    points: Points,
    operator: Operator,
    _directory: TempDir,
}

impl Stage {
    async fn set(scenario: Scenario, case: &str, api: &Api, kubeconfig: &Path) -> Self {
        let nats = NatsServer::start();
        let namespace = format!("crash-{}-{case}", scenario.name);
        api.namespace(&namespace).await;
        let directory = tempfile::tempdir().expect("a temporary directory");
        let points = Points::listen(directory.path());
        let pool = Pool::new(&namespace, "orders", &nats);
        let operator = operator(kubeconfig, &namespace).env(VARIABLE, &points.socket()).start().await;
        if let Some(before) = scenario.before {
            pool.create(api, before()).await;
            pool.converged(api, PATIENCE).await;
        }
        let (api, kubeconfig) = (api.clone(), kubeconfig.to_owned());
        Self { scenario, api, kubeconfig, nats, pool, points, operator, _directory: directory }
    }

    async fn act(&self) {
        match self.scenario.act {
            Act::Create(spec) => self.pool.create(&self.api, spec()).await,
            Act::Change(spec) => self.pool.change(&self.api, spec()).await,
            Act::Delete => self.api.delete(&self.pool.path()).await,
            Act::Replace => {
                self.api.delete(&self.pool.path()).await;
                self.pool.create(&self.api, plain()).await;
            }
        }
    }

    async fn undisturbed(self) -> Reference {
        let before = self.calm().await;
        self.points.arm(None);
        self.act().await;
        match self.scenario.act {
            // The garbage collector hears of a new type half a minute late.
            Act::Delete => within(PATIENCE, "nothing of the pool is left", async || self.is_gone().await).await,
            _ => self.pool.converged(&self.api, PATIENCE).await,
        }
        let after = self.calm().await;
        Reference { before, after, points: self.points.heard() }
    }

    /// At the first of these points, and at the others while it recovers.
    async fn killed(mut self, points: &[&str], reference: &Reference) -> Result<(), Failure> {
        self.becomes(&reference.before).await.map_err(|how| Failure::Differs(format!("before: {how}")))?;
        let [point, later @ ..] = points else { return Err(Failure::NotMet) };
        match *point {
            BEFORE => {
                self.operator.kill();
                self.act().await;
            }
            AFTER => {
                self.act().await;
                self.operator.kill();
            }
            _ => {
                self.points.arm(Some(point));
                self.act().await;
                self.dies_there().await?;
            }
        }
        for point in later {
            self.points.arm(Some(point));
            let again = operator(&self.kubeconfig, &self.pool.namespace).env(VARIABLE, &self.points.socket());
            self.operator = again.spawn();
            self.dies_there().await?;
        }
        let again = operator(&self.kubeconfig, &self.pool.namespace).start().await;
        let end = self.becomes(&reference.after).await;
        end.map_err(|how| {
            let lines = again.lines();
            let last = lines.iter().skip(lines.len().saturating_sub(8)).cloned().collect::<Vec<_>>().join("\n");
            Failure::Differs(format!("{how}\nthe operator's last words:\n{last}"))
        })
    }

    async fn dies_there(&mut self) -> Result<(), Failure> {
        let held = tokio::time::timeout(PATIENCE / 4, self.points.caught()).await;
        let _held = held.map_err(|_| Failure::NotMet)?;
        self.operator.kill();
        Ok(())
    }

    /// What there is, once it has not changed for a while.
    async fn calm(&self) -> Value {
        let (mut last, mut since) = (self.snapshot().await, tokio::time::Instant::now());
        while since.elapsed() < CALM {
            tokio::time::sleep(Duration::from_millis(250)).await;
            let now = self.snapshot().await;
            if now != last {
                (last, since) = (now, tokio::time::Instant::now());
            }
        }
        last
    }

    /// Waits until there is the same; says what differs where that does not come.
    async fn becomes(&self, expected: &Value) -> Result<(), String> {
        let started = tokio::time::Instant::now();
        loop {
            let now = self.snapshot().await;
            if now == *expected {
                return Ok(());
            }
            if started.elapsed() > PATIENCE / 2 {
                let mut differences = Vec::new();
                differ("", expected, &now, &mut differences);
                return Err(differences.join("\n"));
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }

    /// Whether only the broker still knows of the pool.
    async fn is_gone(&self) -> Option<()> {
        let left = self.snapshot().await;
        let names = left.as_object().expect("an object").keys();
        (left["pods"] == 0 && names.eq(["broker", "pods"])).then_some(())
    }

    /// Everything that the operator answers for, without what no two runs share.
    async fn snapshot(&self) -> Value {
        let namespace = &self.pool.namespace;
        let mut found = Map::new();
        let pools = pools(namespace);
        let kinds = [
            "/api/v1/namespaces/NS/serviceaccounts",
            "/api/v1/namespaces/NS/configmaps",
            "/api/v1/namespaces/NS/services",
            "/apis/apps/v1/namespaces/NS/deployments",
            "/apis/policy/v1/namespaces/NS/poddisruptionbudgets",
            "/apis/networking.k8s.io/v1/namespaces/NS/networkpolicies",
            "/apis/monitoring.coreos.com/v1/namespaces/NS/podmonitors",
        ];
        for path in kinds.map(|path| path.replace("NS", namespace)).iter().chain([&pools]) {
            for object in self.api.list(path).await {
                let name = object["metadata"]["name"].as_str().unwrap_or_default();
                if !matches!(name, "default" | "kube-root-ca.crt") {
                    found.insert(format!("{path}/{name}"), object);
                }
            }
        }
        // A pod that goes is not counted, one that comes is.
        let pods = self.api.list(&format!("/api/v1/namespaces/{namespace}/pods")).await;
        found.insert("pods".to_owned(), pods.len().into());
        found.insert("broker".to_owned(), self.broker().await);
        let uid = found.get(&self.pool.path()).map(|pool| pool["metadata"]["uid"].clone());
        let text = Value::from(found).to_string();
        let text = match uid.as_ref().and_then(Value::as_str) {
            Some(uid) => text.replace(uid, "UID"),
            None => text,
        };
        let text = text.replace(namespace, "NAMESPACE").replace(&self.nats.port().to_string(), "PORT");
        normal(serde_json::from_str(&text).expect("it was JSON"))
    }

    /// Streams and consumers as they are configured.
    async fn broker(&self) -> Value {
        let client = async_nats::connect(self.nats.url()).await.expect("a connection");
        let jetstream = jetstream::new(client);
        let mut found = Map::new();
        let streams: Vec<_> = jetstream.streams().try_collect().await.expect("the streams");
        for info in streams {
            let stream = jetstream.get_stream(&info.config.name).await.expect("the stream");
            let consumers: Vec<_> = stream.consumers().try_collect().await.expect("the consumers");
            // One without a lasting name is a watch, which goes with whoever watches.
            for consumer in consumers.into_iter().filter(|consumer| consumer.config.durable_name.is_some()) {
                let config = serde_json::to_value(&consumer.config).expect("plain data");
                found.insert(format!("{} {}", info.config.name, consumer.name), config);
            }
            found.insert(info.config.name.clone(), serde_json::to_value(&info.config).expect("plain data"));
        }
        found.into()
    }
}

/// One that looks after the namespace of a case only.
fn operator(kubeconfig: &Path, namespace: &str) -> beamline_tests::operator::Setup {
    // A killed leader keeps the Lease for its time: that is another test's.
    Operator::of(kubeconfig, namespace).flag("--leader-election=false")
}

/// Without times, identities and what counts writes.
fn normal(value: Value) -> Value {
    match value {
        Value::Object(object) => {
            let kept = object.into_iter().filter(|(key, value)| !is_never_the_same(key, value));
            kept.map(|(key, value)| {
                let value = if key == "managedFields" { ours(value) } else { value };
                (key, normal(value))
            })
            .collect()
        }
        Value::Array(items) => {
            let mut items: Vec<_> = items.into_iter().map(normal).collect();
            if items.iter().all(|item| item["type"].is_string()) {
                items.sort_by_key(|item| item["type"].to_string());
            }
            Value::Array(items)
        }
        other => other,
    }
}

fn is_never_the_same(key: &str, value: &Value) -> bool {
    let times = ["creationTimestamp", "time", "lastTransitionTime", "lastUpdateTime", "lastScaleTime", "oldestSince"];
    let ids = ["uid", "resourceVersion", "clusterIP", "clusterIPs"];
    let rates = ["arrivalsPerSecond", "completionsPerSecond"];
    // Its name ends with a fingerprint of the pod, which knows the port of its broker.
    let names_a_replica_set = value.as_str().is_some_and(|text| text.starts_with("ReplicaSet "));
    times.contains(&key) || ids.contains(&key) || rates.contains(&key) || names_a_replica_set
}

/// Which fields are the operator's is part of the end; who else wrote which, and how often, is not.
fn ours(entries: Value) -> Value {
    let Value::Array(entries) = entries else { return entries };
    entries.into_iter().filter(|entry| entry["manager"] == "beamline-operator").collect()
}

fn differ(at: &str, expected: &Value, found: &Value, into: &mut Vec<String>) {
    match (expected, found) {
        (Value::Object(expected), Value::Object(found)) => {
            let keys: BTreeSet<_> = expected.keys().chain(found.keys()).collect();
            for key in keys {
                let (expected, found) = (expected.get(key), found.get(key));
                differ(&format!("{at}.{key}"), expected.unwrap_or(&Value::Null), found.unwrap_or(&Value::Null), into);
            }
        }
        _ if expected == found => {}
        _ => into.push(format!("{at}: expected {expected}, found {found}")),
    }
}
