//! How one side tells the other that there is work: an eventfd, or a store into a device's register.

use crate::aio;
use crate::descriptor::set_nonblocking;
use crate::error::{MemoryError, last_errno};
use crate::registers::Registers;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// An eventfd that waits for nobody. O_NONBLOCK belongs to the open file, so who shares it may clear it: nothing here relies on it once
/// somebody does.
#[derive(Debug)]
pub struct EventFd {
    fd: OwnedFd,
    kind: Kind,
    /// Whether the open file may be somebody else's too.
    shared: AtomicBool,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    EventFd,
    Pipe,
    Socket,
}

impl EventFd {
    /// A new one, not signalled, closed on exec.
    ///
    /// # Errors
    /// `Os` if the process has no descriptor left.
    pub fn new() -> Result<Self, MemoryError> {
        // SAFETY: eventfd touches no memory; a descriptor that comes back is ours alone.
        unsafe {
            match libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) {
                fd if fd < 0 => Err(MemoryError::last_os("eventfd")),
                fd => Ok(Self { fd: OwnedFd::from_raw_fd(fd), kind: Kind::EventFd, shared: AtomicBool::new(false) }),
            }
        }
    }

    /// One that somebody passed. It is made non-blocking, for all who share it.
    ///
    /// # Errors
    /// `NotEventFd` for a descriptor of another kind; `Os` if its flags cannot be changed.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, MemoryError> {
        Self::passed(fd, |kind| matches!(kind, Kind::EventFd))
    }

    /// As [`EventFd::from_fd`], but a pipe or socket is taken too: eight bytes written into it are a signal (User-Mode Linux is called so).
    ///
    /// # Errors
    /// As `from_fd`.
    pub fn from_fd_or_stream(fd: OwnedFd) -> Result<Self, MemoryError> {
        Self::passed(fd, |_| true)
    }

    fn passed(fd: OwnedFd, right: fn(Kind) -> bool) -> Result<Self, MemoryError> {
        // Eight bytes written into anything else would be damage. Where there is no /proc, the kind cannot be told.
        let kind = match std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
            Ok(name) => match name.to_str() {
                Some("anon_inode:[eventfd]") => Some(Kind::EventFd),
                Some(name) if name.starts_with("pipe:") => Some(Kind::Pipe),
                Some(name) if name.starts_with("socket:") => Some(Kind::Socket),
                _ => None,
            },
            Err(_) => Some(Kind::EventFd),
        };
        let Some(kind) = kind.filter(|kind| right(*kind)) else {
            return Err(MemoryError::NotEventFd { fd: fd.as_raw_fd() });
        };
        set_nonblocking(fd.as_fd())?;
        if matches!(kind, Kind::EventFd) {
            aio::prepare();
        }
        Ok(Self { fd, kind, shared: AtomicBool::new(true) })
    }

    /// From now on somebody else may have the open file.
    pub fn share(&self) {
        aio::prepare();
        self.shared.store(true, Ordering::Relaxed);
    }

    /// Signals it, without waiting. One that holds as many signals as it can is signalled already. A stream that takes none, whatever the
    /// reason, is of somebody who wants to hear nothing.
    ///
    /// # Errors
    /// `Os` if a passed descriptor turns out to be no eventfd, where there was no /proc to tell.
    #[inline]
    pub fn signal(&self) -> Result<(), MemoryError> {
        let one = 1u64.to_ne_bytes();
        let fd = self.fd.as_raw_fd();
        let written = match self.kind {
            // The kernel takes no RWF_NOWAIT here; only a full counter would make the write wait. Where the other way does not work,
            // who fills it between the two calls, and has cleared O_NONBLOCK, holds this thread until the counter is taken.
            Kind::EventFd if self.shared.load(Ordering::Relaxed) && (aio::signal(self.as_fd()) || !self.polls(libc::POLLOUT)?) => {
                return Ok(());
            }
            // SAFETY: eight readable bytes.
            Kind::EventFd => unsafe { libc::write(fd, one.as_ptr().cast(), one.len()) },
            // SAFETY: as above.
            Kind::Socket => unsafe { libc::send(fd, one.as_ptr().cast(), one.len(), libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) },
            Kind::Pipe => {
                let place = libc::iovec { iov_base: one.as_ptr().cast_mut().cast(), iov_len: one.len() };
                // SAFETY: one place of eight bytes, which the kernel reads only.
                let written = unsafe { libc::pwritev2(fd, &raw const place, 1, -1, libc::RWF_NOWAIT) };
                if written >= 0 || !no_nowait() {
                    written
                } else if !self.polls(libc::POLLOUT)? {
                    return Ok(());
                } else {
                    // SAFETY: eight readable bytes.
                    unsafe { libc::write(fd, one.as_ptr().cast(), one.len()) }
                }
            }
        };
        if written >= 0 || !matches!(self.kind, Kind::EventFd) || matches!(last_errno(), libc::EAGAIN | libc::EINTR) {
            Ok(())
        } else {
            Err(MemoryError::last_os("write"))
        }
    }

    /// Takes the signals, without waiting; how many there were, 0 if none.
    ///
    /// # Errors
    /// `Os` if a passed descriptor turns out to allow no such read.
    pub fn drain(&self) -> Result<u64, MemoryError> {
        let mut count = [0; 8];
        let fd = self.fd.as_raw_fd();
        let place = libc::iovec { iov_base: count.as_mut_ptr().cast(), iov_len: count.len() };
        // SAFETY: one place of eight writable bytes.
        let mut read = unsafe { libc::preadv2(fd, &raw const place, 1, -1, libc::RWF_NOWAIT) };
        if read < 0 && no_nowait() {
            if !self.polls(libc::POLLIN)? {
                return Ok(0);
            }
            // SAFETY: eight writable bytes.
            read = unsafe { libc::read(fd, count.as_mut_ptr().cast(), count.len()) };
        }
        if read >= 0 || matches!(last_errno(), libc::EAGAIN | libc::EINTR) {
            Ok(u64::from_ne_bytes(count))
        } else {
            Err(MemoryError::last_os("read"))
        }
    }

    /// Whether it is ready for this now.
    fn polls(&self, events: libc::c_short) -> Result<bool, MemoryError> {
        let mut polled = libc::pollfd { fd: self.fd.as_raw_fd(), events, revents: 0 };
        loop {
            // SAFETY: one pollfd.
            match unsafe { libc::poll(&raw mut polled, 1, 0) } {
                ready if ready >= 0 => return Ok(polled.revents & events != 0),
                _ if last_errno() == libc::EINTR => {}
                _ => return Err(MemoryError::last_os("poll")),
            }
        }
    }

    /// Waits until it is signalled, at most `timeout` (`None`: for ever); true if it is. The signals stay until [`EventFd::drain`].
    ///
    /// # Errors
    /// `Os` with EINTR if a signal handler ran while it waited, so that the caller can act on it and wait again.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<bool, MemoryError> {
        wait_each([self], timeout).map(|[ready]| ready)
    }

    /// As [`EventFd::wait`], for one of the two; which of them are signalled.
    ///
    /// # Errors
    /// As `wait`.
    pub fn wait_either(&self, other: &Self, timeout: Option<Duration>) -> Result<[bool; 2], MemoryError> {
        wait_each([self, other], timeout)
    }
}

