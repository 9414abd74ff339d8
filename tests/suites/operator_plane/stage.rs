//! One case of the crash sweep: a pool in a namespace of its own, with a broker and an operator; everything that the operator
//! answers for is looked at, and compared with how it goes when nobody disturbs it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_nats::{ConnectOptions, jetstream};
use beamline_tests::api::Api;
use beamline_tests::failpoint::{Points, VARIABLE};
use beamline_tests::nats::NatsServer;
use beamline_tests::operator::Operator;
use beamline_tests::pool::{Pool, pools};
use beamline_tests::trust::Accounts;
use beamline_tests::wait::within;
use futures::TryStreamExt;
use serde_json::{Map, Value, json};
use tempfile::TempDir;
use tokio::net::UnixStream;

use super::scenario::Act::{Change, Create, Delete, EndNamespace, Replace, Rotate, Upgrade};
use super::scenario::Before::{Nothing, Ready, Stuck};
use super::scenario::{Scenario, plain, with_gpu};
use super::{PATIENCE, condition, versions};

/// An end that has not changed for so long is one.
const CALM: Duration = Duration::from_secs(4);

/// Where it dies without having written anything, or when the user is done.
pub(super) const BEFORE: &str = "before all";
pub(super) const AFTER: &str = "after all";

pub(super) enum Failure {
    /// The operator did not come to that point.
    NotMet,
    /// The end is another one.
    Differs(String),
}

/// How a scenario goes when nobody disturbs it.
pub(super) struct Reference {
    before: Value,
    after: Value,
    pub(super) points: Vec<String>,
}

/// A namespace, a broker and an operator of one case.
pub(super) struct Stage {
    scenario: Scenario,
    api: Api,
    kubeconfig: PathBuf,
    nats: NatsServer,
    door: Option<Door>,
    pool: Pool,
    points: Points,
    operator: Operator,
    _directory: TempDir,
}

/// A broker that asks who comes: the tests, a user that goes, and one that takes its place.
struct Door {
    accounts: Accounts,
    tests: String,
    old: (String, String),
    new: String,
}

impl Door {
    fn new() -> Self {
        let accounts = Accounts::new();
        let ((tests, _), old, (new, _)) = (accounts.user(), accounts.user(), accounts.user());
        Self { accounts, tests, old, new }
    }
}

/// The Secret, and its key.
pub(super) const CREDENTIALS: &str = "nats.creds";
/// What is missing at the broker after a rotation, so that somebody must use the new credentials.
const BUCKET: &str = "KV_caf-answers";

impl Stage {
    pub(super) async fn set(scenario: Scenario, case: &str, api: &Api, kubeconfig: &Path) -> Self {
        let door = matches!(scenario.act, Rotate).then(Door::new);
        let nats = NatsServer::with(&door.as_ref().map(|door| door.accounts.settings(&[])).unwrap_or_default());
        let namespace = format!("crash-{}-{case}", scenario.name);
        api.namespace(&namespace).await;
        let directory = tempfile::tempdir().expect("a temporary directory");
        let points = Points::listen(directory.path());
        let pool = Pool::new(&namespace, "orders", &nats);
        let operator = operator(&scenario, kubeconfig, &namespace).env(VARIABLE, &points.socket()).start().await;
        let (api, kubeconfig) = (api.clone(), kubeconfig.to_owned());
        let stage = Self { scenario, api, kubeconfig, nats, door, pool, points, operator, _directory: directory };
        stage.begin().await;
        stage
    }

    async fn begin(&self) {
        if let Upgrade(plane, _) = self.scenario.act {
            versions::downgrade(plane).await;
        }
        if let Some(door) = &self.door {
            self.bring(&door.old.0).await;
        }
        match self.scenario.before {
            Nothing => {}
            Ready(spec) => {
                self.pool.create(&self.api, spec()).await;
                self.pool.converged(&self.api, PATIENCE).await;
            }
            Stuck(spec, reason) => {
                self.pool.create(&self.api, spec()).await;
                self.says(reason).await;
            }
        }
    }

    async fn says(&self, reason: &str) {
        let ready = async || condition(&self.api, &self.pool, "Ready").await;
        within(PATIENCE, reason, async || (ready().await["reason"] == reason).then_some(())).await;
    }

