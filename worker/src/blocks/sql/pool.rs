//! Connections to servers: how many there may be, and those that wait. One is only ever given to the tenant and the
//! place that it was opened for.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout_at;

use super::Connection;
use super::database::Server;
use crate::ids::TenantId;

/// Connections of one tenant to one place.
pub(super) const MAX_PER_PLACE: usize = 8;
/// Connections in use at once.
const MAX_BUSY: u32 = 256;
/// Places that are remembered although nothing happens there.
const MAX_PLACES: usize = 1024;
/// Connections that wait.
const MAX_IDLE: usize = 128;
/// How long one waits: below what servers and what lies between usually allow.
const MAX_IDLE_TIME: Duration = Duration::from_secs(30);
/// How long one is used: a role that gained rights is looked at again.
const MAX_AGE: Duration = Duration::from_secs(300);
/// How often those that waited too long are looked for.
const SWEEP: Duration = Duration::from_secs(5);

/// For whom and to where.
type Key = (TenantId, Arc<Server>);

/// All connections of this worker.
#[derive(Debug)]
pub(super) struct Pool {
    busy: Arc<Semaphore>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// How many of a place may be in use. Without an entry, none is.
    places: HashMap<Key, Arc<Semaphore>>,
    /// Longest idle first.
    idle: Vec<Idle>,
    is_swept: bool,
}

#[derive(Debug)]
struct Idle {
    key: Key,
    connection: Connection,
    since: Instant,
}

/// The right to one connection. When it goes, another may be opened.
#[derive(Debug)]
pub(super) struct Permit {
    pool: Arc<Pool>,
    key: Key,
    _place: OwnedSemaphorePermit,
    _busy: OwnedSemaphorePermit,
}

impl Pool {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { busy: Arc::new(Semaphore::new(MAX_BUSY as usize)), state: Mutex::default() })
    }

    /// Waits for the right to a connection; none where that takes too long.
    pub(super) async fn enter(
        self: &Arc<Self>,
        tenant: &TenantId,
        server: &Arc<Server>,
        until: Instant,
    ) -> Option<Permit> {
        let key = (tenant.clone(), Arc::clone(server));
        let place = self.lock().place(&key);
        let both = async {
            // In this order, so that whoever waits for its place keeps nothing from others.
            let place = place.acquire_owned().await.ok()?;
            Some((place, Arc::clone(&self.busy).acquire_owned().await.ok()?))
        };
        let (place, busy) = timeout_at(until.into(), both).await.ok().flatten()?;
        Some(Permit { pool: Arc::clone(self), key, _place: place, _busy: busy })
    }

    /// Returns when no connection is in use: a query that was cut off is until its server has been told.
    pub(super) async fn unused(&self) {
        let _all = self.busy.acquire_many(MAX_BUSY).await;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes what waited too long, until nothing waits.
    async fn sweep(self: Arc<Self>) {
        loop {
            tokio::time::sleep(SWEEP).await;
            let (expired, is_done) = {
                let mut state = self.lock();
                let expired = state.expired();
                state.forget_places();
                state.is_swept = !state.idle.is_empty();
                (expired, !state.is_swept)
            };
            drop(expired);
            if is_done {
                return;
            }
        }
    }
}

impl Permit {
    /// A connection that waits.
    pub(super) fn take(&self) -> Option<Connection> {
        let (found, expired) = {
            let mut state = self.pool.lock();
            let expired = state.expired();
            let found = state.idle.iter().rposition(|idle| idle.key == self.key).map(|at| state.idle.remove(at));
            (found, expired)
        };
        drop(expired);
        found.map(|idle| idle.connection)
    }

    /// Lets a connection wait for the next query; it has been reset.
    pub(super) fn put_back(self, connection: Connection) {
        if is_spent(connection.opened().elapsed(), Duration::ZERO) {
            return;
        }
        let (oldest, is_swept) = {
            let mut state = self.pool.lock();
            let oldest = (state.idle.len() >= MAX_IDLE).then(|| state.idle.remove(0));
            state.idle.push(Idle { key: self.key.clone(), connection, since: Instant::now() });
            (oldest, std::mem::replace(&mut state.is_swept, true))
        };
        drop(oldest);
        if !is_swept {
            tokio::spawn(Arc::clone(&self.pool).sweep());
        }
    }
}

impl State {
    fn place(&mut self, key: &Key) -> Arc<Semaphore> {
        if self.places.len() >= MAX_PLACES {
            self.forget_places();
        }
        Arc::clone(self.places.entry(key.clone()).or_insert_with(|| Arc::new(Semaphore::new(MAX_PER_PLACE))))
    }

    fn expired(&mut self) -> Vec<Idle> {
        let is_spent = |idle: &mut Idle| is_spent(idle.connection.opened().elapsed(), idle.since.elapsed());
        self.idle.extract_if(.., is_spent).collect()
    }

    fn forget_places(&mut self) {
        let idle: Vec<Key> = self.idle.iter().map(|idle| idle.key.clone()).collect();
        self.places.retain(|key, place| Arc::strong_count(place) > 1 || idle.contains(key));
    }
}

/// Whether a connection is used no more that is so old and has waited for so long.
fn is_spent(age: Duration, idle: Duration) -> bool {
    age >= MAX_AGE || idle >= MAX_IDLE_TIME
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_waits_for_half_a_minute_and_is_used_for_five() {
        let seconds = Duration::from_secs;
        assert!(!is_spent(seconds(299), seconds(29)));
        assert!(is_spent(seconds(31), seconds(30)), "it has waited too long");
        assert!(is_spent(seconds(300), seconds(0)), "it has been used too long");
    }
}
