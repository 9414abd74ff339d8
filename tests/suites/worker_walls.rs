//! What one tenant meets slows no other: each test gives one of them trouble that does not end, and another work that
//! has to end meanwhile.
#![expect(clippy::indexing_slicing, reason = "tests")]

use beamline_tests::mariadb::MariaDb;
use beamline_tests::policy::Policy;
use beamline_tests::postgres::Postgres;
use beamline_tests::process::free_port;
use beamline_tests::rig::Rig;
use beamline_tests::router::{Key, Kind, assignment};
use beamline_tests::wait::until;
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// More than there are slots for.
const TROUBLE: usize = 100;
/// 75 % of sixteen slots.
const SHARE: usize = 12;

/// Twenty pieces of another tenant's work succeed, one after another, and none of `acme`'s has ended by then.
async fn another_works_on(rig: &Rig, run: &str, job: &Value) {
    for number in 0..20 {
        let quick = assignment("globex", &format!("{run}-{number}"), job.clone());
        rig.router.submit(&quick).await;
        let result = rig.router.result(&quick).await;
        assert_eq!(result["status"], "success", "{result}");
    }
    let is_over = |key: &Key| key.tenant == "acme";
    let heard = rig.router.heard();
    let ended = heard.iter().filter(|heard| heard.kind == Kind::Result && heard.key.as_ref().is_some_and(is_over));
    assert_eq!(ended.count(), 0, "the trouble lasts");
}

async fn all_slots_of_acme_are_taken(rig: &Rig) {
    let taken = async || rig.worker.metric(r#"worker_slots_busy{pool="io"}"#).await;
    until("its slots are taken", async || taken().await >= SHARE as f64).await;
}

/// A database in a file of the tenant's.
fn sqlite(rig: &Rig, tenant: &str) -> &'static str {
    rig.database(tenant, "CREATE TABLE t (x)");
    "sqlite://db.sqlite"
}

/// A job that does not end while a test runs.
fn patient(mut job: Value) -> Value {
    job["timeout_ms"] = json!(600_000);
    job
}

#[tokio::test]
async fn requests_without_an_answer_hold_up_no_other_tenant() {
    let policy = Policy::new("tenants: {}");
    let rig = Rig::start(&[&policy.flag()]).await;
    let never = patient(rig.call("/gate/never"));
    for number in 0..5 * TROUBLE {
        rig.router.submit(&assignment("acme", &format!("{number}"), never.clone())).await;
    }
    all_slots_of_acme_are_taken(&rig).await;
    another_works_on(&rig, "put", &rig.put("x", "x")).await;
    another_works_on(&rig, "call", &rig.call("/ok")).await;
    assert_eq!(rig.peer.hits("/gate/never").len(), SHARE);
    let (code, health) = rig.worker.get("/_health").await.unwrap();
    assert_eq!(code, 200, "{health}");
}

#[tokio::test]
async fn databases_that_never_answer_hold_up_no_other_tenant() {
    let (postgres, mariadb) = (Postgres::shared().await, MariaDb::shared().await);
    let good = [postgres.database("walls", "").await, mariadb.database("walls", &[]).await];
    let query = |url: &str| json!({"type": "sql.query", "connection_string": url, "query": "SELECT 1 AS a"});
    for (good, scheme) in good.iter().zip(["postgres", "mysql"]) {
        let policy = Policy::new("tenants: {}");
        let rig = Rig::start(&[&policy.flag()]).await;
        // It takes connections and says nothing.
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = silent.local_addr().unwrap().port();
        for number in 0..TROUBLE {
            // Databases of their own, or they would wait for each other's connections.
            let url = format!("{scheme}://bob:hunter2@127.0.0.1:{port}/db{number}?connect_timeout=600");
            rig.router.submit(&assignment("acme", &format!("{number}"), patient(query(&url)))).await;
        }
        all_slots_of_acme_are_taken(&rig).await;
        another_works_on(&rig, "query", &query(good)).await;
    }
}

#[tokio::test]
async fn a_database_that_refuses_and_is_tried_again_and_again_holds_up_no_other_tenant() {
    let policy = Policy::new("tenants: {}");
    let rig = Rig::start(&[&policy.flag()]).await;
    let nobody = free_port();
    let mut job = patient(json!({"type": "sql.query", "query": "SELECT 1"}));
    job["retry_config"] = json!({"max_attempts": 100, "base_delay_ms": 200, "multiplier": 1});
    for number in 0..TROUBLE {
        job["connection_string"] = json!(format!("postgres://bob:hunter2@127.0.0.1:{nobody}/db{number}"));
        rig.router.submit(&assignment("acme", &format!("{number}"), job.clone())).await;
    }
    all_slots_of_acme_are_taken(&rig).await;
    let query = json!({"type": "sql.query", "query": "SELECT 1", "connection_string": sqlite(&rig, "globex")});
    another_works_on(&rig, "query", &query).await;
    another_works_on(&rig, "call", &rig.call("/ok")).await;
}

#[tokio::test]
async fn queries_that_burn_cpu_time_hold_up_no_other_tenant() {
    let policy = Policy::new("tenants: {}");
    let rig = Rig::start(&[&policy.flag()]).await;
    let endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n";
    let job = json!({"type": "sql.query", "query": endless, "connection_string": sqlite(&rig, "acme")});
    for number in 0..TROUBLE {
        rig.router.submit(&assignment("acme", &format!("{number}"), patient(job.clone()))).await;
    }
    all_slots_of_acme_are_taken(&rig).await;
    another_works_on(&rig, "put", &rig.put("x", "x")).await;
    let query = json!({"type": "sql.query", "query": "SELECT 1", "connection_string": sqlite(&rig, "globex")});
    another_works_on(&rig, "query", &query).await;
}

#[tokio::test]
async fn huge_bodies_of_a_tenant_with_a_ceiling_hold_up_no_other() {
    // 90 MB of bodies, and room for 24.
    let policy = Policy::new("tenants: {named: [{id: acme, quotas: {memoryMb: 8}}]}");
    let rig = Rig::start(&[&policy.flag(), "--max-memory-mb=24"]).await;
    let mut job = patient(rig.call("/gate/never"));
    job["body"] = json!("x".repeat(900_000));
    for number in 0..TROUBLE {
        rig.router.submit(&assignment("acme", &format!("{number}"), job.clone())).await;
    }
    until("what does not fit is parked", async || rig.router.parked().await >= 80).await;
    another_works_on(&rig, "put", &rig.put("x", "x")).await;
    assert!((1..=9).contains(&rig.peer.hits("/gate/never").len()), "eight megabytes of them");
    let health = rig.worker.get("/readyz").await.unwrap();
    assert_eq!(health.0, 200, "{}", health.1);
}
