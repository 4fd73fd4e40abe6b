//! Every way an access to memory, a pool or a notification can fail, with the value and the limit.

use thiserror::Error;

/// Why an operation on memory was refused. Nothing was changed, read or written, unless the variant says otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MemoryError {
    /// Some byte of the span lies in no region.
    #[error("{len} bytes at address {address:#x} are not all in mapped memory")]
    Unmapped {
        /// First address of the span asked for.
        address: u64,
        /// Bytes asked for.
        len: u64,
    },
    /// The span runs over the end of the 64-bit address space.
    #[error("{len} bytes at address {address:#x} run over the end of the 64-bit address space")]
    Overflow {
        /// First address of the span asked for.
        address: u64,
        /// Bytes asked for.
        len: u64,
    },
    /// The address or offset is not a multiple of what the access needs.
    #[error("{address:#x} is not a multiple of {align}")]
    Misaligned {
        /// The address or offset.
        address: u64,
        /// What it has to be a multiple of, in bytes.
        align: u64,
    },
    /// The span is mapped, but not in one piece.
    #[error("{len} bytes at address {address:#x} lie in more than one mapping")]
    Straddles {
        /// First address of the span asked for.
        address: u64,
        /// Bytes asked for.
        len: u64,
    },
    /// A new region would overlap an old one.
    #[error("region {address:#x} of {len} bytes overlaps the region {other_address:#x} of {other_len} bytes")]
    Overlap {
        /// First address of the new region.
        address: u64,
        /// Bytes in the new region.
        len: u64,
        /// First address of the region that is there.
        other_address: u64,
        /// Bytes in the region that is there.
        other_len: u64,
    },
    /// No region starts at this address.
    #[error("no region starts at address {address:#x}")]
    NoRegion {
        /// The address.
        address: u64,
    },
    /// An offset into a mapping, span or register block, with its length, goes over the end.
    #[error("{len} bytes at offset {offset} go over the end at {size}")]
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Bytes there are.
        size: u64,
    },
    /// A passed descriptor's file does not hold the bytes to be mapped.
    #[error("{len} bytes at offset {offset} are not in the file of {file} bytes")]
    FileTooSmall {
        /// First byte of the file asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// The file's size.
        file: u64,
    },
    /// A size, count or value out of its range.
    #[error("{what} {value} is not {}in {min} to {max}", multiple(*multiple_of))]
    BadSize {
        /// What the value is.
        what: &'static str,
        /// The value.
        value: u64,
        /// The least legal value.
        min: u64,
        /// The greatest legal value.
        max: u64,
        /// What a legal value is a multiple of.
        multiple_of: u64,
    },
    /// An alignment that is not a power of two.
    #[error("alignment {align} is not a power of two")]
    BadAlignment {
        /// The alignment asked for.
        align: u64,
    },
    /// An access width that no load or store has.
    #[error("width {width} is not 1, 2, 4 or 8 bytes")]
    BadWidth {
        /// The width asked for, in bytes.
        width: usize,
    },
    /// Huge pages of this size were asked for and could not be had.
    #[error("no huge pages of {size} bytes for {len} bytes of memory: {}", os(*errno))]
    HugePages {
        /// Size of one huge page asked for, in bytes.
        size: u64,
        /// Bytes of memory asked for.
        len: u64,
        /// What the kernel answered.
        errno: i32,
    },
    /// The allocator has no gap that is large enough.
    #[error("no room for {requested} bytes: the largest gap has {largest}")]
    OutOfMemory {
        /// Bytes asked for.
        requested: u64,
        /// Bytes in the largest gap.
        largest: u64,
    },
    /// Nothing is allocated at this offset.
    #[error("nothing is allocated at offset {offset}")]
    NotAllocated {
        /// The offset.
        offset: u64,
    },
    /// The object was closed.
    #[error("closed")]
    Closed,
    /// A foreign file was truncated under its mapping: its bytes read as zeros from then on.
    #[error("the file behind {len} bytes at address {address:#x} was truncated")]
    Poisoned {
        /// First address of the region.
        address: u64,
        /// Bytes in the region.
        len: u64,
    },
    /// Something still uses the memory.
    #[error("in use by {exports} of queues, pools, regions and views")]
    InUse {
        /// How many users there are.
        exports: usize,
    },
    /// A slot number that the pool does not have.
    #[error("slot {slot} is not below the pool's {slots} slots")]
    BadSlot {
        /// The slot number.
        slot: u64,
        /// Slots in the pool.
        slots: u32,
    },
    /// The slot belongs to somebody else, or is free.
    #[error("slot {slot} belongs to {owner}, not to {claimed}")]
    NotOwned {
        /// The slot number.
        slot: u32,
        /// Who owns it (0: it is free).
        owner: u32,
        /// Who was said to own it.
        claimed: u32,
    },
    /// The memory is a peer's, and what was asked for needs memory of our own.
    #[error("memory that a peer passed cannot hold a buffer pool")]
    Foreign,
    /// As many foreign files are mapped as can be guarded against truncation.
    #[error("{limit} foreign mappings are the most at one time")]
    TooManyMappings {
        /// The most there can be.
        limit: usize,
    },
    /// More pieces than one `readv` or `writev` takes.
    #[error("more than {limit} pieces in one transfer")]
    TooManySegments {
        /// The most there can be.
        limit: usize,
    },
    /// A descriptor that was passed as an eventfd is something else.
    #[error("descriptor {fd} is not an eventfd")]
    NotEventFd {
        /// The descriptor's number here.
        fd: i32,
    },
    /// A system call failed.
    #[error("{operation}: {}", os(*errno))]
    Os {
        /// The call's name.
        operation: &'static str,
        /// What the kernel answered.
        errno: i32,
    },
}

impl MemoryError {
    /// The error of the system call that just failed.
    pub(crate) fn last_os(operation: &'static str) -> Self {
        Self::Os { operation, errno: last_errno() }
    }
}

/// The calling thread's errno.
pub(crate) fn last_errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

fn os(errno: i32) -> std::io::Error {
    std::io::Error::from_raw_os_error(errno)
}

fn multiple(of: u64) -> String {
    if of > 1 { format!("a multiple of {of} ") } else { String::new() }
}
