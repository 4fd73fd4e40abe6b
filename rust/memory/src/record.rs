//! What this thread stored to shared words, in order: for tests that stop a side after any of its stores. Not in a release build.

use std::cell::RefCell;

/// One store of a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Where, in this process.
    pub address: usize,
    /// Bytes.
    pub width: usize,
    /// What.
    pub value: u64,
}

thread_local! {
    static STORES: RefCell<Option<Vec<Stored>>> = const { RefCell::new(None) };
}

/// Keeps this thread's stores from here on.
pub fn start() {
    STORES.set(Some(Vec::new()));
}

/// The stores since then; none are kept any more.
pub fn take() -> Vec<Stored> {
    STORES.take().unwrap_or_default()
}

pub(crate) fn note(address: usize, width: usize, value: u64) {
    STORES.with_borrow_mut(|stores| {
        if let Some(stores) = stores {
            stores.push(Stored { address, width, value });
        }
    });
}
