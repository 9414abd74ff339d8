//! Which of several operators acts: the holder of a Lease. Two that both believe it are harmless, only wasteful.

use kube::Client;
use kube_lease_manager::{LeaseManagerBuilder, LeaseParams};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::desired::names;

/// A leader that stops answering is followed by another after this long, in seconds.
const LEASE_SECONDS: u64 = 15;
/// How long before its end a lease is renewed, in seconds.
const GRACE_SECONDS: u64 = 5;

/// A seat in the election. Dropping it gives the lease back.
pub struct Leadership {
    holds: watch::Receiver<bool>,
    renewal: JoinHandle<()>,
}

impl Leadership {
    /// Stands for election.
    pub async fn stand(client: Client, namespace: &str) -> anyhow::Result<Self> {
        let manager = LeaseManagerBuilder::new(client, names::OPERATOR)
            .with_namespace(namespace)
            .with_parameters(LeaseParams::new(identity(), LEASE_SECONDS, GRACE_SECONDS))
            .build()
            .await?;
        let (holds, task) = manager.watch().await;
        let renewal = tokio::spawn(async move {
            if let Ok(Err(error)) = task.await {
                tracing::warn!(%error, "the lease was not given back");
            }
        });
        Ok(Self { holds, renewal })
    }

    /// Waits for the lease. It does not come where the renewing task has ended: then one stands again.
    pub async fn won(&mut self) -> bool {
        self.holds.wait_for(|holds| *holds).await.is_ok()
    }

    /// Waits until another operator may act: the lease is another's, or is not renewed any more.
    pub async fn lost(&mut self) {
        let _ = self.holds.wait_for(|holds| !*holds).await;
    }

    /// Gives the lease back, so that the next operator need not wait for its end.
    pub async fn resign(self) {
        drop(self.holds);
        let _ = self.renewal.await;
    }
}

/// Unique for each start: a restarted operator is a new candidate.
fn identity() -> String {
    let system = rustix::system::uname();
    format!("{}-{:x}", system.nodename().to_string_lossy(), jiff::Timestamp::now().as_nanosecond())
}
