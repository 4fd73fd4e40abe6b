//! `Pump` and `PumpRunner`: frames between a queue and a TAP, in a loop without the GIL.

use crate::args::{Int, Mask};
use crate::device_queue::{self, DeviceQueue};
use crate::driver_queue::{self, DriverQueue};
use crate::errors::Error;
use crate::eventfd::EventFd;
use crate::lock::lock;
use crate::pool::{self, BufferPool};
use crate::port;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use virtio_memory::{BoundToProcess, MemoryError, duplicate, let_go, set_nonblocking};
use virtio_net_path::header::MAX_FRAME;
use virtio_net_path::pump::runner::{self, Beside, MAX_STATIONS, Station, Wake};
use virtio_net_path::pump::{DeviceReceive, DeviceTransmit, DriverReceive, DriverTransmit, PumpCounters, Step};
use virtio_net_path::{BurstError, Rules};
use virtqueue::{AnyDevice, AnyDriver};

/// Linux' EBADFD: the TAP's device is gone.
const EBADFD: i32 = 77;

/// Whose queue it is.
enum Queue {
    Driver(Py<DriverQueue>),
    Device(Arc<device_queue::Shared>),
}

enum Kind {
    DriverTransmit(DriverTransmit),
    DriverReceive(DriverReceive),
    DeviceTransmit(DeviceTransmit),
    DeviceReceive(DeviceReceive),
}

/// What a runner takes while it runs.
struct Work {
    kind: Kind,
    tap: OwnedFd,
}

enum Place {
    Here(Box<Work>),
    /// A runner has it. This is its TAP's descriptor.
    Running(RawFd),
    Closed,
}

#[derive(Clone, Copy, Default)]
struct Statistics {
    pump: PumpCounters,
    steps: u64,
    sleeps: u64,
}

/// Frames between one queue of a network device (5.1.6) and a TAP, in a loop without the GIL, and without a copy of ours.
#[pyclass(frozen, module = "virtio._core")]
pub struct Pump {
    queue: Queue,
    /// The driver's, for as long as its slots may be used.
    _pool: Option<Arc<pool::Shared>>,
    event: Arc<virtio_memory::EventFd>,
    process: BoundToProcess,
    place: Mutex<Place>,
    statistics: Mutex<Statistics>,
    running: AtomicBool,
    error: Mutex<Option<Py<PyAny>>>,
}

/// What went wrong with a TAP is nobody's mistake.
fn tap_failed(error: BurstError) -> Error {
    match error {
        BurstError::Memory(MemoryError::Os { errno: EBADFD, .. }) => Error::Transport("the TAP is gone".into()),
        BurstError::Memory(error @ MemoryError::Os { .. }) => Error::Transport(format!("the TAP failed: {error}")),
        error => error.into(),
    }
}

/// All else that the system refuses has to do with whoever is at the other end of the queue.
fn ended(error: Error) -> Error {
    match error {
        Error::Memory(MemoryError::Os { errno: EBADFD, operation }) => tap_failed(MemoryError::Os { errno: EBADFD, operation }.into()),
        error => error.of_system("a notification failed"),
    }
}

impl Pump {
    fn new(
        py: Python<'_>,
        queue: Queue,
        pool: Option<Arc<pool::Shared>>,
        kind: Kind,
        tap: OwnedFd,
        event: &Bound<'_, EventFd>,
    ) -> Result<Self, Error> {
        Ok(Pump {
            queue,
            _pool: pool,
            event: event.get().event(py)?,
            process: BoundToProcess::new(),
            place: Mutex::new(Place::Here(Box::new(Work { kind, tap }))),
            statistics: Mutex::default(),
            running: AtomicBool::new(false),
            error: Mutex::default(),
        })
    }

