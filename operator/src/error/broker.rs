//! Why the broker cannot be used, in words that fit into a condition.

use std::error::Error as StdError;
use std::net::IpAddr;

use super::{SecretError, chain};
use crate::reason;

/// Why the broker cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BrokerError {
    /// Credentials or certificates cannot be had.
    #[error("{field}: {source}")]
    Secret {
        /// Of the pool's spec.
        field: &'static str,
        /// What is wrong with the Secret.
        source: SecretError,
    },
    /// They are there, and are not what they should be.
    #[error("{field}: {why}")]
    Credentials {
        /// Of the pool's spec.
        field: &'static str,
        /// What is wrong with them.
        why: String,
    },
    /// No connection.
    #[error("no connection to {url}: {why}")]
    Unreachable {
        /// Where to.
        url: String,
        /// What the client says.
        why: String,
    },
    /// An address that a pool must not send the operator to.
    #[error(
        "nats.url {url} leads to {address}, {what}, which the operator does not connect to; name the broker's Service or host, or start the operator with --nats-allow"
    )]
    NotAllowed {
        /// Where to.
        url: String,
        /// What it resolves to.
        address: IpAddr,
        /// What kind of address that is.
        what: &'static str,
    },
    /// A bug. It is tried again.
    #[error("the operator panicked while it looked at NATS; its log has the details")]
    Panicked,
    /// A connection, and no answer.
    #[error("NATS gives no answer {what}: {why}")]
    Unanswered {
        /// To which question.
        what: String,
        /// What the client says.
        why: String,
    },
    /// The broker says no.
    #[error("{what}: {why}")]
    Refused {
        /// What was asked.
        what: String,
        /// What the broker says.
        why: String,
    },
    /// Something exists with another setting.
    #[error(
        "{what}: field {field} is {found} but must be {wanted}; alter or remove it by hand, the operator never alters this"
    )]
    Mismatch {
        /// Stream or consumer.
        what: String,
        /// The broker's name of the field.
        field: &'static str,
        /// What the contract asks for.
        wanted: String,
        /// What exists.
        found: String,
    },
    /// Something does not exist.
    #[error("{what} does not exist")]
    Missing {
        /// Stream or consumer.
        what: String,
    },
    /// Something does not exist, and the operator may not create it.
    #[error("{what} does not exist; create it, or set nats.streams.manage to true")]
    Unmanaged {
        /// Stream or consumer.
        what: String,
    },
    /// A stream keeps what a core queue group gets.
    #[error(
        "nats.delivery is Core, and stream {stream} keeps all that comes on {subject} too; drain and remove it, or use another subject"
    )]
    Captured {
        /// Subject of both.
        subject: String,
        /// Name of the stream.
        stream: String,
    },
    /// Another consumer already takes the subject: a message is for one of them only.
    #[error(
        "nats.subject {subject} is already taken by nats.queueGroup {group}{pool}; use that group, or another subject",
        pool = pool.as_ref().map(|pool| format!(" of pool {pool}")).unwrap_or_default()
    )]
    Taken {
        /// Subject that both want.
        subject: String,
        /// Who has it.
        group: String,
        /// Its pool, as namespace/name, where the operator knows one.
        pool: Option<String>,
    },
}

impl BrokerError {
    pub(crate) fn unanswered(what: String, error: &dyn StdError) -> Self {
        Self::Unanswered { what, why: chain(error) }
    }

    pub(crate) fn refused(what: String, error: &dyn StdError) -> Self {
        Self::Refused { what, why: chain(error) }
    }

    /// Reason of a condition: a closed set.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Secret { source, .. } => source.reason(),
            Self::Credentials { .. } => reason::SECRET_UNUSABLE,
            Self::Unreachable { .. } | Self::NotAllowed { .. } => reason::NATS_UNREACHABLE,
            Self::Panicked => reason::PANICKED,
            Self::Unanswered { .. } => reason::NATS_NOT_ANSWERING,
            Self::Refused { .. } => reason::NATS_REFUSED,
            Self::Mismatch { .. } => reason::STREAM_MISMATCH,
            Self::Missing { .. } | Self::Unmanaged { .. } => reason::STREAM_MISSING,
            Self::Taken { .. } | Self::Captured { .. } => reason::SUBJECT_TAKEN,
        }
    }
}
