//! Whose work it is, and which: ids that have proved themselves.

use std::sync::Arc;

use crate::contract;
use crate::fault::Invalid;

/// The longest id, in bytes.
const MAX_ID_BYTES: usize = 256;

/// Whose work it is. Cheap to clone: it goes wherever something is kept per tenant.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TenantId(Arc<str>);

impl TenantId {
    /// A non-empty id of at most 256 bytes without control characters.
    pub fn parse(text: &str) -> Option<Self> {
        is_id(text).then(|| Self(text.into()))
    }

    /// As the Router writes it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A tenant and an assignment id: what a record is kept for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AssignmentKey {
    /// Whose work it is.
    pub tenant: TenantId,
    /// The Router's id, unique within the tenant.
    pub assignment_id: Arc<str>,
}

impl AssignmentKey {
    /// Of two ids that have proved themselves.
    pub(crate) fn new(tenant: &str, assignment_id: &str) -> Self {
        Self { tenant: TenantId(tenant.into()), assignment_id: assignment_id.into() }
    }

    /// `<tenant>.<assignment_id>`, each escaped into one token.
    pub fn token(&self) -> String {
        format!("{}.{}", contract::escape(self.tenant.as_str()), contract::escape(&self.assignment_id))
    }
}

/// Whether a text can be an id: not empty, at most 256 bytes, no control characters.
pub(crate) fn is_id(text: &str) -> bool {
    !text.is_empty() && text.len() <= MAX_ID_BYTES && !text.chars().any(char::is_control)
}

/// An id that has to be there.
///
/// # Errors
/// 1002 where it is missing or empty, 1003 where it is no id.
pub(crate) fn required_id<'a>(text: Option<&'a str>, pointer: &str) -> Result<&'a str, Invalid> {
    let text = text.filter(|text| !text.is_empty()).ok_or_else(|| Invalid::missing(pointer))?;
    if is_id(text) { Ok(text) } else { Err(bad_id(pointer)) }
}

/// An id that may be missing or empty.
///
/// # Errors
/// 1003 where it is no id.
pub(crate) fn optional_id(text: Option<&str>, pointer: &str) -> Result<Option<Box<str>>, Invalid> {
    match text {
        None | Some("") => Ok(None),
        Some(text) if is_id(text) => Ok(Some(text.into())),
        Some(_) => Err(bad_id(pointer)),
    }
}

fn bad_id(pointer: &str) -> Invalid {
    Invalid::format(pointer, "is no id: at most 256 bytes and no control characters")
}
