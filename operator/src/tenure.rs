//! Whether this operator still is the one that acts, asked before workers are told anything or their number changes: what
//! they are told does not pass through the API server, which sees to the rest.

use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;

use crate::error::Error;
use crate::names;

/// The right to act on workers.
#[derive(Clone)]
pub struct Tenure {
    /// Where it is written, and who we are there; nowhere if nobody else can have it.
    lease: Option<(Api<Lease>, String)>,
}

impl Tenure {
    /// Nobody else can have it.
    pub const fn unlimited() -> Self {
        Self { lease: None }
    }

    /// As long as the Lease is this holder's.
    pub fn of(leases: Api<Lease>, holder: String) -> Self {
        Self { lease: Some((leases, holder)) }
    }

    /// Refuses where the Lease is another's, and where it cannot be read: another may have it then.
    pub async fn check(&self) -> Result<(), Error> {
        let Some((leases, holder)) = &self.lease else { return Ok(()) };
        let failed = |source| Error::Observe { kind: "Lease".to_owned(), name: names::OPERATOR.to_owned(), source };
        // By one that somebody has deleted nobody else leads.
        let Some(lease) = leases.get_opt(names::OPERATOR).await.map_err(failed)? else { return Ok(()) };
        let found = lease.spec.and_then(|spec| spec.holder_identity);
        if found.as_ref() == Some(holder) { Ok(()) } else { Err(Error::NotLeading) }
    }
}
