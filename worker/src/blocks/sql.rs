//! `sql.query`: one reading statement on a SQLite file of the tenant's own directories.

use serde_json::value::RawValue;

use super::tenant_dir::TenantDirs;
use super::{Output, Scope};
use crate::fault::{Cause, Fault, Invalid};

/// A statement and where to run it.
#[derive(Debug)]
pub struct Query {}

impl Query {
    /// Reads the parameters from the assignment's `job` object.
    ///
    /// # Errors
    /// The first parameter that breaks a rule.
    pub fn parse(_job: &RawValue) -> Result<Self, Invalid> {
        Ok(Self {})
    }
}

/// Executes queries.
#[derive(Debug)]
pub struct Sql {
    _dirs: TenantDirs,
}

impl Sql {
    /// Opens files of these directories only.
    pub fn new(dirs: TenantDirs) -> Self {
        Self { _dirs: dirs }
    }

    /// What can be refused at the door.
    pub fn refuses(&self, _query: &Query) -> Option<Invalid> {
        None
    }

    /// Runs the statement.
    ///
    /// # Errors
    /// The fault of this attempt.
    pub async fn run(&self, _query: &Query, _scope: &Scope) -> Result<Output, Fault> {
        Err(Fault::new(Cause::Internal, "not there yet"))
    }
}
