//! A worker's policy file as Kubernetes mounts a ConfigMap: a new version is a new directory behind a swapped link.

use std::path::PathBuf;

use tempfile::TempDir;

/// The file; removed when it is dropped.
#[derive(Debug)]
pub struct Policy {
    directory: TempDir,
    version: usize,
}

impl Policy {
    /// A file that says this.
    pub fn new(text: &str) -> Self {
        let mut policy = Self { directory: tempfile::tempdir().unwrap(), version: 0 };
        policy.say(text);
        std::os::unix::fs::symlink("..data/policy.yaml", policy.path()).unwrap();
        policy
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("policy.yaml")
    }

    /// For a worker.
    pub fn flag(&self) -> String {
        format!("--tenants-file={}", self.path().display())
    }

    /// Says something else from now on.
    pub fn say(&mut self, text: &str) {
        self.version += 1;
        let (version, root) = (format!("..{}", self.version), self.directory.path());
        std::fs::create_dir(root.join(&version)).unwrap();
        std::fs::write(root.join(&version).join("policy.yaml"), text).unwrap();
        std::os::unix::fs::symlink(&version, root.join("..new")).unwrap();
        std::fs::rename(root.join("..new"), root.join("..data")).unwrap();
    }
}
