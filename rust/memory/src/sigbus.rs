//! Truncated files must not kill the process (device-24).
//!
//! Whoever passed us a descriptor can shorten its file at any time; the next access beyond the new end raises SIGBUS. The handler here maps
//! private zeros over the whole mapping, marks it poisoned, and lets the access repeat. It does so only for the mappings entered in its
//! table; any other SIGBUS goes to the handler that was there before, or to the default action. It is installed with the first entry and
//! stays.
//!
//! The handler allocates nothing and takes no lock: the table is fixed, and each entry is read under a version number. The entry that a
//! fault belongs to cannot change meanwhile, since the faulting thread holds its mapping.

use crate::error::MemoryError;
use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize, fence};

/// The most guarded mappings at one time.
pub const MAX_GUARDED: usize = 4096;

struct Entry {
    claimed: AtomicBool,
    /// Odd while start and len change.
    version: AtomicU32,
    start: AtomicUsize,
    len: AtomicUsize,
    poisoned: AtomicBool,
}

impl Entry {
    const fn new() -> Self {
        Self {
            claimed: AtomicBool::new(false),
            version: AtomicU32::new(0),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            poisoned: AtomicBool::new(false),
        }
    }

    /// Only the claimer calls this.
    fn set(&self, start: usize, len: usize) {
        let version = self.version.load(Relaxed);
        self.version.store(version.wrapping_add(1), Relaxed);
        fence(Release);
        self.start.store(start, Relaxed);
        self.len.store(len, Relaxed);
        self.version.store(version.wrapping_add(2), Release);
    }

    /// The span, unless it is empty or just changing.
    fn get(&self) -> Option<(usize, usize)> {
        let version = self.version.load(Acquire);
        let span = (self.start.load(Relaxed), self.len.load(Relaxed));
        fence(Acquire);
        let stable = version.is_multiple_of(2) && self.version.load(Relaxed) == version;
        (stable && span.1 != 0).then_some(span)
    }
}

static TABLE: [Entry; MAX_GUARDED] = [const { Entry::new() }; MAX_GUARDED];
/// Entries from here on were never claimed.
static HIGH_WATER: AtomicUsize = AtomicUsize::new(0);
/// How many times any mapping was poisoned.
static EPOCH: AtomicU64 = AtomicU64::new(0);

static PREVIOUS_HANDLER: AtomicUsize = AtomicUsize::new(libc::SIG_DFL);
static PREVIOUS_FLAGS: AtomicI32 = AtomicI32::new(0);

/// Counts poisonings in this process: while it stays the same, no further mapping was poisoned.
#[inline]
pub(crate) fn epoch() -> u64 {
    EPOCH.load(Acquire)
}

/// One mapping's place in the table; dropped before the mapping is unmapped.
#[derive(Debug)]
pub(crate) struct Guard {
    index: usize,
}

impl Guard {
    /// Guards `len` bytes from `start`, whole pages as they were mapped.
    pub(crate) fn new(start: usize, len: usize) -> Result<Self, MemoryError> {
        install()?;
        let free = |entry: &Entry| !entry.claimed.load(Relaxed) && entry.claimed.compare_exchange(false, true, AcqRel, Relaxed).is_ok();
        let index = TABLE.iter().position(free).ok_or(MemoryError::TooManyMappings { limit: MAX_GUARDED })?;
        HIGH_WATER.fetch_max(index + 1, AcqRel);
        TABLE[index].poisoned.store(false, Relaxed);
        TABLE[index].set(start, len);
        Ok(Self { index })
    }

    /// Whether zeros were mapped over this mapping.
    #[inline]
    pub(crate) fn poisoned(&self) -> bool {
        TABLE[self.index].poisoned.load(Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        TABLE[self.index].set(0, 0);
        TABLE[self.index].claimed.store(false, Release);
    }
}

fn install() -> Result<(), MemoryError> {
    static INSTALLED: OnceLock<Result<(), MemoryError>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            let mut previous = MaybeUninit::<libc::sigaction>::zeroed();
            // SAFETY: sigaction only reads and writes the structures passed. The old handler is recorded before ours can run, and once
            // more in case somebody replaced it in between.
            unsafe {
                if libc::sigaction(libc::SIGBUS, std::ptr::null(), previous.as_mut_ptr()) != 0 {
                    return Err(MemoryError::last_os("sigaction"));
                }
                remember(&previous.assume_init());
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_sigbus as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                libc::sigemptyset(&mut action.sa_mask);
                if libc::sigaction(libc::SIGBUS, &action, previous.as_mut_ptr()) != 0 {
                    return Err(MemoryError::last_os("sigaction"));
                }
                remember(&previous.assume_init());
            }
            Ok(())
        })
        .clone()
}