    /// On a driver's queue. `what` is the longest thing that has to fit into slots, and its bytes.
    fn driver(
        py: Python<'_>,
        queue: Py<DriverQueue>,
        pool: &Bound<'_, BufferPool>,
        tap: &Int,
        interrupt: &Bound<'_, EventFd>,
        what: (&str, usize),
        make: impl FnOnce(&virtqueue::DriverQueue<AnyDriver>, Arc<virtio_memory::BufferPool>) -> Result<Kind, MemoryError>,
    ) -> Result<Self, Error> {
        let shared = pool.get().shared.join()?;
        let slots = shared.pool.clone();
        let made = queue.get().open(py, |open| {
            open.bursts.bind_pool(&open.queue, &slots, 0)?;
            Ok(make(&open.queue, slots.clone()))
        })?;
        let kind = made.map_err(|error| slots_error(error, what.0, what.1))?;
        Pump::new(py, Queue::Driver(queue), Some(shared), kind, tap_of(tap)?, interrupt)
    }

    /// On a device's queue.
    fn device(
        py: Python<'_>,
        queue: &Bound<'_, DeviceQueue>,
        tap: &Int,
        doorbell: &Bound<'_, EventFd>,
        make: impl FnOnce(&virtqueue::DeviceQueue<AnyDevice>) -> Result<Kind, MemoryError>,
    ) -> Result<Self, Error> {
        let shared = queue.get().shared.clone();
        let kind = shared.with(py, |open| Ok(make(&open.queue)?))?;
        Pump::new(py, Queue::Device(shared), None, kind, tap_of(tap)?, doorbell)
    }

    fn watch(&self, py: Python<'_>, wake: &Arc<Wake>) -> Result<(), Error> {
        match &self.queue {
            Queue::Driver(queue) => queue.get().watch(py, wake),
            Queue::Device(queue) => queue.watch(py, wake),
        }
    }

    /// For a runner.
    fn start(&self, py: Python<'_>) -> Result<Box<Work>, Error> {
        self.process.check()?;
        let mut place = lock(py, &self.place);
        let tap = match &*place {
            Place::Here(work) => work.tap.as_raw_fd(),
            Place::Running(_) => return Err(Error::Status("the pump runs already".into())),
            Place::Closed => return Err(Error::closed("pump")),
        };
        let before = std::mem::replace(&mut *place, Place::Running(tap));
        drop(place);
        let Place::Here(work) = before else { return Err(Error::closed("pump")) };
        self.running.store(true, Relaxed);
        let old = lock(py, &self.error).take();
        drop(old);
        Ok(work)
    }

    /// What `start` did is undone.
    fn end(&self, py: Python<'_>, work: Box<Work>, wake: &Arc<Wake>) {
        match &self.queue {
            Queue::Driver(queue) => queue.get().unwatch(py, wake),
            Queue::Device(queue) => queue.unwatch(py, wake),
        }
        self.running.store(false, Relaxed);
        *lock(py, &self.place) = Place::Here(work);
    }
}

/// A descriptor of our own for the TAP.
fn tap_of(fd: &Int) -> Result<OwnedFd, Error> {
    let tap = duplicate(fd.within::<RawFd>("TAP descriptor", 0, RawFd::MAX.into())?)?;
    set_nonblocking(tap.as_fd())?;
    Ok(tap)
}

/// The least slot that holds the longest frame, for a message.
fn slots_error(error: MemoryError, what: &str, bytes: usize) -> Error {
    match error {
        MemoryError::BadSize { value, max, .. } => {
            let slot = (bytes + virtio_memory::HEADROOM).next_multiple_of(64);
            let message =
                format!("{what} of {bytes} bytes takes {value} slots, of which there are {max} at most: use slots of {slot} bytes");
            Error::Value(message)
        }
        error => error.into(),
    }
}

#[pymethods]
impl Pump {
    /// From the TAP to a driver's transmit queue.
    #[staticmethod]
    #[pyo3(signature = (queue, pool, tap, *, features, interrupt))]
    fn driver_transmit(
        py: Python<'_>,
        queue: Py<DriverQueue>,
        pool: &Bound<'_, BufferPool>,
        tap: Int,
        features: Mask,
        interrupt: &Bound<'_, EventFd>,
    ) -> Result<Self, Error> {
        let rules = Rules::driver(port::features(&features)?);
        let longest = match rules.longest_outgoing() {
            MAX_FRAME => MAX_FRAME,
            _ => pool.get().shared.pool.slot_size() - virtio_memory::HEADROOM,
        };
        Pump::driver(py, queue, pool, &tap, interrupt, ("a frame", longest), |queue, slots| {
            Ok(Kind::DriverTransmit(DriverTransmit::new(queue, slots, rules, longest)?))
        })
    }

