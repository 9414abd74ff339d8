//! Both programs say the same: what the operator sets up is what its workers expect, and nothing that the API server
//! lets through makes a worker refuse to start.

#![expect(clippy::expect_used, clippy::indexing_slicing, clippy::panic, reason = "a test says so when it cannot go on")]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::time::Duration;

use beamline_crds::WorkerPool;
use beamline_operator::desired::{Desired, desired};
use beamline_operator::pool::{InvalidPool, ValidPool, validate};
use beamline_operator::reports::Crew;
use beamline_operator::surroundings::Surroundings;
use beamline_operator::tenants::{Kept, Parked, Shelf, tenants};
use beamline_operator::{scale, streams};
use beamline_tests::policy::Policy as PolicyFile;
use beamline_tests::rig::Rig;
use beamline_tests::router::assignment;
use beamline_tests::wait::{SOON, within};
use beamline_worker::blocks::egress::Entry;
use beamline_worker::broker::streams::{self as expected, Intake as Source};
use beamline_worker::config::Config;
use beamline_worker::ids::TenantId;
use beamline_worker::policy::{OnExceeded, Policy, Quotas};
use kube::CustomResourceExt;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A pool as the API server stores it, with this spec.
fn validated(spec: Value) -> Result<ValidPool, InvalidPool> {
    let stored: WorkerPool = serde_json::from_value(json!({
        "apiVersion": "beamline.dev/v1alpha1",
        "kind": "WorkerPool",
        "metadata": {"name": "default", "namespace": "flows", "uid": "1234", "generation": 1},
        "spec": spec,
    }))
    .expect("a WorkerPool");
    validate(&stored, "beamline:1")
}

#[track_caller]
fn pool(spec: Value) -> ValidPool {
    validated(spec).expect("a valid pool")
}

#[track_caller]
fn expect_the_same_streams(nats: Value) {
    let pool = pool(json!({"nats": nats}));
    let source = Source { subject: pool.nats.subject.clone(), queue_group: pool.nats.queue_group.clone() };
    let [cancels, approvals, answers, deliveries, quotas] = expected::buckets();
    assert_eq!(
        streams::streams(&pool.nats),
        [
            expected::assignments(&source),
            expected::parked(&source),
            expected::results(),
            expected::dead_letters(),
            expected::control(),
            cancels,
            approvals,
            answers,
            deliveries,
            quotas,
        ]
    );
    assert_eq!(streams::control_consumer(), expected::control_consumer());
    let consumer = expected::consumer(&source);
    assert_eq!(streams::consumer(&pool.nats, consumer.max_ack_pending), consumer);
    let route = expected::route_consumer(&source);
    assert_eq!(streams::route_consumer(&pool.nats, route.max_ack_pending), route);
}

#[test]
fn the_default_subject_has_the_same_streams() {
    expect_the_same_streams(json!({"url": "nats://nats:4222"}));
}

#[test]
fn another_subject_has_the_same_streams() {
    expect_the_same_streams(json!({
        "url": "nats://nats:4222",
        "subject": "orders.eu_1.assign",
        "queueGroup": "orders-workers",
    }));
}

/// What the kubelet brings to a pod below `/etc/beamline`, here below a directory of its own.
struct Mounts {
    directory: TempDir,
    config_map: BTreeMap<String, String>,
    secrets: BTreeMap<&'static str, String>,
}

impl Mounts {
    fn new(config_map: BTreeMap<String, String>) -> Self {
        let user = nkeys::KeyPair::new_user();
        let seed = user.seed().expect("a seed");
        let creds = format!("-----BEGIN NATS USER JWT-----\njwt\n\n-----BEGIN USER NKEY SEED-----\n{seed}\n");
        let made = rcgen::generate_simple_self_signed(["worker".to_owned()]).expect("a certificate");
        let (cert, key) = (made.cert.pem(), made.signing_key.serialize_pem());
        let secrets = [("nats.creds", creds), ("ca.crt", cert.clone()), ("tls.crt", cert), ("tls.key", key)];
        let directory = tempfile::tempdir().expect("a temporary directory");
        Self { directory, config_map, secrets: BTreeMap::from(secrets) }
    }

