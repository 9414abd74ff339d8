//! What the operator makes of a real broker: streams, consumers and what it says about them. No Kubernetes: pools are
//! put where its watch would put them.
#![expect(clippy::expect_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]

use std::collections::HashMap;
use std::time::Duration;

use async_nats::jetstream::consumer::{Consumer, pull};
use async_nats::jetstream::context::{ConsumerInfoErrorKind, Context};
use async_nats::jetstream::stream::{Config, Info, StorageType};
use beamline_crds::WorkerPool;
use beamline_operator::error::BrokerError;
use beamline_operator::pool::validate;
use beamline_operator::scale::as_written;
use beamline_operator::streams::{self, Demand, Neighbours, Refusals, Remark};
use beamline_operator::watched::Watched;
use beamline_tests::nats::NatsServer;
use futures::StreamExt;
use kube::ResourceExt;
use kube::runtime::reflector::store::Writer;
use kube::runtime::{reflector, watcher};
use serde_json::{Value, json};

const ASSIGN: &str = "CAF_EXEC_ASSIGN";
const RESULT: &str = "CAF_EXEC_RESULT";
/// Streams of a pool, and buckets.
const STREAMS: usize = 10;
const ROUTE: &str = "caf.exec.route.gpu.v1";
const ROUTE_GROUP: &str = "caf-workers-gpu";

/// Pools that an operator sees, and the broker that they share.
struct Operator {
    cache: Writer<Watched>,
    neighbours: Neighbours,
    jetstream: Context,
    refusals: Refusals,
    url: String,
}

impl Operator {
    async fn at(nats: &NatsServer) -> Self {
        Self::of_cluster("here", nats).await
    }

    async fn of_cluster(cluster: &str, nats: &NatsServer) -> Self {
        let (pools, cache) = reflector::store();
        let client = async_nats::connect(nats.url()).await.expect("a connection");
        Self {
            cache,
            neighbours: Neighbours::new(pools, cluster.to_owned(), None),
            jetstream: async_nats::jetstream::new(client),
            refusals: Refusals::default(),
            url: nats.url(),
        }
    }

    fn stored(&self, name: &str, spec: &Value) -> Value {
        let mut spec = spec.clone();
        if spec["nats"]["url"].is_null() {
            spec["nats"]["url"] = json!(self.url);
        }
        json!({
            "apiVersion": "beamline.dev/v1alpha1",
            "kind": "WorkerPool",
            "metadata": {"name": name, "namespace": "flows", "uid": format!("uid-{name}"), "generation": 1},
            "spec": spec,
        })
    }

    /// Makes a pool known, or changes it.
    fn has(&mut self, name: &str, spec: &Value) {
        let pool = serde_json::from_value(self.stored(name, spec)).expect("a WorkerPool");
        self.cache.apply_watcher_event(&watcher::Event::Apply(pool));
    }

    fn loses(&mut self, name: &str) {
        let pool = serde_json::from_value(self.stored(name, &json!({}))).expect("a WorkerPool");
        self.cache.apply_watcher_event(&watcher::Event::Delete(pool));
    }

    /// One look at the streams for a pool, after making it known.
    async fn ensures(&mut self, name: &str, spec: Value) -> Result<Vec<Remark>, BrokerError> {
        self.has(name, &spec);
        let demand = self.demand(name, &spec);
        streams::ensure(&self.jetstream, &demand, &self.neighbours, &mut self.refusals).await
    }

    fn demand(&self, name: &str, spec: &Value) -> Demand {
        let stored: WorkerPool = serde_json::from_value(self.stored(name, spec)).expect("a WorkerPool");
        let pool = validate(&stored, "beamline:1").expect("a valid pool");
        let max_ack_pending = streams::max_ack_pending(&pool, &as_written(&pool));
        Demand {
            namespace: stored.namespace().expect("a namespace"),
            name: name.to_owned(),
            nats: pool.nats,
            max_ack_pending,
            limits: pool.limits,
        }
    }

