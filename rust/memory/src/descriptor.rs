//! A descriptor of our own for one that somebody else goes on using.

use crate::error::MemoryError;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Duplicates a descriptor given by its number; the new one is closed on exec.
///
/// # Errors
/// `Os` with EBADF if there is no such descriptor, EMFILE if the process may have no more.
pub fn duplicate(fd: RawFd) -> Result<OwnedFd, MemoryError> {
    // SAFETY: fcntl touches no memory; a descriptor that comes back is ours alone.
    unsafe {
        match libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) {
            copy if copy < 0 => Err(MemoryError::last_os("fcntl(F_DUPFD_CLOEXEC)")),
            copy => Ok(OwnedFd::from_raw_fd(copy)),
        }
    }
}
