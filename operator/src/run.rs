//! One way up and one way down.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use kube::Client;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::admin::{self, Liveness, Readiness, Topic};
use crate::clients::Clients;
use crate::config::Config;
use crate::controller;
use crate::external;
use crate::leader::{Candidate, Leadership};
use crate::metrics::Metrics;
use crate::tenure::Tenure;

/// How long running reconciles may finish after SIGTERM.
const SHUTDOWN: Duration = Duration::from_secs(10);

/// How long a probe or a scrape that has begun may take then.
const FAREWELL: Duration = Duration::from_secs(1);

/// How often an API server is asked for the Lease that does not give an answer.
const LEASE_RETRY: Duration = Duration::from_secs(2);

/// Runs the operator until it is told to stop, or another one leads.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    tokio::spawn(stop_on_signal(stop.clone())?);
    let metrics = Arc::new(Metrics::register()?);
    let clients = Clients::connect(&metrics).await.context("no way to reach Kubernetes")?;
    let (liveness, readiness) = (Liveness::within(config.stall_after), Readiness::default());
    let listener = TcpListener::bind(config.admin_endpoint)
        .await
        .with_context(|| format!("--admin-endpoint: cannot listen on {}", config.admin_endpoint))?;
    let is_asked = config.external_metrics_endpoint.is_some() || config.keda_url.is_some();
    let source = is_asked.then(|| external::Source::follow(&config, &clients, &stop));
    let queues = source.clone().filter(|_| config.keda_url.is_some()).map(external::queues);
    let probes = (liveness.clone(), readiness.clone());
    let admin = tokio::spawn(admin::serve(listener, probes, Arc::clone(&metrics), queues, stop.clone()));
    let external = match config.external_metrics_endpoint.zip(source) {
        None => None,
        Some((endpoint, source)) => {
            let listener = TcpListener::bind(endpoint)
                .await
                .with_context(|| format!("--external-metrics-endpoint: cannot listen on {endpoint}"))?;
            readiness.waits(Topic::ExternalMetrics, "there is no certificate yet");
            let (config, client, readiness) = (config.clone(), clients.calls.clone(), readiness.clone());
            let stop = stop.clone();
            Some(tokio::spawn(async move { external::serve(listener, &config, client, source, readiness, stop).await }))
        }
    };
    let outcome = lead(clients, &config, (liveness, readiness), metrics, &stop).await;
    stop.cancel();
    // Who has asked gets an answer; who holds a connection and never asks holds up nothing.
    if let Ok(served) = tokio::time::timeout(FAREWELL, admin).await {
        served??;
    }
    if let Some(external) = external {
        external.await?;
    }
    outcome
}

/// Acts while leading. A standby is ready too: it does all that is asked of it.
async fn lead(
    clients: Clients,
    config: &Config,
    probes: (Liveness, Readiness),
    metrics: Arc<Metrics>,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    if !config.leader_election {
        metrics.leads(true);
        act(clients, config, Tenure::unlimited(), probes, metrics, stop).await;
        return Ok(());
    }
    let namespace = config.lease_namespace.clone().unwrap_or_else(|| clients.calls.default_namespace().to_owned());
    let Some(mut leadership) = win(&clients.calls, &namespace, &probes.1, stop).await else { return Ok(()) };
    tracing::info!("leading");
    metrics.leads(true);
    let (term, tenure) = (stop.child_token(), leadership.tenure());
    let outcome = tokio::select! {
        () = act(clients, config, tenure, probes, Arc::clone(&metrics), &term) => Ok(()),
        // Ending is the safest way to stop all that is under way; Kubernetes starts a standby.
        () = leadership.lost() => Err(anyhow::anyhow!("another operator leads")),
    };
    metrics.leads(false);
    leadership.resign().await;
    outcome
}

/// A lease that was won, or nothing when told to stop. An API server that is away is waited for: a process that ends is
/// started again ever later.
async fn win(client: &Client, namespace: &str, readiness: &Readiness, stop: &CancellationToken) -> Option<Leadership> {
    readiness.waits(Topic::Lease, "not asked for yet");
    loop {
        match stop.run_until_cancelled(Candidate::stand(client.clone(), namespace)).await? {
            Ok(candidate) => {
                readiness.has(Topic::Lease);
                tracing::info!(%namespace, "waiting to lead");
                if let Some(leadership) = stop.run_until_cancelled(candidate.won()).await? {
                    return Some(leadership);
                }
                tracing::warn!("the Lease is not asked for any more; starting again");
            }
            Err(error) => {
                let why = format!("cannot use the Lease beamline-operator in namespace {namespace}: {error:#}");
                tracing::warn!("waiting: {why}");
                readiness.waits(Topic::Lease, why);
            }
        }
        stop.run_until_cancelled(tokio::time::sleep(LEASE_RETRY)).await?;
    }
}

async fn act(
    clients: Clients,
    config: &Config,
    tenure: Tenure,
    probes: (Liveness, Readiness),
    metrics: Arc<Metrics>,
    stop: &CancellationToken,
) {
    // Large: boxed once here, not in every future around it.
    let controller = Box::pin(controller::run(clients, config, tenure, probes, metrics, stop.clone()));
    let deadline = async {
        stop.cancelled().await;
        tokio::time::sleep(SHUTDOWN).await;
    };
    tokio::select! {
        () = controller => tracing::info!("stopped"),
        () = deadline => tracing::warn!(limit = ?SHUTDOWN, "stopped before all reconciles ended"),
    }
}

fn stop_on_signal(stop: CancellationToken) -> std::io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping");
        stop.cancel();
    })
}
