//! Why a burst was refused.

use thiserror::Error;
use virtio_memory::{MemoryError, RowError};
use virtqueue::RingError;

/// What is wrong with a burst, or with the queue it met. All but a ring's own errors are the caller's mistakes and change nothing.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BurstError {
    /// The ring refused it, or the other side broke a rule.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The pool refused it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A row is not legal.
    #[error(transparent)]
    Row(#[from] RowError),
    /// The packet has more rows than the ring has entries, so that it never fits.
    #[error("the packet that ends in burst row {row} has {rows} rows, more than the queue's size {size}")]
    TooManyRows {
        /// Its last row.
        row: usize,
        /// How many rows it has.
        rows: usize,
        /// The queue's size.
        size: u16,
    },
    /// The queue still holds slots of another pool.
    #[error("the burst is of another pool than {chains} chains that this queue has outstanding")]
    OtherPool {
        /// How many chains hold slots.
        chains: usize,
    },
    /// The pool's slots are not where the queue's device looks.
    #[error("the burst's pool is not in the memory that this queue was made with")]
    OtherMemory,
    /// There is no room for the header before a packet.
    #[error("burst row {row}: offset {offset} leaves no room for a header of {header} bytes")]
    NoHeadroom {
        /// The packet's first row.
        row: usize,
        /// Where its bytes start.
        offset: u32,
        /// Bytes of the header.
        header: usize,
    },
    /// A frame without bytes, or of more than ever fit.
    #[error("frame {frame} has {bytes} bytes, which is not in 1 to {max}")]
    BadFrame {
        /// Which frame, from 0.
        frame: usize,
        /// Its bytes.
        bytes: usize,
        /// The most that it may have.
        max: usize,
    },
}
