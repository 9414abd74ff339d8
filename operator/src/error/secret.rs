//! Why a Secret is of no use.

use crate::reason;

/// Why a Secret is of no use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// There is none.
    #[error("Secret `{0}` does not exist")]
    Missing(String),
    /// It holds other things.
    #[error("Secret `{name}` has no key `{key}`")]
    NoKey {
        /// Name of the Secret.
        name: String,
        /// What it should hold.
        key: String,
    },
    /// It holds bytes.
    #[error("Secret `{name}`, key `{key}`: not text")]
    NotText {
        /// Name of the Secret.
        name: String,
        /// The key that was read.
        key: String,
    },
    /// The operator has no right to read Secrets there.
    #[error("Secret `{name}` may not be read in namespace `{namespace}`; add it to the chart's rbac.secretNamespaces")]
    Forbidden {
        /// Name of the Secret.
        name: String,
        /// Where it is.
        namespace: String,
    },
    /// The API server did not answer.
    #[error("Secret `{name}` cannot be read: {why}")]
    Unreadable {
        /// Name of the Secret.
        name: String,
        /// What the API server says.
        why: String,
    },
}

impl SecretError {
    /// Reason of a condition: a closed set.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Forbidden { .. } => reason::SECRET_FORBIDDEN,
            _ => reason::SECRET_UNUSABLE,
        }
    }
}
