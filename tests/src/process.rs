//! Children that end with their owner, and what they said.

use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, TcpListener};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::wait::within;

/// How much of what a child said is shown when its test fails.
const SHOWN_LINES: usize = 60;

/// A child process: killed when it is dropped, and its last words are shown when the test fails.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    output: Lines,
    readers: Vec<JoinHandle<()>>,
}

/// Lines that are still being written.
#[derive(Clone, Debug, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl Process {
    /// Starts a program and reads what it says.
    pub fn start(name: impl Into<String>, command: &mut Command) -> Self {
        let started = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = started.unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let output = Lines::default();
        let readers = vec![
            output.read(child.stdout.take().expect("standard output is a pipe")),
            output.read(child.stderr.take().expect("standard error is a pipe")),
        ];
        Self { name: name.into(), child, output, readers }
    }

    /// What it has said so far, both outputs in the order in which they were read.
    pub fn lines(&self) -> Vec<String> {
        self.output.0.lock().unwrap().clone()
    }

    /// Its id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended, and how.
    pub fn status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child can be asked")
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> bool {
        self.status().is_none()
    }

    /// `kill -9`: nothing of it runs when this returns.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.hear_out();
    }

    /// Asks it to end.
    pub fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// Asks it to read its configuration again.
    pub fn hang_up(&self) {
        self.signal(Signal::HUP);
    }

    /// Stops it where it stands.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets a stopped one go on.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Its exit code when it ends by itself within the limit.
    pub async fn ended(&mut self, limit: Duration) -> Option<i32> {
        let what = format!("{} ends", self.name);
        let status = within(limit, &what, async || self.status()).await;
        self.hear_out();
        status.code()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("a child of ours can be signalled");
    }

    fn hear_out(&mut self) {
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let lines = self.lines();
            let skipped = lines.len().saturating_sub(SHOWN_LINES);
            eprintln!("---- {} said ({skipped} lines before)", self.name);
            lines.iter().skip(skipped).for_each(|line| eprintln!("{line}"));
        }
    }
}

impl Lines {
    fn read(&self, output: impl Read + Send + 'static) -> JoinHandle<()> {
        let lines = self.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                lines.0.lock().unwrap().push(line);
            }
        })
    }
}

/// The program of this name that `cargo build --workspace --bins` puts beside the directory of the running test.
pub fn built(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a running test has a program");
    let built = test.ancestors().map(|directory| directory.join(name)).find(|path| path.is_file());
    built.unwrap_or_else(|| panic!("{name} is not built: run `cargo build --workspace --bins`"))
}

/// A loopback port that nobody listens on, nor will: no other process of these tests gets it before this one has ended. It
/// lies below those that the kernel gives to outgoing connections, so that a server which is away for a moment finds it
/// free when it comes back.
pub fn free_port() -> u16 {
    const FIRST: u32 = 12_000;
    const COUNT: u32 = 17_000;
    static TAKEN: AtomicU32 = AtomicU32::new(0);
    loop {
        let next = std::process::id().wrapping_mul(199).wrapping_add(TAKEN.fetch_add(1, Ordering::Relaxed));
        let port = u16::try_from(FIRST + next % COUNT).expect("it is below 65536");
        if claim(port) && TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

/// Whether nobody has claimed this port: by a name that one process at a time can have, for as long as it runs.
fn claim(port: u16) -> bool {
    static CLAIMED: Mutex<Vec<UnixListener>> = Mutex::new(Vec::new());
    let name = SocketAddr::from_abstract_name(format!("beamline-tests-port-{port}")).expect("it is short");
    let claimed = UnixListener::bind_addr(&name);
    claimed.map(|claim| CLAIMED.lock().unwrap().push(claim)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_was_given_is_not_given_again_though_nobody_listens_there() {
        let port = free_port();
        assert!(TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok());
        assert!(!claim(port));
    }
}