    /// The value, with a path where there is a file if it names one.
    fn bring(&self, value: String) -> String {
        let Some(name) = value.strip_prefix("/etc/beamline/").and_then(|path| path.rsplit('/').next()) else {
            return value;
        };
        let content = self.config_map.get(name).or_else(|| self.secrets.get(name));
        let path = self.directory.path().join(name);
        std::fs::write(&path, content.unwrap_or_else(|| panic!("nobody brings {value}"))).expect("a file");
        path.to_string_lossy().into_owned()
    }
}

/// The configuration of a worker that the pool's Deployment starts.
#[track_caller]
fn starts(spec: Value) -> Config {
    let pool = pool(spec);
    let Desired { general, config_map, .. } =
        desired(&pool, scale::as_written(&pool).replicas(), &Surroundings::default());
    let pod = general.deployment.spec.and_then(|spec| spec.template.spec).expect("a pod");
    let container = pod.containers.into_iter().next().expect("a container");
    let mounts = Mounts::new(config_map.data.unwrap_or_default());
    let variables = container.env.into_iter().flatten();
    let environment: BTreeMap<String, String> =
        variables.filter_map(|variable| Some((variable.name, mounts.bring(variable.value?)))).collect();
    let args = container.args.unwrap_or_default();
    Config::from_args(args.into_iter().map(OsString::from), |name| environment.get(name).map(OsString::from))
        .unwrap_or_else(|problems| panic!("a worker of this pool does not start:\n{problems}"))
}

/// What a worker reads in the file that the operator writes.
#[track_caller]
fn policy(spec: Value) -> Policy {
    let pool = pool(spec);
    let Desired { config_map, .. } = desired(&pool, scale::as_written(&pool).replicas(), &Surroundings::default());
    Policy::parse(&config_map.data.expect("data")["policy.yaml"]).expect("a policy")
}

#[test]
fn workers_read_the_policy_that_the_operator_writes() {
    let tenants = json!({
        "defaults": {
            "weight": 2, "priority": 3, "maxSlotShare": 50, "onExceeded": "Defer",
            "quotas": {"executions": 6000, "cpuTimeMs": 60_000, "window": "1m", "concurrent": 50, "memoryMb": 512},
        },
        "named": [
            {"id": "acme", "weight": bound("tenants.defaults.weight", "maximum"), "maxSlotShare": 100,
                "onExceeded": "Reject", "quotas": {"executions": 60_000, "window": "1h30m"}},
        ],
    });
    let policy = policy(json!({"nats": {"url": "nats://nats:4222"}, "paused": true, "tenants": tenants}));
    assert!(policy.paused);
    let terms = |tenant: &str| policy.terms(&TenantId::parse(tenant).expect("a tenant"));
    let (acme, other) = (terms("acme"), terms("other"));
    assert_eq!((acme.weight, acme.priority, acme.max_slot_share), (1000, 3, 100));
    assert_eq!((other.weight, other.max_slot_share), (2, 50));
    assert_eq!((acme.on_exceeded, other.on_exceeded), (OnExceeded::Reject, OnExceeded::Defer));
    let quotas = Quotas {
        executions: Some(6000),
        cpu_time: Some(Duration::from_secs(60)),
        window: Duration::from_secs(60),
        concurrent: Some(50),
        memory_mb: Some(512),
    };
    assert_eq!(other.quotas, quotas);
    assert_eq!(acme.quotas, Quotas { executions: Some(60_000), window: Duration::from_secs(5400), ..quotas });
}