    async fn stream(&self, name: &str) -> Info {
        self.jetstream.get_stream(name).await.expect("the stream").cached_info().clone()
    }

    async fn streams(&self) -> HashMap<String, Config> {
        self.jetstream
            .streams()
            .map(|info| info.expect("a stream").config)
            .map(|it| (it.name.clone(), it))
            .collect()
            .await
    }

    /// The most deliveries that a consumer of the intake's stream may have open, where it exists.
    async fn max_ack_pending(&self, group: &str) -> Option<i64> {
        let stream = self.jetstream.get_stream(ASSIGN).await.expect("the stream");
        match stream.consumer_info(group).await {
            Ok(info) => Some(info.config.max_ack_pending),
            Err(error) if error.kind() == ConsumerInfoErrorKind::NotFound => None,
            Err(error) => panic!("{error}"),
        }
    }

    async fn publish(&self, subject: &str) {
        let stored = self.jetstream.publish(subject.to_owned(), "{}".into()).await.expect("sent");
        stored.await.expect("stored");
    }

    /// Takes and settles all that waits for a consumer of the intake's stream.
    async fn drain(&self, group: &str) {
        let stream = self.jetstream.get_stream(ASSIGN).await.expect("the stream");
        let consumer: Consumer<pull::Config> = stream.get_consumer(group).await.expect("the consumer");
        let mut batch = consumer.fetch().max_messages(100).messages().await.expect("messages");
        while let Some(message) = batch.next().await {
            message.expect("a message").double_ack().await.expect("settled");
        }
    }
}

fn said(remarks: Result<Vec<Remark>, BrokerError>) -> Vec<String> {
    remarks.expect("the streams are in order").iter().map(Remark::to_string).collect()
}

// What is missing.

#[tokio::test]
async fn what_is_missing_is_made_for_the_pool_and_then_left_alone() {
    let nats = NatsServer::start();
    let mut operator = Operator::at(&nats).await;
    assert_eq!(operator.ensures("first", json!({"replicas": 3})).await, Ok(vec![]));
    let made = operator.streams().await;
    assert_eq!(made.len(), STREAMS, "{:?}", made.keys());
    for (name, stream) in &made {
        assert_eq!(stream.metadata["beamline.dev/managed-by"], "flows/first", "{name}");
    }
    assert_eq!(operator.max_ack_pending("caf-workers").await, Some(4 * 1048));
    assert_eq!(operator.ensures("first", json!({"replicas": 3})).await, Ok(vec![]));
    assert_eq!(operator.streams().await, made);
}

#[tokio::test]
async fn what_was_deleted_by_hand_is_made_again() {
    let nats = NatsServer::start();
    let mut operator = Operator::at(&nats).await;
    operator.ensures("first", json!({})).await.expect("made");
    for name in [RESULT, "KV_caf-cancel"] {
        operator.jetstream.delete_stream(name).await.expect("deleted");
    }
    operator.jetstream.delete_consumer_from_stream("caf-workers", ASSIGN).await.expect("deleted");
    operator.ensures("first", json!({})).await.expect("made");
    assert_eq!(operator.streams().await.len(), STREAMS);
    assert!(operator.max_ack_pending("caf-workers").await.is_some());
}

#[tokio::test]
async fn an_operator_that_may_not_make_streams_says_what_is_missing() {
    let nats = NatsServer::start();
    let mut operator = Operator::at(&nats).await;
    let unmanaged = json!({"nats": {"streams": {"manage": false, "resultRetention": "2h"}}});
    let missing = operator.ensures("first", unmanaged.clone()).await.expect_err("nothing is there");
    assert_eq!(missing.reason(), "StreamMissing");
    assert!(operator.streams().await.is_empty());
    operator.ensures("second", json!({})).await.expect("made");
    assert_eq!(
        said(operator.ensures("first", unmanaged).await),
        ["stream CAF_EXEC_RESULT: max_age stays 1h, this pool says 2h: nats.streams.manage is false"]
    );
}

