//! What a campaign writes down while it runs, and the auditor reads: one line for each thing that was seen, from outside.

use std::fmt::{self, Display};
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;
use std::str::FromStr;
use std::sync::{Arc, Mutex};

use jiff::Timestamp;

use crate::router::json;

/// Something that was seen of one assignment. Times are milliseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fact {
    /// The Router is about to publish it: from here on the broker may have it.
    Tried,
    /// The broker has said that it keeps it.
    Acked,
    /// A verdict was heard.
    Verdict {
        /// Or else rejected.
        is_accepted: bool,
    },
    /// A result was heard.
    Result(Outcome),
    /// A peer was asked for it.
    Effect {
        /// When.
        at: i64,
    },
    /// Whoever asked a peer for it was gone before the answer.
    Orphaned {
        /// When.
        at: i64,
    },
    /// The listener was away: it may have missed anything, whomever it was about.
    Missed,
}

/// A result without its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Of the bytes.
    pub digest: u64,
    /// What follows from it.
    pub end: End,
}

/// What follows from a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Nothing more: success, cancelled, too late for good.
    Done,
    /// An error for good, of which a dead letter is kept.
    Failed,
    /// A new publication may replace it.
    Retryable,
}

impl Outcome {
    /// Of an ExecResult.
    pub fn of(result: &[u8]) -> Self {
        let mut hasher = DefaultHasher::new();
        result.hash(&mut hasher);
        let said = json(result);
        let end = match (said["status"] == "error", said["error"]["retryable"] == true) {
            (_, true) => End::Retryable,
            (true, false) => End::Failed,
            (false, false) => End::Done,
        };
        Self { digest: hasher.finish(), end }
    }
}

/// The token that stands for no assignment.
pub const NOBODY: &str = "-";

/// A file of facts that is being written. The last lines are on disk when the last handle is dropped.
#[derive(Clone, Debug)]
pub struct Journal(Arc<Mutex<BufWriter<File>>>);

impl Journal {
    /// A new file.
    pub fn create(path: &Path) -> Self {
        let file = File::create(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self(Arc::new(Mutex::new(BufWriter::new(file))))
    }

    /// One more fact about the assignment of this token.
    pub fn note(&self, token: &str, fact: Fact) {
        writeln!(self.0.lock().unwrap(), "{token} {fact}").expect("the disk has room");
    }

    /// Everything noted so far is on disk when this returns.
    pub fn flush(&self) {
        self.0.lock().unwrap().flush().expect("the disk has room");
    }
}

/// Reads a file of facts, line by line.
///
/// # Panics
/// A line says nothing that is known.
pub fn read(path: &Path, mut each: impl FnMut(&str, Fact)) {
    let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    for line in BufReader::new(file).lines() {
        let line = line.expect("text");
        let said = line.split_once(' ').and_then(|(token, fact)| Some((token, fact.parse().ok()?)));
        let (token, fact) = said.unwrap_or_else(|| panic!("{}: {line:?} says nothing", path.display()));
        each(token, fact);
    }
}

/// Milliseconds since 1970.
pub fn now() -> i64 {
    Timestamp::now().as_millisecond()
}

impl Display for Fact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tried => f.write_str("tried"),
            Self::Acked => f.write_str("acked"),
            Self::Verdict { is_accepted: true } => f.write_str("accepted"),
            Self::Verdict { is_accepted: false } => f.write_str("rejected"),
            Self::Result(Outcome { digest, end: End::Done }) => write!(f, "done {digest:x}"),
            Self::Result(Outcome { digest, end: End::Failed }) => write!(f, "failed {digest:x}"),
            Self::Result(Outcome { digest, end: End::Retryable }) => write!(f, "retryable {digest:x}"),
            Self::Effect { at } => write!(f, "effect {at}"),
            Self::Orphaned { at } => write!(f, "orphaned {at}"),
            Self::Missed => f.write_str("missed"),
        }
    }
}

/// What a line says is no fact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unknown;

impl FromStr for Fact {
    type Err = Unknown;

    fn from_str(line: &str) -> Result<Self, Unknown> {
        let (word, number) = line.split_once(' ').unwrap_or((line, ""));
        let at = || number.parse().map_err(|_| Unknown);
        let outcome = |end| {
            let digest = u64::from_str_radix(number, 16).map_err(|_| Unknown)?;
            Ok(Self::Result(Outcome { digest, end }))
        };
        match word {
            "tried" => Ok(Self::Tried),
            "acked" => Ok(Self::Acked),
            "accepted" => Ok(Self::Verdict { is_accepted: true }),
            "rejected" => Ok(Self::Verdict { is_accepted: false }),
            "done" => outcome(End::Done),
            "failed" => outcome(End::Failed),
            "retryable" => outcome(End::Retryable),
            "effect" => Ok(Self::Effect { at: at()? }),
            "orphaned" => Ok(Self::Orphaned { at: at()? }),
            "missed" => Ok(Self::Missed),
            _ => Err(Unknown),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("facts");
        let outcome = |end| Fact::Result(Outcome { digest: u64::MAX, end });
        let facts = [
            Fact::Tried,
            Fact::Acked,
            Fact::Verdict { is_accepted: true },
            Fact::Verdict { is_accepted: false },
            outcome(End::Done),
            outcome(End::Failed),
            outcome(End::Retryable),
            Fact::Effect { at: 7 },
            Fact::Orphaned { at: 8 },
            Fact::Missed,
        ];
        let journal = Journal::create(&path);
        facts.iter().for_each(|fact| journal.note("t.a", *fact));
        journal.flush();
        let mut found = Vec::new();
        read(&path, |token, fact| found.push((token.to_owned(), fact)));
        assert_eq!(found, facts.map(|fact| ("t.a".to_owned(), fact)));
    }
}
