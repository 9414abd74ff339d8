//! The other side of the probes: `helm test` asks whether the operator answers, from a pod of the operator's image.

use std::time::Duration;

use anyhow::Context as _;
use axum::http::{Request, Uri};
use kube::{Client, Config};

use crate::error::explain;

/// How long a name may take to be known, and an operator to be ready.
const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_secs(1);

/// Asks until the answer is 200.
pub async fn check(url: &Uri) -> anyhow::Result<()> {
    let (scheme, authority) = (url.scheme().cloned(), url.authority().cloned());
    let (Some(scheme), Some(authority)) = (scheme, authority) else {
        anyhow::bail!("--check: `{url}` must be a whole address, such as http://beamline:8080/readyz");
    };
    let server = Uri::builder().scheme(scheme).authority(authority).path_and_query("/").build()?;
    // A client for any server that speaks HTTP, when it is given no credentials.
    let client = Client::try_from(Config::new(server))?;
    let mut last = None;
    let answered = tokio::time::timeout(PATIENCE, async {
        while let Err(error) = ask(&client, url.path()).await {
            tracing::info!(%url, %error, "asking again");
            last = Some(error);
            tokio::time::sleep(PAUSE).await;
        }
    });
    if answered.await.is_err() {
        let last = last.unwrap_or_else(|| anyhow::anyhow!("no answer"));
        return Err(last).with_context(|| format!("{url} did not answer with 200 within {PATIENCE:?}"));
    }
    tracing::info!(%url, "it answers");
    Ok(())
}

async fn ask(client: &Client, path: &str) -> anyhow::Result<()> {
    let answer = client.request_text(Request::get(path).body(Vec::new())?).await;
    answer.map(drop).map_err(|error| anyhow::anyhow!("{}", explain(&error)))
}
