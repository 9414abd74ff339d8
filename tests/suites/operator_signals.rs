//! What the operator hears from a real broker over time, with Secrets from a stand-in for the API server: numbers that
//! move and come to rest, and credentials and certificates that are replaced while both programs run.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_nats::ConnectOptions;
use async_nats::jetstream::consumer::{Consumer, pull};
use async_nats::jetstream::{self, Context};
use axum::extract::State;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use beamline_crds::WorkerPool;
use beamline_operator::broker::{Brokers, Gate};
use beamline_operator::error::BrokerError;
use beamline_operator::memory::Memory;
use beamline_operator::pool::{ValidPool, validate};
use beamline_operator::scale::as_written;
use beamline_operator::signals::{Readable, Reading, Route, Signals};
use beamline_operator::streams::Neighbours;
use beamline_operator::surroundings::Lookout;
use beamline_operator::watched::Watched;
use beamline_tests::nats::NatsServer;
use beamline_tests::process::free_port;
use beamline_tests::trust::{Accounts, Certificate};
use beamline_tests::wait::{SOON, within};
use beamline_tests::worker::{Worker, get};
use futures::StreamExt;
use futures::channel::mpsc::UnboundedReceiver;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::reflector::ObjectRef;
use kube::runtime::{reflector, watcher};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

/// Keys of the Secret `nats`.
type Secret = Arc<Mutex<HashMap<String, String>>>;

/// Answers every request with the Secret.
async fn kubernetes(secret: Secret) -> kube::Client {
    async fn answer(State(secret): State<Secret>) -> String {
        let data: HashMap<_, _> =
            secret.lock().unwrap().iter().map(|(key, value)| (key.clone(), BASE64_STANDARD.encode(value))).collect();
        let metadata = json!({"name": "nats", "namespace": "flows"});
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data}).to_string()
    }
    let _ = rustls::crypto::ring::default_provider().install_default();
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let app = axum::Router::new().fallback(answer).with_state(secret);
    tokio::spawn(async move { axum::serve(listener, app).await });
    kube::Config::new(format!("http://{address}").parse().expect("a URL")).try_into().expect("a client")
}

/// The part of an operator that listens, following one pool.
struct Listener {
    signals: Arc<Signals>,
    changes: UnboundedReceiver<ObjectRef<Watched>>,
    cache: reflector::store::Writer<Watched>,
    pods: reflector::store::Writer<Pod>,
}

impl Listener {
    /// At brokers on this host.
    async fn follow(spec: Value, secret: Secret) -> Self {
        Self::allowed(&["127.0.0.0/8"], spec, secret).await
    }

    async fn allowed(allowed: &[&str], spec: Value, secret: Secret) -> Self {
        let (pools, cache) = reflector::store::<Watched>();
        let neighbours = Neighbours::new(pools.clone(), "here".to_owned(), None);
        let kubernetes = kubernetes(secret).await;
        let lookout = Arc::new(Lookout::new(kubernetes.clone(), Some("192.0.2.1".to_owned()), None));
        let gate = Gate::new(lookout, allowed.iter().map(|net| net.parse().expect("a network")).collect());
        let (known_pods, pods) = reflector::store();
        let brokers = Brokers::new(kubernetes, gate, known_pods);
        let memory = Arc::new(Memory::of(pools.clone()));
        let (signals, changes) = Signals::new(brokers, pools, neighbours, memory);
        let mut listener = Self { signals, changes, cache, pods };
        listener.also("default", spec);
        listener
    }

    /// Follows another pool, or one as it is now.
    fn also(&mut self, name: &str, spec: Value) {
        self.also_with(name, spec, json!({}));
    }

    fn also_with(&mut self, name: &str, spec: Value, status: Value) {
        let stored = json!({
            "apiVersion": "beamline.dev/v1alpha1",
            "kind": "WorkerPool",
            "metadata": {"name": name, "namespace": "flows", "uid": name, "generation": 1},
            "spec": spec,
            "status": status,
        });
        let valid = Self::valid(&stored);
        self.cache.apply_watcher_event(&watcher::Event::Apply(serde_json::from_value(stored).expect("a WorkerPool")));
        self.signals.follow(&valid, &as_written(&valid));
    }

