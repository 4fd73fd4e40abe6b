//! A forked child is told apart, and leaves its parent's pool alone.

use crate::memory;
use std::sync::Arc;
use virtio_memory::{BoundToProcess, BufferPool, Burst, ForkedProcess, process_generation};

/// Forks, runs `body` in the child and gives its exit code to the parent. The child has one thread and little time.
fn in_child(body: impl FnOnce() -> i32) -> Option<i32> {
    // SAFETY: the child runs the body, which uses no lock of another thread, and leaves by _exit; alarm ends it if it waits for one.
    unsafe {
        match libc::fork() {
            -1 => panic!("fork: {}", std::io::Error::last_os_error()),
            0 => {
                libc::alarm(30);
                libc::_exit(body());
            }
            child => {
                let mut status = 0;
                assert_eq!(libc::waitpid(child, &mut status, 0), child);
                libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status))
            }
        }
    }
}

#[test]
fn a_child_knows_that_it_is_one() {
    let bound = BoundToProcess::new();
    let (generation, parent) = (process_generation(), std::process::id());
    assert_eq!(bound.check(), Ok(()));
    let code = in_child(|| {
        let refused = bound.check() == Err(ForkedProcess { made_in: parent, pid: std::process::id() });
        let own = BoundToProcess::new().check() == Ok(());
        i32::from(refused && own && process_generation() == generation + 1)
    });
    assert_eq!(code, Some(1));
    assert_eq!((bound.check(), process_generation()), (Ok(()), generation));
    let error = ForkedProcess { made_in: 10, pid: 11 };
    assert_eq!(error.to_string(), "made in process 10, not usable in its forked child 11");
}

#[test]
fn memory_is_shared_with_a_child() {
    let ours = memory(4096);
    assert_eq!(in_child(|| i32::from(ours.store(8, 4, 99).is_ok())), Some(1));
    assert_eq!(ours.load(8, 4), Ok(99));
}

#[test]
fn a_child_that_drops_a_burst_takes_no_lock_and_frees_nothing() {
    let pool = Arc::new(BufferPool::new(memory(8192), 0, 4, 2048).unwrap());
    let burst = Burst::new(pool.clone(), 2).unwrap();
    assert_eq!(burst.fill(&mut pool.lock()), 2);
    let held = pool.lock();
    let code = in_child(|| {
        let refused = pool.check_process().is_err();
        // SAFETY: the child's copy is dropped here, the parent's by the parent.
        drop(unsafe { std::ptr::read(&burst) });
        i32::from(refused)
    });
    assert_eq!(code, Some(1));
    drop(held);
    assert_eq!(pool.lock().available(), 2);
    drop(burst);
    assert_eq!(pool.lock().available(), 4);
}
