//! Signals an eventfd that somebody else may have made blocking, without any way to wait: the kernel does so itself.
//!
//! A request of the kernel's asynchronous I/O names an eventfd for it to signal once the request is done, which takes no notice of
//! O_NONBLOCK. The request is to read no bytes, of the eventfd itself: done at once, in the call, with an error that nobody looks at.

use crate::error::last_errno;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

const PREAD: u16 = 0;
const RESFD: u32 = 1;
/// Requests that a context is made for. The kernel rounds up to a page of results, and counts this many against `fs.aio-max-nr`.
const REQUESTS: libc::c_long = 32;
/// Results are of no use, but whoever never takes them may ask for nothing any more. Others may be quicker to use the room.
const ATTEMPTS: usize = 64;

/// `struct iocb` of linux/aio_abi.h. What is not named is 0.
#[repr(C)]
#[derive(Default)]
struct Request {
    data: u64,
    key_and_flags: u64,
    opcode: u16,
    priority: i16,
    descriptor: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    result_descriptor: u32,
}

/// `struct io_event` of linux/aio_abi.h.
type Done = [u64; 4];

/// The process's context: `UNMADE`, `ABSENT`, or what the kernel calls it (an address, so neither of them).
static CONTEXT: AtomicU64 = AtomicU64::new(UNMADE);
const UNMADE: u64 = 0;
const ABSENT: u64 = 1;

extern "C" fn in_child() {
    CONTEXT.store(UNMADE, Relaxed); // a context is of one process
}

/// Makes the process's context ready, so that the first signal is as quick as others.
pub fn prepare() {
    context();
}

/// Signals it; false if that was not possible: it is no eventfd, or the kernel, its age or a filter of calls, does not let us.
#[inline]
pub fn signal(event: BorrowedFd<'_>) -> bool {
    for _ in 0..ATTEMPTS {
        let context = context();
        if context == ABSENT {
            return false;
        }
        if submit(context, event) {
            return true;
        }
        match last_errno() {
            libc::EAGAIN => take_results(context),
            libc::ENOSYS | libc::EPERM | libc::EACCES => {
                CONTEXT.store(ABSENT, Relaxed); // a filter of calls that came later
                return false;
            }
            _ => return false,
        }
    }
    false
}

#[inline]
fn context() -> u64 {
    match CONTEXT.load(Relaxed) {
        UNMADE => make(),
        made => made,
    }
}

#[cold]
fn make() -> u64 {
    // SAFETY: the handler only stores into an atomic, which is allowed between fork and exec. Its being there twice is harmless.
    let handled = unsafe { libc::pthread_atfork(None, None, Some(in_child)) } == 0;
    let mut made: u64 = 0;
    // SAFETY: a place for one number, which is 0.
    if !handled || unsafe { libc::syscall(libc::SYS_io_setup, REQUESTS, &raw mut made) } < 0 {
        made = ABSENT;
    } else if !works(made) {
        destroy(made);
        made = ABSENT;
    }
    match CONTEXT.compare_exchange(UNMADE, made, Relaxed, Relaxed) {
        Ok(_) => made,
        Err(first) => {
            if made != ABSENT {
                destroy(made);
            }
            first
        }
    }
}

/// Whether this kernel does what is said above.
fn works(context: u64) -> bool {
    // SAFETY: eventfd touches no memory; a descriptor that comes back is ours alone.
    let event = unsafe {
        match libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) {
            fd if fd < 0 => return false,
            fd => OwnedFd::from_raw_fd(fd),
        }
    };
    let mut count = 0u64;
    // SAFETY: eight writable bytes.
    let read = |count: &mut u64| unsafe { libc::read(event.as_raw_fd(), std::ptr::from_mut(count).cast(), 8) };
    submit(context, std::os::fd::AsFd::as_fd(&event)) && read(&mut count) == 8 && count == 1
}

#[inline]
fn submit(context: u64, event: BorrowedFd<'_>) -> bool {
    let descriptor = event.as_raw_fd() as u32;
    let request = Request { opcode: PREAD, descriptor, flags: RESFD, result_descriptor: descriptor, ..Request::default() };
    let requests = [&raw const request];
    // SAFETY: one pointer to a request, read only before the call returns: it reads into no buffer.
    unsafe { libc::syscall(libc::SYS_io_submit, context, 1 as libc::c_long, requests.as_ptr()) == 1 }
}

#[cold]
fn take_results(context: u64) {
    let mut done: [Done; REQUESTS as usize] = [[0; 4]; REQUESTS as usize];
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: as many places as are named, and a time that has passed.
    unsafe { libc::syscall(libc::SYS_io_getevents, context, 0 as libc::c_long, REQUESTS, done.as_mut_ptr(), &raw const now) };
}

fn destroy(context: u64) {
    // SAFETY: a context that nobody else was told of; nothing of it is under way.
    unsafe { libc::syscall(libc::SYS_io_destroy, context) };
}
