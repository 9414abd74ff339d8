//! A real nats-server with JetStream, on a loopback port and in a directory of its own.

use std::io::Read;
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::process::{Process, free_port};
use crate::tool;

/// How long a server may take to greet; 30 ms are usual.
const START: Duration = Duration::from_secs(20);

/// A running server; ended and removed when it is dropped.
#[derive(Debug)]
pub struct NatsServer {
    process: Process,
    port: u16,
    directory: TempDir,
}

impl NatsServer {
    /// A server with the defaults and JetStream.
    pub fn start() -> Self {
        Self::with("")
    }

    /// A server with these lines in its configuration.
    pub fn with(settings: &str) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let port = free_port();
        configure(directory.path(), port, settings);
        let mut server = Self { process: run(directory.path()), port, directory };
        assert!(greets(&mut server.process, port), "nats-server does not start: {}", server.log());
        server
    }

    /// A server that keeps nothing.
    pub fn without_jetstream() -> Self {
        let mut server = Self::start();
        let directory = server.directory.path();
        std::fs::write(directory.join("nats.conf"), format!("listen: \"127.0.0.1:{}\"\n", server.port))
            .expect("a file");
        server.restart();
        server
    }

    /// For `--nats-url`.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// What it has written into its log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(log(self.directory.path())).unwrap_or_default()
    }

    /// Publishes with headers as they are: no client would send these.
    pub async fn publish_with_headers(&self, subject: &str, headers: &[u8], payload: &Value) {
        let mut server = tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).await.expect("a connection");
        let payload = payload.to_string();
        let (headers_len, whole) = (headers.len(), headers.len() + payload.len());
        let head =
            format!("CONNECT {{\"verbose\":false,\"headers\":true}}\r\nHPUB {subject} {headers_len} {whole}\r\n");
        let parts = [head.as_bytes(), headers, payload.as_bytes(), b"\r\nPING\r\n"];
        server.write_all(&parts.concat()).await.expect("it is sent");
        let mut answers = String::new();
        while !answers.contains("PONG") {
            let mut some = [0; 4096];
            let read = server.read(&mut some).await.expect("an answer");
            assert!(read > 0 && !answers.contains("-ERR"), "{answers}");
            answers += &String::from_utf8_lossy(&some[..read]);
        }
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts it again on the same port and store.
    pub fn restart(&mut self) {
        self.process.kill();
        self.process = run(self.directory.path());
        assert!(greets(&mut self.process, self.port), "nats-server does not come back on port {}", self.port);
    }

    /// Starts it again with other lines in its configuration.
    pub fn restart_with(&mut self, settings: &str) {
        self.process.kill();
        configure(self.directory.path(), self.port, settings);
        self.restart();
    }

    /// Lets it read other lines of its configuration while it runs.
    pub fn reload_with(&self, settings: &str) {
        configure(self.directory.path(), self.port, settings);
        self.process.hang_up();
    }

    /// Stops it where it stands: connections stay open and silent.
    pub fn pause(&self) {
        self.process.pause();
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.process.resume();
    }
}

fn configure(directory: &Path, port: u16, settings: &str) {
    let store = directory.join("store");
    let config = format!("listen: \"127.0.0.1:{port}\"\njetstream {{ store_dir: {store:?} }}\n{settings}\n");
    std::fs::write(directory.join("nats.conf"), config).expect("a configuration file");
}

fn run(directory: &Path) -> Process {
    let mut command = Command::new(tool::program("nats-server"));
    command.arg("--config").arg(directory.join("nats.conf")).arg("--log").arg(log(directory));
    Process::start("nats-server", &mut command)
}

fn log(directory: &Path) -> PathBuf {
    directory.join("nats.log")
}

/// Whether the server says who it is; not so when it has ended instead.
fn greets(process: &mut Process, port: u16) -> bool {
    let started = Instant::now();
    while started.elapsed() < START && process.status().is_none() {
        let mut greeting = [0; 5];
        if TcpStream::connect((Ipv4Addr::LOCALHOST, port))
            .and_then(|mut stream| stream.read_exact(&mut greeting))
            .is_ok_and(|()| greeting == *b"INFO ")
        {
            // Whoever greets on this port is ours only if ours still runs.
            return process.status().is_none();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}
