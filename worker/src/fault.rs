//! The 1xxx–5xxx table: every cause of a refusal or a failure, with its number and what follows from it.

use std::time::Duration;

use crate::contract::{Details, Status};

/// Why an assignment was refused or a block did not succeed.
///
/// The number alone does not decide whether a retry helps (3003 is retryable for 503 and final for 404), so the cause
/// is the type, and the number is a view of it. Numbers are public: never reuse one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Not JSON, not an object, nested too deep, an unknown block type, or a value that can never work.
    InvalidInput,
    /// A required field is missing or empty.
    MissingField,
    /// A field is present, but of the wrong type, out of range or unparsable.
    InvalidFormat,
    /// This worker has no slots in the pool that the assignment names.
    NoSuchPool,
    /// The assignment asks for more memory than this worker may ever hold.
    NeverFits,
    /// It needs something kept, and this broker has no JetStream.
    NoJetStream,
    /// The tenant has used up what it may use for now.
    OverBudget,
    /// This worker is full, or stops, and nobody else is given its work.
    Overloaded,
    /// A missing file, an SQL error: the block ran and its work failed.
    ExecutionFailed,
    /// Database busy, pool exhausted, disk full: it may pass.
    ResourceUnavailable,
    /// Over a cap of its own: bytes, rows, memory, CPU time, or a result larger than the broker takes.
    OverCap,
    /// A path, host or statement that is not allowed.
    NotAllowed,
    /// Refused, reset, or the name did not resolve.
    Network,
    /// TLS or certificate failure.
    Tls,
    /// The peer did not accept the connection in time.
    ConnectTimeout,
    /// The peer answered with this status, 400 or above.
    HttpStatus(u16),
    /// More redirects than are followed.
    TooManyRedirects,
    /// A bug of ours: a panic was caught.
    Internal,
    /// It has killed its workers too often.
    Poison,
    /// The deadline of the whole block passed.
    DeadlinePassed,
    /// Somebody wanted it stopped.
    Cancelled,
    /// Nobody who was asked has answered in time.
    NotAnswered,
}

impl Cause {
    /// The public number.
    pub const fn code(self) -> u16 {
        match self {
            Self::InvalidInput => 1001,
            Self::MissingField => 1002,
            Self::InvalidFormat => 1003,
            Self::ExecutionFailed => 2001,
            Self::NoSuchPool | Self::NeverFits | Self::NoJetStream | Self::ResourceUnavailable | Self::OverCap => 2002,
            Self::NotAllowed => 2003,
            Self::OverBudget => 2004,
            Self::Network | Self::Tls => 3001,
            Self::ConnectTimeout => 3002,
            Self::HttpStatus(_) | Self::TooManyRedirects => 3003,
            Self::Internal | Self::Poison => 4001,
            Self::Overloaded => 4002,
            Self::Cancelled => 5001,
            Self::DeadlinePassed | Self::NotAnswered => 5002,
        }
    }

    /// Whether the same assignment may succeed later.
    pub const fn is_retryable(self) -> bool {
        match self {
            Self::NoSuchPool
            | Self::OverBudget
            | Self::Overloaded
            | Self::ResourceUnavailable
            | Self::Network
            | Self::ConnectTimeout
            | Self::Internal
            | Self::DeadlinePassed => true,
            Self::HttpStatus(status) => status >= 500 || matches!(status, 408 | 425 | 429),
            Self::InvalidInput
            | Self::MissingField
            | Self::InvalidFormat
            | Self::NeverFits
            | Self::NoJetStream
            | Self::ExecutionFailed
            | Self::OverCap
            | Self::NotAllowed
            | Self::Tls
            | Self::TooManyRedirects
            | Self::Poison
            | Self::Cancelled
            | Self::NotAnswered => false,
        }
    }

    /// Whether this worker tries the block again before it reports. A bug would only repeat itself.
    pub const fn is_retried_here(self) -> bool {
        self.is_retryable()
            && !matches!(self, Self::Internal | Self::OverBudget | Self::Overloaded | Self::DeadlinePassed)
    }

