//! Idle connections. One is only ever given to the tenant, file and path that it was opened for.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cap_std::fs::MetadataExt;

use super::connection::Reader;
use crate::blocks::tenant_dir::Place;
use crate::fault::{Cause, Fault};
use crate::ids::TenantId;

/// Connections that wait, each with a cache of at most a megabyte.
const MAX_IDLE: usize = 32;
/// How long one waits.
const MAX_IDLE_TIME: Duration = Duration::from_secs(30);
/// Queries of one tenant at once. Far more than slots: it counts those whose slot is free again, but whose thread is
/// still in a function that nothing interrupts.
const MAX_BUSY_PER_TENANT: usize = 64;
/// Queries at once: half of the threads that tokio has for blocking work.
const MAX_BUSY: usize = 256;

/// What a connection was opened for: a replaced file is another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Key {
    tenant: TenantId,
    path: String,
    device: u64,
    inode: u64,
}

impl Key {
    /// The file is looked at, never opened: closing it again would release the locks that SQLite holds on it in this
    /// process.
    pub(super) fn of(tenant: &TenantId, place: &Place<'_>) -> Result<Self, Fault> {
        let kind = place.dir.symlink_metadata(place.name).map_err(|error| place.explain(&error))?;
        if !kind.is_file() {
            return Err(place.fault(Cause::NotAllowed, "the path is not a regular file"));
        }
        Ok(Self { tenant: tenant.clone(), path: place.path.to_owned(), device: kind.dev(), inode: kind.ino() })
    }

    pub(super) fn tenant(&self) -> &TenantId {
        &self.tenant
    }
}

/// All connections of this worker that are not in use, and who uses others.
#[derive(Debug, Default)]
pub(super) struct Connections {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Longest idle first.
    idle: Vec<Idle>,
    /// Never holds a zero.
    busy: HashMap<TenantId, usize>,
}

#[derive(Debug)]
struct Idle {
    key: Key,
    reader: Reader,
    since: Instant,
}

/// One query of a tenant; it no longer counts when this is dropped.
#[derive(Debug)]
pub(super) struct Permit {
    pool: Arc<Connections>,
    tenant: TenantId,
}

impl Connections {
    /// Counts a query in, unless there are too many.
    pub(super) fn enter(self: &Arc<Self>, tenant: &TenantId) -> Option<Permit> {
        let mut state = self.lock();
        let all: usize = state.busy.values().sum();
        let own = state.busy.get(tenant).copied().unwrap_or_default();
        if own >= MAX_BUSY_PER_TENANT || all >= MAX_BUSY {
            return None;
        }
        state.busy.insert(tenant.clone(), own + 1);
        Some(Permit { pool: Arc::clone(self), tenant: tenant.clone() })
    }

    pub(super) fn take(&self, key: &Key) -> Option<Reader> {
        let (found, expired) = {
            let mut state = self.lock();
            let expired = state.expired();
            let found = state.idle.iter().rposition(|idle| idle.key == *key).map(|at| state.idle.remove(at));
            (found, expired)
        };
        // Closing takes time, so the lock is free by now.
        drop(expired);
        found.map(|idle| idle.reader)
    }

    pub(super) fn put_back(&self, key: Key, reader: Reader) {
        let expired = {
            let mut state = self.lock();
            let mut expired = state.expired();
            if state.idle.len() >= MAX_IDLE {
                expired.push(state.idle.remove(0));
            }
            state.idle.push(Idle { key, reader, since: Instant::now() });
            expired
        };
        drop(expired);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(super) fn idle(&self) -> usize {
        self.lock().idle.len()
    }
}

impl State {
    fn expired(&mut self) -> Vec<Idle> {
        let fresh = self.idle.iter().position(|idle| idle.since.elapsed() < MAX_IDLE_TIME);
        self.idle.drain(..fresh.unwrap_or(self.idle.len())).collect()
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        match state.busy.get_mut(&self.tenant) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(state.busy.remove(&self.tenant)),
        }
    }
}