#[tokio::test]
async fn the_operator_understands_what_workers_write_of_budgets_and_ceilings() {
    let quotas = json!({"executions": 100, "window": "744h", "concurrent": 5});
    let named = json!({"named": [{"id": "acme", "maxSlotShare": 100, "quotas": quotas}]});
    let file = PolicyFile::new(&json!({ "tenants": named }).to_string());
    let rig = Rig::start(&[&file.flag(), "--pool=flows/default"]).await;
    for number in 0..3 {
        rig.router.submit(&assignment("acme", &format!("{number}"), rig.call("/gate/unit"))).await;
    }
    rig.peer.arrived("/gate/unit", 3).await;
    let limits = pool(json!({"nats": {"url": "nats://nats:4222"}, "tenants": named})).limits;
    let account = streams::account_subject("flows/default", "acme");
    let waits = Parked { general: Shelf { waiting: 9, in_flight: 0 }, ..Parked::default() };
    within(SOON * 2, "of five at once three run, and of a hundred they have cost three", async || {
        let [account, leases] = [account.clone(), format!("{account}.concurrent")];
        let (account, leases) =
            (rig.router.last(streams::ACCOUNTS, &account).await?, rig.router.last(streams::ACCOUNTS, &leases).await?);
        let kept = Kept {
            accounts: BTreeMap::from([("acme".to_owned(), serde_json::from_slice(&account.payload).ok()?)]),
            slots: BTreeMap::from([("acme".to_owned(), serde_json::from_slice(&leases.payload).ok()?)]),
            parked: Some(BTreeMap::from([("acme".to_owned(), waits)])),
        };
        let said = tenants(&limits, &kept, [&Crew::default(), &Crew::default()], jiff::Timestamp::now());
        let used = said.busiest.first()?.executions_used;
        ((said.general.runnable, used) == (2, Some(3))).then_some(())
    })
    .await;
    rig.peer.open("unit");
}

#[test]
fn workers_read_every_bound_that_the_api_server_lets_through() {
    let windows = ["1s", "1000ms", "90m", "24h", "743h59m60s", "744h"];
    for end in ["minimum", "maximum"] {
        let most = bound("tenants.defaults.quotas.executions", end);
        let counts = ["executions", "cpuTimeMs", "concurrent", "memoryMb"];
        for field in counts {
            assert_eq!(bound(&format!("tenants.defaults.quotas.{field}"), end), most, "{field}");
        }
        for window in windows {
            let mut quotas = json!({ "window": window });
            counts.into_iter().for_each(|field| quotas[field] = most.clone());
            let longest = "é".repeat(128);
            let tenants = json!({"defaults": {"quotas": quotas}, "named": [{"id": longest, "quotas": quotas}]});
            let policy = policy(json!({"nats": {"url": "nats://nats:4222"}, "tenants": tenants}));
            for tenant in ["any", &longest] {
                let found = policy.terms(&TenantId::parse(tenant).expect("a tenant")).quotas;
                let counts = [found.executions, found.concurrent, found.memory_mb];
                assert!(counts.iter().all(|count| *count == most.as_u64()), "{window}: {found:?}");
            }
        }
    }
}

#[test]
fn the_operator_refuses_the_entries_that_workers_refuse() {
    let read = [
        "10.0.0.0/8",
        "10.1.2.3/8",
        "10.1.2.3",
        "10.1.2.3:443",
        "fd00::/8",
        "::1",
        "[::1]",
        "[::1]:443",
        "[fd00::/8]:1",
        "example.com",
        "Example.COM.",
        "*.example.com:8443",
        "a_b.example",
        "x.3com",
        "localhost:1",
        "[example.com]:80",
    ];
    let unreadable = [
        "10.0.0.0/33",
        "fd00::/129",
        "10.0.0.0/",
        "/8",
        "example.com/8",
        "10.1",
        "0x7f.1",
        "1.2.3.4.5",
        "300.1.1.1",
        "x.0x1",
        "*",
        "*.",
        "*.*.com",
        "a.*.com",
        "example.com:0",
        "example.com:65536",
        "example.com:",
        ":443",
        "[::1",
        "[::1]443",
        "[]",
        "fd00::1::2",
        "a@b",
        "a b",
        "http://a",
    ];
    for (entry, is_read) in read.map(|entry| (entry, true)).into_iter().chain(unreadable.map(|entry| (entry, false))) {
        assert_eq!(entry.parse::<Entry>().is_ok(), is_read, "the worker on {entry}");
        let spec = json!({"nats": {"url": "nats://nats:4222"}, "worker": {"egress": {"allow": [entry]}}});
        assert_eq!(validated(spec).is_ok(), is_read, "the operator on {entry}");
    }
}

