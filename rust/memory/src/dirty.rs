//! Which pages the device side wrote: what live migration copies again.

use crate::error::MemoryError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Release};

/// Bytes per page of the bitmap, whatever the machine's page size (as vhost's log has it).
pub const PAGE_SIZE: u64 = 4096;

/// The most pages one bitmap covers: 4 TiB of guest memory.
const MAX_PAGES: u64 = 1 << 30;

/// One bit for each page of the guest's address space from 0 on.
#[derive(Debug)]
pub struct DirtyBitmap {
    words: Box<[AtomicU64]>,
    pages: u64,
}

impl DirtyBitmap {
    /// A bitmap for `pages` pages, none of them marked.
    ///
    /// # Errors
    /// `BadSize` for 0 or more than 2^30 pages.
    pub fn new(pages: u64) -> Result<Self, MemoryError> {
        if pages == 0 || pages > MAX_PAGES {
            return Err(MemoryError::BadSize { what: "dirty bitmap's pages", value: pages, min: 1, max: MAX_PAGES, multiple_of: 1 });
        }
        Ok(Self { words: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(), pages })
    }

    /// How many pages it covers.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Marks the pages that `len` bytes from `address` lie in; pages that the bitmap does not cover are left out. To be called after the
    /// bytes were written: a page marked before could be copied in between.
    pub fn mark(&self, address: u64, len: u64) {
        if len == 0 {
            return;
        }
        let last = (address.saturating_add(len - 1) / PAGE_SIZE).min(self.pages - 1);
        for page in address / PAGE_SIZE..=last {
            // Always a read-modify-write, even if the bit is set: it orders the bytes just written before a `take` that clears the bit now.
            self.words[(page / 64) as usize].fetch_or(1 << (page % 64), Release);
        }
    }

    /// Takes the marks: bit `page % 8` of byte `page / 8`, as many bytes as the pages need. The bitmap is clear afterwards.
    pub fn take(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.words.iter().flat_map(|word| word.swap(0, AcqRel).to_le_bytes()).collect();
        bytes.truncate(self.pages.div_ceil(8) as usize);
        bytes
    }
}
