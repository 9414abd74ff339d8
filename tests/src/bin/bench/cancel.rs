//! Cancels of running work: from the Router's publish to the result in its hands.
#![expect(clippy::indexing_slicing, reason = "a missing field of a JSON value is null")]

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use beamline_tests::nats::NatsServer;
use beamline_tests::peer::Peer;
use beamline_tests::router::{ASSIGN, CANCEL, assignment, cancel};
use beamline_tests::wait::within;
use beamline_tests::worker::Worker;
use futures::StreamExt;
use serde_json::{Value, json};

use crate::figures::{median, percentile};
use crate::pace;
use crate::table::{Row, Table, at_most};

/// How long the end of running work may take.
const LIMIT_MS: f64 = 100.0;
/// Cancels of each kind of work, one after the other.
const CANCELS: usize = 100;
const PATIENCE: Duration = Duration::from_secs(10);
const TENANT: &str = "tenant-1";

/// A request that is never answered, and a query that computes for ever on a thread.
pub(crate) async fn run(table: &mut Table) -> anyhow::Result<()> {
    let (nats, peer, files) = (NatsServer::start(), Peer::start().await, tempfile::tempdir()?);
    let own = files.path().join(TENANT);
    std::fs::create_dir(&own)?;
    rusqlite::Connection::open(own.join("empty.db"))?.execute_batch("CREATE TABLE t (x)")?;
    let source = format!("sqlite://{}", files.path().join("empty.db").display());
    let endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n";
    let jobs = [
        ("http.request", json!({ "type": "http.request", "method": "GET", "url": peer.url("/gate/never") })),
        ("sql.query, SQLite", json!({ "type": "sql.query", "connection_string": source, "query": endless })),
    ];
    let worker = Worker::named("cancel").flag(format!("--fs-roots={}", files.path().display()));
    let worker = worker.flag("--egress-allow=127.0.0.0/8").start(&nats).await;
    let router = pace::connect(&nats).await?;
    let mut results = pace::listen(&router).await?;
    let busy = async || worker.metric(r#"worker_slots_busy{pool="io"}"#).await;
    for (kind, job) in jobs {
        let mut millis = Vec::with_capacity(CANCELS);
        for number in 0..CANCELS {
            let id = format!("{}-{number}", job["type"].as_str().unwrap_or_default());
            router.publish(ASSIGN, assignment(TENANT, &id, job.clone()).to_string().into()).await?;
            within(PATIENCE, "it runs", async || (busy().await == 1.0).then_some(())).await;
            let cancel = cancel(TENANT, &id);
            let sent = Instant::now();
            router.publish(CANCEL, cancel.to_string().into()).await?;
            let result = tokio::time::timeout(PATIENCE, results.next()).await.context("it is not cancelled")?;
            millis.push(sent.elapsed().as_secs_f64() * 1000.0);
            let result: Value = serde_json::from_slice(&result.context("the connection ended")?.payload)?;
            ensure!(result["assignment_id"] == id && result["status"] == "cancelled", "{result}");
            within(PATIENCE, "the slot is free", async || (busy().await == 0.0).then_some(())).await;
        }
        let (p50, p99) = (median(millis.iter().copied()), percentile(millis, 99));
        table.push(Row {
            what: format!("cancel: running {kind}, until its result"),
            figure: format!("p50 {p50:.1} ms, p99 {p99:.1} ms"),
            target: Some(at_most(LIMIT_MS, "ms", p99)),
        });
    }
    Ok(())
}