/// What the CRD says about a field of the spec: `minimum`, `maximum`, `maxItems` and the like.
#[track_caller]
fn bound(field: &str, keyword: &str) -> Value {
    let manifest = serde_json::to_value(WorkerPool::crd()).expect("a manifest is plain data");
    let path: String = field.split('.').map(|name| format!("/properties/{name}")).collect();
    let schema = &manifest["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
    let found = schema.pointer(&format!("{path}/{keyword}")).unwrap_or_else(|| panic!("{field} has no {keyword}"));
    found.as_f64().map_or_else(|| found.clone(), |number| json!(number.round() as i64))
}

#[track_caller]
fn items(field: &str, item: impl Fn(i64) -> String) -> Vec<String> {
    (0..bound(field, "maxItems").as_i64().expect("a number")).map(item).collect()
}

/// Every number of the worker at one end of what the CRD allows.
fn numbers(end: &str) -> Value {
    let of = |field: &str| bound(field, end);
    json!({
        "pools": {"cpu": of("worker.pools.cpu"), "io": of("worker.pools.io")},
        "limits": {"memoryMb": of("worker.limits.memoryMb"), "cpuTimeMs": of("worker.limits.cpuTimeMs")},
        "drainSeconds": of("worker.drainSeconds"),
    })
}

#[test]
fn a_worker_starts_with_nothing_but_the_address() {
    let config = starts(json!({"nats": {"url": "nats://nats:4222"}}));
    assert!(!config.nats_create_streams);
    assert_eq!(config.max_memory_bytes, 512 << 20);
}

#[test]
fn a_worker_starts_at_the_least_of_everything() {
    let mut worker = numbers("minimum");
    worker["resources"] = json!({"limits": {"memory": "32Mi"}});
    let config = starts(json!({"nats": {"url": "nats://nats:4222"}, "worker": worker}));
    assert_eq!((config.cpu_pool_size, config.io_pool_size, config.max_memory_bytes), (1, 1, 16 << 20));
    worker["limits"] = json!({});
    assert_eq!(starts(json!({"nats": {"url": "nats://nats:4222"}, "worker": worker})).max_memory_bytes, 16 << 20);
}

#[test]
fn a_worker_starts_at_the_most_of_everything() {
    let mut worker = numbers("maximum");
    worker["resources"] = json!({"limits": {"memory": "4Ti"}});
    worker["sandbox"] = json!(true);
    worker["filesystem"] = json!({
        "roots": items("worker.filesystem.roots", |index| format!("/data-{index}/{}", "x".repeat(110)))
            .into_iter()
            .map(|path| json!({"path": path}))
            .collect::<Vec<_>>(),
    });
    worker["egress"] = json!({
        "policy": "PublicOnly",
        "allow": items("worker.egress.allow", |index| match index % 4 {
            0 => format!("10.{index}.0.0/16:443"),
            1 => format!("[fd00:{index}::/32]:8443"),
            2 => format!("*.zone-{index}.example.com:443"),
            _ => format!("host-{index}.example.com"),
        }),
        "deny": items("worker.egress.deny", |index| format!("192.0.2.{index}")),
    });
    let secret = json!({"name": "nats", "key": "some.pem"});
    let config = starts(json!({
        "nats": {
            "url": format!("tls://{}.example.com:4222", "n".repeat(60)),
            "subject": "s".repeat(200),
            "queueGroup": "q".repeat(100),
            "credentialsSecretRef": secret,
            "tls": {"caSecretRef": secret, "certSecretRef": secret, "keySecretRef": secret},
        },
        "worker": worker,
        "observability": {"otlpEndpoint": "http://otel-collector.observability:4318"},
    }));
    assert_eq!((config.fs_roots.len(), config.egress_allow.len(), config.egress_deny.len()), (16, 100, 100));
    assert!(config.nats_tls_identity.is_some() && config.otlp_endpoint.is_some());
}
