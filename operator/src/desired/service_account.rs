//! Who the pods are: an account that may do nothing, so that a cloud identity can be bound to it.

use k8s_openapi::api::core::v1::ServiceAccount;

use crate::names;
use crate::pool::ValidPool;

pub(super) fn service_account(pool: &ValidPool) -> ServiceAccount {
    let mut metadata = names::metadata(pool, names::service_account(&pool.name));
    if !pool.worker.service_account_annotations.is_empty() {
        metadata.annotations = Some(pool.worker.service_account_annotations.clone());
    }
    ServiceAccount { metadata, automount_service_account_token: Some(false), ..ServiceAccount::default() }
}
