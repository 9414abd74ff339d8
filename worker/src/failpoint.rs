//! Where a fault campaign stops a worker: between the steps of an assignment. Only in builds with debug assertions, so
//! in no image and no release.
//!
//! A worker that is started with `BEAMLINE_FAILPOINTS=<path of a Unix socket>` says at each point where it is, and waits
//! for leave to go on: whoever listens there can kill it, stop it or cut it off exactly between two steps. And one with
//! `BEAMLINE_ENDS=<name of a vital task>` loses that task.

/// Between two steps of an assignment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// The delivery is here, and nothing has been said.
    Pulled,
    /// The Router has been told that it will run.
    Accepted,
    /// What is recorded of it has been read.
    LookedUp,
    /// It has its slot.
    SlotTaken,
    /// The attempt's block has not begun.
    BeforeEffect,
    /// The attempt's block has ended.
    AfterEffect,
    /// The request for approval is kept.
    RequestStored,
    /// Whoever listens has been told of the request, and the Router of the verdict.
    RequestAnnounced,
    /// An answer to a request is kept.
    AnswerStored,
    /// What the request comes to is kept with it.
    RequestEnded,
    /// The outcome is known here only.
    BeforeRecord,
    /// The outcome is recorded.
    AfterRecord,
    /// A dead letter is due.
    BeforeDeadLetter,
    /// The dead letter is kept.
    AfterDeadLetter,
    /// The Router has not been told how it ended.
    BeforeResult,
    /// The Router has been told how it ended, or that it will not run.
    AfterResult,
    /// The broker has been told that the delivery is done.
    AfterSettle,
    /// The request for approval is kept no more.
    RequestRemoved,
}

impl Point {
    /// Every point, in the order in which an assignment meets them; what waits for a person is settled before its answer.
    pub const ALL: [Self; 18] = [
        Self::Pulled,
        Self::Accepted,
        Self::LookedUp,
        Self::SlotTaken,
        Self::BeforeEffect,
        Self::AfterEffect,
        Self::RequestStored,
        Self::RequestAnnounced,
        Self::AnswerStored,
        Self::RequestEnded,
        Self::BeforeRecord,
        Self::AfterRecord,
        Self::BeforeDeadLetter,
        Self::AfterDeadLetter,
        Self::BeforeResult,
        Self::AfterResult,
        Self::AfterSettle,
        Self::RequestRemoved,
    ];

    /// The word for it on the socket.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pulled => "pulled",
            Self::Accepted => "accepted",
            Self::LookedUp => "looked-up",
            Self::SlotTaken => "slot-taken",
            Self::BeforeEffect => "before-effect",
            Self::AfterEffect => "after-effect",
            Self::RequestStored => "request-stored",
            Self::RequestAnnounced => "request-announced",
            Self::AnswerStored => "answer-stored",
            Self::RequestEnded => "request-ended",
            Self::BeforeRecord => "before-record",
            Self::AfterRecord => "after-record",
            Self::BeforeDeadLetter => "before-dead-letter",
            Self::AfterDeadLetter => "after-dead-letter",
            Self::BeforeResult => "before-result",
            Self::AfterResult => "after-result",
            Self::AfterSettle => "after-settle",
            Self::RequestRemoved => "request-removed",
        }
    }
}

/// Nothing: shipped programs have no fail-points.
#[cfg(not(debug_assertions))]
pub async fn reach(_point: Point) {}

/// Waits for leave to go on, where somebody listens; words instead of leave are what it panics with.
#[cfg(debug_assertions)]
pub async fn reach(point: Point) {
    if let Some(socket) = socket() {
        // Whoever listened has gone: there is nobody left to wait for.
        let words = ask(socket, point).await.unwrap_or_default();
        assert!(words.is_empty(), "{words}");
    }
}

/// The task itself: shipped programs have no fail-points.
#[cfg(not(debug_assertions))]
pub async fn unless_it_ends(_name: &str, task: impl Future<Output = ()>) {
    task.await;
}

/// The task itself, unless `BEAMLINE_ENDS` names it: that one ends before it has begun.
#[cfg(debug_assertions)]
pub async fn unless_it_ends(name: &str, task: impl Future<Output = ()>) {
    if ends().is_none_or(|ends| ends != name) {
        task.await;
    }
}

#[cfg(debug_assertions)]
async fn ask(socket: &std::path::Path, point: Point) -> std::io::Result<String> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::UnixStream::connect(socket).await?;
    stream.write_all(point.as_str().as_bytes()).await?;
    stream.shutdown().await?;
    let mut words = String::new();
    stream.read_to_string(&mut words).await?;
    Ok(words)
}

#[cfg(debug_assertions)]
#[expect(clippy::disallowed_methods, reason = "no flag: shipped programs have no fail-points")]
fn socket() -> Option<&'static std::path::Path> {
    static SOCKET: std::sync::OnceLock<Option<std::path::PathBuf>> = std::sync::OnceLock::new();
    SOCKET.get_or_init(|| std::env::var_os("BEAMLINE_FAILPOINTS").map(Into::into)).as_deref()
}

#[cfg(debug_assertions)]
#[expect(clippy::disallowed_methods, reason = "no flag: shipped programs have no fail-points")]
fn ends() -> Option<std::ffi::OsString> {
    std::env::var_os("BEAMLINE_ENDS")
}
