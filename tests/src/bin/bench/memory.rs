//! What a worker holds: idle, and for each task that waits in it.

use std::time::Duration;

use beamline_tests::nats::NatsServer;
use beamline_tests::worker::Worker;

use crate::figures::resident;
use crate::table::{Row, Table, at_most};

/// What an idle worker may hold.
const IDLE_MIB: f64 = 15.0;
/// Until a worker that has just started has come to rest.
const REST: Duration = Duration::from_secs(3);

/// Resident memory of a worker that has nothing to do.
pub(crate) async fn run(table: &mut Table) -> anyhow::Result<()> {
    let nats = NatsServer::start();
    let worker = Worker::named("idle").start(&nats).await;
    tokio::time::sleep(REST).await;
    let mib = resident(worker.id())? as f64 / (1024.0 * 1024.0);
    table.push(Row {
        what: "memory: idle worker, resident".to_owned(),
        figure: format!("{mib:.1} MiB"),
        target: Some(at_most(IDLE_MIB, "MiB", mib)),
    });
    Ok(())
}