/// Whether a kernel of that age, or a filter of calls, knows no RWF_NOWAIT for this descriptor.
fn no_nowait() -> bool {
    matches!(last_errno(), libc::EOPNOTSUPP | libc::ENOSYS)
}

fn wait_each<const N: usize>(events: [&EventFd; N], timeout: Option<Duration>) -> Result<[bool; N], MemoryError> {
    let limit = timeout.map(|time| libc::timespec {
        tv_sec: libc::time_t::try_from(time.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: time.subsec_nanos().into(),
    });
    let limit = limit.as_ref().map_or(std::ptr::null(), |limit| limit);
    let mut polls = events.map(|event| libc::pollfd { fd: event.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 });
    loop {
        // SAFETY: as many pollfds as are named, a time limit or null, and no signal mask.
        let ready = unsafe { libc::ppoll(polls.as_mut_ptr(), N as libc::nfds_t, limit, std::ptr::null()) };
        if ready >= 0 {
            return Ok(polls.map(|poll| poll.revents != 0));
        }
        if timeout != Some(Duration::ZERO) || last_errno() != libc::EINTR {
            return Err(MemoryError::last_os("ppoll"));
        } // a signal is told of even where there is nothing to wait for
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A register that takes notifications; its place was checked.
#[derive(Clone, Debug)]
pub struct RegisterDoorbell {
    registers: Registers,
    offset: usize,
    wide: bool,
}

/// What a transport chose for telling the other side.
#[derive(Clone, Debug, Default)]
pub enum Doorbell {
    /// Nobody to tell: the other side polls.
    #[default]
    None,
    /// An eventfd.
    EventFd(Arc<EventFd>),
    /// A store into a register; see [`Doorbell::register`].
    Register(RegisterDoorbell),
}

impl Doorbell {
    /// A register of 2 bytes, or of 4 with VIRTIO_F_NOTIFICATION_DATA (4.1.5.2), at this offset.
    ///
    /// # Errors
    /// `BadSize` for another width; `OutOfRange` or `Misaligned` for a place that the registers do not have.
    pub fn register(registers: Registers, offset: usize, width: usize) -> Result<Self, MemoryError> {
        let place = (offset as u64, width as u64, registers.len() as u64);
        if !matches!(width, 2 | 4) {
            return Err(MemoryError::BadSize { what: "doorbell width", value: place.1, min: 2, max: 4, multiple_of: 2 });
        }
        if !offset.is_multiple_of(width) {
            return Err(MemoryError::Misaligned { address: place.0, align: place.1 });
        }
        if place.0.saturating_add(place.1) > place.2 {
            return Err(MemoryError::OutOfRange { offset: place.0, len: place.1, size: place.2 });
        }
        Ok(Self::Register(RegisterDoorbell { registers, offset, wide: width == 4 }))
    }

    /// Tells the other side. A register gets the value (its low 16 bits if it is 2 bytes wide), an eventfd carries none.
    ///
    /// # Errors
    /// `Os` if a passed descriptor is no eventfd; `Misaligned` if the register block itself is not aligned.
    #[inline]
    pub fn ring(&self, value: u32) -> Result<(), MemoryError> {
        match self {
            Self::None => Ok(()),
            Self::EventFd(event) => event.signal(),
            Self::Register(RegisterDoorbell { registers, offset, wide: true }) => registers.write32(*offset, value),
            Self::Register(RegisterDoorbell { registers, offset, wide: false }) => registers.write16(*offset, value as u16),
        }
    }
}