    /// From a driver's receive queue to the TAP; the buffers are given to the device again.
    #[staticmethod]
    #[pyo3(signature = (queue, pool, tap, *, features, interrupt))]
    fn driver_receive(
        py: Python<'_>,
        queue: Py<DriverQueue>,
        pool: &Bound<'_, BufferPool>,
        tap: Int,
        features: Mask,
        interrupt: &Bound<'_, EventFd>,
    ) -> Result<Self, Error> {
        let rules = Rules::driver(port::features(&features)?);
        Pump::driver(py, queue, pool, &tap, interrupt, ("a receive buffer", rules.longest_incoming()), |queue, slots| {
            Ok(Kind::DriverReceive(DriverReceive::new(queue, slots, rules)?))
        })
    }

    /// From a driver's transmitted chains to the TAP.
    #[staticmethod]
    #[pyo3(signature = (queue, tap, *, features, doorbell))]
    fn device_transmit(
        py: Python<'_>,
        queue: &Bound<'_, DeviceQueue>,
        tap: Int,
        features: Mask,
        doorbell: &Bound<'_, EventFd>,
    ) -> Result<Self, Error> {
        let rules = Rules::device(port::features(&features)?);
        Pump::device(py, queue, &tap, doorbell, |queue| Ok(Kind::DeviceTransmit(DeviceTransmit::new(queue, rules)?)))
    }

    /// From the TAP to the receive buffers of a driver.
    #[staticmethod]
    #[pyo3(signature = (queue, tap, *, features, doorbell, longest))]
    fn device_receive(
        py: Python<'_>,
        queue: &Bound<'_, DeviceQueue>,
        tap: Int,
        features: Mask,
        doorbell: &Bound<'_, EventFd>,
        longest: Int,
    ) -> Result<Self, Error> {
        let rules = Rules::device(port::features(&features)?);
        let longest = longest.within("longest frame", 1, MAX_FRAME as i128)?;
        Pump::device(py, queue, &tap, doorbell, |queue| Ok(Kind::DeviceReceive(DeviceReceive::new(queue, rules, longest)?)))
    }

    /// `frames`, `bytes`, `drops` (by reason, as a port's), `refused` (by the TAP), `steps`, and its runner's `sleeps`.
    #[getter]
    fn statistics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let Statistics { pump, steps, sleeps } = *lock(py, &self.statistics);
        let all = PyDict::new(py);
        all.set_item("frames", pump.traffic.frames)?;
        all.set_item("bytes", pump.traffic.bytes)?;
        all.set_item("drops", port::drops(py, &pump.traffic)?)?;
        all.set_item("refused", pump.refused)?;
        all.set_item("steps", steps)?;
        all.set_item("sleeps", sleeps)?;
        Ok(all)
    }

    /// What stopped it: `queue.broken`, StatusError if the queue was closed, TransportError if the TAP is gone, or OSError.
    #[getter]
    fn error(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        lock(py, &self.error).as_ref().map(|error| error.clone_ref(py))
    }

    /// Whether a runner has it, and it has not stopped with an error.
    #[getter]
    fn running(&self) -> bool {
        self.running.load(Relaxed)
    }

    /// Closes the TAP's duplicate; in a forked child, its own.
    fn close(&self, py: Python<'_>) -> Result<(), Error> {
        let mut place = lock(py, &self.place);
        match &*place {
            // In a forked child no runner runs it, and none gives the descriptor back.
            Place::Running(tap) if self.process.check().is_err() => let_go(*tap)?,
            Place::Running(_) => return Err(Error::Status("the pump runs: stop its runner first".into())),
            Place::Here(_) | Place::Closed => {}
        }
        let old = std::mem::replace(&mut *place, Place::Closed);
        drop(place);
        drop(old);
        Ok(())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        if let Queue::Driver(queue) = &self.queue {
            visit.call(queue)?;
        }
        match self.error.try_lock() {
            Ok(error) => visit.call(&*error),
            Err(_) => Ok(()),
        }
    }

    fn __clear__(&self) {
        let Ok(mut error) = self.error.try_lock() else { return };
        let garbage = error.take();
        drop(error);
        drop(garbage);
    }
}

