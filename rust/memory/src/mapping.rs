//! One piece of mapped memory: a memfd of our own, or part of a file whose descriptor a peer passed.
//!
//! A mapping is used as `Arc<Mapping>`; whatever points into it holds a clone, and the last one unmaps it.

use crate::error::{MemoryError, last_errno};
use crate::raw;
use crate::sigbus::Guard;
use crate::span::Span;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

/// Which pages a new memfd is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePages {
    /// Pages of the usual size.
    Off,
    /// Huge pages of this many bytes: a power of two that the machine has, reserved beforehand (`/proc/sys/vm/nr_hugepages`).
    Size(usize),
}

impl From<Option<usize>> for HugePages {
    fn from(size: Option<usize>) -> Self {
        size.map_or(Self::Off, Self::Size)
    }
}

/// Mapped memory, readable and writable, shared with whoever holds the same file.
#[derive(Debug)]
pub struct Mapping {
    /// First byte that may be used.
    base: NonNull<u8>,
    len: usize,
    /// What was mapped: whole pages around the above.
    pages: NonNull<u8>,
    pages_len: usize,
    fd: OwnedFd,
    foreign: bool,
    guard: Option<Guard>,
}

// SAFETY: the memory is accessed by atomics and raw copies only, and stays mapped until drop.
unsafe impl Send for Mapping {}
// SAFETY: as for Send; nothing here needs a single thread.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// New memory of `size` bytes, zeroed: a memfd, closed on exec, sealed so that nobody who gets its descriptor can resize it.
    ///
    /// `name` shows in `/proc/self/maps` (at most 249 bytes, no NUL).
    ///
    /// # Errors
    /// `BadSize` for a size of 0, beyond the address space, or not a multiple of the huge page size; `HugePages` if huge pages were asked
    /// for and are not there; `Os` for anything else the kernel refuses.
    pub fn memfd(size: usize, name: &str, huge: HugePages) -> Result<Self, MemoryError> {
        let page = match huge {
            HugePages::Off => page_size(),
            HugePages::Size(page) => page,
        };
        let refused = |operation, errno| match huge {
            HugePages::Off => MemoryError::Os { operation, errno },
            HugePages::Size(page) => MemoryError::HugePages { size: page as u64, len: size as u64, errno },
        };
        if !page.is_power_of_two() || page < page_size() {
            return Err(refused("memfd_create", libc::EINVAL));
        }
        let multiple_of = if huge == HugePages::Off { 1 } else { page };
        let max = (isize::MAX as usize) & !(page - 1);
        if size == 0 || size > max || !size.is_multiple_of(multiple_of) {
            let (value, multiple_of) = (size as u64, multiple_of as u64);
            return Err(MemoryError::BadSize { what: "memory size", value, min: multiple_of, max: max as u64, multiple_of });
        }
        let c_name = CString::new(name).map_err(|_| MemoryError::Os { operation: "memfd_create", errno: libc::EINVAL })?;
        let mut flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        if let HugePages::Size(page) = huge {
            flags |= libc::MFD_HUGETLB | (page.trailing_zeros() << libc::MFD_HUGE_SHIFT);
        }
        // SAFETY: the name is a NUL-terminated string; a descriptor that comes back is ours alone.
        let fd = unsafe {
            let fd = libc::memfd_create(c_name.as_ptr(), flags);
            if fd < 0 {
                return Err(refused("memfd_create", last_errno()));
            }
            OwnedFd::from_raw_fd(fd)
        };
        // SAFETY: ftruncate and fcntl touch no memory of ours.
        unsafe {
            if libc::ftruncate(fd.as_raw_fd(), size as libc::off_t) != 0 {
                return Err(refused("ftruncate", last_errno()));
            }
            let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
            if libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) != 0 {
                return Err(MemoryError::last_os("fcntl(F_ADD_SEALS)"));
            }
        }
        // A peer can punch holes into huge pages, and filling one again raises SIGBUS when the machine has no page left.
        let guarded = huge != HugePages::Off;
        Self::map(fd, 0, size, page, guarded).map_err(|error| match error {
            MemoryError::Os { operation, errno } => refused(operation, errno),
            other => other,
        })
    }

    /// Maps `size` bytes from `offset` of a file that somebody passed. The offset needs no alignment.
    ///
    /// The mapping is guarded: if the file is truncated later, it reads as zeros and [`Mapping::poisoned`] tells.
    ///
    /// # Errors
    /// `BadSize` for a size of 0; `Overflow` if offset + size is not a file position; `FileTooSmall` if the file ends before;
    /// `TooManyMappings` beyond [`crate::MAX_GUARDED`]; `Os` if it cannot be mapped (EACCES: not open for reading and writing).
    pub fn from_fd(fd: OwnedFd, offset: u64, size: u64) -> Result<Self, MemoryError> {
        let max = isize::MAX as u64;
        if size == 0 || size > max {
            return Err(MemoryError::BadSize { what: "memory size", value: size, min: 1, max, multiple_of: 1 });
        }
        let end = offset.checked_add(size).filter(|end| *end <= max);
        let end = end.ok_or(MemoryError::Overflow { address: offset, len: size })?;
        let (file, page) = file_and_page_size(fd.as_fd())?;
        if end > file {
            return Err(MemoryError::FileTooSmall { offset, len: size, file });
        }
        let mut mapping = Self::map(fd, offset, size as usize, page, true)?;
        mapping.foreign = true;
        Ok(mapping)
    }

    fn map(fd: OwnedFd, offset: u64, len: usize, page: usize, guarded: bool) -> Result<Self, MemoryError> {
        let skip = (offset % page as u64) as usize;
        let pages_len = (skip + len).next_multiple_of(page);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let pages = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                pages_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                (offset - skip as u64) as libc::off_t,
            )
        };
        let pages = if pages == libc::MAP_FAILED { None } else { NonNull::new(pages.cast::<u8>()) };
        let pages = pages.ok_or_else(|| MemoryError::last_os("mmap"))?;
        // SAFETY: skip is below one page, and the mapping has at least skip + len bytes.
        let base = unsafe { pages.add(skip) };
        let mut mapping = Self { base, len, pages, pages_len, fd, foreign: false, guard: None };
        if guarded {
            mapping.guard = Some(Guard::new(pages.as_ptr() as usize, pages_len)?);
        }
        Ok(mapping)
    }

    /// Bytes that may be used.
    #[allow(clippy::len_without_is_empty, reason = "a mapping has at least one byte")]
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The file's descriptor, to be passed on.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether somebody else made the file, and so may truncate it.
    pub fn foreign(&self) -> bool {
        self.foreign
    }

    /// Whether the file lost bytes under the mapping; all of it reads as zeros then, and nobody else sees what is written to it.
    #[inline]
    pub fn poisoned(&self) -> bool {
        self.guard.as_ref().is_some_and(Guard::poisoned)
    }

    /// The first byte. Reading or writing through it is the holder's responsibility, and only while the mapping lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// The place of `len` bytes at `offset`.
    #[inline]
    pub(crate) fn at(&self, offset: usize, len: usize) -> Result<NonNull<u8>, MemoryError> {
        if offset > self.len || len > self.len - offset {
            return Err(MemoryError::OutOfRange { offset: offset as u64, len: len as u64, size: self.len as u64 });
        }
        // SAFETY: offset is inside the mapping, or one past its end with len 0.
        Ok(unsafe { self.base.add(offset) })
    }

    /// Copies bytes out.
    ///
    /// # Errors
    /// `OutOfRange`; nothing is copied.
    #[inline]
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<(), MemoryError> {
        let from = self.at(offset, to.len())?;
        // SAFETY: `at` checked the span.
        unsafe { raw::copy_out(from.as_ptr(), to) };
        Ok(())
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// `OutOfRange`; nothing is copied.
    #[inline]
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), MemoryError> {
        let to = self.at(offset, from.len())?;
        // SAFETY: `at` checked the span.
        unsafe { raw::copy_in(to.as_ptr(), from) };
        Ok(())
    }

    /// Fills bytes with zeros.
    ///
    /// # Errors
    /// `OutOfRange`; nothing is written.
    pub fn zero(&self, offset: usize, len: usize) -> Result<(), MemoryError> {
        let to = self.at(offset, len)?;
        // SAFETY: `at` checked the span.
        unsafe { std::ptr::write_bytes(to.as_ptr(), 0, len) };
        Ok(())
    }

    /// One atomic acquire load of a little-endian word of 1, 2, 4 or 8 bytes.
    ///
    /// # Errors
    /// `OutOfRange`, `BadWidth`, `Misaligned`.
    pub fn load(&self, offset: usize, width: usize) -> Result<u64, MemoryError> {
        let at = self.at(offset, width)?;
        raw::check_word(at.as_ptr(), offset as u64, width)?;
        // SAFETY: mapped and aligned, both just checked.
        Ok(unsafe { raw::load(at.as_ptr(), width) })
    }

    /// One atomic release store of a little-endian word of 1, 2, 4 or 8 bytes.
    ///
    /// # Errors
    /// `OutOfRange`, `BadWidth`, `Misaligned`; `BadSize` if the value does not fit.
    pub fn store(&self, offset: usize, width: usize, value: u64) -> Result<(), MemoryError> {
        let at = self.at(offset, width)?;
        raw::check_word(at.as_ptr(), offset as u64, width)?;
        raw::check_value(width, value)?;
        // SAFETY: mapped and aligned, both just checked.
        unsafe { raw::store(at.as_ptr(), width, value) };
        Ok(())
    }

    /// Sets bits of one byte by an atomic OR, after all that was stored before; gives what stood there.
    ///
    /// # Errors
    /// `OutOfRange`.
    pub fn fetch_or(&self, offset: usize, bits: u8) -> Result<u8, MemoryError> {
        let at = self.at(offset, 1)?;
        // SAFETY: `at` checked the byte; shared memory is accessed through atomics.
        Ok(unsafe { raw::fetch_or(at.as_ptr(), bits) })
    }

    /// `len` bytes at `offset`, which keep the mapping alive.
    ///
    /// # Errors
    /// `OutOfRange`.
    pub fn span(self: &Arc<Self>, offset: usize, len: usize) -> Result<Span, MemoryError> {
        Ok(Span::new(self.at(offset, len)?, len, self.clone()))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // Out of the handler's table first: the addresses may be somebody else's as soon as they are free.
        drop(self.guard.take());
        // SAFETY: exactly what was mapped; no pointer into it is left, since each holds the mapping.
        unsafe { libc::munmap(self.pages.as_ptr().cast(), self.pages_len) };
    }
}

fn page_size() -> usize {
    // SAFETY: no memory is passed.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

/// A file's size and the size of its pages, which is larger than usual on hugetlbfs.
fn file_and_page_size(fd: BorrowedFd<'_>) -> Result<(u64, usize), MemoryError> {
    // SAFETY: both calls write the structure passed, which may be all zeros.
    unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        if libc::fstat(fd.as_raw_fd(), &mut stat) != 0 {
            return Err(MemoryError::last_os("fstat"));
        }
        let mut system: libc::statfs = std::mem::zeroed();
        if libc::fstatfs(fd.as_raw_fd(), &mut system) != 0 {
            return Err(MemoryError::last_os("fstatfs"));
        }
        let huge = system.f_type == libc::HUGETLBFS_MAGIC;
        Ok((stat.st_size as u64, if huge { system.f_bsize as usize } else { page_size() }))
    }
}
