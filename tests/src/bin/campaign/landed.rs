//! The faults that landed, one line each, as the auditor reads them.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use beamline_tests::journal;

/// A file that begins with `start` and ends with `end`.
pub(crate) struct Landed(File);

impl Landed {
    /// Nothing has landed yet.
    pub(crate) fn create(path: &Path) -> anyhow::Result<Self> {
        let mut landed = Self(File::create(path)?);
        landed.note("start");
        Ok(landed)
    }

    /// Its kind, and what else there is to know.
    pub(crate) fn note(&mut self, what: &str) {
        // What is not written down has not landed.
        let _ = writeln!(self.0, "{} {what}", journal::now());
    }

    /// Nothing more is broken.
    pub(crate) fn end(&mut self) {
        self.note("end");
    }
}
