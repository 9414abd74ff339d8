//! Which databases `sql.query` blocks may use.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::SecretKeyRef;

/// Databases of sql.query blocks.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Sql {
    /// Whether a block may bring its own connection string. SQLite files, which lie in a tenant's own directory, are
    /// connections too. Default: Allow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inline_connections: Option<InlineConnections>,

    /// Connections that blocks name ("connection": "crm"), so that no assignment carries a password.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 50),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"])
    )]
    pub connections: Vec<SqlConnection>,
}

/// Whether a block may bring its own connection string.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum InlineConnections {
    /// It may.
    Allow,
    /// Only connections that the pool names may be used.
    Deny,
}

/// A database under a name.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct SqlConnection {
    /// What blocks call it.
    #[schemars(length(min = 1, max = 63), regex(pattern = "^[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?$"))]
    pub name: String,

    /// Its connection string, such as postgres://user:password@db.crm.svc/crm, in a Secret of the pool's namespace. A
    /// changed Secret counts for the next connection that is opened.
    pub url_secret_ref: SecretKeyRef,

    /// Tenants that may use it. Default: all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1000), inner(length(min = 1, max = 256)), extend("x-kubernetes-list-type" = "set"))]
    pub tenants: Vec<String>,
}