#[tokio::test]
async fn the_limit_of_open_deliveries_grows_with_the_pool_and_never_shrinks() {
    let nats = NatsServer::start();
    let mut operator = Operator::at(&nats).await;
    for (replicas, expected) in [(1, 2), (9, 10), (1, 10)] {
        operator.ensures("first", json!({"replicas": replicas})).await.expect("in order");
        assert_eq!(operator.max_ack_pending("caf-workers").await, Some(expected * 1048), "{replicas} replicas");
    }
}

#[tokio::test]
async fn another_group_on_the_same_subject_is_refused_and_named() {
    let nats = NatsServer::start();
    let mut operator = Operator::at(&nats).await;
    operator.ensures("first", json!({"nats": {"queueGroup": "a"}})).await.expect("made");
    let taken = operator.ensures("second", json!({"nats": {"queueGroup": "b"}})).await.expect_err("one of them only");
    assert_eq!(taken.reason(), "SubjectTaken");
    assert!(taken.to_string().contains("already taken by nats.queueGroup a"), "{taken}");
    let second = operator.demand("second", &json!({"nats": {"queueGroup": "b"}}));
    assert_eq!(operator.neighbours.holder(&second, "a").as_deref(), Some("flows/first"));
}

#[tokio::test]
async fn pools_that_share_a_queue_know_of_each_other() {
    let nats = NatsServer::start();
    let mut operator = Operator::at(&nats).await;
    for name in ["first", "second"] {
        operator.has(name, &json!({}));
    }
    operator.has("elsewhere", &json!({"nats": {"subject": "orders"}}));
    operator.has("other", &json!({"nats": {"queueGroup": "b"}}));
    let sharing = |name| operator.neighbours.sharing(&operator.demand(name, &json!({})));
    assert_eq!(
        (sharing("first"), sharing("second")),
        (vec!["flows/second".to_owned()], vec!["flows/first".to_owned()])
    );
}

// The GPU route.

fn with_gpus() -> Value {
    json!({"gpu": {"replicas": 3, "poolSize": 4}})
}

#[tokio::test]
async fn the_gpu_route_is_made_with_the_pool_and_sized_to_its_gpu_slots() {
    let nats = NatsServer::start();
    let mut operator = Operator::at(&nats).await;
    operator.ensures("first", json!({})).await.expect("in order");
    assert_eq!(operator.max_ack_pending(ROUTE_GROUP).await, None);
    operator.ensures("first", with_gpus()).await.expect("in order");
    assert_eq!(operator.max_ack_pending(ROUTE_GROUP).await, Some(4 * 1008));
}

#[tokio::test]
async fn a_route_that_no_pool_needs_goes_once_it_is_drained() {
    let nats = NatsServer::start();
    let mut operator = Operator::at(&nats).await;
    operator.ensures("first", with_gpus()).await.expect("in order");
    operator.publish(ROUTE).await;
    assert_eq!(
        said(operator.ensures("first", json!({})).await),
        [
            "work waits on caf.exec.route.gpu.v1 for GPU slots, and no pool has any: set spec.gpu again, or purge that subject"
        ]
    );
    assert!(operator.max_ack_pending(ROUTE_GROUP).await.is_some(), "something waits");
    operator.drain(ROUTE_GROUP).await;
    assert_eq!(operator.ensures("first", json!({})).await, Ok(vec![]));
    assert_eq!(operator.max_ack_pending(ROUTE_GROUP).await, None);
    assert!(operator.max_ack_pending("caf-workers").await.is_some());
}

