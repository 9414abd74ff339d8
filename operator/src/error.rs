//! Why it did not go. "Not ready yet" is no error, it is a condition.

mod broker; // why a broker cannot be used
mod secret; // why a Secret is of no use

use std::error::Error as StdError;

use kube::runtime::watcher;

use crate::pool::InvalidPool;
use crate::reason;

pub use broker::BrokerError;
pub use secret::SecretError;

/// Why a pool could not be reconciled: one variant for each thing that a person can do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The spec cannot be acted on. What runs is kept.
    #[error("{0}")]
    Invalid(#[from] InvalidPool),
    /// The object does not fit the types at all.
    #[error("the WorkerPool cannot be read: {0}")]
    Unreadable(String),
    /// Somebody else's object has the name that a child needs.
    #[error("{kind} `{name}` is in the way: {owner}; it is left untouched, remove it or rename the pool")]
    InTheWay {
        /// Kind of the object.
        kind: String,
        /// Name of the object.
        name: String,
        /// Whose it is.
        owner: String,
    },
    /// A child cannot be read.
    #[error("{kind} `{name}` cannot be read: {}", explain(source))]
    Observe {
        /// Kind of the child.
        kind: String,
        /// Name of the child.
        name: String,
        /// What the API server said.
        source: kube::Error,
    },
    /// A child cannot be written.
    #[error("{kind} `{name}` cannot be applied: {}", explain(source))]
    Apply {
        /// Kind of the child.
        kind: String,
        /// Name of the child.
        name: String,
        /// What the API server said.
        source: kube::Error,
    },
    /// A child that is wanted no more cannot be removed.
    #[error("{kind} `{name}` cannot be removed: {}", explain(source))]
    Remove {
        /// Kind of the child.
        kind: String,
        /// Name of the child.
        name: String,
        /// What the API server said.
        source: kube::Error,
    },
    /// The status cannot be written.
    #[error("the status cannot be written: {}", explain(.0))]
    Publish(kube::Error),
    /// Another operator acts, or will: it says how the pool is, too.
    #[error("the Lease is another operator's, or nobody's")]
    NotLeading,
    /// A bug. Only this pool waits.
    #[error("the reconciler panicked; the log has the details")]
    Panicked,
}

impl Error {
    /// Reason of a condition and label of a metric: a closed set.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Invalid(_) => reason::INVALID_SPEC,
            Self::Unreadable(_) => reason::UNREADABLE_SPEC,
            Self::InTheWay { .. } => reason::NAME_CONFLICT,
            Self::Observe { source: kube::Error::Api(status), .. }
            | Self::Apply { source: kube::Error::Api(status), .. }
            | Self::Remove { source: kube::Error::Api(status), .. }
                if status.code == 403 =>
            {
                forbidden(&status.message)
            }
            Self::Observe { .. } => reason::OBSERVE_FAILED,
            Self::Apply { .. } => reason::APPLY_FAILED,
            Self::Remove { .. } => reason::REMOVE_FAILED,
            Self::Publish(_) => reason::PUBLISH_FAILED,
            Self::NotLeading => reason::NOT_LEADING,
            Self::Panicked => reason::PANICKED,
        }
    }

    /// Whether only a changed spec can help.
    pub const fn waits_for_a_change(&self) -> bool {
        matches!(self, Self::Invalid(_) | Self::Unreadable(_))
    }
}

/// The API server has one code for three situations; only its sentence tells them apart.
fn forbidden(message: &str) -> &'static str {
    if message.contains("exceeded quota") {
        reason::QUOTA_EXCEEDED
    } else if message.contains("is being terminated") {
        reason::NAMESPACE_TERMINATING
    } else {
        reason::FORBIDDEN
    }
}

/// The sentence of the API server, without the structure around it.
pub(crate) fn explain(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

/// The same for a watch.
pub(crate) fn explain_watch(error: &watcher::Error) -> String {
    match error {
        watcher::Error::InitialListFailed(source)
        | watcher::Error::WatchStartFailed(source)
        | watcher::Error::WatchFailed(source) => explain(source),
        watcher::Error::WatchError(status) => status.message.clone(),
        watcher::Error::NoResourceVersion => error.to_string(),
    }
}

/// An error and its causes.
pub(crate) fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // Many errors of the client already print their source.
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    #[test]
    fn three_situations_of_one_code_are_told_apart_whatever_was_tried() {
        let (kind, name) = ("ConfigMap".to_owned(), "orders".to_owned());
        for (message, expected) in [
            ("configmaps \"orders\" is forbidden: exceeded quota: few, requested: count/configmaps=1", "QuotaExceeded"),
            (
                "configmaps \"orders\" is forbidden: unable to create new content in namespace shop because it is being \
                 terminated",
                "NamespaceTerminating",
            ),
            ("configmaps \"orders\" is forbidden: User \"operator\" cannot patch resource", "Forbidden"),
        ] {
            let source = || kube::Error::Api(Box::new(Status::failure(message, "Forbidden").with_code(403)));
            let (kind, name) = (kind.clone(), name.clone());
            for error in [
                Error::Observe { kind: kind.clone(), name: name.clone(), source: source() },
                Error::Apply { kind: kind.clone(), name: name.clone(), source: source() },
                Error::Remove { kind, name, source: source() },
            ] {
                assert_eq!(error.reason(), expected, "{error}");
            }
        }
    }
}
