//! Which of several operators acts: the holder of a Lease. Two that both believe it are harmless, only
//! wasteful: what the API server does not see, words to workers, is said by none that has not asked it who leads.

use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::Lease;
use kube::api::Patch;
use kube::{Api, Client};
use kube_lease_manager::{LeaseManager, LeaseManagerBuilder, LeaseParams};
use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::clients::in_our_name;
use crate::error::explain;
use crate::names;
use crate::tenure::Tenure;

/// A leader that stops answering is followed by another after this long, and what that needs to see it: 15 s at most.
const LEASE: Duration = Duration::from_secs(10);
/// How long before its end a lease is renewed.
const GRACE: Duration = Duration::from_secs(4);
/// What giving it back may take, also where the API server says nothing.
const GIVING_BACK: Duration = Duration::from_secs(3);
/// How often a standby looks whether the lease is held.
const LOOK: Duration = Duration::from_secs(1);

/// Who would act if nobody else did.
pub struct Candidate {
    manager: LeaseManager,
    leases: Api<Lease>,
    identity: String,
}

/// A seat that was won. Dropping it gives the lease back.
pub struct Leadership {
    holds: watch::Receiver<bool>,
    renewal: JoinHandle<()>,
    tenure: Tenure,
}

impl Candidate {
    /// Stands for election.
    pub async fn stand(client: Client, namespace: &str) -> anyhow::Result<Self> {
        let (leases, identity) = (Api::namespaced(client.clone(), namespace), identity());
        let manager = LeaseManagerBuilder::new(client, names::OPERATOR)
            .with_namespace(namespace)
            .with_parameters(LeaseParams::new(identity.clone(), LEASE.as_secs(), GRACE.as_secs()))
            .build()
            .await?;
        Ok(Self { manager, leases, identity })
    }

    /// Waits for the lease. It does not come where somebody has deleted it, or the renewing task has ended: then one stands again,
    /// which makes what is missing.
    pub async fn won(self) -> Option<Leadership> {
        // The manager would sleep until the end of the lease that it sees first, given back meanwhile or not.
        if !self.vacancy().await {
            return None;
        }
        let (mut holds, task) = self.manager.watch().await;
        let renewal = tokio::spawn(async move {
            if let Ok(Err(error)) = task.await {
                tracing::warn!(%error, "the lease was not given back");
            }
        });
        let has_come = holds.wait_for(|holds| *holds).await.is_ok();
        let tenure = Tenure::of(self.leases, self.identity);
        has_come.then_some(Leadership { holds, renewal, tenure })
    }

    /// Waits until nobody holds the lease; false where there is none. Who has not renewed it for its whole time by our own clock,
    /// whatever time it says by theirs, loses it.
    async fn vacancy(&self) -> bool {
        let mut seen = (None, Instant::now());
        loop {
            match self.leases.get_opt(names::OPERATOR).await {
                Ok(Some(lease)) if is_held(&lease) => {
                    if seen.0.as_ref() != Some(&lease) {
                        seen = (Some(lease), Instant::now());
                    }
                }
                Ok(lease) => return lease.is_some(),
                Err(error) => tracing::warn!("the lease cannot be read: {}", explain(&error)),
            }
            if let (Some(lease), since) = &seen
                && since.elapsed() >= LEASE
                && self.takes_away(lease).await
            {
                return true;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Unless it has been renewed meanwhile.
    async fn takes_away(&self, lease: &Lease) -> bool {
        let nobody = json!({
            "metadata": {"resourceVersion": lease.metadata.resource_version},
            "spec": {"holderIdentity": null, "acquireTime": null, "renewTime": null, "leaseDurationSeconds": null},
        });
        let taken = self.leases.patch(names::OPERATOR, &in_our_name(), &Patch::Merge(nobody)).await;
        taken.inspect_err(|error| tracing::warn!("the lease is not taken away: {}", explain(error))).is_ok()
    }
}

fn is_held(lease: &Lease) -> bool {
    let holder = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref());
    holder.is_some_and(|holder| !holder.is_empty())
}

impl Leadership {
    /// For whoever acts: an API server that is away keeps nobody from believing that it still leads.
    pub fn tenure(&self) -> Tenure {
        self.tenure.clone()
    }

    /// Waits until it is known that another operator may act: the lease is another's, or nobody renews it any more here.
    pub async fn lost(&mut self) {
        let _ = self.holds.wait_for(|holds| !*holds).await;
    }

    /// Gives the lease back, so that the next operator need not wait for its end.
    pub async fn resign(self) {
        drop(self.holds);
        if tokio::time::timeout(GIVING_BACK, self.renewal).await.is_err() {
            tracing::warn!("the lease was not given back in time");
        }
    }
}

/// Unique for each start: a restarted operator is a new candidate.
fn identity() -> String {
    let system = rustix::system::uname();
    format!("{}-{:x}", system.nodename().to_string_lossy(), jiff::Timestamp::now().as_nanosecond())
}
