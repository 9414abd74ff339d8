//! Whether an assignment will run.

use serde::Serialize;

/// What the Router is told before anything runs.
#[derive(Debug, Serialize)]
pub struct Verdict<'a> {
    /// As the assignment says; empty where that cannot be read.
    pub assignment_id: &'a str,
    /// `accepted` or `rejected`.
    pub status: &'static str,
    /// For a person.
    pub message: &'a str,
    /// As the assignment says; empty where that cannot be read.
    pub request_id: &'a str,
    /// As the assignment says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<&'a str>,
    /// As the assignment says; empty where that cannot be read.
    pub tenant_id: &'a str,
    /// The worker that says so.
    pub worker_id: &'a str,
    /// Why it is `rejected`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<Refused<'a>>,
    /// Unix time in milliseconds.
    pub acknowledged_at: i64,
}

/// Why nothing is done: in a verdict, and in the answer to a request that cannot be read.
#[derive(Debug, Serialize)]
pub struct Refused<'a> {
    /// The public number.
    pub code: u16,
    /// For a person.
    pub message: &'a str,
    /// Whether the same may be taken later.
    pub retryable: bool,
}
