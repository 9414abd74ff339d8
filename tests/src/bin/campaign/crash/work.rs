//! What runs in a crash sweep: every kind of block, as it succeeds and as it fails for good, what runs out of attempts,
//! what is refused, and what waits for a person.

use std::path::Path;

use beamline_tests::failpoint::POINTS;
use beamline_tests::peer::Peer;
use serde_json::{Value, json};

/// One assignment's worth of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    Http,
    HttpFails,
    /// Its attempts run out, where that makes a dead letter.
    HttpExhausted,
    Put,
    Get,
    GetFails,
    Sql,
    SqlFails,
    Refused,
    /// A person says yes as soon as they are asked.
    Approval,
}

/// How it must end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Success,
    /// An error with this code, for good or out of attempts, and a dead letter.
    Error(u16),
    /// A verdict with this code, and a dead letter.
    Refusal(u16),
}

/// Where what is refused never comes.
const NOT_REFUSED: [&str; 7] =
    ["accepted", "looked-up", "slot-taken", "before-effect", "after-effect", "before-record", "after-record"];

/// Where only what waits for a person comes.
const APPROVALS_ONLY: [&str; 5] =
    ["request-stored", "request-announced", "answer-stored", "request-ended", "request-removed"];
/// Where that never comes, beside dead letters: it has no slot and no attempts.
const NOT_APPROVALS: [&str; 4] = ["slot-taken", "before-effect", "after-effect", "before-result"];

/// Whose work it is.
pub(crate) const TENANT: &str = "acme";
/// Who is asked.
pub(crate) const APPROVER: &str = "ann";
const DATABASE: &str = "sweep.db";
const READ: &str = "read.txt";

impl Work {
    pub(crate) const ALL: [Self; 10] = [
        Self::Http,
        Self::HttpFails,
        Self::HttpExhausted,
        Self::Put,
        Self::Get,
        Self::GetFails,
        Self::Sql,
        Self::SqlFails,
        Self::Refused,
        Self::Approval,
    ];

    /// For people.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::HttpFails => "http-fails",
            Self::HttpExhausted => "http-exhausted",
            Self::Put => "put",
            Self::Get => "get",
            Self::GetFails => "get-fails",
            Self::Sql => "sql",
            Self::SqlFails => "sql-fails",
            Self::Refused => "refused",
            Self::Approval => "approval",
        }
    }

    /// What the assignment asks for; files lie below `root`.
    pub(crate) fn job(self, root: &Path, peer: &Peer) -> Value {
        let path = |name: &str| root.join(name).to_string_lossy().into_owned();
        let call = |path: &str| json!({"type": "http.request", "method": "POST", "url": peer.url(path), "body": "{}"});
        let query = |query: &str| json!({"type": "sql.query", "connection_string": format!("sqlite://{DATABASE}"), "query": query});
        match self {
            Self::Http => call("/ok"),
            Self::HttpFails => call("/status/404"),
            Self::HttpExhausted => call("/status/503"),
            Self::Put => json!({"type": "fs.put", "path": path("written.txt"), "content": "something"}),
            Self::Get => json!({"type": "fs.get", "path": path(READ)}),
            Self::GetFails => json!({"type": "fs.get", "path": path("not-there.txt")}),
            Self::Sql => query("SELECT n FROM numbers"),
            Self::SqlFails => query("SELECT n FROM not_there"),
            Self::Refused => json!({"type": "no.such.block"}),
            Self::Approval => json!({"type": "human.approval", "prompt": "Go on?", "approvers": [APPROVER]}),
        }
    }

    /// How it must end, whatever breaks meanwhile.
    pub(crate) const fn end(self) -> End {
        match self {
            Self::Http | Self::Put | Self::Get | Self::Sql | Self::Approval => End::Success,
            Self::HttpFails | Self::HttpExhausted => End::Error(3003),
            Self::GetFails | Self::SqlFails => End::Error(2001),
            Self::Refused => End::Refusal(1001),
        }
    }

    /// The points that it meets.
    pub(crate) fn points(self) -> impl Iterator<Item = &'static str> {
        let here = POINTS.into_iter().filter(move |point| match self {
            Self::Approval => !NOT_APPROVALS.contains(point),
            _ => !APPROVALS_ONLY.contains(point),
        });
        here.filter(move |point| match self.end() {
            End::Success => !point.ends_with("dead-letter"),
            End::Error(_) => true,
            End::Refusal(_) => !NOT_REFUSED.contains(point),
        })
    }
}

/// Makes what the tenant's work needs below `root`.
pub(crate) fn prepare(root: &Path) -> anyhow::Result<()> {
    let directory = root.join(TENANT);
    std::fs::create_dir(&directory)?;
    std::fs::write(directory.join(READ), "something to read")?;
    let database = rusqlite::Connection::open(directory.join(DATABASE))?;
    database.execute_batch("CREATE TABLE numbers (n INTEGER); INSERT INTO numbers VALUES (1), (2), (3);")?;
    Ok(())
}
