//! `EventFd`: a doorbell or an interrupt.

use crate::args::{Int, Seconds};
use crate::errors::Error;
use crate::lock::lock;
use pyo3::prelude::*;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;
use virtio_memory::{MemoryError, duplicate};

/// Linux' EINTR: a signal handler ran.
const EINTR: i32 = 4;

/// An eventfd: a doorbell or an interrupt (2.3).
#[pyclass(frozen, module = "virtio._core")]
pub struct EventFd(Mutex<State>);

struct State {
    /// None once it is closed.
    event: Option<Arc<virtio_memory::EventFd>>,
    /// Signalled when it is closed: who sleeps in `wait`, and whoever asked for it.
    told: Vec<Weak<virtio_memory::EventFd>>,
}

impl State {
    fn open(&self) -> Result<&Arc<virtio_memory::EventFd>, Error> {
        self.event.as_ref().ok_or_else(|| Error::closed("eventfd"))
    }

    fn tell(&mut self, event: &Arc<virtio_memory::EventFd>) {
        self.told.retain(|told| told.strong_count() > 0);
        self.told.push(Arc::downgrade(event));
    }
}

impl EventFd {
    /// One that is somebody else's too.
    pub fn shared(event: Arc<virtio_memory::EventFd>) -> Self {
        EventFd(Mutex::new(State { event: Some(event), told: Vec::new() }))
    }

    fn over(event: virtio_memory::EventFd) -> Self {
        Self::shared(Arc::new(event))
    }

    /// The descriptor, shared with whoever rings it; unless it is closed.
    pub fn event(&self, py: Python<'_>) -> Result<Arc<virtio_memory::EventFd>, Error> {
        lock(py, &self.0).open().cloned()
    }

    /// The same, and what is signalled when it is closed.
    fn event_and_close(&self, py: Python<'_>) -> Result<[Arc<virtio_memory::EventFd>; 2], Error> {
        let closed = Arc::new(virtio_memory::EventFd::new()?);
        let mut state = lock(py, &self.0);
        let event = Arc::clone(state.open()?);
        state.tell(&closed);
        Ok([event, closed])
    }
}

#[pymethods]
impl EventFd {
    #[new]
    fn new() -> Result<Self, Error> {
        Ok(EventFd::over(virtio_memory::EventFd::new()?))
    }

    /// One that somebody passed: the descriptor is duplicated, and made non-blocking for all who share it.
    #[classmethod]
    #[pyo3(signature = (fd, *, stream = false))]
    fn from_fd(_cls: &Bound<'_, pyo3::types::PyType>, fd: Int, stream: bool) -> Result<Self, Error> {
        let fd = duplicate(fd.within("fd", 0, RawFd::MAX.into())?)?;
        let passed = if stream { virtio_memory::EventFd::from_fd_or_stream(fd) } else { virtio_memory::EventFd::from_fd(fd) };
        Ok(EventFd::over(passed?))
    }

    /// The descriptor: readable when signalled.
    fn fileno(&self, py: Python<'_>) -> Result<RawFd, Error> {
        let event = self.event(py)?;
        event.share(); // who knows its number may pass it on
        Ok(event.as_fd().as_raw_fd())
    }

    /// Signals it.
    fn signal(&self, py: Python<'_>) -> Result<(), Error> {
        Ok(self.event(py)?.signal()?)
    }

    /// Takes the signals; how many there were, 0 if none.
    fn drain(&self, py: Python<'_>) -> Result<u64, Error> {
        Ok(self.event(py)?.drain()?)
    }

    /// Waits until it is signalled, at most `timeout` seconds; True if it is.
    #[pyo3(signature = (timeout = None))]
    fn wait(&self, py: Python<'_>, timeout: Option<Seconds>) -> Result<bool, Error> {
        let timeout = timeout.map(|timeout| timeout.duration("timeout")).transpose()?;
        if timeout.is_some_and(|timeout| timeout.is_zero()) {
            return Ok(self.event(py)?.wait(timeout)?);
        }
        let [event, closed] = self.event_and_close(py)?;
        let began = Instant::now();
        loop {
            let left = timeout.map(|timeout| timeout.saturating_sub(began.elapsed()));
            match py.detach(|| event.wait_either(&closed, left)) {
                Err(MemoryError::Os { errno: EINTR, .. }) => py.check_signals()?,
                Ok([false, true]) => return Err(Error::closed("eventfd")),
                result => return Ok(result?[0]),
            }
        }
    }

    /// Signals `event` when this one is closed; at once if it is.
    fn tell_closed(&self, py: Python<'_>, event: &EventFd) -> Result<(), Error> {
        let event = event.event(py)?;
        let mut state = lock(py, &self.0);
        if state.event.is_some() {
            state.tell(&event);
            return Ok(());
        }
        drop(state);
        Ok(event.signal()?)
    }

    /// Closes it, which wakes who sleeps in `wait`; again does nothing.
    fn close(&self, py: Python<'_>) -> Result<(), Error> {
        let mut state = lock(py, &self.0);
        let (event, told) = (state.event.take(), std::mem::take(&mut state.told));
        drop(state);
        drop(event);
        for event in told.iter().filter_map(Weak::upgrade) {
            event.signal()?;
        }
        Ok(())
    }
}