    /// A pod of the pool `default`.
    fn has_pod(&mut self, name: &str) {
        let labels =
            json!({"beamline.dev/pool": "default", "beamline.dev/class": "general", "pod-template-hash": "5c9"});
        let owner = json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "default-5c9", "uid": "1", "controller": true});
        let metadata = json!({"name": name, "namespace": "flows", "labels": labels, "ownerReferences": [owner]});
        let pod = serde_json::from_value(json!({"metadata": metadata})).expect("a Pod");
        self.pods.apply_watcher_event(&watcher::Event::Apply(pod));
    }

    fn valid(stored: &Value) -> ValidPool {
        let pool: WorkerPool = serde_json::from_value(stored.clone()).expect("a WorkerPool");
        validate(&pool, "beamline:1").expect("a valid pool")
    }

    /// Whether the pool that asks for this much still has work for workers with GPUs.
    fn needs_gpus_still(&self, spec: &Value) -> bool {
        let metadata = json!({"name": "default", "namespace": "flows", "uid": "default", "generation": 1});
        let kind =
            json!({"apiVersion": "beamline.dev/v1alpha1", "kind": "WorkerPool", "metadata": metadata, "spec": spec});
        self.signals.needs_gpus_still(&Self::valid(&kind))
    }

    fn reading(&self) -> Reading {
        self.reading_of("default")
    }

    fn reading_of(&self, name: &str) -> Reading {
        self.signals.reading(&ObjectRef::new(name).within("flows"))
    }

    async fn hears(&self, what: &str, is_it: impl Fn(&Reading) -> bool) -> Reading {
        within(SOON * 2, what, async || Some(self.reading()).filter(|reading| is_it(reading))).await
    }

    /// Waits until nothing has changed for this long; how often something had.
    async fn comes_to_rest(&mut self, quiet: Duration) -> usize {
        let mut changes = 0;
        let rest = async {
            while tokio::time::timeout(quiet, self.changes.next()).await.is_ok() {
                changes += 1;
            }
        };
        tokio::time::timeout(SOON * 6, rest).await.expect("the reading comes to rest");
        changes
    }
}

async fn publish(jetstream: &Context, subject: &str, count: usize) {
    for _ in 0..count {
        let stored = jetstream.publish(subject.to_owned(), "{}".into()).await.expect("sent");
        stored.await.expect("stored");
    }
}

async fn settle(jetstream: &Context, group: &str, count: usize) {
    let stream = jetstream.get_stream("CAF_EXEC_ASSIGN").await.expect("the stream");
    let consumer: Consumer<pull::Config> = stream.get_consumer(group).await.expect("the consumer");
    let mut batch = consumer.fetch().max_messages(count).messages().await.expect("messages");
    while let Some(message) = batch.next().await {
        message.expect("a message").double_ack().await.expect("settled");
    }
}

fn rate(shown: Option<&String>) -> f64 {
    shown.and_then(|rate| rate.parse().ok()).unwrap_or(-1.0)
}

