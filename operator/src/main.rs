//! The operator's program: flags, logs, run.

use std::process::ExitCode;

use anyhow::{Context, anyhow};
use beamline_operator::config::Config;
use beamline_operator::telemetry;

#[expect(clippy::print_stderr, reason = "there is no log yet")]
fn main() -> ExitCode {
    let config = Config::from_process().unwrap_or_else(|answer| answer.exit());
    let telemetry = match provide_tls().and_then(|()| telemetry::start(&config)) {
        Ok(telemetry) => telemetry,
        Err(error) => {
            eprintln!("beamline-operator: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let ended = start(config);
    telemetry.shutdown();
    if let Err(error) = &ended {
        tracing::error!(error = format!("{error:#}"), "the operator ends");
    }
    ended.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS)
}

/// Before anything opens a connection, the exporter of spans too: two linked providers would make rustls refuse to choose.
fn provide_tls() -> anyhow::Result<()> {
    rustls::crypto::ring::default_provider().install_default().map_err(|_| anyhow!("a TLS provider is set already"))
}

fn start(config: Config) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start threads")?;
    let ended = runtime.block_on(async {
        match &config.check {
            Some(url) => beamline_operator::check::check(url).await,
            None => beamline_operator::run(config).await,
        }
    });
    runtime.shutdown_background();
    ended
}
