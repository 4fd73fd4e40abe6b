//! `EventFd`: a doorbell or an interrupt.

use crate::args::{Int, seconds};
use crate::errors::Error;
use crate::lock::lock;
use pyo3::prelude::*;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::{Arc, Mutex};
use std::time::Instant;
use virtio_memory::{MemoryError, duplicate};

/// Linux' EINTR: a signal handler ran.
const EINTR: i32 = 4;

/// An eventfd: a doorbell or an interrupt (2.3).
#[pyclass(frozen, module = "virtio._core")]
pub struct EventFd(Mutex<Option<Arc<virtio_memory::EventFd>>>);

impl EventFd {
    /// One that is somebody else's too.
    pub fn shared(event: Arc<virtio_memory::EventFd>) -> Self {
        EventFd(Mutex::new(Some(event)))
    }

    fn over(event: virtio_memory::EventFd) -> Self {
        EventFd(Mutex::new(Some(Arc::new(event))))
    }

    /// The descriptor, shared with whoever rings it; unless it is closed.
    pub fn event(&self, py: Python<'_>) -> Result<Arc<virtio_memory::EventFd>, Error> {
        lock(py, &self.0).clone().ok_or_else(|| Error::closed("eventfd"))
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
        Ok(self.event(py)?.as_fd().as_raw_fd())
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
    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> Result<bool, Error> {
        let timeout = timeout.map(|timeout| seconds("timeout", timeout)).transpose()?;
        let event = self.event(py)?;
        let began = Instant::now();
        loop {
            let left = timeout.map(|timeout| timeout.saturating_sub(began.elapsed()));
            match py.detach(|| event.wait(left)) {
                Err(MemoryError::Os { errno: EINTR, .. }) => py.check_signals()?,
                result => return Ok(result?),
            }
        }
    }

    /// Closes it; again does nothing.
    fn close(&self, py: Python<'_>) {
        let event = lock(py, &self.0).take();
        drop(event);
    }
}
