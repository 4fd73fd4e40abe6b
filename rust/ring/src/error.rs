//! One variant for each broken rule, with the numbers and the section of VIRTIO 1.4.

use crate::options::Format;
use thiserror::Error;
use virtio_memory::MemoryError;

/// Whose mistake an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The call is refused; nothing has changed.
    Caller,
    /// There is no room; nothing has changed.
    Full,
    /// The driver broke a rule: the device's queue breaks.
    Driver,
    /// The device broke a rule: the driver's queue breaks.
    Device,
    /// Whoever owns the memory took it away: a queue of either side breaks.
    Memory,
}

/// What went wrong on a ring.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs)] // the messages are the documentation, the fields are the numbers in them
pub enum RingError {
    // The caller's mistakes.
    #[error("queue size {size} is not within 1..={max}")]
    BadSize { size: u64, max: u64 },
    #[error("queue size {size} is not a power of two, as the split ring needs")]
    SizeNotPowerOfTwo { size: u64 },
    #[error("{area} area at {address:#x} is not aligned to {align} bytes")]
    AreaUnaligned { area: &'static str, address: u64, align: u64 },
    #[error("{area} area at {address:#x} with {len} bytes goes past the end of the address space")]
    AreaOverflow { area: &'static str, address: u64, len: u64 },
    #[error("{area} area at {address:#x} with {len} bytes is not inside mapped memory")]
    AreaUnmapped { area: &'static str, address: u64, len: u64 },
    #[error("area: {0}")]
    Area(MemoryError),
    #[error("chain limit {limit} is not within 1..={max}")]
    BadChainLimit { limit: u64, max: u64 },
    #[error("a batch with room for {room} segments cannot hold a chain of up to {limit}")]
    BatchTooSmall { room: usize, limit: u16 },
    #[error("a buffer needs at least one segment")]
    EmptyBuffer,
    #[error("segment {index} has no bytes")]
    EmptySegment { index: usize },
    #[error("segment {index} is readable but follows a writable one")]
    SegmentOrder { index: usize },
    #[error("{segments} segments are more than the limit of {limit}")]
    TooManySegments { segments: usize, limit: usize },
    #[error("a buffer of {bytes} bytes is longer than 4294967295")]
    BufferTooLong { bytes: u64 },
    #[error("INDIRECT_DESC was not negotiated")]
    IndirectRefused,
    #[error("chain {head} is not in flight here, or was completed already")]
    NotInFlight { head: u16 },
    #[error("used length {len} is more than the chain's {writable} writable bytes")]
    UsedTooLong { len: u32, writable: u32 },
    #[error("{count} chains cannot be handed back: {reason}")]
    CannotRewind { count: usize, reason: &'static str },
    #[error("avail position {position} is not within 0..{size}")]
    BadRestore { position: u16, size: u16 },
    #[error("a packed queue that keeps no descriptors cannot be taken over by another device")]
    NotKept,
    #[error("the queue is broken: reset it first")]
    Broken,
    #[error("no room: the buffer needs {needed} descriptors, {free} are free")]
    Full { needed: usize, free: usize },

    // The driver's mistakes, met by the device side.
    #[error("avail idx {index} is {ahead} ahead of {last}, more than the queue's size {size}")]
    AvailIndex { index: u16, last: u16, ahead: u16, size: u16 },
    #[error("available head {head} is not below the queue's size {size}")]
    HeadOutOfRange { head: u16, size: u16 },
    #[error("head {head} was made available while it is in flight")]
    HeadInFlight { head: u16 },
    #[error("{slots} ring slots in flight are more than the queue's size {size}")]
    TooManyInFlight { slots: u32, size: u16 },
    #[error("the chain has more than {limit} descriptors")]
    ChainTooLong { limit: u16 },
    #[error("next {next} is not below {limit}")]
    NextOutOfRange { next: u16, limit: u32 },
    #[error("readable descriptor at position {position} follows a writable one")]
    ReadableAfterWritable { position: u16 },
    #[error("the chain has {bytes} bytes, more than 4294967295")]
    ChainTooManyBytes { bytes: u64 },
    #[error("INDIRECT descriptor, but INDIRECT_DESC was not negotiated")]
    IndirectNotNegotiated,
    #[error("indirect table of {len} bytes is not a positive multiple of 16")]
    IndirectLength { len: u32 },
    #[error("indirect table of {entries} entries is longer than the limit of {limit}")]
    IndirectTooLong { entries: u32, limit: u16 },
    #[error("INDIRECT together with NEXT")]
    IndirectWithNext,
    #[error("INDIRECT inside an indirect table")]
    IndirectNested,
    #[error("INDIRECT inside a list of descriptors")]
    IndirectInList,
    #[error("indirect table: {0}")]
    IndirectUnmapped(MemoryError),
    #[error("buffer: {0}")]
    BufferUnmapped(MemoryError),
    #[error("in-flight area: {what} is {value}, not {wanted}")]
    InFlightArea { what: &'static str, value: u64, wanted: u64 },
    #[error("in-flight area: used idx {used} is {behind} ahead of {told}, more than the queue's size {size}")]
    InFlightIndex { used: u16, told: u16, behind: u16, size: u16 },
    #[error("in-flight area: {what} {index} is not below the queue's size {size}, or is there twice")]
    InFlightLink { what: &'static str, index: u16, size: u16 },
    #[error("in-flight area: counter {counter:#x} would run out")]
    InFlightCounter { counter: u64 },
    #[error("used idx {used} is {behind} behind the avail base {base}, more than the queue's size {size}")]
    RestoredUsedIndex { used: u16, base: u16, behind: u16, size: u16 },

    // The device's mistakes, met by the driver side.
    #[error("used idx {index} is {ahead} ahead of {last}, but only {outstanding} chains are outstanding")]
    UsedIndex { index: u16, last: u16, ahead: u16, outstanding: u16 },
    #[error("used id {id} is not below the queue's size {size}")]
    UsedIdOutOfRange { id: u32, size: u16 },
    #[error("used id {id} is not the head of an outstanding chain")]
    UsedIdNotOutstanding { id: u32 },
    #[error("used id {id} stands for a run of {run} chains, but only {limit} were used")]
    InOrderRun { id: u32, run: u16, limit: u16 },

    // Whoever owns the memory.
    #[error("memory at {address:#x} with {len} bytes was taken away by its owner")]
    MemoryLost { address: u64, len: u64 },
    #[error("the in-flight area was taken away by its owner")]
    InFlightLost,
}

/// The vhost-user text's own section.
const TRACKING: &str = "vhost-user, Inflight I/O tracking";

impl RingError {
    /// Whose mistake it is.
    pub fn fault(&self) -> Fault {
        use RingError::*;
        match self {
            BadSize { .. } | SizeNotPowerOfTwo { .. } | AreaUnaligned { .. } | AreaOverflow { .. } | AreaUnmapped { .. } | Area(_) => {
                Fault::Caller
            }
            BadChainLimit { .. } | BatchTooSmall { .. } | EmptyBuffer | EmptySegment { .. } | SegmentOrder { .. } => Fault::Caller,
            TooManySegments { .. } | BufferTooLong { .. } | IndirectRefused | NotInFlight { .. } | UsedTooLong { .. } => Fault::Caller,
            CannotRewind { .. } | BadRestore { .. } | NotKept | Broken => Fault::Caller,
            Full { .. } => Fault::Full,
            AvailIndex { .. } | HeadOutOfRange { .. } | HeadInFlight { .. } | TooManyInFlight { .. } | ChainTooLong { .. } => Fault::Driver,
            NextOutOfRange { .. } | ReadableAfterWritable { .. } | ChainTooManyBytes { .. } | IndirectNotNegotiated => Fault::Driver,
            IndirectLength { .. } | IndirectTooLong { .. } | IndirectWithNext | IndirectNested | IndirectInList => Fault::Driver,
            IndirectUnmapped(_) | BufferUnmapped(_) | RestoredUsedIndex { .. } => Fault::Driver,
            InFlightArea { .. } | InFlightIndex { .. } | InFlightLink { .. } | InFlightCounter { .. } => Fault::Driver,
            MemoryLost { .. } | InFlightLost => Fault::Memory,
            UsedIndex { .. } | UsedIdOutOfRange { .. } | UsedIdNotOutstanding { .. } | InOrderRun { .. } => Fault::Device,
        }
    }

    /// Whether it breaks the queue.
    pub fn breaks(&self) -> bool {
        matches!(self.fault(), Fault::Driver | Fault::Device | Fault::Memory)
    }

    /// The section of VIRTIO 1.4 that says so, for a ring of this format.
    pub fn section(&self, format: Format) -> &'static str {
        use RingError::*;
        let (split, packed) = match self {
            BadSize { .. } | SizeNotPowerOfTwo { .. } => ("2.6", "2.6"),
            AreaUnaligned { .. } | AreaOverflow { .. } | AreaUnmapped { .. } | Area(_) => ("2.6", "2.6"),
            BufferUnmapped(_) | MemoryLost { .. } => ("2.6", "2.6"),
            BadChainLimit { .. } | BatchTooSmall { .. } | TooManySegments { .. } => ("2.7.5.3.1", "2.8.17"),
            EmptyBuffer | EmptySegment { .. } | SegmentOrder { .. } | ReadableAfterWritable { .. } => ("2.7.4.2", "2.8.17"),
            ChainTooLong { .. } => ("2.7.5.2", "2.8.17"),
            BufferTooLong { .. } | ChainTooManyBytes { .. } => ("2.7.5.2", "2.8.4"),
            IndirectRefused | IndirectNotNegotiated | IndirectWithNext | IndirectNested | IndirectInList => ("2.7.5.3.1", "2.8.19"),
            IndirectTooLong { .. } => ("2.7.5.3.1", "2.8.19"),
            IndirectLength { .. } | IndirectUnmapped(_) => ("2.7.5.3", "2.8.7"),
            NotInFlight { .. } => ("2.7.8", "2.8.15"),
            UsedTooLong { .. } => ("2.7.8", "2.8.4"),
            CannotRewind { .. } | BadRestore { .. } | NotKept => ("2.7.6", "2.8.1"),
            Full { .. } | Broken => ("2.7.13", "2.8.21"),
            TooManyInFlight { .. } => ("2.7.13", "2.8.16"),
            AvailIndex { .. } | HeadOutOfRange { .. } | HeadInFlight { .. } => ("2.7.6", "2.8.1"),
            NextOutOfRange { .. } => ("2.7.5", "2.8.6"),
            RestoredUsedIndex { .. } => ("2.7.8", "2.8.1"),
            UsedIndex { .. } | UsedIdOutOfRange { .. } | UsedIdNotOutstanding { .. } => ("2.7.8", "2.8.22"),
            InOrderRun { .. } => ("2.7.9", "2.8.8"),
            InFlightArea { .. } | InFlightIndex { .. } | InFlightLink { .. } | InFlightCounter { .. } | InFlightLost => {
                (TRACKING, TRACKING)
            }
        };
        match format {
            Format::Split => split,
            Format::Packed => packed,
        }
    }
}
