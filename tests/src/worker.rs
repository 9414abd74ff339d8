//! `beamline_worker` as its users run it: flags and variables in, HTTP, log lines and an exit code out.

use std::ffi::OsStr;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::clock::Clock;
use crate::nats::NatsServer;
use crate::process::{Process, built, free_port};
use crate::wait::{SOON, until, within};

/// A worker that runs, or ran.
#[derive(Debug)]
pub struct Worker {
    process: Process,
    admin: SocketAddr,
}

/// A worker that is about to be started.
#[derive(Debug)]
pub struct Setup {
    name: String,
    admin: SocketAddr,
    command: Command,
}

/// How a worker ended that was not meant to run.
#[derive(Debug)]
pub struct Ending {
    /// Its exit code.
    pub code: Option<i32>,
    /// Everything that it said.
    pub said: String,
}

impl Worker {
    /// A worker of this id, with the variables of nobody and probes on a port of its own.
    pub fn named(name: &str) -> Setup {
        let admin = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let mut command = Command::new(program());
        command.env_clear().args([format!("--worker-id={name}"), format!("--prometheus-endpoint={admin}")]);
        Setup { name: name.to_owned(), admin, command }
    }

    /// A request to the side door: status code and body; `None` while nobody answers.
    pub async fn get(&self, path: &str) -> Option<(u16, String)> {
        get(self.admin, path).await
    }

    /// Waits until it is ready.
    pub async fn ready(&self) {
        until("the worker is ready", async || self.get("/readyz").await.is_some_and(|(code, _)| code == 200)).await;
    }

    /// Waits until it is not ready for this reason, and returns all reasons.
    pub async fn unready(&self, reason: &str) -> String {
        let what = format!("the worker is not ready: {reason}");
        within(SOON, &what, async || match self.get("/readyz").await {
            Some((503, reasons)) if reasons.contains(reason) => Some(reasons),
            _ => None,
        })
        .await
    }

    /// One sample of its metrics; 0 where there is none.
    pub async fn metric(&self, series: &str) -> f64 {
        let (_, text) = self.get("/metrics").await.expect("the worker answers");
        sample(&text, series)
    }

    /// The first log line with this message.
    pub async fn says(&self, message: &str) -> Value {
        within(SOON, &format!("the worker says {message:?}"), async || {
            let logged = |line: &String| serde_json::from_str::<Value>(line).ok();
            self.lines().iter().filter_map(logged).find(|line| line["message"] == message)
        })
        .await
    }

    /// The most memory that it has ever held, in MiB.
    pub fn peak_memory_mib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).expect("the worker runs");
        let peak =
            status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
        peak.map_or(0, |kib: u64| kib / 1024)
    }

    /// Its exit code when it ends by itself.
    pub async fn ended(&mut self) -> Option<i32> {
        self.process.ended(SOON).await
    }
}

impl Deref for Worker {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

impl DerefMut for Worker {
    fn deref_mut(&mut self) -> &mut Process {
        &mut self.process
    }
}

impl Setup {
    /// Another flag.
    #[must_use]
    pub fn flag(mut self, flag: impl Into<String>) -> Self {
        self.command.arg(flag.into());
        self
    }

    /// A variable.
    #[must_use]
    pub fn env(mut self, variable: &str, value: &str) -> Self {
        self.command.env(variable, value);
        self
    }

    /// It goes by this clock.
    #[must_use]
    pub fn by(self, clock: &Clock) -> Self {
        clock.variables().into_iter().fold(self, |setup, (name, value)| setup.env(name, &value))
    }

    /// In a mount namespace of its own, where this is the `/etc/resolv.conf`.
    #[must_use]
    pub fn resolv_conf(self, file: &Path) -> Self {
        self.after_mounting(r#"/bin/mount --bind "$0" /etc/resolv.conf && exec "$@""#, file)
    }

    /// In a mount namespace of its own, where this directory is a disk of 64 KiB.
    #[must_use]
    pub fn small_disk(self, directory: &Path) -> Self {
        self.after_mounting(r#"/bin/mount -t tmpfs -o size=64k tmpfs "$0" && exec "$@""#, directory)
    }

    fn after_mounting(self, script: &str, place: &Path) -> Self {
        let unshare = ["--mount", "--", "/bin/sh", "-c", script];
        self.run_by("/usr/bin/unshare", unshare.map(OsStr::new).into_iter().chain([place.as_os_str()]))
    }

    /// Its system calls of these names are written into a file, with their files and the beginning of their bytes.
    #[must_use]
    pub fn traced(self, calls: &str, file: &Path) -> Self {
        let filter = format!("trace={calls}");
        // The worker stays the child of its test: the tracer is a grandchild.
        let options = ["-D", "-f", "-y", "-s", "4096", "-e", &filter, "-o"].map(OsStr::new);
        self.run_by("/usr/bin/strace", options.into_iter().chain([file.as_os_str()]))
    }

    /// Another program becomes the worker in the end.
    fn run_by<'a>(mut self, program: &str, args: impl IntoIterator<Item = &'a OsStr>) -> Self {
        let mut command = Command::new(program);
        command.env_clear().args(args).arg(self.command.get_program()).args(self.command.get_args());
        command.envs(self.command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        self.command = command;
        self
    }

    /// Starts it at this broker, and waits until it is ready.
    pub async fn start(self, nats: &NatsServer) -> Worker {
        let worker = self.flag(format!("--nats-url={}", nats.url())).spawn();
        worker.ready().await;
        worker
    }

    /// Starts it and waits for nothing.
    pub fn spawn(mut self) -> Worker {
        Worker { process: Process::start(format!("worker {}", self.name), &mut self.command), admin: self.admin }
    }

    /// Starts it and waits until it has ended by itself.
    pub async fn end(self) -> Ending {
        let mut worker = self.spawn();
        let code = worker.process.ended(Duration::from_secs(20)).await;
        Ending { code, said: worker.lines().join("\n") }
    }
}

/// The program.
pub fn program() -> PathBuf {
    built("beamline_worker")
}

/// One sample of these metrics; 0 where there is none.
pub(crate) fn sample(metrics: &str, series: &str) -> f64 {
    let sample = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok());
    sample.unwrap_or(0.0)
}

/// One GET request: status code and body; `None` where nobody answers.
pub async fn get(address: SocketAddr, path: &str) -> Option<(u16, String)> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await.ok()?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
    };
    tokio::time::timeout(Duration::from_secs(5), exchange).await.ok().flatten()
}
