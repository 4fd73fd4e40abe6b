//! The memory crate, by behaviour.
#![cfg(not(loom))]

mod allocator;
mod burst;
mod dirty;
mod doorbell;
mod fork;
mod guest;
mod mapping;
mod pool;
mod region;
mod region_model;
mod registers;
mod sigbus;
mod span;
mod tenancy;
mod transfer;

use std::fs::File;
use std::sync::Arc;
use virtio_memory::{HugePages, Mapping};

/// Memory of our own.
fn memory(size: usize) -> Arc<Mapping> {
    Arc::new(Mapping::memfd(size, "test", HugePages::Off).unwrap())
}

/// A file that can be truncated, as a peer's can; unlike our own memory it is not sealed.
fn unsealed(size: u64) -> File {
    use std::os::fd::FromRawFd;
    // SAFETY: the name is NUL-terminated, and the descriptor that comes back is ours alone.
    let file = unsafe {
        let fd = libc::memfd_create(c"peer".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(size).unwrap();
    file
}

/// A peer's file and our mapping of all of it.
fn foreign(size: u64) -> (File, Arc<Mapping>) {
    let file = unsealed(size);
    let mapping = Mapping::from_fd(file.try_clone().unwrap().into(), 0, size).unwrap();
    (file, Arc::new(mapping))
}

/// Bytes that differ from one to the next: `start`, `start + 1`, ...
fn counting(start: u8, len: usize) -> Vec<u8> {
    (0..len).map(|index| start.wrapping_add(index as u8)).collect()
}
