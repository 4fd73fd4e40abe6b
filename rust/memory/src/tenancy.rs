//! When a place that many use may be given to others: once it is closed, and nobody uses it any more.

use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::sync::atomic::{AtomicBool, fence};
use std::sync::{Arc, Mutex, PoisonError};

/// A place, open until it is closed. Who becomes its user, and whether it has any at its end, is decided under one lock.
#[derive(Debug)]
pub struct Tenancy<P> {
    place: Mutex<Option<P>>,
    closed: AtomicBool,
}

impl<P> Tenancy<P> {
    /// Open.
    pub fn new(place: P) -> Self {
        Self { place: Mutex::new(Some(place)), closed: AtomicBool::new(false) }
    }

    /// Whether it is closed: for those who are its users already. One load.
    #[inline]
    pub fn closed(&self) -> bool {
        self.closed.load(Relaxed)
    }

    /// One more user of `shared`, unless it is closed. Users may make others by themselves, as long as they are some.
    pub fn join<T>(&self, shared: &Arc<T>) -> Option<Arc<T>> {
        let _place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        (!self.closed()).then(|| shared.clone())
    }

    /// Closes it. The place, if `alone` says that there are no users: else it stays until this object goes.
    pub fn close(&self, alone: impl FnOnce() -> bool) -> Option<P> {
        let mut place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        self.closed.store(true, Relaxed);
        if !alone() {
            return None;
        }
        // Counts are read without order: what the last user did was done before.
        fence(Acquire);
        place.take()
    }
}
