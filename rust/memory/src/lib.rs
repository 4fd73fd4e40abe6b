//! Memory that two sides share, and the only way the rest of the house touches it.
//!
//! What it is: mappings ([`Mapping`]), guest address tables over them ([`RegionTable`], [`GuestMemory`]), arrays of atomic little-endian
//! words for rings ([`U16Array`] and its sisters), bulk copies, `readv` and `writev` straight between a descriptor and guest memory
//! ([`IoVecs`]), device registers at their exact width ([`Registers`]), notifications ([`Doorbell`]), and the buffer pool with its bursts
//! ([`BufferPool`], [`Burst`]). What it is not: it knows no ring format, no packet and no Python.
//!
//! All `unsafe` code of the Rust side lives here (and in the binding's buffer-protocol file). Three rules carry it:
//!
//! - shared memory is never a `&[u8]`: it is reached by atomics, by volatile accesses, or copied;
//! - whatever points into a mapping holds an `Arc<Mapping>`, so that unmapping waits for the last user;
//! - an address, an offset or a length from outside is checked, whole, before the first byte moves.

mod aio;
mod allocator;
mod burst;
mod copy;
mod descriptor;
mod dirty;
mod doorbell;
mod error;
pub mod fence;
mod fork;
mod guest;
mod mapping;
mod pool;
mod raw;
#[cfg(all(debug_assertions, not(loom)))]
pub mod record;
mod region;
mod registers;
mod row;
mod sigbus;
mod span;
mod tenancy;
#[cfg(not(loom))]
mod word;
#[cfg(loom)]
#[path = "word_loom.rs"]
mod word;

pub use allocator::Allocator;
pub use burst::Burst;
pub use copy::IoVecs;
pub use descriptor::{MAX_WAITED, Ready, duplicate, let_go, set_nonblocking, wait_ready};
pub use dirty::{DirtyBitmap, LoggedAt, PAGE_SIZE};
pub use doorbell::{Doorbell, EventFd, RegisterDoorbell};
pub use error::MemoryError;
pub use fence::{FencePoint, full_fence};
pub use fork::{BoundToProcess, ForkedProcess, process_generation};
pub use guest::{GuestMemory, View};
pub use mapping::{HugePages, Mapping};
pub use pool::{BufferPool, HEADROOM, Lender, Owner, PoolState};
pub use region::{Place, Region, RegionTable};
pub use registers::Registers;
pub use row::{Column, Limit, RawRow, Row, RowError};
pub use sigbus::MAX_GUARDED;
pub use span::Span;
pub use tenancy::Tenancy;
pub use word::{U16Array, U16Ring, U32Array, U32Ring, U64Array, U64Ring};
#[cfg(not(loom))]
pub use word::{U16Cells, U16RingCells, U32Cells, U32RingCells, U64Cells, U64RingCells};
