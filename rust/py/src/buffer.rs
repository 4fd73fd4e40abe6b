//! The buffer protocol, both ways: bytes of ours for Python, and Python's bytes-like arguments for us. The binding's only unsafe code.
//!
//! What is exported stays where it is as long as an export lives, because the export holds its owner. Nothing of a peer's memory is exported,
//! and what others export is copied before it is looked at.

#![allow(unsafe_code)]

use crate::args::wrong;
use crate::errors::Error;
use crate::memory::{Memory, Use};
use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;
use std::any::Any;
use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use virtio_memory::Mapping;

/// Fills a view of writable bytes. `exporter` is kept by the view until it is released.
///
/// # Safety
/// `view` is the one passed to `__getbuffer__`, and `len` bytes from `start` stay readable and writable while `exporter` lives.
unsafe fn export(exporter: &Bound<'_, PyAny>, view: *mut ffi::Py_buffer, start: *mut u8, len: usize, flags: c_int) -> PyResult<()> {
    if view.is_null() {
        return Err(PyBufferError::new_err("no view to fill"));
    }
    // SAFETY: the caller vouches for view and bytes; the length fits, since the bytes exist.
    match unsafe { ffi::PyBuffer_FillInfo(view, exporter.as_ptr(), start.cast(), len as ffi::Py_ssize_t, 0, flags) } {
        0 => Ok(()),
        _ => Err(PyErr::fetch(exporter.py())),
    }
}

#[pymethods]
impl Memory {
    unsafe fn __getbuffer__(slf: &Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let (mapping, counted) = slf.get().export()?;
        // SAFETY: the mapping lives as long as the memory is not closed, and it refuses that while `counted` is not dropped.
        unsafe { export(slf.as_any(), view, mapping.as_ptr(), mapping.len(), flags)? };
        // SAFETY: `view` was just filled; `internal` is the exporter's own.
        unsafe { (*view).internal = Box::into_raw(Box::new(counted)).cast() };
        Ok(())
    }

    unsafe fn __releasebuffer__(&self, view: *mut ffi::Py_buffer) {
        // SAFETY: `internal` is what `__getbuffer__` put there, and a view is released once.
        drop(unsafe { Box::from_raw((*view).internal.cast::<Use>()) });
    }
}

/// Bytes that an array may be made over: what numpy calls the array's base.
#[pyclass(frozen, module = "virtio._core", name = "_View")]
pub struct View {
    start: NonNull<u8>,
    len: usize,
    _keep: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the bytes may be reached from any thread (atomics, or memory that is shared anyhow), and `_keep` holds them.
unsafe impl Send for View {}
// SAFETY: as for Send.
unsafe impl Sync for View {}

impl View {
    /// A column that `owner` never moves or frees.
    pub fn column<T: Any + Send + Sync>(owner: Arc<T>, column: impl FnOnce(&T) -> &[AtomicI64]) -> View {
        let values = column(&owner);
        let (start, len) = (NonNull::from(values).cast(), size_of_val(values));
        View { start, len, _keep: owner }
    }

    /// Bytes of a mapping of our own, which `keep` holds.
    pub fn mapped(mapping: &Mapping, offset: usize, len: usize, keep: Arc<dyn Any + Send + Sync>) -> Result<View, Error> {
        if offset > mapping.len() || len > mapping.len() - offset || mapping.foreign() {
            return Err(Error::Value(format!("{len} bytes at offset {offset} cannot be shown")));
        }
        // SAFETY: offset is inside the mapping, whose first byte is not null.
        let start = unsafe { NonNull::new_unchecked(mapping.as_ptr().add(offset)) };
        Ok(View { start, len, _keep: keep })
    }
}

#[pymethods]
impl View {
    unsafe fn __getbuffer__(slf: &Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let this = slf.get();
        // SAFETY: `_keep` holds the bytes while this object lives, and the view keeps this object.
        unsafe { export(slf.as_any(), view, this.start.as_ptr(), this.len, flags) }
    }
}

/// A numpy array over a view. numpy is imported here, and so not before the first array is asked for.
pub fn array<'py>(py: Python<'py>, view: View, dtype: &str) -> PyResult<Bound<'py, PyAny>> {
    py.import("numpy")?.call_method1("frombuffer", (Bound::new(py, view)?, dtype))
}

/// A bytes-like argument. `bytes` never change and are used where they are; whatever else has a buffer may be memory that another thread or
/// a peer writes, and is copied first, so that no reference is ever made to it.
pub enum Bytes {
    /// `bytes`, kept alive.
    Constant(PyBackedBytes),
    /// Our own copy.
    Copied(Vec<u8>),
}

impl Bytes {
    /// The bytes themselves.
    pub fn as_slice(&self) -> &[u8] {
        match self {
            Bytes::Constant(bytes) => bytes,
            Bytes::Copied(bytes) => bytes,
        }
    }
}

/// A view of somebody's buffer, released when it is dropped.
struct Foreign(Box<ffi::Py_buffer>);

impl Foreign {
    fn of(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        let mut view = Box::new(MaybeUninit::<ffi::Py_buffer>::uninit());
        // SAFETY: a view to fill, in a place that it does not leave before it is released: the box only changes its type.
        unsafe {
            if ffi::PyObject_GetBuffer(object.as_ptr(), view.as_mut_ptr(), ffi::PyBUF_SIMPLE) != 0 {
                return Err(PyErr::fetch(object.py()));
            }
            Ok(Foreign(Box::from_raw(Box::into_raw(view).cast())))
        }
    }

    /// What stands there now.
    fn copy(&self) -> Vec<u8> {
        let len = self.0.len as usize;
        let mut bytes = Vec::with_capacity(len);
        if len > 0 {
            // SAFETY: `PyBUF_SIMPLE` gives `len` contiguous readable bytes, which stay until the view is released; the new vector has room
            // for them and lies elsewhere. They may change meanwhile, which is why they are reached through pointers only.
            unsafe {
                ptr::copy_nonoverlapping(self.0.buf.cast::<u8>().cast_const(), bytes.as_mut_ptr(), len);
                bytes.set_len(len);
            }
        }
        bytes
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // SAFETY: filled by `of`, released once; arguments are extracted while the thread is attached.
        Python::attach(|_| unsafe { ffi::PyBuffer_Release(ptr::from_mut(&mut *self.0)) });
    }
}

impl<'a, 'py> FromPyObject<'a, 'py> for Bytes {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        match object.cast_exact::<PyBytes>() {
            Ok(bytes) => Ok(Bytes::Constant(bytes.to_owned().into())),
            Err(_) => Ok(Bytes::Copied(Foreign::of(object)?.copy())),
        }
    }
}

/// [`Bytes`] as an argument; the `TypeError` about something without a buffer is raised where the argument's name is known.
pub struct Data(Result<Bytes, PyErr>);

impl Data {
    /// The bytes themselves.
    pub fn of(&self, what: &str) -> Result<&[u8], Error> {
        self.0.as_ref().map(Bytes::as_slice).map_err(|error| wrong(what, error))
    }
}

impl<'a, 'py> FromPyObject<'a, 'py> for Data {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        match object.extract::<Bytes>() {
            Err(error) if !error.is_instance_of::<PyTypeError>(object.py()) => Err(error),
            bytes => Ok(Data(bytes)),
        }
    }
}
