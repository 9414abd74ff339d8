//! The only way to a file: a tenant's own directory below a safe root, opened name by name.
//!
//! The text of a path only chooses the root. From there each name is opened relative to the directory before it, never
//! through a symbolic link, so that what the path meant a moment ago does not matter.

use std::fs::File;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use cap_fs_ext::{FollowSymlinks, OpenOptionsFollowExt, OpenOptionsSyncExt};
use cap_std::fs::{Dir, DirBuilder, DirBuilderExt, OpenOptions, OpenOptionsExt};
use rustix::fs::{Access, AtFlags, OFlags};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use crate::contract;
use crate::contract::Details;
use crate::fault::{Cause, Fault, Invalid, excerpt};
use crate::ids::TenantId;

/// The longest name that Linux file systems take, in bytes.
const MAX_NAME_BYTES: usize = 255;
/// How much of a tenant's id stays readable in a shortened name.
const READABLE_BYTES: usize = 128;

/// The safe roots, each with a directory for every tenant. Cheap to clone.
#[derive(Clone, Debug)]
pub struct TenantDirs {
    roots: Arc<[PathBuf]>,
}

/// What to do about a directory that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absent {
    /// Make it, for the worker's user only.
    Create,
    /// Say that the file does not exist.
    Refuse,
}

/// A name in an open directory: whatever happens to the path, it stays there.
#[derive(Debug)]
pub struct Place<'p> {
    /// Where the file is, or will be.
    pub dir: Dir,
    /// Its name there.
    pub name: &'p str,
    /// As the assignment wrote it.
    pub path: &'p str,
}

impl TenantDirs {
    /// The roots are absolute; where one lies below another, the longer one is meant.
    pub fn new(roots: Vec<PathBuf>) -> Self {
        Self { roots: roots.into() }
    }

    /// What is wrong with the roots at this moment, each as a sentence: they may be mounted or made later.
    pub fn complaints(&self) -> Vec<String> {
        let complain = |root: &PathBuf| Some(format!("{} {}", root.display(), unusable(root)?));
        self.roots.iter().filter_map(complain).collect()
    }

    /// Whether a path can be looked up at all, which needs no tenant and touches no file.
    ///
    /// # Errors
    /// 2003 with the pointer `/job/path`.
    pub fn check(&self, path: &str) -> Result<(), Invalid> {
        self.locate(path).map(drop).map_err(|reason| Invalid::not_allowed("/job/path", reason))
    }

    /// The absolute path of a relative one: in the first root.
    pub fn absolute(&self, relative: &str) -> Option<String> {
        Some(self.roots.first()?.join(relative).to_str()?.to_owned())
    }

    /// Opens the directory that the path's file is in.
    ///
    /// # Errors
    /// 2003 outside the roots or through a symbolic link, 2001 where a directory is missing or none.
    pub fn find<'p>(&self, tenant: &TenantId, path: &'p str, absent: Absent) -> Result<Place<'p>, Fault> {
        let (root, names) = self.allowed(path)?;
        let own = self.own_directory(root, tenant);
        let mut dir = match File::open(root) {
            Ok(root) => Dir::from_std_file(root),
            Err(error) => return Err(explain(&error, path)),
        };
        let (name, parents) = names.split_last().ok_or_else(|| fault(Cause::NotAllowed, path, "the path is a root"))?;
        for parent in std::iter::once(own.as_str()).chain(parents.iter().copied()) {
            dir = descend(&dir, parent, absent).map_err(|error| explain_at(&dir, parent, &error, path))?;
        }
        Ok(Place { dir, name, path })
    }

    /// As [`Self::check`], for a path that no job names.
    ///
    /// # Errors
    /// 2003.
    pub fn allow(&self, path: &str) -> Result<(), Fault> {
        self.allowed(path).map(drop)
    }

    fn allowed<'p>(&self, path: &'p str) -> Result<(&Path, Vec<&'p str>), Fault> {
        self.locate(path).map_err(|reason| fault(Cause::NotAllowed, path, format!("the path {reason}")))
    }

    /// The root that a path lies below, and the names from there.
    fn locate<'p>(&self, path: &'p str) -> Result<(&Path, Vec<&'p str>), &'static str> {
        check_shape(path)?;
        let below = |root: &PathBuf| Some((root.clone(), Path::new(path).strip_prefix(root).ok()?));
        let deepest = self.roots.iter().max_by_key(|root| below(root).map(|(root, _)| root.components().count()));
        let root = deepest.ok_or("lies outside the safe directories")?;
        let rest = Path::new(path).strip_prefix(root).map_err(|_| "lies outside the safe directories")?;
        let names: Vec<_> = rest.iter().filter_map(|name| name.to_str()).collect();
        if names.is_empty() { Err("is a safe directory itself") } else { Ok((root, names)) }
    }

    /// The name of the tenant's directory: the escaped id, unless that is too long or could mean something else there.
    fn own_directory(&self, root: &Path, tenant: &TenantId) -> String {
        let name = contract::escape(tenant.as_str());
        let is_taken =
            root.parent().is_none() || self.roots.iter().any(|other| first_below(root, other) == Some(&name));
        if name.len() <= MAX_NAME_BYTES && !is_taken {
            return name.into_owned();
        }
        // No escaped id has `=_` in it, so no other tenant's name can be this one.
        let readable = name.get(..READABLE_BYTES).unwrap_or(&name);
        format!("{readable}=_{:x}", Sha256::digest(tenant.as_str()))
    }
}

