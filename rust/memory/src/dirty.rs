//! Which pages the device side wrote: what live migration copies again.

use crate::error::MemoryError;
use crate::mapping::Mapping;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Relaxed, Release};

/// Bytes per page of the bitmap, whatever the machine's page size (as vhost's log has it).
pub const PAGE_SIZE: u64 = 4096;

/// The most pages one bitmap covers: 4 TiB of guest memory.
const MAX_PAGES: u64 = 1 << 30;

/// Bytes whose marks belong elsewhere too: a used ring with a log address of its own.
#[derive(Clone, Copy, Debug)]
pub struct LoggedAt {
    /// Where they are.
    pub address: u64,
    /// How many there are, at least 1.
    pub len: u64,
    /// The address under which they are logged as well.
    pub log: u64,
}

/// The pages that these bytes lie in.
fn pages_of(address: u64, len: u64) -> std::ops::RangeInclusive<u64> {
    address / PAGE_SIZE..=address.saturating_add(len.saturating_sub(1)) / PAGE_SIZE
}

/// Words of one chunk: 128 MiB of guest memory.
const CHUNK: usize = 512;

/// One bit for each page of the guest's address space from 0 on. Guests choose their addresses, so what nobody wrote takes no room.
#[derive(Debug)]
pub struct DirtyBitmap {
    chunks: Box<[OnceLock<Box<[AtomicU64; CHUNK]>>]>,
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
        Ok(Self { chunks: (0..pages.div_ceil(64 * CHUNK as u64)).map(|_| OnceLock::new()).collect(), pages })
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
            let word = (page / 64) as usize;
            let chunk = self.chunks[word / CHUNK].get_or_init(|| Box::new([const { AtomicU64::new(0) }; CHUNK]));
            // Always a read-modify-write, even if the bit is set: it orders the bytes just written before a `take` that clears the bit now.
            chunk[word % CHUNK].fetch_or(1 << (page % 64), Release);
        }
    }

    /// Takes the marks, in words that have some: bit b of the word with number n is page 64 n + b. The bitmap is clear afterwards.
    pub fn take(&self) -> Vec<(u64, u64)> {
        let mut taken = Vec::new();
        for (number, chunk) in self.chunks.iter().enumerate() {
            for (at, word) in chunk.get().into_iter().flat_map(|chunk| chunk.iter().enumerate()) {
                if word.load(Relaxed) != 0 {
                    taken.push(((number * CHUNK + at) as u64, word.swap(0, AcqRel)));
                }
            }
        }
        taken
    }

    /// Carries the marks over to a log that others read and clear meanwhile: bit `page % 8` of byte `page / 8`, set by an atomic OR. Pages that
    /// the log does not cover are left out. If a page of `also` is marked, all its pages are, under its other address.
    pub fn merge_into(&self, log: &Mapping, also: &[LoggedAt]) {
        let covered = log.len() as u64;
        let set = |byte: u64, bits: u8| {
            if bits != 0 && byte < covered {
                let _ = log.fetch_or(byte as usize, bits);
            }
        };
        let marks = self.take();
        for &(number, word) in &marks {
            for (byte, bits) in (8 * number..).zip(word.to_le_bytes()) {
                set(byte, bits);
            }
        }
        for bytes in also {
            let pages = pages_of(bytes.address, bytes.len);
            let inside = |number: u64, word: u64| (0..64).any(|bit| word >> bit & 1 == 1 && pages.contains(&(64 * number + bit)));
            if marks.iter().any(|&(number, word)| inside(number, word)) {
                let logged = pages_of(bytes.log, bytes.len);
                for page in *logged.start()..(*logged.end() + 1).min(8 * covered) {
                    set(page / 8, 1 << (page % 8));
                }
            }
        }
    }
}