/// A pump that runs.
struct Running<'a> {
    pump: &'a Pump,
    work: Box<Work>,
    runner: &'a Shared,
    /// The last step waited for buffers of the queue.
    starved: bool,
}

impl Station for Running<'_> {
    type Error = Error;

    fn step(&mut self) -> Result<Step, Error> {
        let Work { kind, tap } = &mut *self.work;
        let tap = tap.as_fd();
        let stepped = match &self.pump.queue {
            Queue::Driver(queue) => {
                let queue = queue.get();
                queue.with_pump(|open| {
                    let driver_queue::Open { queue: ring, bursts, table, .. } = open;
                    let step = match kind {
                        Kind::DriverTransmit(pump) => pump.step(ring, bursts, table, tap),
                        Kind::DriverReceive(pump) => pump.step(ring, bursts, table, tap),
                        Kind::DeviceTransmit(_) | Kind::DeviceReceive(_) => Ok(Step::default()),
                    };
                    // What went before an error goes.
                    open.publish(&queue.ring)?;
                    step.map_err(tap_failed)
                })
            }
            Queue::Device(shared) => shared.with_pump(|open| {
                let step = match kind {
                    Kind::DeviceTransmit(pump) => pump.step(&mut open.queue, tap),
                    Kind::DeviceReceive(pump) => pump.step(&mut open.queue, tap),
                    Kind::DriverTransmit(_) | Kind::DriverReceive(_) => Ok(Step::default()),
                };
                open.publish(&shared.ring)?;
                step.map_err(tap_failed)
            }),
        };
        let mut statistics = self.pump.statistics.lock().unwrap_or_else(PoisonError::into_inner);
        statistics.steps += 1;
        statistics.pump = match kind {
            Kind::DriverTransmit(pump) => pump.counters,
            Kind::DriverReceive(pump) => pump.counters,
            Kind::DeviceTransmit(pump) => pump.counters,
            Kind::DeviceReceive(pump) => pump.counters,
        };
        self.starved = matches!(stepped, Ok(Step { starved: true, .. }));
        stepped
    }

    fn arm(&mut self) -> Result<bool, Error> {
        match &self.pump.queue {
            Queue::Driver(queue) => {
                let queue = queue.get();
                let transmits = matches!(self.work.kind, Kind::DriverTransmit(_));
                queue.with_pump(|open| {
                    let ready = open.queue.arm() || open.bursts.ready() > 0;
                    if self.starved && transmits && !ready && open.queue.outstanding() > 0 {
                        open.ring_again(&queue.ring)?;
                    }
                    Ok(ready)
                })
            }
            Queue::Device(shared) => shared.with_pump(|open| Ok(open.queue.arm())),
        }
    }

    fn disarm(&mut self) {
        // If that fails the next step tells.
        match &self.pump.queue {
            Queue::Driver(queue) => queue.get().try_pump(|open| open.queue.disarm()),
            Queue::Device(shared) => shared.try_pump(|open| open.queue.disarm()),
        }
    }

    fn tap(&self) -> BorrowedFd<'_> {
        self.work.tap.as_fd()
    }

    fn event(&self) -> &virtio_memory::EventFd {
        &self.pump.event
    }

    fn sleeps(&mut self) {
        self.pump.statistics.lock().unwrap_or_else(PoisonError::into_inner).sleeps += 1;
    }

    fn ended(&mut self, error: Error) {
        let failed = Python::attach(|py| {
            let exception = PyErr::from(ended(error)).into_value(py).into_any();
            let old = lock(py, &self.pump.error).replace(exception.clone_ref(py));
            drop(old);
            self.pump.running.store(false, Relaxed);
            let mut first = lock(py, &self.runner.first);
            let kept = if first.is_none() { first.replace(exception) } else { Some(exception) };
            drop(first);
            drop(kept);
            self.runner.failed.signal()
        });
        // Our own eventfd takes every signal.
        let _ = failed;
    }
}

