//! Telling a forked child apart, without a system call: what has private state beside shared memory works in one process only.

use std::sync::Once;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;
use thiserror::Error;

/// How many forks lie between this process and the one that first made a [`BoundToProcess`].
static GENERATION: AtomicU32 = AtomicU32::new(0);

extern "C" fn in_child() {
    GENERATION.fetch_add(1, Relaxed);
}

/// A number that differs in a forked child from its parent's, from the first [`BoundToProcess`] on.
#[inline]
pub fn process_generation() -> u32 {
    GENERATION.load(Relaxed)
}

/// An object was used in a process that did not make it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("made in process {made_in}, not usable in its forked child {pid}")]
pub struct ForkedProcess {
    /// The process that made it.
    pub made_in: u32,
    /// This process.
    pub pid: u32,
}

/// The process that made something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BoundToProcess {
    generation: u32,
    pid: u32,
}

impl BoundToProcess {
    /// Bound to this process.
    ///
    /// # Panics
    /// If the system has no memory for a fork handler.
    #[allow(clippy::new_without_default, reason = "it stands for the process it is made in, not for a neutral value")]
    pub fn new() -> Self {
        static INSTALL: Once = Once::new();
        INSTALL.call_once(|| {
            // SAFETY: the handler only adds to an atomic, which is allowed between fork and exec.
            let refused = unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
            assert_eq!(refused, 0, "pthread_atfork: no memory");
        });
        Self { generation: process_generation(), pid: std::process::id() }
    }

    /// Checks that this still is the process; one load.
    ///
    /// # Errors
    /// [`ForkedProcess`] in a forked child.
    #[inline]
    pub fn check(&self) -> Result<(), ForkedProcess> {
        if process_generation() == self.generation { Ok(()) } else { Err(ForkedProcess { made_in: self.pid, pid: std::process::id() }) }
    }
}
