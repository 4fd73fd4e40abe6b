//! What `DriverQueue` and `DeviceQueue` share: a lock, whether they are open, the error that broke them, and the runner of a pump.

use crate::errors::{self, Error};
use crate::lock::Fair;
use crate::ring::Ring;
use pyo3::prelude::*;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard};
use virtio_memory::BoundToProcess;
use virtio_net_path::pump::runner::Wake;
use virtqueue::RingError;

/// What is there until reset or close, of either side.
pub trait Side: Send {
    /// What is still told of it then.
    type Last: Default + Send;

    /// What broke the ring.
    fn broken(&self) -> Option<&RingError>;

    /// Refuses what a pump cannot work on.
    fn for_pump(&mut self) -> Result<&mut Self, Error>;
}

pub struct State<S: Side> {
    pub open: Option<S>,
    /// As it was when it closed.
    pub last: S::Last,
    pub broken: Option<Py<PyAny>>,
    /// The runner of a pump on this queue, which is told when it closes or breaks.
    wake: Option<Arc<Wake>>,
}

impl<S: Side> State<S> {
    /// Tells the runner.
    pub fn tell(&self) {
        if let Some(wake) = &self.wake {
            wake.look();
        }
    }

    #[inline]
    fn open(&mut self) -> Result<&mut S, Error> {
        self.open.as_mut().ok_or_else(|| Error::closed("queue"))
    }
}

/// One side of a queue.
pub struct Core<S: Side> {
    pub ring: Ring,
    process: BoundToProcess,
    state: Fair<State<S>>,
    /// There is nobody left who can be asked for `broken`, which keeps nothing then.
    unasked: AtomicBool,
}

impl<S: Side> Core<S> {
    pub fn new(ring: Ring, open: S) -> Self {
        let state = State { open: Some(open), last: S::Last::default(), broken: None, wake: None };
        Core { ring, process: BoundToProcess::new(), state: Fair::new(state), unasked: AtomicBool::new(false) }
    }

    #[inline]
    pub fn lock<'a>(&'a self, py: Python<'_>) -> Result<MutexGuard<'a, State<S>>, Error> {
        self.process.check()?;
        Ok(self.state.lock(py))
    }

    /// The lock itself, for `hold` and the garbage collector.
    pub fn mutex(&self) -> &Mutex<State<S>> {
        &self.state.mutex
    }

    /// Runs `call` on the open queue. The first mistake of the other side becomes the exception that `broken` keeps.
    #[inline]
    pub fn with<T>(&self, py: Python<'_>, call: impl FnOnce(&mut S) -> Result<T, Error>) -> Result<T, Error> {
        let mut state = self.lock(py)?;
        let result = state.open().and_then(call);
        drop(state);
        result.map_err(|error| self.keep(py, error))
    }

    #[cold]
    fn keep(&self, py: Python<'_>, error: Error) -> Error {
        let (error, kept) = errors::latch(py, self.ring.format, error);
        if let Some(exception) = kept {
            let mut state = self.state.lock(py);
            let old = if self.unasked.load(Relaxed) { Some(exception) } else { state.broken.replace(exception) };
            state.tell();
            drop(state);
            drop(old);
        }
        error
    }

    /// Drops the exception that broke it, unless the queue is in use.
    pub fn forget(&self) {
        let Ok(mut state) = self.state.mutex.try_lock() else { return };
        let garbage = state.broken.take();
        drop(state);
        drop(garbage);
    }

    /// Keeps none any more: there is nobody left to ask for it.
    pub fn unasked(&self) {
        self.unasked.store(true, Relaxed);
        self.forget();
    }

    /// The exception that broke it.
    pub fn broken(&self, py: Python<'_>) -> Result<Option<Py<PyAny>>, Error> {
        Ok(self.lock(py)?.broken.as_ref().map(|exception| exception.clone_ref(py)))
    }

    /// For a pump's runner, which `wake` wakes when the queue closes or breaks. There is one pump at a time.
    pub fn watch(&self, py: Python<'_>, wake: &Arc<Wake>) -> Result<(), Error> {
        let mut state = self.lock(py)?;
        if state.wake.is_some() {
            return Err(Error::Status(format!("queue {} has a pump that runs already", self.ring.index)));
        }
        state.wake = Some(wake.clone());
        Ok(())
    }

    /// That runner has ended. Another's stays.
    pub fn unwatch(&self, py: Python<'_>, wake: &Arc<Wake>) {
        if let Ok(mut state) = self.lock(py) {
            let old = state.wake.take_if(|known| Arc::ptr_eq(known, wake));
            drop(state);
            drop(old);
        }
    }

    /// Something small on the queue, if it is open, without the GIL.
    pub fn try_pump(&self, call: impl FnOnce(&mut S)) {
        if let (Ok(()), Ok(open)) = (self.process.check(), self.state.lock_in_turn().open()) {
            call(open);
        }
    }

    /// As [`Core::with`], without the GIL, and with the error of a queue that is broken already.
    pub fn with_pump<T>(&self, call: impl FnOnce(&mut S) -> Result<T, Error>) -> Result<T, Error> {
        self.process.check()?;
        let mut state = self.state.lock_in_turn();
        let result = state.open().and_then(|open| {
            if let Some(error) = open.broken() {
                return Err(error.clone().into());
            }
            let result = call(open.for_pump()?);
            match open.broken() {
                Some(error) => Err(error.clone().into()),
                None => result,
            }
        });
        drop(state);
        result.map_err(|error| Python::attach(|py| self.known(py, error)))
    }

    /// The exception that `broken` keeps, which is made now if nobody has met this error before.
    #[cold]
    fn known(&self, py: Python<'_>, error: Error) -> Error {
        let known = self.state.lock(py).broken.as_ref().map(|exception| exception.clone_ref(py));
        match (error, known) {
            (Error::Ring(error), Some(exception)) if error.breaks() || error == RingError::Broken => {
                Error::Python(PyErr::from_value(exception.into_bound(py)))
            }
            (error, _) => self.keep(py, error),
        }
    }
}
