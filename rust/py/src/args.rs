//! Arguments that are checked at full width before they are narrowed, so that an error names the value that was passed.

use crate::errors::Error;
use pyo3::exceptions::{PyOverflowError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::PyInt;

/// An integer as it was passed: an `int`, or whatever has `__index__`.
pub struct Int {
    value: i128,
    /// How it is shown, if it does not fit into `value`.
    huge: Option<String>,
}

impl Int {
    /// A default.
    pub const fn new(value: i64) -> Self {
        Int { value: value as i128, huge: None }
    }

    /// The value, if it is in this range; the error names both.
    pub fn within<T: TryFrom<i128>>(&self, what: &str, min: i128, max: i128) -> Result<T, Error> {
        if self.huge.is_none()
            && (min..=max).contains(&self.value)
            && let Ok(value) = T::try_from(self.value)
        {
            return Ok(value);
        }
        let shown = self.huge.clone().unwrap_or_else(|| self.value.to_string());
        Err(Error::Value(format!("{what} {shown} is not in {min} to {max}")))
    }

    /// A 64-bit address.
    pub fn address(&self) -> Result<u64, Error> {
        self.within("address", 0, u64::MAX.into())
    }

    /// A length or an offset in bytes.
    pub fn bytes(&self, what: &str) -> Result<usize, Error> {
        self.within(what, 0, i64::MAX.into())
    }
}

impl<'a, 'py> FromPyObject<'a, 'py> for Int {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        if let Ok(value) = object.extract::<i64>() {
            return Ok(Int::new(value));
        }
        let index = object.py().import("operator")?.call_method1("index", (object,))?;
        match index.extract::<i128>() {
            Ok(value) => Ok(Int { value, huge: None }),
            Err(error) if error.is_instance_of::<PyOverflowError>(object.py()) => {
                let shown = object.py().import("builtins")?.call_method1("hex", (index,))?.extract()?;
                Ok(Int { value: 0, huge: Some(shown) })
            }
            Err(error) => Err(error),
        }
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
        let Mask(Int { value, huge }) = self;
        match huge {
            None if *value >= 0 => Ok(*value as u128),
            // Bit 127 is the one that an i128 has no room for.
            Some(shown) => {
                let bits = shown.strip_prefix("0x").and_then(|digits| u128::from_str_radix(digits, 16).ok());
                bits.ok_or_else(|| Error::Value(format!("features {shown} have bits beyond 127")))
            }
            None => Err(Error::Value(format!("features {value} are negative"))),
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