#[tokio::test]
async fn a_route_stays_while_another_pool_or_a_worker_uses_it() {
    let nats = NatsServer::start();
    let mut operator = Operator::at(&nats).await;
    operator.ensures("first", with_gpus()).await.expect("in order");
    operator.has("second", &with_gpus());
    operator.ensures("first", json!({})).await.expect("in order");
    assert!(operator.max_ack_pending(ROUTE_GROUP).await.is_some(), "the second pool has GPU slots");

    operator.loses("second");
    let stream = operator.jetstream.get_stream(ASSIGN).await.expect("the stream");
    let consumer: Consumer<pull::Config> = stream.get_consumer(ROUTE_GROUP).await.expect("the route");
    let mut pulling = consumer.stream().max_messages_per_batch(1).messages().await.expect("a pull");
    let pull = tokio::spawn(async move { pulling.next().await.map(|_| ()) });
    beamline_tests::wait::until("a worker pulls", async || {
        stream.consumer_info(ROUTE_GROUP).await.expect("the route").num_waiting > 0
    })
    .await;
    operator.ensures("first", json!({})).await.expect("in order");
    assert!(operator.max_ack_pending(ROUTE_GROUP).await.is_some(), "somebody pulls from it");
    pull.abort();
}

/// What a pool with GPUs at this address asks for.
fn with_gpus_at(url: &str) -> Value {
    let mut spec = with_gpus();
    spec["nats"]["url"] = json!(url);
    spec
}

#[tokio::test]
async fn gpu_slots_at_another_broker_keep_no_route_and_hide_no_work() {
    let (nats, elsewhere) = (NatsServer::start(), NatsServer::start());
    let mut operator = Operator::at(&nats).await;
    operator.ensures("first", with_gpus()).await.expect("in order");
    let second = with_gpus_at(&elsewhere.url());
    operator.has("second", &second);
    operator.publish(ROUTE).await;
    assert_eq!(said(operator.ensures("first", json!({})).await).len(), 1, "work waits for slots that nobody has here");
    operator.drain(ROUTE_GROUP).await;
    operator.ensures("first", json!({})).await.expect("in order");
    assert!(operator.max_ack_pending(ROUTE_GROUP).await.is_some(), "it may be this broker by another name");

    let client = async_nats::connect(elsewhere.url()).await.expect("a connection");
    let jetstream = async_nats::jetstream::new(client);
    let demand = operator.demand("second", &second);
    streams::ensure(&jetstream, &demand, &operator.neighbours, &mut Refusals::default()).await.expect("made");
    operator.ensures("first", json!({})).await.expect("in order");
    assert_eq!(operator.max_ack_pending(ROUTE_GROUP).await, None, "the second pool has seen another broker");
}

#[tokio::test]
async fn a_route_stays_for_a_pool_that_knows_its_broker_by_another_name() {
    let nats = NatsServer::start();
    let mut operator = Operator::at(&nats).await;
    operator.ensures("first", with_gpus()).await.expect("in order");
    operator.ensures("second", with_gpus_at(&nats.url().replace("127.0.0.1", "localhost"))).await.expect("in order");
    operator.publish(ROUTE).await;
    assert_eq!(operator.ensures("first", json!({})).await, Ok(vec![]), "the second pool's workers take it");
    operator.drain(ROUTE_GROUP).await;
    operator.ensures("first", json!({})).await.expect("in order");
    assert!(operator.max_ack_pending(ROUTE_GROUP).await.is_some());
}

#[tokio::test]
async fn a_route_that_was_not_made_for_a_pool_stays() {
    let nats = NatsServer::start();
    let mut operator = Operator::at(&nats).await;
    operator.ensures("first", json!({})).await.expect("in order");
    let config = pull::Config {
        durable_name: Some(ROUTE_GROUP.to_owned()),
        filter_subject: ROUTE.to_owned(),
        ..pull::Config::default()
    };
    operator.jetstream.create_consumer_on_stream(config, ASSIGN).await.expect("made by hand");
    operator.ensures("first", json!({})).await.expect("in order");
    assert!(operator.max_ack_pending(ROUTE_GROUP).await.is_some());
}

#[tokio::test]
async fn work_that_waits_where_no_route_is_left_is_told() {
    let nats = NatsServer::start();
    let mut operator = Operator::at(&nats).await;
    operator.ensures("first", json!({})).await.expect("in order");
    operator.publish(ROUTE).await;
    let remarks = operator.ensures("first", json!({})).await.expect("in order");
    assert_eq!(remarks, [Remark::Stranded { subject: ROUTE.to_owned() }]);
}

