//! What most tests need: a broker, a worker that may touch the test's own directory and peer, and a Router.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::audit::{Allowed, audit};
use crate::nats::NatsServer;
use crate::peer::Peer;
use crate::router::{Router, assignment};
use crate::tcpfault::TcpFault;
use crate::worker::{Setup, Worker};

/// A hold lapses after 10 s; then the next worker needs a moment.
pub const LAPSE: Duration = Duration::from_secs(40);

/// Everything that a test drives. Fields end in this order: the worker before its broker.
#[derive(Debug)]
pub struct Rig {
    /// The program under test.
    pub worker: Worker,
    /// Who gives it work.
    pub router: Router,
    /// Whom it calls.
    pub peer: Peer,
    /// What they talk through.
    pub nats: NatsServer,
    /// The safe root.
    pub files: TempDir,
}

impl Rig {
    /// One of each, with these flags for the worker.
    pub async fn start(flags: &[&str]) -> Self {
        Self::at(NatsServer::start(), flags).await
    }

    /// One of each, at this broker.
    pub async fn at(nats: NatsServer, flags: &[&str]) -> Self {
        let files = tempfile::tempdir().expect("a temporary directory");
        let setup = flags.iter().fold(worker("worker-1", &files, flags), |setup, flag| setup.flag(*flag));
        let worker = setup.start(&nats).await;
        let router = Router::connect(&nats.url()).await;
        Self { worker, router, peer: Peer::start().await, nats, files }
    }

    /// A worker of the same kind in the place of the first, with a network of its own that may break.
    pub async fn moved_behind_a_link(&mut self) -> TcpFault {
        self.worker.kill();
        let network = TcpFault::before(SocketAddr::from(([127, 0, 0, 1], self.nats.port()))).await;
        let setup = self.another("worker-2");
        self.worker = setup.flag(format!("--nats-url=nats://127.0.0.1:{}", network.port())).spawn();
        self.worker.ready().await;
        network
    }

    /// Another worker of the same kind; not started yet.
    pub fn another(&self, name: &str) -> Setup {
        worker(name, &self.files, &[])
    }

    /// A path that assignments may name.
    pub fn path(&self, name: &str) -> String {
        self.files.path().join(name).to_string_lossy().into_owned()
    }

    /// Where a tenant's file of that path really is.
    pub fn file_of(&self, tenant: &str, name: &str) -> PathBuf {
        self.files.path().join(tenant).join(name)
    }

    /// A database of a tenant's, `sqlite://db.sqlite` to it, with what these statements make.
    pub fn database(&self, tenant: &str, statements: &str) -> rusqlite::Connection {
        std::fs::create_dir_all(self.file_of(tenant, "")).expect("a directory");
        let database = rusqlite::Connection::open(self.file_of(tenant, "db.sqlite")).expect("a database");
        database.execute_batch(statements).expect("it is as wanted");
        database
    }

    /// Has a job of a tenant done, and returns its result.
    pub async fn run(&self, tenant: &str, id: &str, job: Value) -> Value {
        let payload = assignment(tenant, id, job);
        self.router.submit(&payload).await;
        self.router.result(&payload).await
    }

    /// `fs.put` of a file.
    pub fn put(&self, name: &str, content: &str) -> Value {
        json!({ "type": "fs.put", "path": self.path(name), "content": content })
    }

    /// `http.request` to the peer.
    pub fn call(&self, path: &str) -> Value {
        json!({ "type": "http.request", "method": "POST", "url": self.peer.url(path), "body": "{}" })
    }
}

/// Waits until everything is settled, also what a worker held that has died, and holds it to all invariants.
///
/// # Panics
/// One of them is broken.
pub async fn kept_its_promise(router: &Router, peer: &Peer) {
    router.settled(LAPSE).await;
    let found = audit(router, &peer.hits("/"), Allowed { attempts: 3 }).await;
    assert!(found.is_empty(), "{found:#?}");
}

/// With the test's directory and, unless the flags say else, the test's peer within its reach.
fn worker(name: &str, files: &TempDir, flags: &[&str]) -> Setup {
    let setup = Worker::named(name).flag(format!("--fs-roots={}", files.path().display()));
    if flags.iter().any(|flag| flag.starts_with("--egress-allow")) {
        setup
    } else {
        setup.flag("--egress-allow=127.0.0.0/8")
    }
}
