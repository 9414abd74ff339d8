//! Ways to the API server, on which all calls are counted.

use std::sync::Arc;
use std::time::Duration;

use axum::http::Response;
use kube::api::PatchParams;
use kube::client::{ClientBuilder, DynBody};
use kube::{Client, Config};
use tower::BoxError;
use tower::util::MapResultLayer;

use crate::metrics::Metrics;
use crate::names;

/// How long the API server may take to answer a call. A watch is silent for longer, and has an idle limit of its own.
const ANSWER: Duration = Duration::from_secs(15);

/// Ways to the API server.
#[derive(Clone)]
pub struct Clients {
    /// For calls, each of which ends: with an answer, or with the limit.
    pub calls: Client,
    /// For watches, which do not.
    pub watches: Client,
}

impl Clients {
    /// From the kubeconfig, or from the service account.
    pub async fn connect(metrics: &Arc<Metrics>) -> anyhow::Result<Self> {
        let mut config = Config::infer().await?;
        // What fails is tried again by whoever asked, who counts it and says so.
        config.default_retry = false;
        let watches = counted(config.clone(), metrics)?;
        config.read_timeout = Some(ANSWER);
        config.reset_reader_on_write = true;
        Ok(Self { calls: counted(config, metrics)?, watches })
    }
}

/// For a change of single fields: `managedFields` says whose it was, as of what is applied.
pub fn in_our_name() -> PatchParams {
    PatchParams { field_manager: Some(names::OPERATOR.to_owned()), ..PatchParams::default() }
}

fn counted(config: Config, metrics: &Arc<Metrics>) -> kube::Result<Client> {
    let metrics = Arc::clone(metrics);
    let counts = MapResultLayer::new(move |answer: Result<Response<Box<DynBody>>, BoxError>| {
        metrics.called(answer.as_ref().ok().map(Response::status));
        answer
    });
    Ok(ClientBuilder::try_from(config)?.with_layer(&counts).build())
}