// Whose word counts.

fn keeps(retention: &str) -> Value {
    json!({"nats": {"streams": {"resultRetention": retention}}})
}

async fn retention(operator: &Operator) -> Duration {
    operator.stream(RESULT).await.config.max_age
}

const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn the_pool_that_made_a_shared_stream_governs_it_and_the_others_say_what_differs() {
    let nats = NatsServer::start();
    let mut operator = Operator::at(&nats).await;
    operator.ensures("first", keeps("1h")).await.expect("made");
    assert_eq!(
        said(operator.ensures("second", keeps("2h")).await),
        ["stream CAF_EXEC_RESULT: max_age stays 1h, this pool says 2h: pool flows/first governs it"]
    );
    assert_eq!(retention(&operator).await, HOUR);
    assert_eq!(operator.ensures("first", keeps("2h")).await, Ok(vec![]));
    assert_eq!(retention(&operator).await, 2 * HOUR);
    assert_eq!(operator.ensures("second", keeps("2h")).await, Ok(vec![]));
}

#[tokio::test]
async fn a_stream_is_taken_over_when_its_pool_is_gone_or_manages_it_no_more() {
    let nats = NatsServer::start();
    let mut operator = Operator::at(&nats).await;
    operator.ensures("first", keeps("1h")).await.expect("made");
    operator.has("second", &keeps("2h"));
    operator.loses("first");
    assert_eq!(operator.ensures("second", keeps("2h")).await, Ok(vec![]));
    assert_eq!(retention(&operator).await, 2 * HOUR);
    assert_eq!(operator.stream(RESULT).await.config.metadata["beamline.dev/managed-by"], "flows/second");

    operator.has("second", &json!({"nats": {"streams": {"manage": false}}}));
    assert_eq!(operator.ensures("third", keeps("3h")).await, Ok(vec![]));
    assert_eq!(retention(&operator).await, 3 * HOUR);
}

#[tokio::test]
async fn a_stream_of_another_clusters_pool_is_not_taken_over() {
    let nats = NatsServer::start();
    let mut elsewhere = Operator::of_cluster("elsewhere", &nats).await;
    elsewhere.ensures("first", keeps("1h")).await.expect("made");
    let mut operator = Operator::at(&nats).await;
    assert_eq!(
        said(operator.ensures("second", keeps("2h")).await),
        ["stream CAF_EXEC_RESULT: max_age stays 1h, this pool says 2h: \
          pool flows/first governs it, which this operator does not see"]
    );
    assert_eq!(elsewhere.ensures("first", keeps("3h")).await, Ok(vec![]));
    assert_eq!(retention(&operator).await, 3 * HOUR);
}

#[tokio::test]
async fn what_a_pool_leaves_out_is_the_administrators() {
    let nats = NatsServer::start();
    let mut operator = Operator::at(&nats).await;
    operator.ensures("first", json!({})).await.expect("made");
    let edited = Config { max_age: 7 * HOUR, max_messages: 5, ..operator.stream(RESULT).await.config };
    operator.jetstream.update_stream(&edited).await.expect("edited");
    assert_eq!(operator.ensures("first", json!({})).await, Ok(vec![]));
    assert_eq!(retention(&operator).await, 7 * HOUR);
    assert_eq!(operator.ensures("first", keeps("90m")).await, Ok(vec![]));
    let Config { max_age, max_messages, .. } = operator.stream(RESULT).await.config;
    assert_eq!((max_age, max_messages), (HOUR * 3 / 2, 5));
}

#[tokio::test]
async fn a_shorter_age_takes_the_duplicate_window_with_it() {
    let nats = NatsServer::start();
    let mut operator = Operator::at(&nats).await;
    operator.ensures("first", json!({})).await.expect("made");
    assert_eq!(operator.ensures("first", keeps("1m")).await, Ok(vec![]));
    assert_eq!(retention(&operator).await, Duration::from_secs(60));
}