/// Why blocks will find nothing in a root, or can put nothing there, as the end of a sentence.
fn unusable(root: &Path) -> Option<&'static str> {
    let may = |access: Access| rustix::fs::accessat(rustix::fs::CWD, root, access, AtFlags::EACCESS).is_ok();
    match std::fs::metadata(root) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Some("does not exist"),
        Err(_) => Some("cannot be looked at"),
        Ok(kind) if !kind.is_dir() => Some("is not a directory"),
        Ok(_) if !may(Access::EXEC_OK) => Some("may not be searched by the worker's user"),
        Ok(_) if !may(Access::WRITE_OK) => Some("is read-only for the worker's user: fs.put will fail there"),
        Ok(_) => None,
    }
}

/// What can be said of a path without knowing the roots.
///
/// # Errors
/// The end of a sentence that begins with the path.
pub fn check_shape(path: &str) -> Result<(), &'static str> {
    if !path.starts_with('/') {
        return Err("is not absolute");
    }
    if path.contains('\0') {
        return Err("contains a NUL");
    }
    if path.split('/').any(|name| name == "..") {
        return Err("contains `..`");
    }
    if matches!(path.rsplit('/').next(), None | Some("" | ".")) {
        return Err("does not end with the name of a file");
    }
    Ok(())
}

/// In a root that has another root below it, the name on the way there belongs to that root's tenants, and in `/` all
/// names belong to the system.
fn first_below<'a>(root: &Path, other: &'a Path) -> Option<&'a str> {
    match other.strip_prefix(root).ok()?.components().next()? {
        Component::Normal(name) => name.to_str(),
        _ => None,
    }
}

fn descend(dir: &Dir, name: &str, absent: Absent) -> io::Result<Dir> {
    match open_directory(dir, name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && absent == Absent::Create => {
            create_directory(dir, name)?;
            open_directory(dir, name)
        }
        opened => opened,
    }
}

fn open_directory(dir: &Dir, name: &str) -> io::Result<Dir> {
    let mut options = OpenOptions::new();
    options.read(true).follow(FollowSymlinks::No).custom_flags(OFlags::DIRECTORY.bits().cast_signed());
    Ok(Dir::from_std_file(dir.open_with(name, &options)?.into_std()))
}

fn create_directory(dir: &Dir, name: &str) -> io::Result<()> {
    let mut private = DirBuilder::new();
    private.mode(0o700);
    match dir.create_dir_with(name, &private) {
        // Another assignment was faster.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
        Ok(()) => Ok(rustix::fs::fsync(dir)?),
    }
}

impl Place<'_> {
    /// Opens the file for reading: a regular one, and not through a symbolic link.
    ///
    /// # Errors
    /// 2001 where it does not exist, 2003 where it is something else.
    pub fn open(&self) -> Result<File, Fault> {
        let mut options = OpenOptions::new();
        // A FIFO without a writer would block an open that waits.
        options.read(true).follow(FollowSymlinks::No).nonblock(true);
        options.custom_flags(OFlags::NOCTTY.bits().cast_signed());
        let file = self.dir.open_with(self.name, &options).map_err(|error| self.explain(&error))?.into_std();
        let kind = file.metadata().map_err(|error| self.explain(&error))?;
        if kind.is_file() { Ok(file) } else { Err(self.not_regular()) }
    }

    /// Refuses to replace what is not a regular file.
    ///
    /// # Errors
    /// 2003.
    pub fn check_replaceable(&self) -> Result<(), Fault> {
        match self.dir.symlink_metadata(self.name) {
            Ok(kind) if kind.is_file() => Ok(()),
            Ok(_) => Err(self.not_regular()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(self.explain(&error)),
        }
    }

    /// The fault that an error on this file means.
    pub fn explain(&self, error: &io::Error) -> Fault {
        explain_at(&self.dir, self.name, error, self.path)
    }

    /// A fault about this file.
    pub fn fault(&self, cause: Cause, message: impl Into<String>) -> Fault {
        fault(cause, self.path, message)
    }

    fn not_regular(&self) -> Fault {
        self.fault(Cause::NotAllowed, "the path is not a regular file")
    }
}

/// Linux says "not a directory" for a symbolic link where a directory was asked for.
fn explain_at(dir: &Dir, name: &str, error: &io::Error, path: &str) -> Fault {
    match dir.symlink_metadata(name) {
        Ok(kind) if kind.is_symlink() => fault(Cause::NotAllowed, path, "the path leads through a symbolic link"),
        _ => explain(error, path),
    }
}

fn explain(error: &io::Error, path: &str) -> Fault {
    let (cause, message) = match Errno::from_io_error(error) {
        Some(Errno::NOENT) => (Cause::ExecutionFailed, "the file does not exist".to_owned()),
        Some(Errno::NOTDIR) => (Cause::ExecutionFailed, "a part of the path is not a directory".to_owned()),
        Some(Errno::LOOP) => (Cause::NotAllowed, "the path leads through a symbolic link".to_owned()),
        Some(Errno::NXIO | Errno::ISDIR) => (Cause::NotAllowed, "the path is not a regular file".to_owned()),
        Some(Errno::ACCESS | Errno::PERM | Errno::ROFS) => {
            (Cause::NotAllowed, "the worker may not do this to the file".to_owned())
        }
        Some(Errno::NOSPC | Errno::DQUOT) => (Cause::ResourceUnavailable, "the disk is full".to_owned()),
        Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::IO | Errno::STALE | Errno::AGAIN | Errno::BUSY) => {
            (Cause::ResourceUnavailable, format!("the file cannot be used for now: {}", error.kind()))
        }
        _ => (Cause::ExecutionFailed, format!("the file cannot be used: {}", error.kind())),
    };
    fault(cause, path, message)
}

/// A fault that names the path as the assignment wrote it.
pub fn fault(cause: Cause, path: &str, message: impl Into<String>) -> Fault {
    Fault::new(cause, message).with(Details { path: Some(excerpt(path.to_owned())), ..Details::default() })
}

#[cfg(test)]
mod tests;
