//! `DriverPort`: the driver's end of a network device's queue pair.

use crate::args::{Int, Mask};
use crate::burst::Burst;
use crate::driver_queue::{DriverQueue, Open};
use crate::errors::Error;
use crate::lock::{lock, lock_pool};
use crate::pool::BufferPool;
use crate::port::{self, BothPorts, Received};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use std::sync::{Arc, Mutex};
use virtio_memory::HEADROOM;
use virtio_net_path::{DriverBursts, ReceiveBuffers, Rules, Traffic};

/// The driver's end of a network device's queue pair (5.1.6): each call is one crossing for a whole burst.
#[pyclass(frozen, module = "virtio._core")]
pub struct DriverPort {
    receiveq: Py<DriverQueue>,
    transmitq: Py<DriverQueue>,
    pool: Py<BufferPool>,
    slots: Arc<virtio_memory::BufferPool>,
    rules: Rules,
    buffers: ReceiveBuffers,
    sent: Mutex<Traffic>,
    received: Mutex<Received>,
}

impl DriverPort {
    /// Refuses a pool that is closed, and a burst of another one.
    #[inline]
    fn check(&self, burst: &Burst) -> Result<(), Error> {
        burst.shared.check()?;
        if !Arc::ptr_eq(&self.slots, burst.rows.pool()) {
            return Err(Error::Value("the burst is not of the port's pool".into()));
        }
        Ok(())
    }

    /// Runs `call` on one of the queues, bound to the pool.
    #[inline]
    fn with<T>(
        &self,
        py: Python<'_>,
        queue: &Py<DriverQueue>,
        capacity: usize,
        call: impl FnOnce(&mut Open) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let queue = queue.get();
        queue.with_memory(py, |open| {
            let open = open.for_bursts()?;
            open.bursts.bind_pool(&open.queue, &self.slots, capacity)?;
            let result = call(open)?;
            open.publish(&queue.ring)?;
            Ok(result)
        })
    }
}

impl BothPorts for DriverPort {
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
        self.pool.get().shared.check()?;
        let mut traffic = lock(py, &self.sent);
        let traffic = &mut *traffic;
        self.with(py, &self.transmitq, 1, |open| {
            DriverBursts::check_frames(&open.queue, &self.slots, frames.iter().copied())?;
            let mut pool = lock_pool(py, &self.slots);
            let frames = frames.iter().copied();
            Ok(open.bursts.send_frames(&mut open.queue, &mut pool, frames, &self.rules, traffic)?)
        })
    }

    fn receive_list<'py>(&self, py: Python<'py>, limit: usize) -> Result<Bound<'py, PyList>, Error> {
        self.pool.get().shared.check()?;
        port::received(py, &self.received, |frames, traffic| {
            self.with(py, &self.receiveq, 1, |open| {
                let mut pool = lock_pool(py, &self.slots);
                open.bursts.receive_frames(&mut open.queue, &mut pool, frames, limit, &self.rules, traffic)?;
                open.bursts.refill(&mut open.queue, &mut pool, &self.rules, self.buffers)?;
                Ok(())
            })
        })
    }
}

