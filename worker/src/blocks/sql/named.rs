//! The administrator's own connections: a YAML list of `{name, url | urlFile, tenants}`, read again when it is used.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Deserialize;

use super::database::Database;
use crate::ids::TenantId;
use crate::yaml;

/// A file of connections, and what it last said that made sense.
#[derive(Debug)]
pub struct ConnectionsFile {
    path: PathBuf,
    last: Mutex<Last>,
}

/// What was read last, byte for byte, and the last good list.
struct Last {
    text: Vec<u8>,
    list: Arc<Vec<Entry>>,
}

/// One connection.
struct Entry {
    name: String,
    place: Place,
    /// Every tenant where none is listed.
    tenants: Option<BTreeSet<String>>,
}

enum Place {
    Here(Database),
    File(PathBuf),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Wire {
    name: String,
    url: Option<String>,
    url_file: Option<PathBuf>,
    tenants: Option<Vec<String>>,
}

/// Why a name leads nowhere.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Missing {
    /// Nobody has it, or not this tenant: which one is not said.
    Unknown,
    /// The administrator's file of its URL cannot be used now; why, for the log.
    Broken(String),
}

impl ConnectionsFile {
    /// Reads the list and every `urlFile`.
    ///
    /// # Errors
    /// What is wrong and with which entry, for a person; never a URL.
    pub fn open(path: PathBuf) -> Result<Self, String> {
        let text = std::fs::read(&path).map_err(|error| error.to_string())?;
        let list = parse(&text)?;
        for entry in &list {
            entry.database().map_err(|reason| format!("{}: {reason}", entry.name))?;
        }
        Ok(Self { path, last: Mutex::new(Last { text, list: Arc::new(list) }) })
    }

    /// The database that a name means to a tenant now. A file that is broken by now counts as it last was.
    pub(super) fn find(&self, name: &str, tenant: &TenantId) -> Result<Database, Missing> {
        let list = self.list();
        let entry = list.iter().find(|entry| entry.name == name && entry.is_for(tenant)).ok_or(Missing::Unknown)?;
        entry.database().map_err(Missing::Broken)
    }

    fn list(&self) -> Arc<Vec<Entry>> {
        let read = std::fs::read(&self.path);
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match read {
            Ok(text) if text == last.text => {}
            Ok(text) => {
                match parse(&text) {
                    Ok(list) => last.list = Arc::new(list),
                    Err(reason) => warn(&self.path, &reason),
                }
                last.text = text;
            }
            Err(error) => warn(&self.path, &error.to_string()),
        }
        Arc::clone(&last.list)
    }
}

fn warn(path: &Path, reason: &str) {
    tracing::warn!(file = %path.display(), reason, "the list of connections cannot be used: the last good one stays");
}

fn parse(text: &[u8]) -> Result<Vec<Entry>, String> {
    let text = std::str::from_utf8(text).map_err(|_| "it is not UTF-8".to_owned())?;
    let wire: Vec<Wire> = yaml::read(text, "no YAML list of {name, url or urlFile, tenants}")?;
    let mut names = BTreeSet::new();
    let entry = |(index, wire): (usize, Wire)| {
        let name = wire.name.clone();
        if name.is_empty() || !names.insert(name.clone()) {
            return Err(format!("entry {}: the name is empty or there twice", index + 1));
        }
        Entry::read(wire).map_err(|reason| format!("entry {} ({name}): {reason}", index + 1))
    };
    wire.into_iter().enumerate().map(entry).collect()
}

impl Entry {
    fn read(wire: Wire) -> Result<Self, String> {
        let place = match (wire.url, wire.url_file) {
            (Some(url), None) => Place::Here(database(&url)?),
            (None, Some(file)) => Place::File(file),
            _ => return Err("it needs either url or urlFile".to_owned()),
        };
        let tenants = wire.tenants.map(|tenants| tenants.into_iter().collect());
        Ok(Self { name: wire.name, place, tenants })
    }

    fn is_for(&self, tenant: &TenantId) -> bool {
        self.tenants.as_ref().is_none_or(|tenants| tenants.contains(tenant.as_str()))
    }

    fn database(&self) -> Result<Database, String> {
        match &self.place {
            Place::Here(database) => Ok(database.clone()),
            Place::File(path) => {
                let url = std::fs::read_to_string(path);
                let url = url.map_err(|error| format!("urlFile {}: {error}", path.display()))?;
                database(url.trim())
            }
        }
    }
}

fn database(url: &str) -> Result<Database, String> {
    Database::parse(url).map_err(|refusal| format!("the URL {}", refusal.reason))
}

/// A list holds passwords.
impl fmt::Debug for Last {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.list.iter().map(|entry| &entry.name)).finish()
    }
}
