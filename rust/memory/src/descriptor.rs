//! A descriptor of our own for one that somebody else goes on using.

use crate::error::{MemoryError, last_errno};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

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

/// The most descriptors that [`wait_readable`] looks at.
const MAX_WAITED: usize = 64;

/// Sleeps until one of these descriptors has something to read, or an error to tell, however long that takes.
///
/// # Errors
/// `BadSize` for more than 64 of them; `Os` as the kernel answers, but for EINTR, after which it sleeps on.
pub fn wait_readable<'a>(fds: impl IntoIterator<Item = BorrowedFd<'a>>) -> Result<(), MemoryError> {
    let mut polled = [libc::pollfd { fd: -1, events: libc::POLLIN, revents: 0 }; MAX_WAITED];
    let mut count = 0;
    for fd in fds {
        let Some(place) = polled.get_mut(count) else {
            let (value, max) = (count as u64 + 1, MAX_WAITED as u64);
            return Err(MemoryError::BadSize { what: "number of descriptors", value, min: 0, max, multiple_of: 1 });
        };
        place.fd = fd.as_raw_fd();
        count += 1;
    }
    loop {
        // SAFETY: `count` entries of the array, no more than it has.
        let ready = unsafe { libc::poll(polled.as_mut_ptr(), count as libc::nfds_t, -1) };
        if ready >= 0 {
            return Ok(());
        }
        if last_errno() != libc::EINTR {
            return Err(MemoryError::last_os("poll"));
        }
    }
}
