//! Work that waits for its tenant's next window: no demand before that, and then enough to wake a pool.

use async_nats::jetstream;
use beamline_tests::nats::NatsServer;
use beamline_tests::operator::Operator;
use beamline_tests::pool::Pool;
use beamline_tests::wait::within;
use serde_json::json;

use super::{PATIENCE, calm, is_write, plane};

/// The longest window that there is: none ends while this runs.
const WINDOW_MS: i64 = 744 * 3600 * 1000;

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_at_zero_wakes_for_parked_work_when_the_window_has_turned_and_not_before() {
    let (plane, nats) = (plane(), NatsServer::start());
    let release = plane.install("parked", &["watchNamespace=parked"]);
    let api = plane.api().await;
    let _operator = Operator::of(&release.kubeconfig, "parked").start().await;
    let jetstream = jetstream::new(async_nats::connect(nats.url()).await.expect("a connection"));
    let pool = Pool::new("parked", "budgets", &nats);
    let quotas = json!({"executions": 100, "window": "744h"});
    let tenants = json!({"defaults": {"onExceeded": "Defer", "quotas": quotas}});
    pool.create(&api, json!({"scaling": {"mode": "Operator"}, "tenants": tenants})).await;
    pool.converged(&api, PATIENCE).await;
    let accounts = jetstream.get_key_value("caf-quota").await.expect("the bucket");
    let stream = jetstream::stream::Config {
        name: "CAF_PARKED_work=2Ebudgets".to_owned(),
        subjects: vec!["work.budgets.parked.*".to_owned()],
        retention: jetstream::stream::RetentionPolicy::WorkQueue,
        ..Default::default()
    };
    jetstream.get_or_create_stream(stream).await.expect("the stream");
    let now = jiff::Timestamp::now().as_millisecond();
    let use_up = async |windows_ago: i64| {
        let start = now - now % WINDOW_MS - windows_ago * WINDOW_MS;
        let account =
            json!({"version": "1", "window_start": start, "window_ms": WINDOW_MS, "executions": 100, "cpu_time_ms": 0});
        accounts.put("parked=2Fbudgets.acme", account.to_string().into()).await.expect("stored");
    };
    use_up(0).await;
    for _ in 0..3 {
        jetstream.publish("work.budgets.parked.acme", "{}".into()).await.expect("sent").await.expect("stored");
    }
    let status = async || api.get(&pool.path()).await.unwrap_or_default()["status"].clone();
    let told = within(PATIENCE, "it is told what is parked and why", async || {
        Some(status().await).filter(|status| status["queue"]["parked"] == 3 && status["tenants"][0]["parked"] == 3)
    })
    .await;
    let acme = &told["tenants"][0];
    assert_eq!(
        (&acme["id"], &acme["executionsUsed"], &acme["executionsLimit"]),
        (&json!("acme"), &json!(100), &json!(100))
    );
    assert_eq!(acme["exceeded"]["budget"], "executions");
    assert!(acme["exceeded"]["until"].is_string(), "{acme}");
    let written = || {
        plane
            .asked_by(&release.user)
            .iter()
            .filter(|event| is_write(event) && event["objectRef"]["resource"] == "workerpools")
            .count()
    };
    calm(written).await;
    let still = status().await;
    assert_eq!(
        (&still["desiredReplicas"], &still["queue"]["depth"]),
        (&json!(0), &json!(0)),
        "parked work woke it: {still}"
    );

    use_up(1).await;
    within(PATIENCE, "it wakes", async || Some(status().await).filter(|status| status["desiredReplicas"] == 1)).await;
    let words = status().await["scaling"]["reason"].clone();
    assert!(words.as_str().is_some_and(|words| words.starts_with("3 waiting or running")), "{words}");
}
