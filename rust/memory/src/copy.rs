//! Bulk movement without a private copy between: guest memory to and from a descriptor, or a pool's mapping.

use crate::error::{MemoryError, last_errno};
use crate::mapping::Mapping;
use crate::raw;
use crate::region::RegionTable;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The most pieces that the kernel takes in one call (IOV_MAX).
const MAX_PIECES: usize = 1024;

/// Room for the pieces of one `readv` or `writev`, to be used again and again. It holds nothing between calls.
#[derive(Debug)]
pub struct IoVecs {
    pieces: Vec<libc::iovec>,
    /// The guest spans behind the pieces, one or more pieces each.
    spans: Vec<(u64, u32)>,
    limit: usize,
}

// SAFETY: the pointers are used within one call only, and cleared before it returns.
unsafe impl Send for IoVecs {}
// SAFETY: as for Send; nothing is reached through a shared reference.
unsafe impl Sync for IoVecs {}

impl IoVecs {
    /// Room for `limit` pieces: a segment is one piece, and one more for each border between regions inside it.
    ///
    /// # Errors
    /// `BadSize` for 0 or more than 1024.
    pub fn new(limit: usize) -> Result<Self, MemoryError> {
        if limit == 0 || limit > MAX_PIECES {
            let (value, max) = (limit as u64, MAX_PIECES as u64);
            return Err(MemoryError::BadSize { what: "pieces of a transfer", value, min: 1, max, multiple_of: 1 });
        }
        Ok(Self { pieces: Vec::with_capacity(limit), spans: Vec::with_capacity(limit), limit })
    }

    /// How many pieces there is room for.
    pub fn limit(&self) -> usize {
        self.limit
    }

    fn clear(&mut self) {
        self.pieces.clear();
        self.spans.clear();
    }

    /// Puts private bytes, which outlive the call that the pieces are gathered for, before or behind guest segments.
    fn private(&mut self, base: *mut u8, len: usize) -> Result<(), MemoryError> {
        if len == 0 {
            return Ok(());
        }
        if self.pieces.len() == self.limit {
            return Err(MemoryError::TooManySegments { limit: self.limit });
        }
        self.pieces.push(libc::iovec { iov_base: base.cast(), iov_len: len });
        Ok(())
    }

    fn gather(&mut self, table: &RegionTable, segments: impl IntoIterator<Item = (u64, u32)>) -> Result<(), MemoryError> {
        for (address, len) in segments.into_iter().filter(|(_, len)| *len != 0) {
            table.pieces(address, len as usize, |at, _, count| {
                if self.pieces.len() == self.limit {
                    return Err(MemoryError::TooManySegments { limit: self.limit });
                }
                self.pieces.push(libc::iovec { iov_base: at.as_ptr().cast(), iov_len: count });
                Ok(())
            })?;
            self.spans.push((address, len));
        }
        Ok(())
    }
}

impl RegionTable {
    /// Reads from a descriptor straight into guest segments (address, bytes), one after the other; the bytes read. What was really read is
    /// marked dirty.
    ///
    /// # Errors
    /// `Unmapped`, `Overflow`, `TooManySegments` before anything is read; `Os` as the kernel answers: EAGAIN if a non-blocking descriptor
    /// has nothing, EFAULT if a truncated file is behind a segment (device-24).
    pub fn readv(
        &self,
        fd: BorrowedFd<'_>,
        segments: impl IntoIterator<Item = (u64, u32)>,
        vecs: &mut IoVecs,
    ) -> Result<usize, MemoryError> {
        self.readv_around(fd, &mut [], segments, &mut [], vecs)
    }