    /// The status of the result that reports it.
    pub const fn status(self) -> Status {
        match self {
            Self::DeadlinePassed | Self::NotAnswered => Status::Timeout,
            Self::Cancelled => Status::Cancelled,
            _ => Status::Error,
        }
    }

    /// Whether the assignment is also kept as a dead letter, whatever the administrator has chosen.
    pub const fn is_dead_letter(self) -> bool {
        Letters::Final.include(self.code(), self.is_retryable())
    }
}

/// Which errors become dead letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Letters {
    /// Those that no retry helps.
    Final,
    /// Those too whose attempts here are used up.
    Exhausted,
}

impl Letters {
    /// Whether an error with these public parts is one of them: so a record says it as well as its cause did. A bug, a
    /// cancel, a deadline and a worker without room never are.
    pub const fn include(self, code: u16, retryable: bool) -> bool {
        match (code, retryable) {
            (5001 | 5002, _) | (4001 | 4002, true) => false,
            (_, false) => true,
            (_, true) => matches!(self, Self::Exhausted),
        }
    }
}

/// What a failed block says of itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    /// The row of the table.
    pub cause: Cause,
    /// For a person; never holds a credential.
    pub message: String,
    /// For a program.
    pub details: Details,
    /// How long the peer asked to be left alone.
    pub retry_after: Option<Duration>,
    /// False where a part of the output has left already: this worker does not try the block again.
    pub may_repeat: bool,
}

/// What a detail repeats of a text that came from outside, in bytes: an error has to fit the broker many times over.
pub(crate) const EXCERPT_BYTES: usize = 2048;

/// What a message that has to be short keeps, in bytes.
const SHORT_BYTES: usize = 256;

/// The beginning of a message, where all of it is too much.
pub fn short(message: &str) -> &str {
    message.get(..message.floor_char_boundary(SHORT_BYTES)).unwrap_or(message)
}

/// The beginning of a text as a detail repeats it; one that is cut ends in an ellipsis.
pub fn excerpt(mut text: String) -> String {
    if text.len() > EXCERPT_BYTES {
        text.truncate(text.floor_char_boundary(EXCERPT_BYTES));
        text.push('…');
    }
    text
}

impl Fault {
    /// A fault without details.
    pub fn new(cause: Cause, message: impl Into<String>) -> Self {
        Self { cause, message: message.into(), details: Details::default(), retry_after: None, may_repeat: true }
    }

    /// The same fault with details.
    #[must_use]
    pub fn with(self, details: Details) -> Self {
        Self { details, ..self }
    }

    /// Says less: without the peer's words, then without details, then with the beginning of the message. False where
    /// nothing is left to leave out.
    pub fn shorten(&mut self) -> bool {
        if self.details.body.take().is_some() {
            return true;
        }
        if self.details != Details::default() {
            self.details = Details::default();
            return true;
        }
        let kept = short(&self.message).len();
        let is_long = kept < self.message.len();
        self.message.truncate(kept);
        is_long
    }
}

/// Why a payload is not an assignment that can be run: the row of the table and the field that it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    /// The row of the table.
    pub cause: Cause,
    /// A JSON pointer into the assignment; empty for the whole of it.
    pub pointer: String,
    /// What is wrong, as the end of a sentence that begins with the pointer; never quotes a value that may be secret.
    pub reason: String,
}

impl Invalid {
    /// 1001: it can never work.
    pub fn input(pointer: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { cause: Cause::InvalidInput, pointer: pointer.into(), reason: reason.into() }
    }

    /// 1002: missing or empty.
    pub fn missing(pointer: impl Into<String>) -> Self {
        Self { cause: Cause::MissingField, pointer: pointer.into(), reason: "is missing or empty".to_owned() }
    }

