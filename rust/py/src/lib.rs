//! `virtio._core`: the Rust side as Python sees it. Translation only: signatures, calls, errors. What the names mean is documented in the
//! stub, `_core.pyi`; here stands the first sentence of each text, which `help()` shows.
//!
//! Every class is frozen and may be used from any thread: what changes stands behind a lock, taken once per call ([`lock`]). The calls that
//! carry bursts neither allocate nor make Python objects, and do not release the GIL.
#![deny(unsafe_code)]

mod args;
mod batch;
mod buffer;
mod burst;
mod chain;
mod device_queue;
mod driver_queue;
mod errors;
mod eventfd;
mod guest;
mod lock;
mod memory;
mod pool;
mod port;
mod port_device;
mod port_driver;
mod port_group;
mod pump;
mod queue;
mod ring;
mod tokens;

use args::{Int, Mask};
use errors::Error;
use pyo3::prelude::*;
use virtqueue::RingFeatures;

/// Whether going from index `old` to `new` passes `event`, all of 16 bits (2.7.7.1).
#[pyfunction]
fn need_event(event: Int, new: Int, old: Int) -> Result<bool, Error> {
    let index = |what, value: Int| value.within::<u16>(what, 0, u16::MAX.into());
    Ok(virtqueue::event::need_event(index("event", event)?, index("new", new)?, index("old", old)?))
}

/// (bytes, alignment) of one area.
type Extent = (u64, u64);

/// (bytes, alignment) of the descriptor, driver and device area (2.7, 2.8.10.1).
#[pyfunction]
#[pyo3(signature = (size, *, features = Mask::NONE), text_signature = "(size, *, features=0)")]
fn layout(size: Int, features: Mask) -> Result<(Extent, Extent, Extent), Error> {
    let (format, _) = RingFeatures::from_bits(features.bits()?);
    let max = virtqueue::spec::MAX_SIZE;
    let size = virtqueue::check_size(format, size.within("queue size", 1, max.into())?, max.into())?;
    let [descriptor, driver, device] = virtqueue::layout(format, size);
    Ok((descriptor, driver, device))
}

/// For tests: holds an object's lock for so long, without the GIL, so that other threads have to wait for it.
#[pyfunction]
fn _hold(py: Python<'_>, object: &Bound<'_, PyAny>, seconds: args::Seconds) -> Result<(), Error> {
    let time = seconds.duration("seconds")?;
    if let Ok(queue) = object.cast::<driver_queue::DriverQueue>() {
        lock::hold(py, queue.get().mutex(), time);
    } else if let Ok(queue) = object.cast::<device_queue::DeviceQueue>() {
        lock::hold(py, queue.get().mutex(), time);
    } else {
        lock::hold_pool(py, &object.cast::<pool::BufferPool>().map_err(PyErr::from)?.get().shared.pool, time);
    }
    Ok(())
}

/// The Rust core: memory, buffer pools, and both ends of a virtqueue in both ring formats.
#[pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use super::batch::ChainBatch;
    #[pymodule_export]
    use super::burst::Burst;
    #[pymodule_export]
    use super::chain::Chain;
    #[pymodule_export]
    use super::device_queue::DeviceQueue;
    #[pymodule_export]
    use super::driver_queue::DriverQueue;
    #[pymodule_export]
    use super::eventfd::EventFd;
    #[pymodule_export]
    use super::guest::GuestMemory;
    #[pymodule_export]
    use super::memory::Memory;
    #[pymodule_export]
    use super::pool::BufferPool;
    #[pymodule_export]
    use super::port::net_header_size;
    #[pymodule_export]
    use super::port_device::DevicePort;
    #[pymodule_export]
    use super::port_driver::DriverPort;
    #[pymodule_export]
    use super::port_group::PortGroup;
    #[pymodule_export]
    use super::pump::Pump;
    #[pymodule_export]
    use super::pump::PumpRunner;
    #[pymodule_export]
    use super::{_hold, layout, need_event};

    #[allow(non_upper_case_globals, reason = "a name that Python gives")]
    #[pymodule_export]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
