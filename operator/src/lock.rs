//! One way to take a lock.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// The lock, whatever happened to whoever held it last: what is kept under locks here is whole at every step.
pub fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