#[tokio::test]
async fn the_numbers_are_those_of_the_stream_and_come_to_rest_with_it() {
    let nats = NatsServer::start();
    let spec = json!({"nats": {"url": nats.url()}, "gpu": {"replicas": 1}});
    let mut operator = Listener::follow(spec, Secret::default()).await;
    let reading = operator
        .hears("rates are known", |it| it.queue.as_ref().is_some_and(|it| it.arrivals_per_second.is_some()))
        .await;
    assert_eq!((reading.readable, reading.streams), (Some(Ok(Readable::Own)), Some(Ok(vec![]))));
    operator.comes_to_rest(Duration::from_secs(7)).await;
    let queue = operator.reading().queue.expect("a queue");
    assert_eq!(
        (queue.arrivals_per_second.as_deref(), queue.completions_per_second.as_deref()),
        (Some("0.0"), Some("0.0"))
    );
    assert_eq!((queue.depth, queue.drain_eta_seconds, queue.oldest_since), (0, None, None));

    let jetstream = jetstream::new(async_nats::connect(nats.url()).await.expect("a connection"));
    publish(&jetstream, "caf.exec.assign.v1", 200).await;
    // What is on the route arrived there, and not here.
    publish(&jetstream, "caf.exec.route.gpu.v1", 100).await;
    let queue =
        operator.hears("all wait", |it| it.queue.as_ref().is_some_and(|it| it.pending == 200)).await.queue.unwrap();
    let reading = operator.hears("all wait on the route", |it| it.route.is_some_and(|it| it.pending == 100)).await;
    assert_eq!(reading.route, Some(Route { pending: 100, in_flight: 0 }));
    assert!(queue.oldest_since.is_some() && queue.drain_eta_seconds.is_none(), "{queue:?}");

    settle(&jetstream, "caf-workers-gpu", 100).await;
    settle(&jetstream, "caf-workers", 150).await;
    let reading = operator.hears("most have ended", |it| it.queue.as_ref().is_some_and(|it| it.depth == 50)).await;
    let queue = reading.queue.expect("a queue");
    let (arrivals, completions) =
        (rate(queue.arrivals_per_second.as_ref()), rate(queue.completions_per_second.as_ref()));
    // Over the same time: 200 came and 150 went.
    assert!(arrivals > 0.0 && (completions / arrivals - 0.75).abs() < 0.1, "{queue:?}");
    let eta = queue.drain_eta_seconds.expect("it ends");
    assert!((eta as f64 - 50.0 / completions).abs() <= 1.0, "{queue:?}");

    settle(&jetstream, "caf-workers", 50).await;
    operator.hears("all have ended", |it| it.queue.as_ref().is_some_and(|it| it.depth == 0)).await;
    // Longer than rates stay when nothing moves.
    let changes = operator.comes_to_rest(Duration::from_secs(23)).await;
    let queue = operator.reading().queue.expect("a queue");
    assert_eq!(queue.completions_per_second.as_deref(), Some("0.0"), "{queue:?}");
    assert!(changes <= 10, "{changes} changes, most of them after the last of the work");
}

#[tokio::test]
async fn a_message_that_the_client_cannot_read_costs_a_connection_and_no_more() {
    let nats = NatsServer::start();
    let operator = Listener::follow(json!({"nats": {"url": nats.url()}}), Secret::default()).await;
    operator.hears("the queue is read", |it| it.queue.is_some()).await;
    // The client panics over it.
    let headers = b"NATS/1.0\r\nX-Name: Jos\re\r\n\r\n";
    nats.publish_with_headers("caf.worker.report.v1.w1", headers, &json!({})).await;
    let jetstream = jetstream::new(async_nats::connect(nats.url()).await.expect("a connection"));
    publish(&jetstream, "caf.exec.assign.v1", 7).await;
    operator.hears("the queue is read again", |it| it.queue.as_ref().is_some_and(|it| it.pending == 7)).await;
}

#[tokio::test]
async fn gpus_are_needed_while_work_waits_for_them_and_nobody_else_takes_it() {
    let nats = NatsServer::start();
    let without = json!({"nats": {"url": nats.url()}});
    let with = json!({"nats": {"url": nats.url()}, "gpu": {"replicas": 1}});
    let mut operator = Listener::follow(with.clone(), Secret::default()).await;
    assert!(operator.needs_gpus_still(&without), "the broker has not been asked yet");
    operator.hears("there is a route", |it| it.route.is_some()).await;
    assert!(!operator.needs_gpus_still(&without), "nothing waits");
    let jetstream = jetstream::new(async_nats::connect(nats.url()).await.expect("a connection"));
    publish(&jetstream, "caf.exec.route.gpu.v1", 1).await;
    operator.hears("something waits", |it| it.route.is_some_and(|it| it.pending == 1)).await;
    assert!(operator.needs_gpus_still(&without));
    assert!(!operator.needs_gpus_still(&with), "a pool that asks for GPUs has them");
    let slots = json!({"nats": {"url": nats.url()}, "worker": {"pools": {"gpu": 1}}});
    assert!(!operator.needs_gpus_still(&slots), "its other workers take it");

    let ready =
        |count: i32| json!({"gpu": {"replicas": 1, "readyReplicas": count, "desiredReplicas": 1, "limitedBy": "None"}});
    for (count, needed) in [(0, true), (1, false)] {
        operator.also_with("second", with.clone(), ready(count));
        assert_eq!(operator.needs_gpus_still(&without), needed, "another pool has {count} ready");
    }
    operator.also_with("second", json!({"nats": {"url": "nats://elsewhere:4222"}, "gpu": {}}), ready(1));
    assert!(operator.needs_gpus_still(&without), "another pool has some at another broker");
    settle(&jetstream, "caf-workers-gpu", 1).await;
    operator.hears("nothing waits", |it| it.route.is_some_and(|it| it.pending + it.in_flight == 0)).await;
    assert!(!operator.needs_gpus_still(&without));
    drop(nats);
    operator.hears("the broker is away", |it| it.readable.as_ref().is_some_and(Result::is_err)).await;
    assert!(operator.needs_gpus_still(&without), "what cannot be read may hold some");
}