/// What a runner shares with those who watch it.
struct Shared {
    wake: Arc<Wake>,
    failed: Arc<virtio_memory::EventFd>,
    first: Mutex<Option<Py<PyAny>>>,
    process: BoundToProcess,
}

/// Runs pumps, on the one thread that calls `run`.
#[pyclass(frozen, module = "virtio._core")]
pub struct PumpRunner {
    pumps: Vec<Py<Pump>>,
    shared: Shared,
    failed: Py<EventFd>,
}

impl PumpRunner {
    /// Takes every pump, or none.
    fn start(&self, py: Python<'_>) -> Result<Vec<Running<'_>>, Error> {
        let mut taken: Vec<Running<'_>> = Vec::with_capacity(self.pumps.len());
        for pump in &self.pumps {
            let pump = pump.get();
            let started = pump.start(py).and_then(|work| match pump.watch(py, &self.shared.wake) {
                Ok(()) => Ok(work),
                Err(error) => {
                    pump.end(py, work, &self.shared.wake);
                    Err(error)
                }
            });
            match started {
                Ok(work) => taken.push(Running { pump, work, runner: &self.shared, starved: false }),
                Err(error) => {
                    taken.into_iter().for_each(|running| running.pump.end(py, running.work, &self.shared.wake));
                    return Err(error);
                }
            }
        }
        Ok(taken)
    }
}

#[pymethods]
impl PumpRunner {
    #[new]
    fn new(py: Python<'_>, pumps: Vec<Py<Pump>>) -> Result<Self, Error> {
        if pumps.is_empty() || pumps.len() > MAX_STATIONS {
            return Err(Error::Value(format!("{} pumps are not in 1 to {MAX_STATIONS}", pumps.len())));
        }
        if pumps.iter().enumerate().any(|(index, pump)| pumps[..index].iter().any(|other| other.is(pump))) {
            return Err(Error::Value("a pump stands in the list twice".into()));
        }
        let failed = Arc::new(virtio_memory::EventFd::new()?);
        let shared =
            Shared { wake: Arc::new(Wake::new()?), failed: failed.clone(), first: Mutex::new(None), process: BoundToProcess::new() };
        Ok(PumpRunner { pumps, shared, failed: Py::new(py, EventFd::shared(failed))? })
    }

    /// Moves frames, without the GIL, until `stop` or until every pump has stopped with an error; then raises the first error, if any.
    fn run(&self, py: Python<'_>) -> Result<(), Error> {
        self.shared.process.check()?;
        let threading = py.import("threading")?;
        let main = threading.call_method0("current_thread")?.is(&threading.call_method0("main_thread")?);
        let mut stations = self.start(py)?;
        let mut raised = None;
        let mut signals = || {
            raised = Python::attach(|py| py.check_signals()).err();
            raised.is_some()
        };
        let signals: Option<Beside<'_>> = if main { Some(&mut signals) } else { None };
        let result = py.detach(|| runner::run(&mut stations, &self.shared.wake, signals));
        stations.into_iter().for_each(|running| running.pump.end(py, running.work, &self.shared.wake));
        if let Some(error) = raised {
            return Err(error.into());
        }
        result?;
        match lock(py, &self.shared.first).take() {
            Some(error) => Err(Error::Python(PyErr::from_value(error.into_bound(py)))),
            None => Ok(()),
        }
    }

    /// Ends `run`, now and for good: a later one ends at once.
    fn stop(&self) -> Result<(), Error> {
        self.shared.process.check()?;
        self.shared.wake.stop();
        Ok(())
    }

    /// Signalled whenever a pump stops with an error, which its `error` then tells.
    #[getter]
    fn failed(&self, py: Python<'_>) -> Py<EventFd> {
        self.failed.clone_ref(py)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        for pump in &self.pumps {
            visit.call(pump)?;
        }
        match self.shared.first.try_lock() {
            Ok(first) => visit.call(&*first),
            Err(_) => Ok(()),
        }
    }
}
