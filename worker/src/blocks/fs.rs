//! `fs.put` and `fs.get`: whole files in the tenant's own directories, on threads that may wait for a disk.

use std::borrow::Cow;
use std::fs::File;
use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Instant;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use cap_fs_ext::{FollowSymlinks, OpenOptionsFollowExt};
use cap_std::fs::{OpenOptions, OpenOptionsExt};
use rustix::fs::XattrFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::output::{MAX_BYTES, encoded_len};
use super::tenant_dir::{self, Absent, Place, TenantDirs};
use super::thread::on_thread;
use super::{Output, Scope};
use crate::fault::{Cause, Fault, Invalid};
use crate::message;

/// The longest content type, in bytes.
const MAX_TYPE_BYTES: usize = 255;
/// Where the content type is kept.
const TYPE_ATTRIBUTE: &str = "user.mime_type";
/// Of a file whose name says nothing.
const DEFAULT_TYPE: &str = "application/octet-stream";

/// Writes a file. Cheap to clone, for the thread that does it.
#[derive(Clone, Debug)]
pub struct Put {
    path: Arc<str>,
    content: Bytes,
    content_type: Option<Arc<str>>,
}

/// Reads a file.
#[derive(Clone, Debug)]
pub struct Get {
    path: Arc<str>,
}

/// The wire form of both.
#[derive(Deserialize)]
struct Job<'a> {
    #[serde(borrow)]
    path: Option<Cow<'a, str>>,
    #[serde(borrow)]
    content: Option<Cow<'a, str>>,
    #[serde(borrow)]
    content_base64: Option<Cow<'a, str>>,
    #[serde(borrow)]
    content_type: Option<Cow<'a, str>>,
}

impl Put {
    /// Reads the parameters from the assignment's `job` object.
    ///
    /// # Errors
    /// The first parameter that breaks a rule.
    pub fn parse(job: &RawValue) -> Result<Self, Invalid> {
        let mut job = message::read_part::<Job>(job.get(), "/job")?;
        let content = message::text_or_base64(job.content.take(), job.content_base64.take(), "/job/content")?
            .ok_or_else(|| Invalid::missing("/job/content"))?;
        let content_type = job.content_type.as_deref().filter(|text| !text.is_empty());
        if content_type.is_some_and(|text| !is_content_type(text)) {
            let reason = format!("is no content type: at most {MAX_TYPE_BYTES} bytes of printable ASCII");
            return Err(Invalid::format("/job/content_type", reason));
        }
        Ok(Self { path: path(&job)?, content, content_type: content_type.map(Arc::from) })
    }

    /// As the assignment wrote it.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// How many bytes it writes.
    pub fn size_bytes(&self) -> usize {
        self.content.len()
    }

    /// What it is, as the assignment says or the name suggests.
    pub fn content_type(&self) -> &str {
        self.content_type.as_deref().unwrap_or_else(|| type_by_name(&self.path))
    }
}

impl Get {
    /// Reads the parameters from the assignment's `job` object.
    ///
    /// # Errors
    /// The first parameter that breaks a rule.
    pub fn parse(job: &RawValue) -> Result<Self, Invalid> {
        Ok(Self { path: path(&message::read_part::<Job>(job.get(), "/job")?)? })
    }

    /// As the assignment wrote it.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// What a file of this name is.
    pub fn content_type(&self) -> &'static str {
        type_by_name(&self.path)
    }
}

fn path(job: &Job<'_>) -> Result<Arc<str>, Invalid> {
    let path = job.path.as_deref().filter(|path| !path.is_empty()).ok_or_else(|| Invalid::missing("/job/path"))?;
    tenant_dir::check_shape(path).map_err(|reason| Invalid::not_allowed("/job/path", reason))?;
    Ok(path.into())
}

fn is_content_type(text: &str) -> bool {
    !text.is_empty() && text.len() <= MAX_TYPE_BYTES && text.bytes().all(|byte| matches!(byte, b' '..=b'~'))
}

fn type_by_name(path: &str) -> &'static str {
    mime_guess::from_path(path).first_raw().unwrap_or(DEFAULT_TYPE)
}

/// What both blocks answer.
#[derive(Serialize)]
struct Answer<'a> {
    path: &'a str,
    size_bytes: usize,
    content_type: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_base64: Option<String>,
}

/// Executes both. The caller's slots bound how many threads it keeps busy.
#[derive(Debug)]
pub struct Fs {
    dirs: TenantDirs,
}

impl Fs {
    /// Works in these directories only.
    pub fn new(dirs: TenantDirs) -> Self {
        Self { dirs }
    }

    /// Writes a file whole or not at all, and answers when a power failure could not undo it.
    ///
    /// # Errors
    /// 2003 for a path that is not allowed, retryable 2002 for a full disk.
    pub async fn put(&self, put: &Put, scope: &Scope) -> Result<Output, Fault> {
        let (dirs, put) = (self.dirs.clone(), put.clone());
        on_thread(scope.clone(), move |scope| write(&dirs, &put, scope)).await
    }

    /// Reads a file.
    ///
    /// # Errors
    /// 2001 for a missing file, 2003 for a path that is not allowed, 2002 for a file that no result can hold.
    pub async fn get(&self, get: &Get, scope: &Scope) -> Result<Output, Fault> {
        let (dirs, get) = (self.dirs.clone(), get.clone());
        on_thread(scope.clone(), move |scope| read(&dirs, &get, scope)).await
    }
}

