//! How many bytes of each tenant's payloads and results a worker holds.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::ids::TenantId;
use crate::intake::Parking;

/// What is held for tenants that have a ceiling. Clones share it.
#[derive(Clone, Debug)]
pub struct Memory(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    held: Mutex<HashMap<TenantId, usize>>,
    parking: Arc<Parking>,
}

/// Bytes that count for a tenant until this is dropped.
#[derive(Debug)]
pub struct Held {
    memory: Memory,
    tenant: TenantId,
    bytes: usize,
}

impl Memory {
    /// Nothing held yet.
    pub fn new(parking: Arc<Parking>) -> Self {
        Self(Arc::new(Shared { held: Mutex::default(), parking }))
    }

    /// How many more bytes a tenant may have held, of at most `most`.
    pub fn free(&self, tenant: &TenantId, most: usize) -> usize {
        most.saturating_sub(self.lock().get(tenant).copied().unwrap_or_default())
    }

    /// Counts bytes where that many may be held.
    pub fn hold_within(&self, tenant: &TenantId, bytes: usize, most: usize) -> Option<Held> {
        let mut tenants = self.lock();
        let held = tenants.entry(tenant.clone()).or_default();
        if held.saturating_add(bytes) > most {
            if *held == 0 {
                tenants.remove(tenant);
            }
            return None;
        }
        *held += bytes;
        Some(Held { memory: self.clone(), tenant: tenant.clone(), bytes })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TenantId, usize>> {
        self.0.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    /// So many more count: what is there already cannot wait.
    pub fn add(&mut self, bytes: usize) {
        *self.memory.lock().entry(self.tenant.clone()).or_default() += bytes;
        self.bytes += bytes;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        {
            let mut tenants = self.memory.lock();
            if let Some(held) = tenants.get_mut(&self.tenant) {
                *held = held.saturating_sub(self.bytes);
                if *held == 0 {
                    tenants.remove(&self.tenant);
                }
            }
        }
        self.memory.0.parking.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_held_than_a_tenant_may_have_but_for_what_is_there_already() {
        let memory = Memory::new(Arc::default());
        let (a, b) = (TenantId::parse("a").expect("an id"), TenantId::parse("b").expect("an id"));
        let mut first = memory.hold_within(&a, 60, 100).expect("there is room");
        assert!(memory.hold_within(&a, 41, 100).is_none() && memory.hold_within(&b, 100, 100).is_some());
        first.add(70);
        assert_eq!((memory.free(&a, 100), memory.free(&a, 150), memory.free(&b, 100)), (0, 20, 100));
        drop(first);
        assert_eq!(memory.free(&a, 100), 100);
        assert!(memory.lock().is_empty());
    }
}
