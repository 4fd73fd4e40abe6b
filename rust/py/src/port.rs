//! What `DriverPort` and `DevicePort` share: arguments, counters, frames as Python's bytes.

use crate::args::{Int, Mask};
use crate::buffer::Bytes;
use crate::burst::Burst;
use crate::errors::{Error, named};
use crate::lock::lock;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyDict, PyList};
use std::sync::Mutex;
use virtio_net_path::header::{Reason, header_size};
use virtio_net_path::{Frames, Traffic};

/// Bytes of the header before each frame under these features, for both sides (5.1.6): 10, 12, 20, 24 or 32.
#[pyfunction]
pub fn net_header_size(features: Mask) -> Result<usize, Error> {
    Ok(header_size(features.bits()?))
}

/// What the two kinds of ports have in common: the calls of a `PortGroup`.
pub trait BothPorts {
    /// As the method of this name.
    fn take(&self, py: Python<'_>, burst: &Bound<'_, Burst>) -> Result<usize, Error>;
    /// As the method of this name.
    fn send(&self, py: Python<'_>, burst: &Bound<'_, Burst>) -> Result<usize, Error>;
    /// As the method of this name.
    fn receive(&self, py: Python<'_>, burst: &Bound<'_, Burst>) -> Result<usize, Error>;
    /// As `send_frames`.
    fn send_slices(&self, py: Python<'_>, frames: &[&[u8]]) -> Result<usize, Error>;
    /// As `receive_frames`.
    fn receive_list<'py>(&self, py: Python<'py>, limit: usize) -> Result<Bound<'py, PyList>, Error>;
}

/// The accepted bits, if a port can work with them.
pub fn features(given: &Mask) -> Result<u128, Error> {
    let features = given.bits()?;
    match header_size(features) {
        10 => Err(Error::Value(format!("features {features:#x} lack VERSION_1 (bit 32): there is no legacy header here"))),
        _ => Ok(features),
    }
}

/// As [`features`], for a port of its own: on two queues.
pub fn accepted<Q>(given: &Mask, receiveq: &Py<Q>, transmitq: &Py<Q>) -> Result<u128, Error> {
    if receiveq.is(transmitq) {
        return Err(Error::Value("a port has two queues, not one twice".into()));
    }
    features(given)
}

/// Frames to send, held while they are copied.
pub fn outgoing<'py>(frames: &Bound<'py, PyAny>) -> PyResult<Vec<Bound<'py, PyBytes>>> {
    let bytes = |item: Bound<'py, PyAny>| match item.cast_into_exact::<PyBytes>() {
        Ok(bytes) => Ok(bytes),
        Err(error) => other_bytes(error.into_inner()),
    };
    if let Ok(list) = frames.cast::<PyList>() {
        let mut found = Vec::with_capacity(list.len());
        for (number, item) in list.iter().enumerate() {
            found.push(bytes(item).map_err(|error| nth(number, error))?);
        }
        return Ok(found);
    }
    // A frame's bytes are no frames, though they can be gone through.
    if frames.is_instance_of::<PyBytes>() || frames.is_instance_of::<PyByteArray>() || !frames.hasattr("__iter__")? {
        let found = frames.get_type().name()?;
        return Err(PyTypeError::new_err(format!("frames is a {found}: it has to be a list of frames, each bytes-like")));
    }
    frames.try_iter()?.enumerate().map(|(number, item)| bytes(item?).map_err(|error| nth(number, error))).collect()
}

#[cold]
fn nth(number: usize, error: PyErr) -> PyErr {
    named(&format!("frame {number}"), error)
}

#[cold]
fn other_bytes(item: Bound<'_, PyAny>) -> PyResult<Bound<'_, PyBytes>> {
    match item.cast_into::<PyBytes>() {
        Ok(bytes) => Ok(bytes),
        Err(error) => {
            let item = error.into_inner();
            let data: Bytes = item.extract()?;
            Ok(PyBytes::new(item.py(), data.as_slice()))
        }
    }
}

/// Their bytes, which do not change: asked for once, since every question to an object is a call.
pub fn slices<'a>(frames: &'a [Bound<'_, PyBytes>]) -> Vec<&'a [u8]> {
    frames.iter().map(|frame| frame.as_bytes()).collect()
}

/// How many frames a call may give.
pub fn limit(limit: &Int) -> Result<usize, Error> {
    limit.within("limit", 0, i64::MAX.into())
}

/// What was received, with room for frames on their way to Python.
#[derive(Default)]
pub struct Received {
    pub traffic: Traffic,
    pub frames: Frames,
}

/// Makes Python's bytes of what `receive` left in the frames it is given, outside of the lock.
pub fn received<'py>(
    py: Python<'py>,
    state: &Mutex<Received>,
    receive: impl FnOnce(&mut Frames, &mut Traffic) -> Result<(), Error>,
) -> Result<Bound<'py, PyList>, Error> {
    let mut guard = lock(py, state);
    let mut frames = std::mem::take(&mut guard.frames);
    frames.clear();
    let result = receive(&mut frames, &mut guard.traffic);
    drop(guard);
    let list = result.and_then(|()| Ok(PyList::new(py, frames.iter().map(|frame| PyBytes::new(py, frame)))?));
    lock(py, state).frames = frames;
    list
}

/// Dropped packets by reason, where there were any.
pub fn drops<'py>(py: Python<'py>, traffic: &Traffic) -> PyResult<Bound<'py, PyDict>> {
    let drops = PyDict::new(py);
    for (reason, name) in Reason::ALL {
        if traffic.drops[reason as usize] > 0 {
            drops.set_item(name, traffic.drops[reason as usize])?;
        }
    }
    Ok(drops)
}

/// Counters of both ways by name, `sent` or `received` before them.
pub fn counters<'py>(py: Python<'py>, sent: &Mutex<Traffic>, received: &Mutex<Received>) -> PyResult<Bound<'py, PyDict>> {
    let (sent, received) = (*lock(py, sent), lock(py, received).traffic);
    let all = PyDict::new(py);
    for (way, traffic) in [("sent", &sent), ("received", &received)] {
        all.set_item(format!("{way}_frames"), traffic.frames)?;
        all.set_item(format!("{way}_bytes"), traffic.bytes)?;
        all.set_item(format!("{way}_drops"), drops(py, traffic)?)?;
    }
    Ok(all)
}
