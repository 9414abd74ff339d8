//! Holds a worker of a test build exactly between two steps of an assignment.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

/// Where a worker can be held, in the order in which an assignment gets there.
pub const POINTS: [&str; 18] = [
    "pulled",
    "accepted",
    "looked-up",
    "slot-taken",
    "before-effect",
    "after-effect",
    "request-stored",
    "request-announced",
    "answer-stored",
    "request-ended",
    "before-record",
    "after-record",
    "before-dead-letter",
    "after-dead-letter",
    "before-result",
    "after-result",
    "after-settle",
    "request-removed",
];

/// For [`crate::worker::Setup::env`]: the socket on which a worker says where it is.
pub const VARIABLE: &str = "BEAMLINE_FAILPOINTS";

/// Holds whichever worker is the first to reach a point. Everybody goes on everywhere else, and there the next time.
#[derive(Debug)]
pub struct Trap {
    directory: PathBuf,
    point: &'static str,
    is_sprung: Arc<AtomicBool>,
    caught: mpsc::Sender<Caught>,
    first: mpsc::Receiver<Caught>,
}

/// A worker that waits at its point until this is dropped.
#[derive(Debug)]
pub struct Caught {
    /// Which one, counted from 0.
    pub worker: usize,
    _waits: UnixStream,
}

impl Trap {
    /// At this point; its sockets lie in the directory.
    pub fn at(point: &'static str, directory: &Path) -> Self {
        let (caught, first) = mpsc::channel(1);
        Self { directory: directory.to_owned(), point, is_sprung: Arc::default(), caught, first }
    }

    /// The socket for a worker, counted from 0.
    pub fn socket(&self, worker: usize) -> String {
        let path = self.directory.join(format!("points-{worker}"));
        let listener = UnixListener::bind(&path).expect("a socket");
        tokio::spawn(serve(listener, worker, self.point, Arc::clone(&self.is_sprung), self.caught.clone()));
        path.to_string_lossy().into_owned()
    }

    /// The worker that was caught, when it is.
    pub async fn caught(&mut self) -> Caught {
        self.first.recv().await.expect("the trap keeps a sender of its own")
    }
}

async fn serve(
    listener: UnixListener,
    worker: usize,
    point: &'static str,
    is_sprung: Arc<AtomicBool>,
    caught: mpsc::Sender<Caught>,
) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let mut reached = String::new();
        let is_here = stream.read_to_string(&mut reached).await.is_ok() && reached == point;
        if is_here && !is_sprung.swap(true, Ordering::Relaxed) {
            let _ = caught.send(Caught { worker, _waits: stream }).await;
        }
    }
}
