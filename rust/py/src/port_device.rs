//! `DevicePort`: the device's end of a network device's queue pair.

use crate::args::{Int, Mask};
use crate::burst::Burst;
use crate::device_queue::DeviceQueue;
use crate::errors::Error;
use crate::lock::{lock, lock_pool};
use crate::port::{self, BothPorts, Received};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use std::sync::Mutex;
use virtio_net_path::{DeviceBursts, Rules, Traffic};

/// The device's end of a network device's queue pair (5.1.6): as `DriverPort`, with the names of the driver's queues.
#[pyclass(frozen, module = "virtio._core")]
pub struct DevicePort {
    receiveq: Py<DeviceQueue>,
    transmitq: Py<DeviceQueue>,
    rules: Rules,
    sent: Mutex<Traffic>,
    received: Mutex<Received>,
}

impl BothPorts for DevicePort {
    fn take(&self, py: Python<'_>, burst: &Bound<'_, Burst>) -> Result<usize, Error> {
        self.take(py, burst)
    }

    fn send(&self, py: Python<'_>, burst: &Bound<'_, Burst>) -> Result<usize, Error> {
        self.send(py, burst)
    }

    fn receive(&self, py: Python<'_>, burst: &Bound<'_, Burst>) -> Result<usize, Error> {
        self.receive(py, burst)
    }

    fn send_slices(&self, py: Python<'_>, frames: &[&[u8]]) -> Result<usize, Error> {
        DeviceBursts::check_frames(frames.iter().copied())?;
        let mut traffic = lock(py, &self.sent);
        let traffic = &mut *traffic;
        let shared = &self.receiveq.get().shared;
        shared.with(py, |open| {
            let frames = frames.iter().copied();
            let (done, _) = open.bursts.send_frames(&mut open.queue, frames, &self.rules, traffic)?;
            open.publish(&shared.ring)?;
            Ok(done)
        })
    }

    fn receive_list<'py>(&self, py: Python<'py>, limit: usize) -> Result<Bound<'py, PyList>, Error> {
        let shared = &self.transmitq.get().shared;
        port::received(py, &self.received, |frames, traffic| {
            shared.with(py, |open| {
                open.bursts.receive_frames(&mut open.queue, frames, limit, &self.rules, traffic)?;
                open.publish(&shared.ring)?;
                Ok(())
            })
        })
    }
}

#[pymethods]
impl DevicePort {
    #[new]
    #[pyo3(signature = (receiveq, transmitq, *, features))]
    fn new(receiveq: Py<DeviceQueue>, transmitq: Py<DeviceQueue>, features: Mask) -> Result<Self, Error> {
        let rules = Rules::device(port::accepted(&features, &receiveq, &transmitq)?);
        Ok(DevicePort { receiveq, transmitq, rules, sent: Mutex::default(), received: Mutex::default() })
    }

    /// Where frames go: the queue from which the driver receives.
    #[getter]
    fn receiveq(&self, py: Python<'_>) -> Py<DeviceQueue> {
        self.receiveq.clone_ref(py)
    }

    /// Where frames come from.
    #[getter]
    fn transmitq(&self, py: Python<'_>) -> Py<DeviceQueue> {
        self.transmitq.clone_ref(py)
    }

    /// Bytes of the header (5.1.6).
    #[getter]
    fn header_size(&self) -> usize {
        self.rules.header
    }

    /// Takes back what the burst holds, completes chains whose slots came back, and fills it with slots whose headers are zero.
    fn take(&self, py: Python<'_>, burst: &Bound<'_, Burst>) -> Result<usize, Error> {
        let burst = burst.get();
        burst.shared.check()?;
        let shared = &self.transmitq.get().shared;
        shared.with(py, |open| {
            open.bursts.bind(&open.queue, &burst.rows)?;
            let mut pool = lock_pool(py, burst.rows.pool());
            let completed = open.bursts.complete(&mut open.queue, &mut pool, &burst.rows)?;
            let taken = virtio_net_path::fill_clean(&mut pool, &burst.rows, &self.rules)?;
            drop(pool);
            if completed > 0 {
                open.publish(&shared.ring)?;
            }
            Ok(taken)
        })
    }

    /// Copies the burst's packets into receive buffers, publishes, and notifies; returns how many.
    fn send(&self, py: Python<'_>, burst: &Bound<'_, Burst>) -> Result<usize, Error> {
        let burst = burst.get();
        burst.shared.check()?;
        let mut traffic = lock(py, &self.sent);
        let traffic = &mut *traffic;
        let shared = &self.receiveq.get().shared;
        shared.with(py, |open| {
            let mut pool = lock_pool(py, burst.rows.pool());
            let sent = open.bursts.send(&mut open.queue, &mut pool, &burst.rows, &self.rules, traffic)?;
            drop(pool);
            open.publish(&shared.ring)?;
            Ok(sent)
        })
    }

    /// Gives back what the burst holds, completes chains whose slots came back, and fills it with transmitted packets; how many.
    fn receive(&self, py: Python<'_>, burst: &Bound<'_, Burst>) -> Result<usize, Error> {
        let burst = burst.get();
        burst.shared.check()?;
        let mut received = lock(py, &self.received);
        let traffic = &mut received.traffic;
        let shared = &self.transmitq.get().shared;
        shared.with(py, |open| {
            open.bursts.bind(&open.queue, &burst.rows)?;
            let mut pool = lock_pool(py, burst.rows.pool());
            if open.bursts.complete(&mut open.queue, &mut pool, &burst.rows)? > 0 {
                open.publish(&shared.ring)?;
            }
            let packets = open.bursts.receive(&mut open.queue, &mut pool, &burst.rows, &self.rules, traffic)?;
            drop(pool);
            open.publish(&shared.ring)?; // dropped chains
            Ok(packets)
        })
    }

    /// Copies frames into receive buffers; returns how many are done with, from the first on: one longer than the driver's buffer is dropped and counted.
    fn send_frames(&self, py: Python<'_>, frames: &Bound<'_, PyAny>) -> Result<usize, Error> {
        let frames = port::outgoing(frames)?;
        self.send_slices(py, &port::slices(&frames))
    }

    /// Copies of transmitted frames, at most `limit`; their chains are completed.
    #[pyo3(signature = (limit = Int::new(64)), text_signature = "($self, limit=64)")]
    fn receive_frames<'py>(&self, py: Python<'py>, limit: Int) -> Result<Bound<'py, PyList>, Error> {
        self.receive_list(py, port::limit(&limit)?)
    }

    /// As of `DriverPort`.
    #[getter]
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        port::counters(py, &self.sent, &self.received)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.receiveq)?;
        visit.call(&self.transmitq)
    }
}
