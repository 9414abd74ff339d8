//! Outcomes that wait for the broker on a disk, where they survive the end of this worker.
//!
//! One file each, and only while its record cannot be written: the dead letter, the publication and the settlement
//! follow from the record when the broker delivers the assignment again. In core mode it does not: all of it follows from
//! the file.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use crate::broker::Expected;

/// A directory of outcomes.
#[derive(Clone, Debug)]
pub struct Spool {
    directory: PathBuf,
}

/// An outcome whose record has not been written yet.
#[derive(Debug, Serialize, Deserialize)]
pub struct SpooledOutcome {
    /// Whose work it was.
    pub tenant_id: String,
    /// The Router's id of it.
    pub assignment_id: String,
    /// Which publication it answers, as a header says it.
    pub publication: String,
    /// When the broker stored that publication.
    pub published: Timestamp,
    /// What its record replaces.
    pub expected: Expected,
    /// The ExecResult, byte for byte.
    pub result: Box<RawValue>,
    /// What was published, where its dead letter is due and nobody would deliver it again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assignment: Option<Box<RawValue>>,
}

impl Spool {
    /// Makes the directory where it is missing, and proves that files can be written there.
    ///
    /// # Errors
    /// Why that is not so.
    pub fn open(directory: PathBuf) -> io::Result<Self> {
        std::fs::create_dir_all(&directory)?;
        let spool = Self { directory };
        let proof = spool.directory.join(".proof");
        write_whole(&proof, b"")?;
        std::fs::remove_file(proof)?;
        Ok(spool)
    }

    /// Keeps an outcome until [`Self::forget`]; a power failure does not undo it.
    ///
    /// # Errors
    /// It could not be written.
    pub fn keep(&self, outcome: &SpooledOutcome) -> io::Result<()> {
        write_whole(&self.file_of(outcome), &serde_json::to_vec(outcome)?)
    }

    /// Forgets an outcome whose record stands.
    pub fn forget(&self, outcome: &SpooledOutcome) {
        match std::fs::remove_file(self.file_of(outcome)) {
            // Another worker with the same directory was faster.
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, "an outcome on the disk could not be removed: it is written again at the next start");
            }
            _ => {}
        }
    }

    /// Everything that was kept. A file that is none of ours is left where it is.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn kept(&self) -> io::Result<Vec<SpooledOutcome>> {
        let mut kept = Vec::new();
        for entry in std::fs::read_dir(&self.directory)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                match std::fs::read(&path).map(|bytes| serde_json::from_slice(&bytes)) {
                    Ok(Ok(outcome)) => kept.push(outcome),
                    Ok(Err(error)) => tracing::error!(file = %path.display(), %error, "this file is no outcome"),
                    Err(error) => tracing::error!(file = %path.display(), %error, "an outcome cannot be read"),
                }
            }
        }
        Ok(kept)
    }

    fn file_of(&self, outcome: &SpooledOutcome) -> PathBuf {
        let identity = [&outcome.tenant_id, &outcome.assignment_id, &outcome.publication].map(|part| part.as_bytes());
        self.directory.join(format!("{:x}.json", Sha256::digest(identity.join(&b'\0'))))
    }
}

/// A file is there whole or not at all.
fn write_whole(path: &Path, content: &[u8]) -> io::Result<()> {
    let temp = path.with_extension("tmp");
    if let Err(error) = write(&temp, content).and_then(|()| std::fs::rename(&temp, path)) {
        // What could not be kept must not fill the disk.
        let _ = std::fs::remove_file(&temp);
        return Err(error);
    }
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    // Results are a tenant's, and an assignment may hold credentials.
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(assignment_id: &str) -> SpooledOutcome {
        SpooledOutcome {
            tenant_id: "acme".to_owned(),
            assignment_id: assignment_id.to_owned(),
            publication: "CAF_EXEC_ASSIGN,2026-11-23T09:00:00Z,7".to_owned(),
            published: "2026-11-23T09:00:01Z".parse().unwrap(),
            expected: Expected::NOTHING,
            result: RawValue::from_string(r#"{"status": "success"}"#.to_owned()).unwrap(),
            assignment: None,
        }
    }

    #[test]
    fn an_outcome_is_kept_byte_for_byte_until_it_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let spool = Spool::open(directory.path().join("outbox")).unwrap();
        for id in ["a", "../../b", &"é".repeat(100)] {
            spool.keep(&outcome(id)).unwrap();
            spool.keep(&outcome(id)).unwrap();
            let again = Spool::open(directory.path().join("outbox")).unwrap();
            let kept = again.kept().unwrap();
            assert_eq!(kept.len(), 1);
            assert_eq!((kept[0].assignment_id.as_str(), kept[0].result.get()), (id, r#"{"status": "success"}"#));
            again.forget(&kept[0]);
            again.forget(&kept[0]);
            assert!(again.kept().unwrap().is_empty());
        }
    }

    #[test]
    fn what_is_no_outcome_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let spool = Spool::open(directory.path().to_owned()).unwrap();
        for (name, content) in [("half.json", "{\"tenant_id\":"), ("x.tmp", "{}"), ("README", "")] {
            std::fs::write(directory.path().join(name), content).unwrap();
        }
        assert!(spool.kept().unwrap().is_empty());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 3);
    }

    #[test]
    fn what_could_not_be_kept_takes_no_room() {
        let directory = tempfile::tempdir().unwrap();
        let spool = Spool::open(directory.path().to_owned()).unwrap();
        let file = spool.file_of(&outcome("a"));
        std::fs::create_dir(&file).unwrap();
        assert!(spool.keep(&outcome("a")).is_err());
        let left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(left, [file]);
    }

    #[test]
    fn a_place_where_nothing_can_be_written_is_noticed_at_once() {
        assert!(Spool::open("/proc/outbox".into()).is_err());
    }
}