    /// These credentials, for workers and the operator.
    async fn bring(&self, credentials: &str) {
        let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": CREDENTIALS},
            "stringData": {CREDENTIALS: credentials}});
        let path = format!("/api/v1/namespaces/{}/secrets/{CREDENTIALS}", self.pool.namespace);
        self.api.apply(&path, &secret).await;
    }

    async fn act(&mut self) {
        let path = self.pool.path();
        match self.scenario.act {
            Create(spec) => self.pool.create(&self.api, spec()).await,
            Change(spec) => self.pool.change(&self.api, spec()).await,
            Delete => self.api.delete(&path).await,
            Replace => {
                self.api.delete(&path).await;
                self.pool.create(&self.api, plain()).await;
            }
            EndNamespace => self.api.delete(&self.namespace()).await,
            Rotate => self.rotate().await,
            Upgrade(plane, spec) => {
                versions::upgrade(plane).await;
                self.pool.change(&self.api, spec()).await;
            }
        }
    }

    async fn rotate(&mut self) {
        let door = self.door.as_ref().expect("the broker asks who comes");
        self.bring(&door.new).await;
        self.nats.restart_with(&door.accounts.settings(&[&door.old.1]));
        self.jetstream().await.delete_stream(BUCKET).await.expect("deleted");
    }

    pub(super) async fn undisturbed(mut self) -> Reference {
        let before = self.calm().await;
        self.points.arm(None);
        self.act().await;
        match self.scenario.act {
            // The garbage collector hears of a new type half a minute late.
            Delete | EndNamespace => self.leaves_nothing().await,
            Rotate => {
                let jetstream = self.jetstream().await;
                within(PATIENCE, "what is missing is made", async || jetstream.get_stream(BUCKET).await.ok()).await;
                self.pool.converged(&self.api, PATIENCE).await;
            }
            Upgrade(..) => self.says("Paused").await,
            Create(_) | Change(_) | Replace => self.pool.converged(&self.api, PATIENCE).await,
        }
        let after = self.calm().await;
        Reference { before, after, points: self.points.heard() }
    }

    /// At the first of these points, and at the others while it recovers.
    pub(super) async fn killed(mut self, points: &[&str], reference: &Reference) -> Result<(), Failure> {
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
            let again = self.again().env(VARIABLE, &self.points.socket());
            self.operator = again.spawn();
            self.dies_there().await?;
        }
        let again = self.again().start().await;
        let end = self.becomes(&reference.after).await;
        end.map_err(|how| {
            let lines = again.lines();
            let last = lines.iter().skip(lines.len().saturating_sub(8)).cloned().collect::<Vec<_>>().join("\n");
            Failure::Differs(format!("{how}\nthe operator's last words:\n{last}"))
        })
    }

    /// Goes for good when the operator, which makes the pool, is at this point: whether it dies there or goes on.
    pub(super) async fn ends(mut self, point: &str, dies: bool) -> Result<(), Failure> {
        self.points.arm(Some(point));
        self.pool.create(&self.api, with_gpu()).await;
        let held = self.held().await?;
        if dies {
            self.operator.kill();
        }
        self.act().await;
        within(PATIENCE, "the pool is gone", async || self.api.get(&self.pool.path()).await.is_none().then_some(()))
            .await;
        drop(held);
        if dies {
            self.operator = self.again().start().await;
        }
        self.leaves_nothing().await;
        self.calm().await;
        self.is_gone().await.ok_or_else(|| Failure::Differs("something is there again".to_owned()))
    }

    fn again(&self) -> beamline_tests::operator::Setup {
        operator(&self.scenario, &self.kubeconfig, &self.pool.namespace)
    }

    async fn dies_there(&mut self) -> Result<(), Failure> {
        let _held = self.held().await?;
        self.operator.kill();
        Ok(())
    }

    async fn held(&mut self) -> Result<UnixStream, Failure> {
        tokio::time::timeout(PATIENCE / 4, self.points.caught()).await.map_err(|_| Failure::NotMet)
    }

    /// What there is, once it has not changed for a while.
    async fn calm(&self) -> Value {
        let (mut last, mut since) = (self.snapshot().await, tokio::time::Instant::now());
        while since.elapsed() < CALM {
            tokio::time::sleep(Duration::from_millis(500)).await;
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
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// Waits until only the broker still knows of the pool.
    async fn leaves_nothing(&self) {
        within(PATIENCE, "nothing of the pool is left", async || self.is_gone().await).await;
    }

    async fn is_gone(&self) -> Option<()> {
        let left = self.snapshot().await;
        let names = left.as_object().expect("an object").keys();
        let stays = if matches!(self.scenario.act, EndNamespace) { Value::Null } else { json!("Active") };
        let is_empty = left["pods"] == 0 && names.eq(["broker", "namespace", "pods"]);
        (is_empty && left["namespace"] == stays).then_some(())
    }

    fn namespace(&self) -> String {
        format!("/api/v1/namespaces/{}", self.pool.namespace)
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
            "/apis/autoscaling/v2/namespaces/NS/horizontalpodautoscalers",
            "/apis/policy/v1/namespaces/NS/poddisruptionbudgets",
            "/apis/networking.k8s.io/v1/namespaces/NS/networkpolicies",
            "/apis/monitoring.coreos.com/v1/namespaces/NS/podmonitors",
        ];
        for path in kinds.map(|path| path.replace("NS", namespace)).iter().chain([&pools]) {
            for mut object in self.api.list(path).await {
                let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
                if path.ends_with("horizontalpodautoscalers") {
                    // It is its controller's, which hears of a new type later than others.
                    object["status"].take();
                }
                if !matches!(name.as_str(), "default" | "kube-root-ca.crt") {
                    found.insert(format!("{path}/{name}"), object);
                }
            }
        }
        let phase = self.api.get(&self.namespace()).await.map(|mut namespace| namespace["status"]["phase"].take());
        found.insert("namespace".to_owned(), phase.into());
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

    async fn jetstream(&self) -> jetstream::Context {
        let options = match &self.door {
            Some(door) => ConnectOptions::with_credentials(&door.tests).expect("credentials"),
            None => ConnectOptions::new(),
        };
        jetstream::new(options.connect(self.nats.url()).await.expect("a connection"))
    }

    /// Streams and consumers as they are configured.
    async fn broker(&self) -> Value {
        let jetstream = self.jetstream().await;
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
fn operator(scenario: &Scenario, kubeconfig: &Path, namespace: &str) -> beamline_tests::operator::Setup {
    // A killed leader keeps the Lease for its time: that is another test's.
    let operator = Operator::of(kubeconfig, namespace).flag("--leader-election=false");
    match scenario.act {
        // A watch that is older than its type shows what that one knew, until all is listed anew.
        Upgrade(..) => operator.flag("--relist-after=5s"),
        _ => operator,
    }
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
    // Whether a pod's start was seen is up to when the operator was away.
    let learned = ["learned", "f:learned"];
    // Its name ends with a fingerprint of the pod, which knows the port of its broker.
    let names_a_replica_set = value.as_str().is_some_and(|text| text.starts_with("ReplicaSet "));
    [times.as_slice(), &ids, &rates, &learned].concat().contains(&key) || names_a_replica_set
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
