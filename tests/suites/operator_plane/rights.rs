//! What the chart lets the operator do, beside what the audit log shows that it does: the same, in every mode.

use std::collections::BTreeSet;

use beamline_tests::api::Api;
use beamline_tests::nats::NatsServer;
use beamline_tests::operator::Operator;
use beamline_tests::plane::Release;
use beamline_tests::pool::Pool;
use beamline_tests::wait::within;
use serde_json::{Value, json};

use super::autoscaler::serving;
use super::keda::SCALED_OBJECTS;
use super::{PATIENCE, start_plane};

/// Values of the chart, and the flags that it gives the operator for them.
const MODES: [(&str, &[&str], &[&str]); 5] = [
    ("whole", &[], &[]),
    ("narrow", &["watchNamespace=narrow"], &["--watch-namespace=narrow"]),
    ("secretive", &["rbac.secretNamespaces={secretive}"], &[]),
    ("measured", &["externalMetrics.enabled=true"], &[]),
    ("eventful", &["keda.enabled=true"], &["--keda-url=http://eventful-queues.eventful.svc:8080"]),
];

/// Modes of a pool, and what is made in them.
const AUTOSCALERS: [(&str, &str); 2] = [
    ("HPA", "/apis/autoscaling/v2/namespaces/NS/horizontalpodautoscalers"),
    ("KEDA", "/apis/keda.sh/v1alpha1/namespaces/NS/scaledobjects"),
];

/// Not on the plane that the others share: this operator looks after the whole cluster.
#[tokio::test(flavor = "multi_thread")]
async fn the_operator_uses_every_right_that_it_has_and_is_denied_none() {
    let plane = start_plane();
    let api = plane.api().await;
    plane.kubectl(&["create", "-f", "-"], Some(SCALED_OBJECTS));
    for (name, values, flags) in MODES {
        let release = plane.install(name, values);
        let operator = if values.contains(&"externalMetrics.enabled=true") {
            serving(&api, &release).await
        } else {
            Operator::by(&release.kubeconfig).flag(format!("--lease-namespace={name}"))
        };
        let operator = flags.iter().fold(operator, |operator, flag| operator.flag(*flag));
        let operator = operator.start().await;
        let has_keda = values.contains(&"keda.enabled=true");
        do_everything(&api, name, if has_keda { &AUTOSCALERS } else { &AUTOSCALERS[..1] }).await;
        let granted = granted(&api, &release).await;
        let asked = plane.asked_by(&release.user);
        drop(operator);
        let denied: Vec<_> = asked.iter().filter(|event| is_denied(event)).map(|event| &event["requestURI"]).collect();
        assert!(denied.is_empty(), "{name}: denied: {denied:#?}");
        let nameless: Vec<_> =
            asked.iter().filter(|event| is_nameless(event)).map(|event| &event["requestURI"]).collect();
        assert!(nameless.is_empty(), "{name}: managedFields do not say whose these are: {nameless:#?}");
        let used: BTreeSet<_> = asked.iter().flat_map(rights).collect();
        let unused: Vec<_> = granted.iter().filter(|right| !used.iter().any(|used| right.covers(used))).collect();
        assert!(unused.is_empty(), "{name}: granted and never used: {unused:#?}");
        assert!(granted.len() > 30, "{name}: only {} rights were found", granted.len());
        eprintln!("rights: {name}: {} granted, all used, none denied", granted.len());
    }
}

/// What a pool that asks for everything refers to.
pub(super) async fn surround(api: &Api, namespace: &str) {
    let core = |kind: &str, name: &str| format!("/api/v1/namespaces/{namespace}/{kind}/{name}");
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "crm"},
        "stringData": {"url": "postgres://crm.test:5432/crm"}});
    api.apply(&core("secrets", "crm"), &secret).await;
    let claim = json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "data"},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}},
                 "storageClassName": "", "volumeName": namespace}});
    api.apply(&core("persistentvolumeclaims", "data"), &claim).await;
    let volume = json!({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": namespace},
        "spec": {"accessModes": ["ReadWriteMany"], "capacity": {"storage": "1Gi"}, "hostPath": {"path": "/data"},
                 "storageClassName": "",
                 "claimRef": {"namespace": namespace, "name": "data"}}});
    api.apply(&format!("/api/v1/persistentvolumes/{namespace}"), &volume).await;
}

