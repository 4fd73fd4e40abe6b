//! A descriptor of our own for one that somebody else goes on using.

use crate::error::MemoryError;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

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

/// Makes it answer EAGAIN instead of waiting, for all who share the open file.
///
/// # Errors
/// `Os` if its flags cannot be changed.
pub fn set_nonblocking(fd: BorrowedFd<'_>) -> Result<(), MemoryError> {
    // SAFETY: fcntl with these commands touches no memory.
    unsafe {
        let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        if flags < 0 || libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) < 0 {
            return Err(MemoryError::last_os("fcntl(O_NONBLOCK)"));
        }
    }
    Ok(())
}

/// Lets go of what a descriptor names; its number stays an open descriptor, of nothing. For a forked child, where the thread that owns it is
/// not there to close it.
///
/// # Errors
/// `Os` if the process may open nothing.
pub fn let_go(fd: RawFd) -> Result<(), MemoryError> {
    let nothing = crate::EventFd::new()?;
    // SAFETY: dup3 touches no memory, and leaves whoever owns `fd` with a descriptor.
    match unsafe { libc::dup3(nothing.as_fd().as_raw_fd(), fd, libc::O_CLOEXEC) } {
        refused if refused < 0 => Err(MemoryError::last_os("dup3")),
        _ => Ok(()),
    }
}

/// The most descriptors that [`wait_ready`] looks at.
pub const MAX_WAITED: usize = 64;

/// What [`wait_ready`] found, a bit for each descriptor by its place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// Something to read.
    pub readable: u64,
    /// An error, or nobody at the other end any more.
    pub failed: u64,
    /// Of these, those that are not just an eventfd that holds all it can.
    pub lost: u64,
}

/// Sleeps until one of these descriptors has something to read, if that is wanted of it, or an error to tell; at most `timeout` (`None`: for
/// ever), after which nothing is ready.
///
/// # Errors
/// `BadSize` for more than 64 of them; `Os` as the kernel answers: EINTR if a signal handler ran, so that the caller can act on it.
pub fn wait_ready<'a>(
    fds: impl IntoIterator<Item = (BorrowedFd<'a>, bool)>,
    timeout: Option<std::time::Duration>,
) -> Result<Ready, MemoryError> {
    let mut polled = [libc::pollfd { fd: -1, events: 0, revents: 0 }; MAX_WAITED];
    let mut count = 0;
    for (fd, readable) in fds {
        let Some(place) = polled.get_mut(count) else {
            let (value, max) = (count as u64 + 1, MAX_WAITED as u64);
            return Err(MemoryError::BadSize { what: "number of descriptors", value, min: 0, max, multiple_of: 1 });
        };
        *place = libc::pollfd { fd: fd.as_raw_fd(), events: if readable { libc::POLLIN } else { 0 }, revents: 0 };
        count += 1;
    }
    let limit = timeout.map_or(-1, |time| libc::c_int::try_from(time.as_millis()).unwrap_or(libc::c_int::MAX));
    // SAFETY: `count` entries of the array, no more than it has.
    if unsafe { libc::poll(polled.as_mut_ptr(), count as libc::nfds_t, limit) } < 0 {
        return Err(MemoryError::last_os("poll"));
    }
    let mut found = Ready::default();
    for (index, place) in polled[..count].iter().enumerate() {
        found.readable |= u64::from(place.revents & libc::POLLIN != 0) << index;
        let lost = place.revents & (libc::POLLHUP | libc::POLLNVAL) != 0;
        found.lost |= u64::from(lost) << index;
        found.failed |= u64::from(lost || place.revents & libc::POLLERR != 0) << index;
    }
    Ok(found)
}
