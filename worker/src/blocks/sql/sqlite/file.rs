//! Which file a connection string names.

use std::borrow::Cow;

use crate::blocks::sql::database::Refusal;
use crate::blocks::tenant_dir::{self, TenantDirs};

/// A path of the tenant.
#[derive(Clone, Debug)]
pub(in crate::blocks::sql) enum File {
    /// A path as for `fs.get`.
    Absolute(String),
    /// A path in the first safe root.
    Relative(String),
}

impl File {
    /// Reads what stands behind `sqlite://`.
    pub(in crate::blocks::sql) fn parse(file: &str) -> Result<Self, Refusal> {
        if file.contains(['?', '#']) {
            return Err(Refusal::format("has parameters: none are supported"));
        }
        if file.split('/').next().is_some_and(|first| first.contains('@')) {
            return Err(Refusal::format("has credentials or a host: a SQLite file has none"));
        }
        let path = percent_encoding::percent_decode_str(file)
            .decode_utf8()
            .map_err(|_| Refusal::format("is not UTF-8 once decoded"))?;
        if path.is_empty() || path == ":memory:" {
            return Err(Refusal::format("names no file"));
        }
        let not_allowed = |reason| Refusal::not_allowed(format!("names a path that {reason}"));
        if path.starts_with('/') {
            tenant_dir::check_shape(&path).map_err(not_allowed)?;
            return Ok(Self::Absolute(path.into_owned()));
        }
        tenant_dir::check_shape(&format!("/{path}")).map_err(not_allowed)?;
        Ok(Self::Relative(path.into_owned()))
    }

    /// The absolute path.
    pub(super) fn path(&self, dirs: &TenantDirs) -> Cow<'_, str> {
        match self {
            Self::Absolute(path) => Cow::Borrowed(path),
            // Without a root no path is allowed, this one neither.
            Self::Relative(path) => dirs.absolute(path).map_or(Cow::Borrowed(path), Cow::Owned),
        }
    }
}
