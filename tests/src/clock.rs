//! A clock of a program's own, which is wrong, or jumps. Only its time of day does: nobody can set back what time has passed.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// The clock of whoever has its variables.
#[derive(Debug)]
pub struct Clock {
    offset: File,
    directory: TempDir,
}

impl Clock {
    /// One that is right. The C compiler builds it.
    pub fn new() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/clock.c");
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-O1", "-o"]).args([library(&directory), source]);
        assert!(compiler.status().expect("there is a C compiler").success(), "the clock is not built");
        let offset = File::create(offset(&directory)).expect("a file");
        let clock = Self { offset, directory };
        clock.jump(0);
        clock
    }

    /// One that is so many seconds ahead of the right time.
    pub fn ahead(seconds: i64) -> Self {
        let clock = Self::new();
        clock.set_ahead(seconds);
        clock
    }

    /// From now on it is so many hours ahead of the right time.
    pub fn jump(&self, hours: i64) {
        self.set_ahead(hours * 3600);
    }

    fn set_ahead(&self, seconds: i64) {
        self.offset.write_all_at(&seconds.to_ne_bytes(), 0).expect("it is written");
    }

    /// Variables of a program that goes by it.
    pub fn variables(&self) -> [(&'static str, String); 2] {
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        [("LD_PRELOAD", text(library(&self.directory))), ("CLOCK_OFFSET", text(offset(&self.directory)))]
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

fn library(directory: &TempDir) -> PathBuf {
    directory.path().join("clock.so")
}

fn offset(directory: &TempDir) -> PathBuf {
    directory.path().join("offset")
}
