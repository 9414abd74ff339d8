//! The operator's program: flags, logs, run.

use anyhow::anyhow;
use beamline_operator::config::Config;
use clap::Parser;

fn main() -> anyhow::Result<()> {
    // Before anything opens a connection: two linked TLS providers would make rustls refuse to choose.
    rustls::crypto::ring::default_provider().install_default().map_err(|_| anyhow!("a TLS provider is set already"))?;
    let config = Config::parse();
    let telemetry = beamline_operator::telemetry::start(&config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ended = runtime.block_on(async {
        match &config.check {
            Some(url) => beamline_operator::check::check(url).await,
            None => beamline_operator::run(config).await,
        }
    });
    runtime.shutdown_background();
    telemetry.shutdown();
    ended
}