#[tokio::test]
async fn a_worker_is_heard_and_told_and_has_stopped_when_its_last_pull_has_ended() {
    let nats = NatsServer::start();
    let mut operator = Listener::follow(json!({"nats": {"url": nats.url()}}), Secret::default()).await;
    operator.has_pod("worker-1");
    operator.hears("it is connected", |it| it.readable == Some(Ok(Readable::Own))).await;
    // Neither of them is a pod of the pool.
    let stranger = Worker::named("stranger").flag(format!("--nats-url={}", nats.url()));
    let stranger = stranger.flag("--nats-create-streams=false").flag("--pool=flows/default").spawn();
    let client = async_nats::connect(nats.url()).await.expect("a connection");
    let invented = |number: usize| {
        let slots = json!({"cpu": 1, "gpu": 0, "io": 1});
        json!({"version": "1", "worker": format!("invented-{number}"), "pool": "flows/default", "class": "general",
            "slots": slots, "busy": slots, "running": 1, "waiting": 1, "pulling": true, "finished": 0, "work_ms": 0,
            "started_at": 1})
        .to_string()
    };
    for number in 0..1000 {
        let subject = format!("caf.worker.report.v1.invented-{number}");
        client.publish(subject, invented(number).into()).await.expect("sent");
    }
    client.flush().await.expect("sent");
    let mut worker = Worker::named("worker-1")
        .flag(format!("--nats-url={}", nats.url()))
        .flag("--nats-create-streams=false")
        .flag("--pool=flows/default")
        .spawn();
    worker.ready().await;
    let heard = |told: bool, stopped: bool| {
        move |it: &Reading| {
            let known = it.general.workers.iter().map(|it| (it.name.as_str(), it.is_told_to_stop, it.has_stopped));
            known.eq([("worker-1", told, stopped)])
        }
    };
    operator.hears("it is heard", heard(false, false)).await;
    let pool = ObjectRef::new("default").within("flows");
    operator.signals.tell(&pool, &["worker-1".to_owned()], false).await;
    operator.hears("it was told", heard(true, false)).await;
    operator.hears("it has stopped", heard(true, true)).await;
    // It would take what comes.
    drop(stranger);

    let jetstream = jetstream::new(async_nats::connect(nats.url()).await.expect("a connection"));
    publish(&jetstream, "caf.exec.assign.v1", 1).await;
    operator.hears("one waits", |it| it.queue.as_ref().is_some_and(|queue| queue.pending == 1)).await;
    operator.signals.tell(&pool, &["worker-1".to_owned()], true).await;
    operator.hears("it goes on", heard(false, false)).await;
    operator.hears("it is done", |it| it.queue.as_ref().is_some_and(|queue| queue.depth == 0)).await;
    worker.kill();
    operator.hears("it is forgotten", |it| it.general.workers.is_empty()).await;
}