    /// 1003: present, but not as it should be.
    pub fn format(pointer: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { cause: Cause::InvalidFormat, pointer: pointer.into(), reason: reason.into() }
    }

    /// 2003: well-formed, but not allowed here.
    pub fn not_allowed(pointer: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { cause: Cause::NotAllowed, pointer: pointer.into(), reason: reason.into() }
    }
}

impl std::fmt::Display for Invalid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.pointer.as_str() {
            "" => write!(f, "the assignment {}", self.reason),
            pointer => write!(f, "{pointer} {}", self.reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_decides_whether_an_http_error_is_final() {
        for status in [408, 425, 429, 500, 503, 599] {
            assert!(Cause::HttpStatus(status).is_retryable(), "{status}");
        }
        for status in [400, 401, 404, 410, 451] {
            assert!(Cause::HttpStatus(status).is_dead_letter(), "{status}");
        }
    }

    #[test]
    fn a_long_detail_is_cut_between_characters() {
        assert_eq!(excerpt("/data/x".to_owned()), "/data/x");
        let cut = excerpt("é".repeat(EXCERPT_BYTES));
        assert_eq!(cut, format!("{}…", "é".repeat(EXCERPT_BYTES / 2)));
    }

    #[test]
    fn a_fault_is_shortened_step_by_step_to_its_number_and_the_beginning_of_its_message() {
        let details = Details { body: Some("b".repeat(2048)), url: Some("u".repeat(2048)), ..Details::default() };
        let mut fault = Fault::new(Cause::HttpStatus(404), "é".repeat(1000)).with(details);
        let mut sizes = vec![];
        while fault.shorten() {
            let details = fault.details.url.as_ref().map_or(0, String::len);
            sizes.push((fault.details.body.is_some(), details, fault.message.len()));
        }
        assert_eq!(sizes, [(false, 2048, 2000), (false, 0, 2000), (false, 0, 256)]);
        assert_eq!(fault.cause, Cause::HttpStatus(404));
    }

    #[test]
    fn a_passed_deadline_is_a_retryable_timeout_that_is_not_tried_again_here() {
        let cause = Cause::DeadlinePassed;
        assert_eq!((cause.code(), cause.status(), cause.is_retryable()), (5002, Status::Timeout, true));
        assert!(!cause.is_retried_here() && !cause.is_dead_letter());
    }

    #[test]
    fn an_approval_that_nobody_answers_is_a_timeout_that_is_not_asked_again() {
        let cause = Cause::NotAnswered;
        assert_eq!((cause.code(), cause.status(), cause.is_retryable()), (5002, Status::Timeout, false));
        assert!(!cause.is_retried_here() && !cause.is_dead_letter());
    }

    #[test]
    fn a_bug_is_reported_at_once_and_may_be_tried_again_by_the_router() {
        assert!(Cause::Internal.is_retryable() && !Cause::Internal.is_retried_here());
    }

    #[test]
    fn what_was_tried_again_here_is_a_letter_only_where_exhausted_ones_are() {
        for cause in [Cause::ResourceUnavailable, Cause::Network, Cause::ConnectTimeout, Cause::HttpStatus(503)] {
            assert!(cause.is_retried_here());
            assert!(Letters::Exhausted.include(cause.code(), cause.is_retryable()), "{cause:?}");
            assert!(!Letters::Final.include(cause.code(), cause.is_retryable()), "{cause:?}");
        }
        for cause in [Cause::Internal, Cause::Overloaded, Cause::DeadlinePassed, Cause::Cancelled, Cause::NotAnswered] {
            assert!(!Letters::Exhausted.include(cause.code(), cause.is_retryable()), "{cause:?}");
        }
    }

    #[test]
    fn an_invalid_field_reads_as_a_sentence() {
        assert_eq!(Invalid::missing("/job/url").to_string(), "/job/url is missing or empty");
        assert_eq!(Invalid::input("", "is not JSON").to_string(), "the assignment is not JSON");
    }
}
