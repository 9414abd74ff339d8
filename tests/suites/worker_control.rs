//! What reaches a worker besides assignments, and where it keeps what it knows about them.
#![expect(clippy::expect_used, reason = "tests")]

use std::collections::BTreeMap;
use std::time::Duration;

use beamline_tests::nats::NatsServer;
use beamline_tests::rig::Rig;
use beamline_tests::router::Router;
use beamline_tests::wait::SOON;
use beamline_worker::admin::Health;
use beamline_worker::broker::kv::{Bucket, Change, Entry};
use beamline_worker::broker::streams::ANSWER_BUCKET;
use beamline_worker::broker::{Address, Broker, Stored};
use bytes::Bytes;
use tokio::sync::mpsc;

// Buckets.

/// The worker's own access to a bucket that a worker has made and looks after.
async fn bucket(nats: &NatsServer) -> Bucket {
    let address = Address {
        servers: vec![nats.url().parse().expect("an address")],
        creds: None,
        tls_ca: None,
        tls_identity: None,
        name: "test".to_owned(),
    };
    Bucket::new(Broker::connect(&address, &Health::new()).await.expect("a connection"), ANSWER_BUCKET)
}

fn value(entry: Option<Entry>) -> Option<Bytes> {
    entry.map(|entry| entry.value)
}

#[tokio::test]
async fn of_two_writers_who_know_the_same_one_is_refused() {
    let rig = Rig::start(&[]).await;
    let bucket = bucket(&rig.nats).await;
    let key = "acme.a=2E1";
    assert_eq!(bucket.get(key).await.unwrap(), None);
    let Stored::At(first) = bucket.create(key, "1".into()).await.unwrap() else { panic!("there was none") };
    assert_eq!(bucket.create(key, "2".into()).await.unwrap(), Stored::Refused);
    let Stored::At(second) = bucket.update(key, "3".into(), first).await.unwrap() else { panic!("nobody wrote") };
    assert_eq!(bucket.update(key, "4".into(), first).await.unwrap(), Stored::Refused);
    assert_eq!(bucket.delete(key, first).await.unwrap(), Stored::Refused);
    let entry = bucket.get(key).await.unwrap().expect("a value");
    assert_eq!((entry.revision, entry.value.as_ref(), entry.key.as_str()), (second, b"3".as_slice(), key));
    assert!(matches!(bucket.delete(key, second).await.unwrap(), Stored::At(_)));
    assert_eq!(bucket.get(key).await.unwrap(), None);
    assert_eq!(bucket.update(key, "5".into(), second).await.unwrap(), Stored::Refused);
    assert!(matches!(bucket.create(key, "6".into()).await.unwrap(), Stored::At(_)), "a removed key can be made anew");
    assert_eq!(bucket.create(key, "7".into()).await.unwrap(), Stored::Refused);
    assert_eq!(value(bucket.get(key).await.unwrap()), Some("6".into()));
    let last = bucket.put(key, "8".into()).await.unwrap();
    assert_eq!(bucket.get(key).await.unwrap().map(|entry| entry.revision), Some(last));
}

#[tokio::test]
async fn a_list_has_the_values_whose_keys_fit() {
    let rig = Rig::start(&[]).await;
    let bucket = bucket(&rig.nats).await;
    let keys = |found: Vec<Entry>| found.into_iter().map(|entry| entry.key).collect::<Vec<_>>();
    assert!(bucket.list(">").await.unwrap().is_empty());
    for key in ["acme.1.x", "acme.1.y", "acme.2.x", "other.1.x"] {
        bucket.put(key, key.to_owned().into()).await.unwrap();
    }
    let removed = bucket.put("acme.1.z", "z".into()).await.unwrap();
    bucket.delete("acme.1.z", removed).await.unwrap();
    assert_eq!(keys(bucket.list("acme.1.*").await.unwrap()), ["acme.1.x", "acme.1.y"]);
    assert_eq!(keys(bucket.list(">").await.unwrap()), ["acme.1.x", "acme.1.y", "acme.2.x", "other.1.x"]);
    assert!(bucket.list("acme.3.*").await.unwrap().is_empty());
}

/// What a watcher knows when it has been told everything.
struct Known {
    changes: mpsc::Receiver<Change>,
    values: BTreeMap<String, Bytes>,
    is_current: bool,
}

impl Known {
    fn of(bucket: &Bucket) -> Self {
        Self { changes: bucket.watch(Health::new()), values: BTreeMap::new(), is_current: false }
    }

    /// Hears changes until it is current and knows exactly these.
    #[track_caller]
    fn knows(&mut self, expected: &[(&str, &str)]) -> impl Future<Output = ()> {
        let place = std::panic::Location::caller();
        let expected: BTreeMap<String, Bytes> =
            expected.iter().map(|(key, value)| ((*key).to_owned(), Bytes::from((*value).to_owned()))).collect();
        async move {
            let known = async {
                while !self.is_current || self.values != expected {
                    match self.changes.recv().await.expect("it goes on") {
                        Change::Anew => (self.values, self.is_current) = (BTreeMap::new(), false),
                        Change::Put(entry) => drop(self.values.insert(entry.key, entry.value)),
                        Change::Removed(key) => drop(self.values.remove(&key)),
                        Change::Current => self.is_current = true,
                    }
                }
            };
            let in_time = tokio::time::timeout(SOON * 3, known).await.is_ok();
            assert!(in_time, "{place}: knows {:?}, current: {}", self.values, self.is_current);
        }
    }
}

#[tokio::test]
async fn a_watcher_knows_what_there_is_whatever_happens_to_broker_and_bucket() {
    let mut rig = Rig::start(&[]).await;
    let bucket = bucket(&rig.nats).await;
    let mut known = Known::of(&bucket);
    known.knows(&[]).await;
    let first = bucket.put("a.1", "1".into()).await.unwrap();
    bucket.put("a.2", "1".into()).await.unwrap();
    known.knows(&[("a.1", "1"), ("a.2", "1")]).await;
    bucket.delete("a.1", first).await.unwrap();
    bucket.put("a.2", "2".into()).await.unwrap();
    known.knows(&[("a.2", "2")]).await;
    // Who comes later knows the same.
    Known::of(&bucket).knows(&[("a.2", "2")]).await;

    rig.nats.kill();
    rig.nats.restart();
    let router = Router::connect(&rig.nats.url()).await;
    // Another connection writes before ours may be back.
    router.jetstream().publish("$KV.caf-answers.a.3", "3".into()).await.unwrap().await.unwrap();
    known.knows(&[("a.2", "2"), ("a.3", "3")]).await;

    // The worker makes the bucket anew; it counts from 1 again.
    router.jetstream().delete_stream("KV_caf-answers").await.unwrap();
    known.knows(&[]).await;
    tokio::time::timeout(SOON * 2, async {
        while bucket.put("a.4", "4".into()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .expect("the bucket is there again");
    known.knows(&[("a.4", "4")]).await;
}

#[tokio::test]
async fn a_watcher_of_many_values_is_told_all_of_them() {
    let rig = Rig::start(&[]).await;
    let bucket = bucket(&rig.nats).await;
    let total = 3_000;
    for number in 0..total {
        rig.router.client().publish(format!("$KV.caf-answers.many.{number}"), "x".repeat(1000).into()).await.unwrap();
    }
    // The last one of the same connection is kept: so are those before it.
    rig.router.jetstream().publish("$KV.caf-answers.many.last", "x".into()).await.unwrap().await.unwrap();
    assert_eq!(bucket.list("many.*").await.unwrap().len(), total + 1);
}
