//! Holds a worker of a test build exactly between two steps of an assignment, and an operator before or after a write.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
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

/// For [`crate::worker::Setup::env`] and [`crate::operator::Setup::env`]: the socket on which a program says where it is.
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
    waits: UnixStream,
}

impl Caught {
    /// It panics with these words where it is.
    pub async fn panics(mut self, words: &str) {
        self.waits.write_all(words.as_bytes()).await.expect("it waits");
    }
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
            let _ = caught.send(Caught { worker, waits: stream }).await;
        }
    }
}

/// Hears where an operator is, and holds it at a point that is armed, once.
#[derive(Debug)]
pub struct Points {
    socket: PathBuf,
    heard: Arc<Mutex<Heard>>,
    caught: mpsc::Receiver<UnixStream>,
}

#[derive(Debug, Default)]
struct Heard {
    points: Vec<String>,
    armed: Option<String>,
}

impl Points {
    /// On a socket in this directory; holds nobody yet.
    pub fn listen(directory: &Path) -> Self {
        let socket = directory.join("points");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let (sender, caught) = mpsc::channel(1);
        let heard = Arc::<Mutex<Heard>>::default();
        tokio::spawn(listen(listener, Arc::clone(&heard), sender));
        Self { socket, heard, caught }
    }

    /// For [`VARIABLE`].
    pub fn socket(&self) -> String {
        self.socket.to_string_lossy().into_owned()
    }

    /// Forgets what was heard so far, and holds whoever is next at this point.
    pub fn arm(&self, point: Option<&str>) {
        *self.heard.lock().expect("nobody panics in there") =
            Heard { points: Vec::new(), armed: point.map(str::to_owned) };
    }

    /// Makes whoever is held panic there.
    pub async fn panic(mut held: UnixStream) {
        held.write_all(b"!").await.expect("it waits for an answer");
    }

    /// The points that were reached since then, in order.
    pub fn heard(&self) -> Vec<String> {
        self.heard.lock().expect("nobody panics in there").points.clone()
    }

    /// When somebody is held: as long as the answer lives.
    pub async fn caught(&mut self) -> UnixStream {
        self.caught.recv().await.expect("the listener keeps a sender")
    }
}

async fn listen(listener: UnixListener, heard: Arc<Mutex<Heard>>, caught: mpsc::Sender<UnixStream>) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let mut point = String::new();
        if stream.read_to_string(&mut point).await.is_err() {
            continue;
        }
        let is_armed = {
            let mut heard = heard.lock().expect("nobody panics in there");
            heard.points.push(point.clone());
            heard.armed.take_if(|armed| *armed == point).is_some()
        };
        if is_armed {
            let _ = caught.send(stream).await;
        }
    }
}
