//! Locks as Python threads need them: tried first, and waited for only without the GIL.
//!
//! Two rules keep this free of deadlocks. No Python object is made, called or dropped while a lock is held, since that may run anything. A
//! queue's lock may be held while a pool's is waited for, never the other way round.

use pyo3::prelude::*;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;
use virtio_memory::{BufferPool, PoolState};

/// Takes a lock. A panic while it was held left nothing half done that matters: each step under a lock is a whole one.
#[inline]
pub fn lock<'a, T: Send>(py: Python<'_>, mutex: &'a Mutex<T>) -> MutexGuard<'a, T> {
    loop {
        match mutex.try_lock() {
            Ok(guard) => return guard,
            Err(TryLockError::Poisoned(guard)) => return guard.into_inner(),
            Err(TryLockError::WouldBlock) => wait(py, || drop(mutex.lock().unwrap_or_else(PoisonError::into_inner))),
        }
    }
}

/// Takes a pool's lock.
#[inline]
pub fn lock_pool<'a>(py: Python<'_>, pool: &'a BufferPool) -> MutexGuard<'a, PoolState> {
    loop {
        if let Some(guard) = pool.try_lock() {
            return guard;
        }
        wait(py, || drop(pool.lock()));
    }
}

/// Holds a lock without the GIL for so long: what a loop in Rust does, and what tests of contention need.
pub fn hold<T: Send>(py: Python<'_>, mutex: &Mutex<T>, time: Duration) {
    py.detach(|| {
        let guard = mutex.lock();
        std::thread::sleep(time);
        drop(guard);
    });
}

/// As [`hold`], for a pool.
pub fn hold_pool(py: Python<'_>, pool: &BufferPool, time: Duration) {
    py.detach(|| {
        let guard = pool.lock();
        std::thread::sleep(time);
        drop(guard);
    });
}

/// Waits without the GIL until the lock was free once. It is then tried again: a guard cannot be brought back from there.
#[cold]
fn wait(py: Python<'_>, until_free: impl FnOnce() + Send) {
    py.detach(until_free);
}