#[tokio::test]
async fn a_deadline_that_has_passed_and_an_answer_are_each_a_waiting_message() {
    let nats = NatsServer::start();
    let operator = Listener::follow(json!({"nats": {"url": nats.url()}}), Secret::default()).await;
    operator.hears("nothing is due", |it| it.due == Some(0)).await;
    let jetstream = jetstream::new(async_nats::connect(nats.url()).await.expect("a connection"));
    let request = |pool: &str, seconds: i64| {
        let expires_at = jiff::Timestamp::now().as_millisecond() + seconds * 1000;
        json!({"version": "1", "pool": pool, "expires_at": expires_at}).to_string()
    };
    let open = jetstream.get_key_value("caf-approvals").await.expect("the bucket");
    open.put("acme.due", request("flows/default", 1).into()).await.expect("stored");
    open.put("acme.open", request("flows/default", 3600).into()).await.expect("stored");
    open.put("acme.theirs", request("flows/other", -1).into()).await.expect("stored");
    operator.hears("one deadline has passed", |it| it.due == Some(1)).await;
    let answer = r#"{"version": "1", "assignment_id": "a", "tenant_id": "acme", "approver": "ann", "approved": true}"#;
    // Nobody answers, since there is no worker.
    jetstream.publish("caf.human.response.v1", answer.into()).await.expect("sent");
    operator.hears("an answer waits too", |it| it.due == Some(2)).await;
    open.delete("acme.due").await.expect("removed");
    operator.hears("only the answer is left", |it| it.due == Some(1)).await;
}

// What tenants use, and what they have parked.

#[tokio::test]
async fn what_is_parked_may_run_when_its_tenant_has_a_budget_again() {
    let nats = NatsServer::start();
    // As long as a window can be: none ends meanwhile.
    let quotas = json!({"executions": 10, "window": "744h", "concurrent": 8});
    let spec = json!({"nats": {"url": nats.url()}, "tenants": {"defaults": {"onExceeded": "Defer", "quotas": quotas}}});
    let operator = Listener::follow(spec, Secret::default()).await;
    let tenants = |it: &Reading| it.tenants.clone().unwrap_or_default();
    operator.hears("nothing is parked", |it| tenants(it).parked == Some(0)).await;
    let jetstream = jetstream::new(async_nats::connect(nats.url()).await.expect("a connection"));
    let accounts = jetstream.get_key_value("caf-quota").await.expect("the bucket");
    let stream = jetstream::stream::Config {
        name: "CAF_EXEC_PARKED".to_owned(),
        subjects: vec!["caf.exec.parked.v1.*".to_owned()],
        retention: jetstream::stream::RetentionPolicy::WorkQueue,
        ..Default::default()
    };
    let stream = jetstream.get_or_create_stream(stream).await.expect("the stream");
    let (length, now) = (744 * 3600 * 1000, jiff::Timestamp::now().as_millisecond());
    let use_up = async |windows_ago: i64, executions: u32| {
        let start = now - now % length - windows_ago * length;
        let account = json!({"version": "1", "window_start": start, "window_ms": length, "executions": executions,
            "cpu_time_ms": 12});
        accounts.put("flows=2Fdefault.acme=2Ecorp", account.to_string().into()).await.expect("stored");
    };

    use_up(0, 10).await;
    for subject in ["caf.exec.parked.v1.acme=2Ecorp"; 20] {
        jetstream.publish(subject, "{}".into()).await.expect("sent").await.expect("stored");
    }
    operator.hears("it is parked", |it| tenants(it).parked == Some(20)).await;
    operator
        .hears("its budget is used up", |it| {
            tenants(it).busiest.first().is_some_and(|one| {
                let exceeded = one.exceeded.as_ref().map(|exceeded| exceeded.budget.as_str());
                (one.id.as_str(), one.executions_used, one.parked, exceeded)
                    == ("acme.corp", Some(10), 20, Some("executions"))
            })
        })
        .await;
    operator.hears("none may run", |it| tenants(it).general.runnable == 0).await;
    use_up(0, 7).await;
    operator.hears("units were given back", |it| tenants(it).general.runnable == 3).await;
    let slots = json!({"version": "1", "leases": {"worker-1": {"slots": 6, "until": now + 3_600_000}}});
    accounts.put("flows=2Fdefault.acme=2Ecorp.concurrent", slots.to_string().into()).await.expect("stored");
    operator.hears("most slots are taken", |it| tenants(it).general.runnable == 2).await;
    use_up(1, 10).await;
    accounts
        .put("flows=2Fdefault.acme=2Ecorp.concurrent", r#"{"version": "1", "leases": {}}"#.into())
        .await
        .expect("stored");
    operator.hears("the window has turned", |it| tenants(it).general.runnable == 8).await;

    let consumer = pull::Config {
        durable_name: Some("acme=2Ecorp".to_owned()),
        filter_subject: "caf.exec.parked.v1.acme=2Ecorp".to_owned(),
        ..pull::Config::default()
    };
    let consumer: Consumer<pull::Config> = stream.create_consumer(consumer).await.expect("the consumer");
    let mut messages = consumer.fetch().max_messages(5).messages().await.expect("messages");
    let held = messages.next().await.expect("one").expect("one");
    operator.hears("five are held", |it| (tenants(it).general.in_flight, tenants(it).parked) == (5, Some(15))).await;
    drop(held);

    jetstream.publish("caf.exec.parked.gpu.v1.globex", "{}".into()).await.expect("sent").await.expect("stored");
    operator
        .hears("it waits for GPU slots", |it| (tenants(it).gpu.runnable, tenants(it).parked) == (1, Some(16)))
        .await;
}

// A pool that leads the operator astray.

#[tokio::test]
async fn a_pool_does_not_send_the_operator_to_its_own_host_or_to_the_api_server() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    for (host, what) in [
        ("127.0.0.1", "127.0.0.1, a loopback address"),
        ("localhost", "1, a loopback address"),
        ("[::ffff:127.0.0.1]", "127.0.0.1, a loopback address"),
        ("169.254.169.254", "169.254.169.254, a link-local address"),
        ("0.0.0.0", "0.0.0.0, no address of a host"),
        ("192.0.2.1", "192.0.2.1, the API server's"),
    ] {
        let url = format!("nats://{host}:{port}");
        let operator = Listener::allowed(&[], json!({"nats": {"url": url}}), Secret::default()).await;
        let heard = operator.hears("it is refused", |it| it.readable.is_some()).await;
        let Some(Err(refused)) = heard.readable else { panic!("{host} is connected to") };
        assert_eq!(refused.reason(), "NatsUnreachable");
        assert!(refused.to_string().starts_with(&format!("nats.url {url} leads to ")), "{refused}");
        assert!(refused.to_string().contains(what), "{refused}");
    }
    let came = tokio::time::timeout(Duration::from_millis(100), listener.accept()).await;
    assert!(came.is_err(), "somebody has connected");
}