/// A pool that asks for everything.
pub(super) fn everything() -> Value {
    json!({
        "replicas": 2,
        "gpu": {"replicas": 1},
        "observability": {"podMonitor": true},
        "worker": {
            "filesystem": {"roots": [
                {"path": "/data", "volume": {"persistentVolumeClaim": {"claimName": "data"}}},
            ]},
            "sql": {"connections": [{"name": "crm", "urlSecretRef": {"name": "crm", "key": "url"}}]},
        },
    })
}

/// A life in which the operator meets everything that it has a right for.
async fn do_everything(api: &Api, namespace: &str, autoscalers: &[(&str, &str)]) {
    let nats = NatsServer::start();
    surround(api, namespace).await;
    let pool = Pool::new(namespace, "orders", &nats);
    pool.create(api, everything()).await;
    pool.converged(api, PATIENCE).await;
    // The policy changes, so pods are told; and what is said of the pool is said twice, which one event counts.
    for paused in [true, false, true, false] {
        pool.change(api, json!({"paused": paused})).await;
        let reason = if paused { "Paused" } else { "WorkersReady" };
        within(PATIENCE, reason, async || {
            let pool = api.get(&pool.path()).await?;
            let ready = pool["status"]["conditions"].as_array()?.iter().find(|one| one["type"] == "Ready")?;
            (ready["reason"] == reason).then_some(())
        })
        .await;
    }
    pool.change(api, json!({"gpu": null, "observability": null, "networkPolicy": "Off"})).await;
    let policies = format!("/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies");
    within(PATIENCE, "the wall is gone", async || api.list(&policies).await.is_empty().then_some(())).await;
    let monitor = format!("/apis/monitoring.coreos.com/v1/namespaces/{namespace}/podmonitors/orders");
    within(PATIENCE, "the monitor is gone", async || api.get(&monitor).await.is_none().then_some(())).await;
    pool.converged(api, PATIENCE).await;
    // Who leaves mode Operator finds written what runs.
    pool.change(api, json!({"scaling": {"mode": "Operator", "minReplicas": 3}, "gpu": {"minReplicas": 2}})).await;
    let desired = async || {
        let status = api.get(&pool.path()).await?["status"].take();
        (status["desiredReplicas"] == 3 && status["gpu"]["desiredReplicas"] == 2).then_some(())
    };
    within(PATIENCE, "the operator asks for three, and for two with GPUs", desired).await;
    pool.change(api, json!({"scaling": {"mode": "Manual"}})).await;
    let written = async || {
        let spec = api.get(&pool.path()).await?["spec"].take();
        (spec["replicas"] == 3 && spec["gpu"]["replicas"] == 2).then_some(())
    };
    within(PATIENCE, "what runs is written", written).await;
    // An autoscaler comes and goes with its mode.
    for (mode, path) in autoscalers {
        let path = path.replace("NS", namespace);
        for (mode, count) in [(*mode, 1), ("Manual", 0)] {
            pool.change(api, json!({"scaling": {"mode": mode}})).await;
            let there = async || (api.list(&path).await.len() == count).then_some(());
            within(PATIENCE, "the autoscaler comes and goes", there).await;
        }
    }
    api.delete(&pool.path()).await;
}

/// One thing that may be done, or was.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Right {
    pub(super) verb: String,
    pub(super) group: String,
    pub(super) resource: String,
    /// Any, where there is none.
    pub(super) namespace: Option<String>,
    /// Any, where there is none.
    pub(super) name: Option<String>,
}

impl Right {
    /// Whether what was done is this.
    fn covers(&self, used: &Self) -> bool {
        let fits = |may: &Option<String>, did: &Option<String>| may.is_none() || may == did;
        (&self.verb, &self.group, &self.resource) == (&used.verb, &used.group, &used.resource)
            && fits(&self.namespace, &used.namespace)
            && fits(&self.name, &used.name)
    }
}

/// A role that the operator has.
pub(super) struct Role {
    pub(super) path: String,
    pub(super) rules: Value,
    /// Where it holds; everywhere, where there is none.
    namespace: Option<String>,
}

