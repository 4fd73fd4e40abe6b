//! Python objects that stand for chains: the ring knows them by number.

use pyo3::prelude::*;

/// As many places as the ring has entries, so that it never grows.
pub struct Tokens {
    places: Box<[Option<Py<PyAny>>]>,
    /// Free places; the first `free` are valid.
    stack: Box<[u32]>,
    free: usize,
}

impl Tokens {
    pub fn new(size: u16) -> Self {
        let size = usize::from(size);
        Tokens { places: (0..size).map(|_| None).collect(), stack: (0..size as u32).rev().collect(), free: size }
    }

    /// How many are kept.
    #[inline]
    pub fn len(&self) -> usize {
        self.places.len() - self.free
    }

    /// The number of the object that is put next. There is a place for each chain that the ring takes; beyond, no number is right.
    pub fn next(&self) -> u64 {
        self.free.checked_sub(1).map_or(u64::MAX, |top| self.stack[top].into())
    }

    /// Keeps an object under the number that `next` gave.
    pub fn put(&mut self, token: Option<Py<PyAny>>) {
        if let Some(top) = self.free.checked_sub(1) {
            self.places[self.stack[top] as usize] = token;
            self.free = top;
        }
    }

    /// Takes an object out.
    pub fn take(&mut self, number: u64) -> Option<Py<PyAny>> {
        let token = self.places.get_mut(usize::try_from(number).ok()?)?.take()?;
        self.stack[self.free] = number as u32;
        self.free += 1;
        Some(token)
    }

    /// All objects.
    pub fn all(&self) -> impl Iterator<Item = &Py<PyAny>> {
        self.places.iter().flatten()
    }

    /// Takes all objects out, but keeps their numbers in use.
    pub fn clear(&mut self) -> Vec<Py<PyAny>> {
        self.places.iter_mut().filter_map(Option::take).collect()
    }
}