#[pymethods]
impl DriverPort {
    #[new]
    #[pyo3(signature = (receiveq, transmitq, pool, *, features, buffer_size = Int::new(1), buffers = Int::new(32768)),
           text_signature = "(receiveq, transmitq, pool, *, features, buffer_size=1, buffers=32768)")]
    fn new(
        py: Python<'_>,
        receiveq: Py<DriverQueue>,
        transmitq: Py<DriverQueue>,
        pool: Py<BufferPool>,
        features: Mask,
        buffer_size: Int,
        buffers: Int,
    ) -> Result<Self, Error> {
        let rules = Rules::driver(port::accepted(&features, &receiveq, &transmitq)?);
        let slots = pool.get().shared.join()?.pool.clone();
        let bytes: usize = buffer_size.within("receive buffer size", 1, 1 << 20)?;
        let each = bytes.div_ceil(slots.slot_size() - HEADROOM + rules.header);
        let (size, most) = (receiveq.get().ring.size, slots.slots());
        if each > usize::from(size).min(most as usize) {
            let message =
                format!("a receive buffer of {bytes} bytes takes {each} slots: the queue has {size} entries, the pool {most} slots");
            return Err(Error::Value(message));
        }
        let count = buffers.within("receive buffers", 0, 32768)?;
        let port = DriverPort {
            receiveq,
            transmitq,
            pool,
            slots,
            rules,
            buffers: ReceiveBuffers { slots: each, count },
            sent: Mutex::default(),
            received: Mutex::default(),
        };
        port.with(py, &port.transmitq, 1, |_| Ok(()))?;
        port.with(py, &port.receiveq, 1, |_| Ok(()))?;
        Ok(port)
    }

    /// Where frames come from.
    #[getter]
    fn receiveq(&self, py: Python<'_>) -> Py<DriverQueue> {
        self.receiveq.clone_ref(py)
    }

    /// Where frames go.
    #[getter]
    fn transmitq(&self, py: Python<'_>) -> Py<DriverQueue> {
        self.transmitq.clone_ref(py)
    }

    /// Whose slots they are in.
    #[getter]
    fn pool(&self, py: Python<'_>) -> Py<BufferPool> {
        self.pool.clone_ref(py)
    }

    /// Bytes of the header (5.1.6).
    #[getter]
    fn header_size(&self) -> usize {
        self.rules.header
    }

    /// Gives the device receive buffers, as many as it is to have and the pool has slots for; returns how many.
    fn refill(&self, py: Python<'_>) -> Result<usize, Error> {
        self.pool.get().shared.check()?;
        self.with(py, &self.receiveq, 1, |open| {
            let mut pool = lock_pool(py, &self.slots);
            Ok(open.bursts.refill(&mut open.queue, &mut pool, &self.rules, self.buffers)?)
        })
    }

    /// Frees the slots of what was sent, takes back what the burst holds, and fills it with slots whose headers are zero; how many.
    fn take(&self, py: Python<'_>, burst: &Bound<'_, Burst>) -> Result<usize, Error> {
        let burst = burst.get();
        self.check(burst)?;
        self.with(py, &self.transmitq, burst.rows.capacity(), |open| {
            let mut pool = lock_pool(py, &self.slots);
            Ok(open.bursts.take(&mut open.queue, &mut pool, &burst.rows, &self.rules)?)
        })
    }

    /// Sends the burst's packets, publishes, and notifies; returns how many.
    fn send(&self, py: Python<'_>, burst: &Bound<'_, Burst>) -> Result<usize, Error> {
        let burst = burst.get();
        self.check(burst)?;
        let mut traffic = lock(py, &self.sent);
        let traffic = &mut *traffic;
        self.with(py, &self.transmitq, burst.rows.capacity(), |open| {
            let mut pool = lock_pool(py, &self.slots);
            Ok(open.bursts.send(&mut open.queue, &mut pool, &burst.rows, &self.rules, traffic)?)
        })
    }

    /// Gives back what the burst holds, fills it with received packets, and gives the device new buffers; returns how many packets.
    fn receive(&self, py: Python<'_>, burst: &Bound<'_, Burst>) -> Result<usize, Error> {
        let burst = burst.get();
        self.check(burst)?;
        let mut received = lock(py, &self.received);
        let traffic = &mut received.traffic;
        self.with(py, &self.receiveq, burst.rows.capacity(), |open| {
            let mut pool = lock_pool(py, &self.slots);
            let packets = open.bursts.receive(&mut open.queue, &mut pool, &burst.rows, &self.rules, traffic)?;
            open.bursts.refill(&mut open.queue, &mut pool, &self.rules, self.buffers)?;
            Ok(packets)
        })
    }

    /// Copies and sends frames; returns how many fitted, from the first on.
    fn send_frames(&self, py: Python<'_>, frames: &Bound<'_, PyAny>) -> Result<usize, Error> {
        let frames = port::outgoing(frames)?;
        self.send_slices(py, &port::slices(&frames))
    }

    /// Copies of received frames, at most `limit`; their slots are the device's again.
    #[pyo3(signature = (limit = Int::new(64)), text_signature = "($self, limit=64)")]
    fn receive_frames<'py>(&self, py: Python<'py>, limit: Int) -> Result<Bound<'py, PyList>, Error> {
        self.receive_list(py, port::limit(&limit)?)
    }

    /// `sent_frames`, `sent_bytes`, `sent_drops` (by reason: short, long, checksum, gso, num_buffers, missing, offload); so received.
    #[getter]
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        port::counters(py, &self.sent, &self.received)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.receiveq)?;
        visit.call(&self.transmitq)?;
        visit.call(&self.pool)
    }
}
