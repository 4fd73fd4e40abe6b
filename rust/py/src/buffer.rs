//! The buffer protocol, both ways: bytes of ours for Python, and Python's bytes-like arguments for us. The binding's only unsafe code.
//!
//! What is exported stays where it is as long as an export lives, because the export holds its owner. Nothing of a peer's memory is exported.

#![allow(unsafe_code)]

use crate::errors::Error;
use crate::memory::{Memory, Use};
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use std::any::Any;
use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::pin::Pin;
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

/// A bytes-like argument, without a copy. The bytes are for copying only: another thread or a peer may change them meanwhile.
pub struct Bytes(Pin<Box<ffi::Py_buffer>>);

impl Bytes {
    /// The bytes themselves. To be copied from, not to be interpreted in place.
    pub fn as_slice(&self) -> &[u8] {
        if self.0.len == 0 {
            return &[];
        }
        // SAFETY: `PyBUF_SIMPLE` gives `len` contiguous bytes, which stay until the view is released.
        unsafe { std::slice::from_raw_parts(self.0.buf.cast(), self.0.len as usize) }
    }
}

impl<'a, 'py> FromPyObject<'a, 'py> for Bytes {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let mut view = Box::pin(MaybeUninit::<ffi::Py_buffer>::uninit());
        // SAFETY: a view to fill, in a place that it never leaves.
        unsafe {
            if ffi::PyObject_GetBuffer(object.as_ptr(), view.as_mut_ptr(), ffi::PyBUF_SIMPLE) != 0 {
                return Err(PyErr::fetch(object.py()));
            }
            let place = Box::into_raw(Pin::into_inner_unchecked(view));
            Ok(Bytes(Box::into_pin(Box::from_raw(place.cast()))))
        }
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        // SAFETY: filled by `extract`, released once; arguments are dropped while the thread is attached.
        Python::attach(|_| unsafe { ffi::PyBuffer_Release(ptr::from_mut(&mut *self.0)) });
    }
}