fn write(dirs: &TenantDirs, put: &Put, scope: &Scope) -> Result<Output, Fault> {
    let place = dirs.find(&scope.tenant, &put.path, Absent::Create)?;
    place.check_replaceable()?;
    let temp = Temp::create(&place)?;
    temp.fill(put).map_err(|error| place.explain(&error))?;
    // The caller has given up by now: what it reports as timed out should not appear afterwards.
    if Instant::now() >= scope.deadline {
        return Err(place.fault(Cause::DeadlinePassed, "the deadline passed while the file was written"));
    }
    temp.put_in_place()?;
    let content_type = put.content_type();
    let size_bytes = put.size_bytes();
    Output::encode(&Answer { path: &put.path, size_bytes, content_type, content: None, content_base64: None }, scope)
}

/// A file that is not there yet. Dropped before it is in place, it is removed.
struct Temp<'p> {
    place: &'p Place<'p>,
    name: String,
    file: File,
    is_in_place: bool,
}

impl<'p> Temp<'p> {
    /// The name cannot be guessed, so no path of the tenant's other assignments leads to it.
    fn create(place: &'p Place<'p>) -> Result<Self, Fault> {
        let mut random = [0_u8; 16];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| place.explain(&error.into()))?;
        let name = format!(".beamline-{:032x}.tmp", u128::from_ne_bytes(random));
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).follow(FollowSymlinks::No).mode(0o600);
        let file = place.dir.open_with(&name, &options).map_err(|error| place.explain(&error))?.into_std();
        Ok(Self { place, name, file, is_in_place: false })
    }

    fn fill(&self, put: &Put) -> std::io::Result<()> {
        (&self.file).write_all(&put.content)?;
        if let Some(content_type) = &put.content_type {
            keep_type(&self.file, content_type)?;
        }
        self.file.sync_all()
    }

    /// Where the file was synced before, exchanging the two names is no faster than renaming over the old one.
    fn put_in_place(mut self) -> Result<(), Fault> {
        let Place { dir, name, .. } = self.place;
        dir.rename(&self.name, dir, name).map_err(|error| self.place.explain(&error))?;
        self.is_in_place = true;
        rustix::fs::fsync(dir).map_err(|error| self.place.explain(&error.into()))
    }
}

impl Drop for Temp<'_> {
    fn drop(&mut self) {
        if !self.is_in_place
            && let Err(error) = self.place.dir.remove_file(&self.name)
        {
            tracing::warn!(%error, name = self.name, "a temporary file could not be removed");
        }
    }
}

/// Not every file system has attributes; without one the type is guessed when the file is read.
fn keep_type(file: &File, content_type: &str) -> std::io::Result<()> {
    match rustix::fs::fsetxattr(file, TYPE_ATTRIBUTE, content_type.as_bytes(), XattrFlags::empty()) {
        Ok(()) | Err(Errno::NOTSUP | Errno::NOSYS | Errno::PERM | Errno::ACCESS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn kept_type(file: &File) -> Option<String> {
    let mut value = [0_u8; MAX_TYPE_BYTES];
    let length = rustix::fs::fgetxattr(file, TYPE_ATTRIBUTE, &mut value[..]).ok()?;
    let text = std::str::from_utf8(value.get(..length)?).ok()?;
    is_content_type(text).then(|| text.to_owned())
}

fn read(dirs: &TenantDirs, get: &Get, scope: &Scope) -> Result<Output, Fault> {
    let place = dirs.find(&scope.tenant, &get.path, Absent::Refuse)?;
    let file = place.open()?;
    let limit = scope.max_output_bytes.min(MAX_BYTES);
    let bytes = read_at_most(&file, limit, &place)?;
    let kept = kept_type(&file);
    let text = std::str::from_utf8(&bytes).ok();
    if encoded_len(&bytes, text) > limit {
        return Err(too_large(&place, limit));
    }
    let answer = Answer {
        path: &get.path,
        size_bytes: bytes.len(),
        content_type: kept.as_deref().unwrap_or_else(|| type_by_name(&get.path)),
        content: text,
        content_base64: text.is_none().then(|| STANDARD.encode(&bytes)),
    };
    Output::encode(&answer, scope)
}

/// The size is asked first, and counted all the same: the file may grow meanwhile.
fn read_at_most(file: &File, limit: usize, place: &Place<'_>) -> Result<Vec<u8>, Fault> {
    let size = file.metadata().map_err(|error| place.explain(&error))?.len();
    let size = usize::try_from(size).ok().filter(|size| *size <= limit).ok_or_else(|| too_large(place, limit))?;
    let mut bytes = Vec::with_capacity(size);
    let most = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    file.take(most).read_to_end(&mut bytes).map_err(|error| place.explain(&error))?;
    if bytes.len() > limit { Err(too_large(place, limit)) } else { Ok(bytes) }
}

fn too_large(place: &Place<'_>, limit: usize) -> Fault {
    place.fault(Cause::OverCap, format!("the file does not fit into a result of {limit} bytes"))
}

#[cfg(test)]
mod tests;
