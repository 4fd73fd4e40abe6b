//! Arguments, checked at full width before they are narrowed: an error names the argument and the value that was passed.

use crate::errors::{Error, named};
use pyo3::exceptions::{PyOverflowError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::PyInt;
use std::time::Duration;

/// An integer as it was passed: an `int`, or whatever has `__index__`.
pub enum Int {
    /// Most of them.
    Value(i128),
    /// How one is shown that does not fit.
    Huge(String),
    /// The `TypeError` about something that is no integer. It is raised where the argument's name is known: at its first use.
    Wrong(PyErr),
}

impl Int {
    /// A default.
    pub const fn new(value: i64) -> Self {
        Int::Value(value as i128)
    }

    /// The value, if it is in this range; the error names both.
    pub fn within<T: TryFrom<i128>>(&self, what: &str, min: i128, max: i128) -> Result<T, Error> {
        if let Int::Value(value) = self
            && (min..=max).contains(value)
            && let Ok(value) = T::try_from(*value)
        {
            return Ok(value);
        }
        match self {
            Int::Value(value) => Err(Error::Value(format!("{what} {value} is not in {min} to {max}"))),
            Int::Huge(shown) => Err(Error::Value(format!("{what} {shown} is not in {min} to {max}"))),
            Int::Wrong(error) => Err(wrong(what, error)),
        }
    }

    /// A 64-bit address.
    pub fn address(&self) -> Result<u64, Error> {
        self.within("address", 0, u64::MAX.into())
    }

    /// A length, an offset or a count, where there is no other limit to name than 0.
    pub fn bytes(&self, what: &str) -> Result<usize, Error> {
        match self {
            Int::Value(value) if *value < 0 => Err(Error::Value(format!("{what} {value} is negative"))),
            _ => self.within(what, 0, i64::MAX.into()),
        }
    }
}

/// A `TypeError` that was kept, with the argument's name.
#[cold]
pub fn wrong(what: &str, error: &PyErr) -> Error {
    named(what, Python::attach(|py| error.clone_ref(py))).into()
}

impl<'a, 'py> FromPyObject<'a, 'py> for Int {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        if let Ok(value) = object.extract::<i64>() {
            return Ok(Int::new(value));
        }
        let py = object.py();
        let index = match py.import("operator")?.call_method1("index", (object,)) {
            Err(error) if error.is_instance_of::<PyTypeError>(py) => return Ok(Int::Wrong(error)),
            index => index?,
        };
        match index.extract::<i128>() {
            Ok(value) => Ok(Int::Value(value)),
            Err(error) if error.is_instance_of::<PyOverflowError>(py) => {
                Ok(Int::Huge(py.import("builtins")?.call_method1("hex", (index,))?.extract()?))
            }
            Err(error) => Err(error),
        }
    }
}

/// Seconds as they were passed: a number, 0 or more.
pub enum Seconds {
    /// Most of them.
    Value(f64),
    /// The `TypeError` about something that is no number, or the `OverflowError` about too large an integer.
    Wrong(PyErr),
}

impl Seconds {
    /// As a time; what is longer than there can be is the longest.
    pub fn duration(&self, what: &str) -> Result<Duration, Error> {
        match self {
            Seconds::Value(value) if *value >= 0.0 => Ok(Duration::try_from_secs_f64(*value).unwrap_or(Duration::MAX)),
            Seconds::Value(value) => Err(Error::Value(format!("{what} {value:?} s is not 0 or more"))),
            Seconds::Wrong(error) => Err(wrong(what, error)),
        }
    }
}

impl<'a, 'py> FromPyObject<'a, 'py> for Seconds {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        Ok(object.extract().map_or_else(Seconds::Wrong, Seconds::Value))
    }
}

/// Accepted feature bits, 0 to 127 (2.2), as one integer. A member of an enumeration names one bit by its number, and would be read as other
/// bits: it is refused.
pub struct Mask(Int);

impl Mask {
    /// No bits.
    pub const NONE: Mask = Mask(Int::new(0));

    /// The bits.
    pub fn bits(&self) -> Result<u128, Error> {
        match &self.0 {
            Int::Value(value) if *value >= 0 => Ok(*value as u128),
            Int::Value(value) => Err(Error::Value(format!("features {value} are negative"))),
            // Bit 127 is the one that an i128 has no room for.
            Int::Huge(shown) => {
                let bits = shown.strip_prefix("0x").and_then(|digits| u128::from_str_radix(digits, 16).ok());
                bits.ok_or_else(|| Error::Value(format!("features {shown} have bits beyond 127")))
            }
            Int::Wrong(error) => Err(wrong("features", error)),
        }
    }
}

impl<'a, 'py> FromPyObject<'a, 'py> for Mask {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        if !object.is_exact_instance_of::<PyInt>() {
            let kinds = object.py().import("enum")?;
            if object.is_instance(&kinds.getattr("Enum")?)? && !object.is_instance(&kinds.getattr("Flag")?)? {
                let member = format!("{}.{}", object.get_type().name()?, object.getattr("name")?);
                let message = format!("features is {member}, the number of a bit: pass a mask (1 << {member}) or a Features set");
                return Err(PyTypeError::new_err(message));
            }
        }
        Ok(Mask(object.extract()?))
    }
}