    /// As [`RegionTable::readv`], with private bytes before the segments (a header that is judged before anybody else sees it) and behind
    /// them (where what did not fit shows). The bytes read, private ones included.
    ///
    /// # Errors
    /// As [`RegionTable::readv`]; each private part that has bytes is one more piece.
    pub fn readv_around(
        &self,
        fd: BorrowedFd<'_>,
        head: &mut [u8],
        segments: impl IntoIterator<Item = (u64, u32)>,
        tail: &mut [u8],
        vecs: &mut IoVecs,
    ) -> Result<usize, MemoryError> {
        vecs.clear();
        let gathered = vecs
            .private(head.as_mut_ptr(), head.len())
            .and_then(|()| vecs.gather(self, segments))
            .and_then(|()| vecs.private(tail.as_mut_ptr(), tail.len()));
        let result = gathered.and_then(|()| {
            // SAFETY: the pieces are the two slices, borrowed for this call alone, and mapped memory, checked by `gather`, that stays so while
            // the table lives; the kernel answers EFAULT for pages that are gone.
            transfer("readv", || unsafe { libc::readv(fd.as_raw_fd(), vecs.pieces.as_ptr(), vecs.pieces.len() as libc::c_int) })
        });
        if let (Ok(bytes), Some(dirty)) = (&result, self.dirty()) {
            let mut left = bytes.saturating_sub(head.len()) as u64;
            for (address, len) in &vecs.spans {
                let part = left.min(u64::from(*len));
                dirty.mark(*address, part);
                left -= part;
            }
        }
        vecs.clear();
        result
    }

    /// Writes guest segments (address, bytes), one after the other, straight to a descriptor; the bytes written.
    ///
    /// # Errors
    /// `Unmapped`, `Overflow`, `TooManySegments` before anything is written; `Os` as the kernel answers: EAGAIN if a non-blocking
    /// descriptor has no room, EFAULT if a truncated file is behind a segment (device-24).
    pub fn writev(
        &self,
        fd: BorrowedFd<'_>,
        segments: impl IntoIterator<Item = (u64, u32)>,
        vecs: &mut IoVecs,
    ) -> Result<usize, MemoryError> {
        self.writev_after(fd, &[], segments, vecs)
    }

    /// As [`RegionTable::writev`], with private bytes before the segments: a header that was copied and judged. The bytes written, private
    /// ones included.
    ///
    /// # Errors
    /// As [`RegionTable::writev`]; the private bytes are one more piece.
    pub fn writev_after(
        &self,
        fd: BorrowedFd<'_>,
        head: &[u8],
        segments: impl IntoIterator<Item = (u64, u32)>,
        vecs: &mut IoVecs,
    ) -> Result<usize, MemoryError> {
        vecs.clear();
        let gathered = vecs.private(head.as_ptr().cast_mut(), head.len()).and_then(|()| vecs.gather(self, segments));
        let result = gathered.and_then(|()| {
            // SAFETY: as for readv_around; the kernel only reads the pieces.
            transfer("writev", || unsafe { libc::writev(fd.as_raw_fd(), vecs.pieces.as_ptr(), vecs.pieces.len() as libc::c_int) })
        });
        vecs.clear();
        result
    }

    /// Copies `len` bytes of guest memory from `address` into `to`, from its byte `offset` on (a pool slot).
    ///
    /// # Errors
    /// `Unmapped`, `Overflow`, `OutOfRange`; nothing is copied then.
    #[inline]
    pub fn copy_out(&self, address: u64, len: usize, to: &Mapping, offset: usize) -> Result<(), MemoryError> {
        let target = to.at(offset, len)?;
        self.pieces(address, len, |from, start, count| {
            // SAFETY: `pieces` vouches for the source, `at` for len bytes of the target.
            unsafe { raw::copy_across(from.as_ptr(), target.as_ptr().add(start), count) };
            Ok(())
        })
    }

    /// Copies `len` bytes of `from`, from its byte `offset` on (a pool slot), into guest memory at `address`, and marks them dirty.
    ///
    /// # Errors
    /// `Unmapped`, `Overflow`, `OutOfRange`; nothing is copied then.
    #[inline]
    pub fn copy_in(&self, address: u64, len: usize, from: &Mapping, offset: usize) -> Result<(), MemoryError> {
        let source = from.at(offset, len)?;
        self.pieces(address, len, |to, start, count| {
            // SAFETY: `pieces` vouches for the target, `at` for len bytes of the source.
            unsafe { raw::copy_across(source.as_ptr().add(start), to.as_ptr(), count) };
            Ok(())
        })?;
        self.mark(address, len as u64);
        Ok(())
    }
}

/// Repeats a call that a signal interrupted before it moved anything.
fn transfer(operation: &'static str, mut call: impl FnMut() -> libc::ssize_t) -> Result<usize, MemoryError> {
    loop {
        let moved = call();
        if moved >= 0 {
            return Ok(moved as usize);
        }
        let errno = last_errno();
        if errno != libc::EINTR {
            return Err(MemoryError::Os { operation, errno });
        }
    }
}
