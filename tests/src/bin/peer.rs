//! The HTTP peer of the suites as a program of its own, for blocks that run in a cluster.

use beamline_tests::peer::Peer;
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::io::Result<()> {
    let _peer = Peer::on("0.0.0.0:8080").await;
    signal(SignalKind::terminate())?.recv().await;
    Ok(())
}