impl Role {
    /// All that it says, one by one.
    pub(super) fn rights(&self) -> Vec<Right> {
        let rules = self.rules.as_array().into_iter().flatten();
        rules.flat_map(|rule| expand(rule, self.namespace.as_deref())).collect()
    }
}

async fn granted(api: &Api, release: &Release) -> BTreeSet<Right> {
    roles(api, release).await.iter().flat_map(Role::rights).collect()
}

/// The chart's. A Role, and what a RoleBinding gives of a ClusterRole, hold in their namespace.
pub(super) async fn roles(api: &Api, release: &Release) -> Vec<Role> {
    let mut roles = Vec::new();
    let group = "/apis/rbac.authorization.k8s.io/v1";
    for (kind, is_narrow) in [("clusterrolebindings", false), ("rolebindings", true)] {
        for binding in api.list(&format!("{group}/{kind}")).await {
            let subjects = binding["subjects"].as_array().cloned().unwrap_or_default();
            let is_ours = |subject: &Value| {
                let account = ["namespace", "name"].map(|key| subject[key].as_str().unwrap_or_default());
                format!("system:serviceaccount:{}", account.join(":")) == release.user
            };
            if !subjects.iter().any(is_ours) {
                continue;
            }
            let namespace = binding["metadata"]["namespace"].as_str();
            let role = binding["roleRef"]["name"].as_str().expect("a role");
            let path = match (binding["roleRef"]["kind"].as_str(), namespace) {
                (Some("Role"), Some(namespace)) => format!("{group}/namespaces/{namespace}/roles/{role}"),
                _ => format!("{group}/clusterroles/{role}"),
            };
            let role = api.get(&path).await.unwrap_or_else(|| panic!("there is no {path}"));
            let namespace = namespace.filter(|_| is_narrow).map(str::to_owned);
            roles.push(Role { path, rules: role["rules"].clone(), namespace });
        }
    }
    roles
}

fn expand(rule: &Value, namespace: Option<&str>) -> Vec<Right> {
    let texts = |key: &str| -> Vec<String> {
        let texts = rule[key].as_array().into_iter().flatten();
        texts.filter_map(|text| text.as_str().map(str::to_owned)).collect()
    };
    let names: Vec<_> = texts("resourceNames").into_iter().map(Some).collect();
    let names = if names.is_empty() { vec![None] } else { names };
    let mut rights = Vec::new();
    for group in texts("apiGroups") {
        for resource in texts("resources") {
            for verb in texts("verbs") {
                for name in &names {
                    let (group, resource) = (group.clone(), resource.clone());
                    let namespace = namespace.map(str::to_owned);
                    rights.push(Right { verb: verb.clone(), group, resource, namespace, name: name.clone() });
                }
            }
        }
    }
    rights
}

/// What an entry of the audit log shows as used. Server-side apply that makes an object needs the right to create it, too.
fn rights(event: &Value) -> Vec<Right> {
    let object = &event["objectRef"];
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let resource = text(&object["resource"]).unwrap_or_default();
    let resource = match object["subresource"].as_str() {
        Some(part) => format!("{resource}/{part}"),
        None => resource,
    };
    let used = Right {
        verb: text(&event["verb"]).unwrap_or_default(),
        group: text(&object["apiGroup"]).unwrap_or_default(),
        resource,
        namespace: text(&object["namespace"]),
        name: text(&object["name"]),
    };
    let is_made = used.verb == "patch" && event["responseStatus"]["code"] == 201;
    let create = is_made.then(|| Right { verb: "create".to_owned(), ..used.clone() });
    std::iter::once(used).chain(create).collect()
}

/// Those of events are the library's.
fn is_nameless(event: &Value) -> bool {
    let is_ours = event["verb"] == "patch" && event["objectRef"]["resource"] != "events";
    is_ours && !event["requestURI"].as_str().is_some_and(|uri| uri.contains("fieldManager="))
}

/// By the rules of access, not by a quota or an admission.
fn is_denied(event: &Value) -> bool {
    event["annotations"]["authorization.k8s.io/decision"] == "forbid"
}
