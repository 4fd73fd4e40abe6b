//! Locks as Python threads need them: tried first, and waited for only without the GIL.
//!
//! Two rules keep this free of deadlocks. No Python object is made, called or dropped while a lock is held, since that may run anything. A
//! queue's lock may be held while a pool's is waited for, never the other way round.

use pyo3::prelude::*;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
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

/// A queue's lock, which a loop in Rust takes over and over: the system's mutex would let it win every time.
pub struct Fair<T> {
    pub mutex: Mutex<T>,
    /// Python threads that found it taken.
    waiting: AtomicUsize,
    turn: Mutex<()>,
    free: Condvar,
}

/// How long a loop lets others go first, between two steps: the one who waits may also wait for the GIL.
const COURTESY: Duration = Duration::from_millis(20);

impl<T: Send> Fair<T> {
    pub fn new(value: T) -> Self {
        Fair { mutex: Mutex::new(value), waiting: AtomicUsize::new(0), turn: Mutex::new(()), free: Condvar::new() }
    }

    /// Takes it in a call from Python.
    #[inline]
    pub fn lock<'a>(&'a self, py: Python<'_>) -> MutexGuard<'a, T> {
        match self.mutex.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(guard)) => guard.into_inner(),
            Err(TryLockError::WouldBlock) => self.wait(py),
        }
    }

    #[cold]
    fn wait<'a>(&'a self, py: Python<'_>) -> MutexGuard<'a, T> {
        self.waiting.fetch_add(1, Relaxed);
        let guard = lock(py, &self.mutex);
        if self.waiting.fetch_sub(1, Relaxed) == 1 {
            drop(self.turn.lock().unwrap_or_else(PoisonError::into_inner));
            self.free.notify_all();
        }
        guard
    }

    /// Takes it in a loop without the GIL, after those who wait.
    #[inline]
    pub fn lock_in_turn(&self) -> MutexGuard<'_, T> {
        if self.waiting.load(Relaxed) > 0 {
            self.stand_back();
        }
        self.mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cold]
    fn stand_back(&self) {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.free.wait_timeout_while(turn, COURTESY, |()| self.waiting.load(Relaxed) > 0));
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