#[tokio::test]
async fn a_stream_that_was_made_by_hand_keeps_its_settings() {
    let nats = NatsServer::start();
    let mut operator = Operator::at(&nats).await;
    let demand = operator.demand("first", &json!({}));
    let by_hand = streams::streams(&demand.nats).into_iter().find(|stream| stream.name == RESULT).expect("results");
    operator.jetstream.create_stream(by_hand).await.expect("made by hand");
    assert_eq!(
        said(operator.ensures("first", keeps("2h")).await),
        ["stream CAF_EXEC_RESULT: max_age stays 1h, this pool says 2h: it was not made for a pool; alter it by hand"]
    );
    assert_eq!(retention(&operator).await, HOUR);
}

#[tokio::test]
async fn what_the_broker_does_not_take_is_said_and_nothing_else_fails() {
    let nats = NatsServer::start();
    let mut operator = Operator::at(&nats).await;
    operator.ensures("first", json!({})).await.expect("made");
    let three = json!({"nats": {"streams": {"replicas": 3}}});
    let first = said(operator.ensures("first", three.clone()).await);
    assert_eq!(first.len(), STREAMS, "one server keeps no three copies: {first:?}");
    assert!(first[0].starts_with("stream CAF_EXEC_ASSIGN: num_replicas stays 1, this pool says 3: the broker refuses"));

    let client = async_nats::connect(nats.url()).await.expect("a connection");
    let mut updates = client.subscribe("$JS.API.STREAM.UPDATE.>").await.expect("an ear");
    client.flush().await.expect("it listens");
    assert_eq!(said(operator.ensures("first", three).await), first, "it is said as long as it is so");
    operator
        .ensures("first", json!({"nats": {"streams": {"replicas": 3, "resultRetention": "2h"}}}))
        .await
        .expect("said");
    // What the broker heard before, it has passed on before.
    let asked = operator.jetstream.get_stream(RESULT).await.is_ok() && client.flush().await.is_ok();
    let heard = updates.next().await.filter(|_| asked).expect("another wish is tried");
    assert_eq!(heard.subject.as_str(), "$JS.API.STREAM.UPDATE.CAF_EXEC_RESULT", "and what was refused is not");
}

#[tokio::test]
async fn what_must_match_is_never_altered() {
    let nats = NatsServer::start();
    let mut operator = Operator::at(&nats).await;
    operator.ensures("first", json!({})).await.expect("made");
    let mismatch = operator.ensures("first", json!({"nats": {"streams": {"storage": "Memory"}}})).await;
    assert_eq!(mismatch.expect_err("another storage").reason(), "StreamMismatch");
    assert_eq!(operator.stream(ASSIGN).await.config.storage, StorageType::File);
}

// A core queue group.

fn core() -> Value {
    json!({"nats": {"delivery": "Core"}})
}

#[tokio::test]
async fn a_core_queue_group_gets_all_streams_but_those_to_wait_in() {
    let nats = NatsServer::start();
    let mut operator = Operator::at(&nats).await;
    assert_eq!(operator.ensures("first", core()).await, Ok(vec![]));
    let made = operator.streams().await;
    let waits = [ASSIGN, "CAF_EXEC_PARKED"];
    assert_eq!((made.len(), waits.map(|name| made.contains_key(name))), (STREAMS - waits.len(), [false; 2]));
}

#[tokio::test]
async fn a_stream_that_keeps_what_a_core_queue_group_gets_is_told() {
    let nats = NatsServer::start();
    let mut operator = Operator::at(&nats).await;
    operator.ensures("first", json!({})).await.expect("made");
    let captured = operator.ensures("first", core()).await.expect_err("all of it would run again");
    assert_eq!(captured.reason(), "SubjectTaken");
    assert!(captured.to_string().contains("stream CAF_EXEC_ASSIGN keeps all that comes on caf.exec.assign.v1"));
}