fn remember(previous: &libc::sigaction) {
    PREVIOUS_FLAGS.store(previous.sa_flags, Relaxed);
    PREVIOUS_HANDLER.store(previous.sa_sigaction, Release);
}

/// Async-signal-safe: atomics, mmap and sigaction only; errno is kept.
extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler, and errno's location is the thread's own.
    let (code, address, errno) = unsafe { ((*info).si_code, (*info).si_addr() as usize, *libc::__errno_location()) };
    // A positive code is a fault of this thread; an optional machine-check report (BUS_MCEERR_AO) is not an access that can be repeated.
    let fault = code > 0 && code != libc::BUS_MCEERR_AO;
    if !(fault && cover(address)) {
        pass_on(signal, info, context, code > 0);
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Maps zeros over the guarded mapping that holds `address`; false if there is none, or if that failed.
fn cover(address: usize) -> bool {
    for entry in &TABLE[..HIGH_WATER.load(Acquire)] {
        let Some((start, len)) = entry.get() else { continue };
        if address.wrapping_sub(start) >= len {
            continue;
        }
        // SAFETY: [start, start + len) is a mapping of this crate, alive because the faulting thread uses it; replacing its pages by zeros
        // keeps every pointer into it valid.
        let covered = unsafe {
            libc::mmap(
                start as *mut libc::c_void,
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        if covered == libc::MAP_FAILED {
            return false;
        }
        entry.poisoned.store(true, Release);
        EPOCH.fetch_add(1, AcqRel);
        return true;
    }
    false
}

/// Hands a signal that is not ours to the previous handler, or lets the default action happen.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void, fault: bool) {
    let handler = PREVIOUS_HANDLER.load(Acquire);
    if handler == libc::SIG_IGN && !fault {
        return;
    }
    if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
        // SAFETY: both calls are async-signal-safe. A fault repeats under the default action when this handler returns, as the kernel has
        // it for an ignored fault too; a signal that was sent is sent again, and arrives when this handler returns.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = libc::SIG_DFL;
            libc::sigaction(signal, &action, std::ptr::null_mut());
            if !fault {
                libc::raise(signal);
            }
        }
        return;
    }
    if PREVIOUS_FLAGS.load(Relaxed) & libc::SA_SIGINFO != 0 {
        // SAFETY: with SA_SIGINFO the recorded address is a handler of three arguments.
        let previous: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = unsafe { std::mem::transmute(handler) };
        previous(signal, info, context);
    } else {
        // SAFETY: without SA_SIGINFO it is a handler of one.
        let previous: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(handler) };
        previous(signal);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_bounded_and_its_places_are_used_again() {
        // Addresses that nobody maps: nothing ever faults there.
        let mut guards: Vec<Guard> = (0..MAX_GUARDED).map(|index| Guard::new(4096 * (index + 1), 4096).unwrap()).collect();
        assert_eq!(Guard::new(0x1000_0000, 4096).unwrap_err(), MemoryError::TooManyMappings { limit: MAX_GUARDED });
        TABLE[guards[17].index].poisoned.store(true, Relaxed);
        guards.swap_remove(17);
        let again = Guard::new(0x1000_0000, 4096).unwrap();
        assert!(!again.poisoned(), "a place that was poisoned starts sound for the next mapping");
        assert_eq!(TABLE[again.index].get(), Some((0x1000_0000, 4096)));
    }

    #[test]
    fn an_entry_that_is_changing_or_empty_is_not_read() {
        let entry = Entry::new();
        assert_eq!(entry.get(), None);
        entry.set(4096, 8192);
        assert_eq!(entry.get(), Some((4096, 8192)));
        entry.version.fetch_add(1, Relaxed);
        assert_eq!(entry.get(), None);
    }
}
