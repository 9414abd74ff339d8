//! What running workers read again when it changes: the policy, and the databases that blocks name.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ConfigMap;
use serde_json::{Value, json};

use super::{digest, secrets};
use crate::names;
use crate::pool::ValidPool;

/// File of the policy.
pub(super) const POLICY: &str = "policy.yaml";
/// File of the databases.
pub(super) const SQL_CONNECTIONS: &str = "sql-connections.yaml";

/// JSON is YAML, and needs no quoting of ours.
pub(super) fn config_map(pool: &ValidPool) -> ConfigMap {
    let mut data = BTreeMap::from([(POLICY.to_owned(), policy(pool))]);
    if !pool.worker.sql.connections.is_empty() {
        data.insert(SQL_CONNECTIONS.to_owned(), sql_connections(pool));
    }
    ConfigMap { metadata: names::metadata(pool, pool.name.clone()), data: Some(data), ..ConfigMap::default() }
}

/// Changes with what running workers should read again.
pub fn policy_hash(config_map: &ConfigMap) -> String {
    digest(config_map.data.iter().flatten().flat_map(|(name, text)| [name.as_str(), text]))
}

fn policy(pool: &ValidPool) -> String {
    let mut policy = json!({ "paused": pool.paused });
    if let (Some(tenants), Value::Object(policy)) = (&pool.tenants, &mut policy) {
        policy.insert("tenants".to_owned(), json!(tenants));
    }
    format!("{policy:#}\n")
}

fn sql_connections(pool: &ValidPool) -> String {
    let list = secrets::sql(pool).map(|(connection, file)| {
        let mut entry = json!({ "name": connection.name, "urlFile": file.path() });
        if let (false, Value::Object(entry)) = (connection.tenants.is_empty(), &mut entry) {
            entry.insert("tenants".to_owned(), json!(connection.tenants));
        }
        entry
    });
    format!("{:#}\n", Value::Array(list.collect()))
}
