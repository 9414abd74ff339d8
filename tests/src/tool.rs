//! The pinned programs that tests run, built by `tests/cluster/tools.sh` where that has not been done.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{LazyLock, Mutex, PoisonError};

static BUILT: LazyLock<Mutex<HashMap<String, PathBuf>>> = LazyLock::new(Mutex::default);

/// The path of a program of that name.
pub fn program(name: &str) -> PathBuf {
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    built.entry(name.to_owned()).or_insert_with(|| build(name)).clone()
}

fn build(name: &str) -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster/tools.sh");
    let mut command = Command::new("bash");
    let built = command.arg(&script).args(["--path", name]).stderr(Stdio::inherit()).output();
    let built = built.unwrap_or_else(|error| panic!("cannot run {}: {error}", script.display()));
    assert!(built.status.success(), "no {name}: run `{} {name}` and see why", script.display());
    PathBuf::from(String::from_utf8_lossy(&built.stdout).trim()).join(name)
}
