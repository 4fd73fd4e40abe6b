//! From Rust's errors to Python's exceptions: the one place. The exception classes are Python's own, in `virtio.errors`.

use pyo3::exceptions::{PyBufferError, PyOSError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;
use virtio_memory::{ForkedProcess, MemoryError, RowError};
use virtio_net_path::BurstError;
use virtqueue::{Fault, Format, RingError};

/// Why a call of the binding fails.
#[derive(Debug)]
pub enum Error {
    /// Something on a ring: whose fault it is decides the class.
    Ring(RingError),
    /// Something in memory, always the caller's.
    Memory(MemoryError),
    /// Rows of a burst that are not legal.
    Row(RowError),
    /// An argument with a value that it may not have.
    Value(String),
    /// A call out of order.
    Status(String),
    /// The transport failed, or what stands for it.
    Transport(String),
    /// What Python itself raised.
    Python(PyErr),
}

impl From<RingError> for Error {
    fn from(error: RingError) -> Self {
        Error::Ring(error)
    }
}

impl From<MemoryError> for Error {
    fn from(error: MemoryError) -> Self {
        Error::Memory(error)
    }
}

impl From<BurstError> for Error {
    fn from(error: BurstError) -> Self {
        match error {
            BurstError::Ring(error) => Error::Ring(error),
            BurstError::Memory(error) => Error::Memory(error),
            BurstError::Row(error) => Error::Row(error),
            other => Error::Value(other.to_string()),
        }
    }
}

impl From<ForkedProcess> for Error {
    fn from(error: ForkedProcess) -> Self {
        Error::Status(error.to_string())
    }
}

impl From<PyErr> for Error {
    fn from(error: PyErr) -> Self {
        Error::Python(error)
    }
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        match error {
            // At set-up; later errors know their ring's format.
            Error::Ring(error) => ring(&error, Format::Split),
            Error::Memory(error) => memory(&error),
            Error::Row(error) => PyValueError::new_err(error.to_string()),
            Error::Value(message) => PyValueError::new_err(message),
            Error::Status(message) => class(&STATUS_ERROR, "StatusError", (message,)),
            Error::Transport(message) => class(&TRANSPORT_ERROR, "TransportError", (message,)),
            Error::Python(error) => error,
        }
    }
}

impl Error {
    /// The same error with what it is about in front, if it is about an argument.
    #[cold]
    pub fn of(self, what: &str) -> Self {
        match self {
            Error::Value(message) => Error::Value(format!("{what}: {message}")),
            Error::Memory(error @ (MemoryError::BadSize { .. } | MemoryError::OutOfMemory { .. })) => {
                Error::Value(format!("{what}: {error}"))
            }
            Error::Python(error) => Error::Python(named(what, error)),
            other => other,
        }
    }

    /// The same, with what it is about in front, if the system refused that.
    #[cold]
    pub fn of_system(self, what: &str) -> Self {
        match self {
            Error::Memory(MemoryError::Os { errno, operation }) => {
                let error = MemoryError::Os { errno, operation };
                Error::Python(PyOSError::new_err((errno, format!("{what}: {}", shown(&error, errno)))))
            }
            other => other,
        }
    }

    /// Use of something that was closed.
    pub fn closed(what: &str) -> Self {
        Error::Status(format!("the {what} is closed"))
    }
}

/// The same `TypeError` or `ValueError`, raised at the same place, but naming what it is about; any other error as it is.
pub fn named(what: &str, error: PyErr) -> PyErr {
    Python::attach(|py| {
        let kind = error.get_type(py);
        if !kind.is(py.get_type::<PyTypeError>()) && !kind.is(py.get_type::<PyValueError>()) {
            return error;
        }
        let named = PyErr::from_type(kind, format!("{what}: {}", error.value(py)));
        named.set_traceback(py, error.traceback(py));
        named
    })
}

static STATUS_ERROR: PyOnceLock<Py<PyType>> = PyOnceLock::new();
static QUEUE_FULL: PyOnceLock<Py<PyType>> = PyOnceLock::new();
static SPEC_VIOLATION: PyOnceLock<Py<PyType>> = PyOnceLock::new();
static TRANSPORT_ERROR: PyOnceLock<Py<PyType>> = PyOnceLock::new();
static MALFORMED_CHAIN: PyOnceLock<Py<PyType>> = PyOnceLock::new();
static BAD_USED_ELEMENT: PyOnceLock<Py<PyType>> = PyOnceLock::new();

/// An exception of `virtio.errors`, which is imported at the first error.
fn class<A>(cell: &'static PyOnceLock<Py<PyType>>, name: &str, arguments: A) -> PyErr
where
    A: for<'py> pyo3::call::PyCallArgs<'py>,
{
    Python::attach(|py| {
        let made = cell.import(py, "virtio.errors", name).and_then(|class| class.call1(arguments));
        made.map_or_else(|error| error, PyErr::from_value)
    })
}

/// The exception for an error on a ring of this format.
fn ring(error: &RingError, format: Format) -> PyErr {
    let (message, section) = (error.to_string(), error.section(format));
    match error.fault() {
        _ if *error == RingError::Broken => class(&STATUS_ERROR, "StatusError", (message,)),
        Fault::Caller => PyValueError::new_err(format!("{message} ({section})")),
        Fault::Full => class(&QUEUE_FULL, "QueueFull", (message,)),
        Fault::Driver => class(&MALFORMED_CHAIN, "MalformedChain", (message, section)),
        Fault::Memory => class(&SPEC_VIOLATION, "SpecViolation", (message, section)),
        Fault::Device => class(&BAD_USED_ELEMENT, "BadUsedElement", (message, section)),
    }
}

/// An error to raise; if it breaks a queue of this format, also the exception for `broken` to keep, which is the one that is raised.
#[cold]
pub fn latch(py: Python<'_>, format: Format, error: Error) -> (Error, Option<Py<PyAny>>) {
    let Error::Ring(error) = error else { return (error, None) };
    let exception = ring(&error, format);
    let kept = error.breaks().then(|| exception.value(py).clone().into_any().unbind());
    (Error::Python(exception), kept)
}

/// The text of an error of the system's, without the number that an OSError has in front.
fn shown(error: &MemoryError, errno: i32) -> String {
    error.to_string().replace(&format!(" (os error {errno})"), "")
}

fn memory(error: &MemoryError) -> PyErr {
    let message = error.to_string();
    match error {
        MemoryError::Os { errno, .. } | MemoryError::HugePages { errno, .. } => PyOSError::new_err((*errno, shown(error, *errno))),
        MemoryError::InUse { .. } => PyBufferError::new_err(message),
        MemoryError::Closed => class(&STATUS_ERROR, "StatusError", (message,)),
        _ => PyValueError::new_err(message),
    }
}
