//! What people are asked, what they answer, and what is kept of both.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// What approvers are told on [`APPROVAL_REQUEST`](super::APPROVAL_REQUEST).
#[derive(Debug, Serialize)]
pub struct HumanRequest<'a> {
    /// [`VERSION`](super::VERSION).
    pub version: &'static str,
    /// As the assignment says.
    pub assignment_id: &'a str,
    /// As the assignment says.
    pub request_id: &'a str,
    /// As the assignment says.
    pub tenant_id: &'a str,
    /// As the assignment says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<&'a str>,
    /// As the assignment says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_id: Option<&'a str>,
    /// What is asked.
    pub prompt: &'a str,
    /// Whose answers count.
    pub approvers: &'a [String],
    /// Unix time in milliseconds.
    pub requested_at: i64,
    /// Unix time in milliseconds.
    pub expires_at: i64,
}

/// What an approver publishes on [`APPROVAL_ANSWER`](super::APPROVAL_ANSWER).
#[derive(Debug, Deserialize)]
pub struct HumanResponse<'a> {
    /// [`VERSION`](super::VERSION), or nothing.
    #[serde(borrow)]
    pub version: Option<Cow<'a, str>>,
    /// Which assignment.
    #[serde(borrow)]
    pub assignment_id: Option<Cow<'a, str>>,
    /// Whose it is.
    #[serde(borrow)]
    pub tenant_id: Option<Cow<'a, str>>,
    /// Who answers.
    #[serde(borrow)]
    pub approver: Option<Cow<'a, str>>,
    /// What they decided.
    pub approved: Option<bool>,
    /// What they say about it.
    #[serde(borrow)]
    pub comment: Option<Cow<'a, str>>,
}

/// A request for approval as it is kept: with its assignment while it is open, with its result from then on.
#[derive(Debug, Deserialize, Serialize)]
pub struct StoredRequest {
    /// [`VERSION`](super::VERSION).
    pub version: String,
    /// Whose work it is.
    pub tenant_id: String,
    /// The Router's id, unique within the tenant.
    pub assignment_id: String,
    /// The newest publication that waits for it, as in [`HEADER_ANSWERS`](super::HEADER_ANSWERS).
    pub publication: String,
    /// `<namespace>/<name>` of the WorkerPool whose workers end it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Unix time in milliseconds.
    pub requested_at: i64,
    /// Unix time in milliseconds.
    pub expires_at: i64,
    /// Milliseconds that the assignment waited at the worker before.
    pub queue_ms: u64,
    /// The sequence of the record that its result replaces; 0 for none.
    pub replaces: u64,
    /// Unix time in milliseconds: what was said about the assignment before is not about this request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<i64>,
    /// W3C trace context of the publication.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// What tracing systems keep beside it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tracestate: Option<String>,
    /// As the Router published it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assignment: Option<Box<RawValue>>,
    /// Tells apart whoever came to the same result at the same time; unique.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_by: Option<String>,
    /// As it is recorded and published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Box<RawValue>>,
}

/// An answer as it is kept.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct StoredAnswer {
    /// Who answered.
    pub approver: String,
    /// What they decided.
    pub approved: bool,
    /// What they say about it; may be empty.
    pub comment: String,
    /// When the broker got it, Unix time in milliseconds.
    pub answered_at: i64,
    /// Its sequence there.
    pub sequence: u64,
}
