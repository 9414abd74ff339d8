//! A database server as a child process, in a directory of its own and as nobody in particular.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use rustix::process::geteuid;

/// How long a server may take to start on a busy machine.
pub const START: Duration = Duration::from_secs(60);

/// Runs its arguments until its input ends, which is at the latest when the process that holds the other end is gone,
/// however it goes. Then nothing is left of server and directory.
const UNTIL_INPUT_ENDS: &str = r#"
    exec 2>/dev/null
    trap '' INT TERM
    directory=$1; shift
    "$@" </dev/null >>"$directory/log" 2>&1 &
    cat >/dev/null
    kill -9 $!; wait
    if [ ! -e "$directory/keep" ]; then
        until rm -rf "$directory"; do sleep 0.1; done
    fi
"#;

/// A running server.
#[derive(Debug)]
pub struct Server {
    /// Its end is the server's end.
    input: Option<ChildStdin>,
    shell: Child,
    directory: PathBuf,
}

impl Server {
    /// Starts a program that stays in the foreground.
    pub fn start(directory: &Path, command: &[String]) -> Self {
        let mut shell = Command::new("bash")
            .args(["-c", UNTIL_INPUT_ENDS, "server"])
            .arg(directory)
            .args(unprivileged())
            .args(command)
            .stdin(Stdio::piped())
            .spawn()
            .expect("bash runs");
        Self { input: shell.stdin.take(), shell, directory: directory.to_owned() }
    }

    /// `kill -9` of it and all its sessions; its files stay.
    pub fn kill(mut self) {
        std::fs::write(self.directory.join("keep"), "").expect("a file");
        self.input = None;
        let _ = self.shell.wait();
        std::fs::remove_file(self.directory.join("keep")).expect("the file is there");
    }

    /// What it said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.shell.try_wait().expect("a child can be asked").is_none()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.input = None;
        let _ = self.shell.wait();
    }
}

/// A directory that the servers may write, gone when its server is.
pub fn directory() -> PathBuf {
    let directory = tempfile::tempdir().expect("a temporary directory").keep();
    if geteuid().is_root() {
        std::os::unix::fs::chown(&directory, Some(NOBODY), Some(NOBODY)).expect("root may give directories away");
    }
    directory
}

/// A file that only the server may read.
pub fn write_private(path: &Path, content: &str) {
    std::fs::write(path, content).expect("a file");
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).expect("our own file");
    if geteuid().is_root() {
        std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).expect("root may give files away");
    }
}

/// Runs a program that sets a server up.
pub fn set_up(directory: &Path, command: &[String]) {
    let all: Vec<String> = unprivileged().into_iter().chain(command.iter().cloned()).collect();
    let (program, arguments) = all.split_first().expect("a program");
    let output = Command::new(program).args(arguments).current_dir(directory).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("cannot run {program}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Servers refuse to be root.
const NOBODY: u32 = 65_534;

fn unprivileged() -> Vec<String> {
    let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"];
    if geteuid().is_root() { nobody.map(str::to_owned).to_vec() } else { Vec::new() }
}

/// A program in `PATH`, or else in one of these directories.
pub fn program(name: &str, others: &[PathBuf]) -> Option<PathBuf> {
    #[expect(clippy::disallowed_methods, reason = "where programs are is the one thing that is asked here")]
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain(others.iter().cloned());
    directories.map(|directory| directory.join(name)).find(|path| path.is_file())
}
