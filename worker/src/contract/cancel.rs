//! That an assignment is wanted no more.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use super::verdict::Refused;

/// What a requester publishes on [`CANCEL`](super::CANCEL), and what is kept of it.
#[derive(Debug, Deserialize, Serialize)]
pub struct Cancel<'a> {
    /// Must be [`VERSION`](super::VERSION).
    #[serde(borrow)]
    pub version: Option<Cow<'a, str>>,
    /// Which assignment.
    #[serde(borrow)]
    pub assignment_id: Option<Cow<'a, str>>,
    /// Whose it is.
    #[serde(borrow)]
    pub tenant_id: Option<Cow<'a, str>>,
    /// Why, for a person.
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Cow<'a, str>>,
    /// Who wants it.
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    pub requested_by: Option<Cow<'a, str>>,
    /// RFC 3339; only as it is kept: when the broker got it, or the last one of which that is known.
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    pub sent_at: Option<Cow<'a, str>>,
}

/// What a requester is told who gave a reply subject.
#[derive(Debug, Serialize)]
pub struct CancelAnswer<'a> {
    /// Which assignment.
    pub assignment_id: &'a str,
    /// What has come of it so far.
    pub outcome: CancelOutcome,
}

/// What has come of a cancel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CancelOutcome {
    /// A cancelled result is recorded.
    Cancelled,
    /// The cancel is kept; nothing is recorded.
    Recorded,
    /// Another result is recorded.
    Finished,
}

/// What a requester is told whose message cannot be read.
#[derive(Debug, Serialize)]
pub struct CancelError<'a> {
    /// Why.
    pub error: Refused<'a>,
}