#[tokio::test]
async fn a_server_that_lies_leads_nowhere_else_and_holds_up_nobody() {
    let elsewhere = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let liar = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let [astray, url] =
        [&elsewhere, &liar].map(|it| format!("127.0.0.1:{}", it.local_addr().expect("an address").port()));
    tokio::spawn(lie(liar, astray));
    let nats = NatsServer::start();
    let spec = json!({"nats": {"url": format!("nats://{url}")}});
    let mut operator = Listener::follow(spec, Secret::default()).await;
    operator.also("honest", json!({"nats": {"url": nats.url()}}));
    let reading = operator.hears("no answer is an error", |it| it.readable.is_some()).await;
    assert!(reading.readable.is_some_and(|it| it.is_err()));
    let readable = async || (operator.reading_of("honest").readable == Some(Ok(Readable::Own))).then_some(());
    within(SOON, "another pool is looked after", readable).await;
    let came = tokio::time::timeout(Duration::from_secs(6), elsewhere.accept()).await;
    assert!(came.is_err(), "the operator has followed the server's word");
}

/// Greets as a server does, says that there is another one, answers no request and cuts what it has let in.
async fn lie(listener: TcpListener, astray: String) {
    while let Ok((mut client, _)) = listener.accept().await {
        let info = json!({
            "server_id": "L", "server_name": "liar", "version": "2.12.0", "host": "127.0.0.1", "port": 4222, "headers": true,
            "max_payload": 1_048_576, "proto": 1, "jetstream": true, "connect_urls": [astray],
        });
        let _ = client.write_all(format!("INFO {info}\r\n").as_bytes()).await;
        let _ = client.read(&mut [0; 4096]).await;
        let _ = client.write_all(b"PONG\r\n").await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

#[tokio::test]
async fn a_core_queue_group_needs_no_jetstream() {
    let nats = NatsServer::without_jetstream();
    let spec = json!({"nats": {"url": nats.url(), "delivery": "Core"}});
    let operator = Listener::follow(spec, Secret::default()).await;
    let reading = operator.hears("the server answers", |reading| reading.readable.is_some()).await;
    assert_eq!(
        (reading.readable, reading.streams, reading.queue),
        (Some(Ok(Readable::NoQueue)), Some(Ok(vec![])), None)
    );
}

#[tokio::test]
async fn all_pools_at_a_broker_are_asked_about_on_one_connection() {
    let monitoring = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
    let nats = NatsServer::with(&format!("http: \"{monitoring}\"\n"));
    let mut operator = Listener::follow(json!({"nats": {"url": nats.url()}}), Secret::default()).await;
    for name in ["second", "third"] {
        operator.also(name, json!({"nats": {"url": nats.url(), "subject": format!("work.{name}")}}));
    }
    for name in ["default", "second", "third"] {
        let is_read = async || (operator.reading_of(name).readable == Some(Ok(Readable::Own))).then_some(());
        within(SOON * 2, name, is_read).await;
    }
    let (_, connections) = get(monitoring, "/connz").await.expect("the broker answers");
    let connections: Value = serde_json::from_str(&connections).expect("JSON");
    assert_eq!(connections["total"], 1, "{connections:#}");
}

#[tokio::test]
async fn pools_on_one_queue_say_so_and_have_room_for_all_of_their_workers() {
    let nats = NatsServer::start();
    let mut operator = Listener::follow(json!({"replicas": 3, "nats": {"url": nats.url()}}), Secret::default()).await;
    operator.hears("it is alone", |it| it.readable == Some(Ok(Readable::Own))).await;
    operator.also("second", json!({"replicas": 5, "nats": {"url": nats.url()}}));
    for (name, other) in [("default", "flows/second"), ("second", "flows/default")] {
        let shared = Some(Ok(Readable::Shared(vec![other.to_owned()])));
        let knows = async || (operator.reading_of(name).readable == shared).then_some(());
        within(SOON * 2, &format!("{name} knows of {other}"), knows).await;
    }
    let jetstream = jetstream::new(async_nats::connect(nats.url()).await.expect("a connection"));
    let stream = jetstream.get_stream("CAF_EXEC_ASSIGN").await.expect("the stream");
    within(SOON * 2, "there is room for the workers of both", async || {
        let consumer = stream.consumer_info("caf-workers").await.expect("the consumer");
        (consumer.config.max_ack_pending == (4 + 6) * 1048).then_some(())
    })
    .await;

    operator.also("third", json!({"nats": {"url": nats.url(), "queueGroup": "others"}}));
    let taken = within(SOON * 2, "the third is refused", async || operator.reading_of("third").streams?.err()).await;
    assert_eq!(
        taken.to_string(),
        "nats.subject caf.exec.assign.v1 is already taken by nats.queueGroup caf-workers of pool flows/default; \
         use that group, or another subject"
    );
}

// Rotation.

/// A new authority's certificate, and lines of a server that shows one signed by it.
fn certified(directory: &Path, name: &str) -> (String, String) {
    let Certificate { authority, certificate, key } = Certificate::of(&["127.0.0.1", "localhost"]);
    let (cert_file, key_file) = (directory.join(format!("{name}.crt")), directory.join(format!("{name}.key")));
    std::fs::write(&cert_file, certificate).expect("a file");
    std::fs::write(&key_file, key).expect("a file");
    (authority, format!("tls {{ cert_file: {cert_file:?}, key_file: {key_file:?} }}\n"))
}

async fn connect(nats: &NatsServer, creds: &str, ca: &Path) -> Result<async_nats::Client, async_nats::ConnectError> {
    let options = ConnectOptions::new().credentials(creds).expect("credentials").require_tls(true);
    options.add_root_certificates(ca.to_path_buf()).connect(nats.url()).await
}

#[tokio::test]
async fn what_is_wrong_with_a_secret_is_said_with_the_field_that_names_it() {
    let key = |key: &str| json!({"name": "nats", "key": key});
    let own = json!({"credentialsSecretRef": key("worker.creds"), "operatorCredentialsSecretRef": key("none")});
    for (mut nats, said) in [
        (json!({"credentialsSecretRef": key("none")}), "nats.credentialsSecretRef: Secret `nats` has no key `none`"),
        (own, "nats.operatorCredentialsSecretRef: Secret `nats` has no key `none`"),
        (json!({"credentialsSecretRef": key("text")}), "nats.credentialsSecretRef: not a .creds file: "),
        (json!({"tls": {"caSecretRef": key("none")}}), "nats.tls.caSecretRef: Secret `nats` has no key `none`"),
        (json!({"tls": {"caSecretRef": key("text")}}), "nats.tls.caSecretRef: no usable PEM certificate"),
    ] {
        nats["url"] = json!("nats://127.0.0.1:4222");
        let secret = Secret::default();
        secret.lock().unwrap().insert("text".to_owned(), "nonsense".to_owned());
        let operator = Listener::follow(json!({"nats": nats}), secret).await;
        let is_said = |reading: &Reading| {
            let queue = reading.readable.as_ref().and_then(|queue| queue.as_ref().err());
            let streams = reading.streams.as_ref().and_then(|streams| streams.as_ref().err());
            let is_it = |error: &BrokerError| error.reason() == "SecretUnusable" && error.to_string().starts_with(said);
            queue.is_some_and(is_it) && streams.is_some_and(is_it)
        };
        operator.hears(said, is_said).await;
    }
}

#[tokio::test]
async fn rotated_credentials_and_certificates_need_no_restart() {
    let (directory, accounts) = (tempfile::tempdir().expect("a directory"), Accounts::new());
    let (creds_file, ca_file) = (directory.path().join("nats.creds"), directory.path().join("ca.crt"));
    let secret = Secret::default();
    let bring = |creds: &str, ca: &str| {
        for (file, key, text) in [(&creds_file, "worker.creds", creds), (&ca_file, "ca.crt", ca)] {
            // As the kubelet does it: a reader sees the one or the other.
            std::fs::write(file.with_extension("new"), text).expect("a file");
            std::fs::rename(file.with_extension("new"), file).expect("a file");
            secret.lock().unwrap().insert(key.to_owned(), text.to_owned());
        }
    };
    let ((first, first_user), (second, _)) = (accounts.user(), accounts.user());
    let (first_ca, first_tls) = certified(directory.path(), "first");
    let (second_ca, second_tls) = certified(directory.path(), "second");
    bring(&first, &first_ca);
    let mut nats = NatsServer::with(&(accounts.settings(&[]) + &first_tls));

    let key = |key: &str| json!({"name": "nats", "key": key});
    let spec = json!({"nats": {
        "url": nats.url(),
        "credentialsSecretRef": key("worker.creds"),
        "tls": {"caSecretRef": key("ca.crt")},
    }});
    let operator = Listener::follow(spec, Arc::clone(&secret)).await;
    let is_fine = |reading: &Reading| matches!((&reading.readable, &reading.streams), (Some(Ok(_)), Some(Ok(_))));
    operator.hears("the operator is connected", is_fine).await;
    let mut worker = Worker::named("worker-1")
        .flag(format!("--nats-url={}", nats.url()))
        .flag("--nats-create-streams=false")
        .flag(format!("--nats-creds={}", creds_file.display()))
        .flag(format!("--nats-tls-ca={}", ca_file.display()))
        .spawn();
    worker.ready().await;

    bring(&second, &second_ca);
    nats.restart_with(&(accounts.settings(&[&first_user]) + &second_tls));
    assert!(connect(&nats, &first, &ca_file).await.is_err(), "the old credentials are good for nothing");
    let client = connect(&nats, &second, &ca_file).await.expect("the new ones are");
    // An answer proves a connection to this server: nobody was connected to it before.
    within(SOON, "the worker is connected again", async || {
        let request = client.request("caf.worker.control.v1.worker-1", r#"{"pull": true}"#.into());
        tokio::time::timeout(Duration::from_secs(2), request).await.ok()?.ok()
    })
    .await;
    worker.ready().await;
    assert!(worker.is_running());
    let jetstream = jetstream::new(client);
    jetstream.delete_stream("KV_caf-answers").await.expect("deleted");
    within(SOON * 3, "the operator is connected again and makes what is missing", async || {
        jetstream.get_stream("KV_caf-answers").await.ok()
    })
    .await;
    operator.hears("the operator is fine", is_fine).await;
}
