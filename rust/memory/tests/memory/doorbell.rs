//! Eventfds and register doorbells.

use crate::memory;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use virtio_memory::{Doorbell, EventFd, MemoryError, Registers};

const NOW: Option<Duration> = Some(Duration::ZERO);

#[test]
fn signals_are_counted_and_taken() {
    let event = EventFd::new().unwrap();
    assert_eq!((event.wait(NOW), event.drain()), (Ok(false), Ok(0)));
    event.signal().unwrap();
    event.signal().unwrap();
    assert_eq!((event.wait(None), event.wait(Some(Duration::MAX))), (Ok(true), Ok(true)));
    assert_eq!((event.drain(), event.drain()), (Ok(2), Ok(0)));
    assert_eq!(event.wait(Some(Duration::from_nanos(1))), Ok(false));
}

#[test]
fn one_that_holds_all_it_can_does_not_block() {
    let event = EventFd::new().unwrap();
    let mut file = std::fs::File::from(event.as_fd().try_clone_to_owned().unwrap());
    file.write_all(&(u64::MAX - 1).to_ne_bytes()).unwrap();
    event.signal().unwrap();
    assert_eq!(event.drain(), Ok(u64::MAX - 1));
}

#[test]
fn what_a_descriptor_names_is_let_go_and_its_number_stays() {
    let (near, mut far) = std::os::unix::net::UnixStream::pair().unwrap();
    virtio_memory::let_go(near.as_raw_fd()).unwrap();
    assert!(far.write_all(b"x").is_err());
    // SAFETY: fcntl with this command touches no memory.
    assert_eq!(unsafe { libc::fcntl(near.as_raw_fd(), libc::F_GETFD) }, libc::FD_CLOEXEC);
}

#[test]
fn a_passed_descriptor_is_made_non_blocking() {
    // SAFETY: eventfd touches no memory; the descriptor that comes back is ours alone.
    let passed = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, 0)) };
    let other = passed.try_clone().unwrap();
    let event = EventFd::from_fd(passed).unwrap();
    // SAFETY: fcntl with this command touches no memory.
    assert_ne!(unsafe { libc::fcntl(other.as_raw_fd(), libc::F_GETFL) } & libc::O_NONBLOCK, 0);
    assert_eq!(event.drain(), Ok(0));
    event.signal().unwrap();
    assert_eq!(EventFd::from_fd(other).unwrap().drain(), Ok(1));
}

/// What `work` gives; it must not wait for anybody.
fn promptly<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(work()));
    result.recv_timeout(Duration::from_secs(60)).expect("it waits for a peer")
}

/// Clears O_NONBLOCK, for all who share the open file.
fn make_blocking(fd: impl AsFd) {
    // SAFETY: fcntl with this command touches no memory.
    assert_eq!(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_SETFL, 0) }, 0);
}

#[test]
fn device_23_a_peer_that_makes_an_eventfd_blocking_holds_nobody() {
    let made = EventFd::new().unwrap();
    made.share();
    let other = made.as_fd().try_clone_to_owned().unwrap();
    let passed = EventFd::from_fd(other.try_clone().unwrap()).unwrap();
    for event in [made, passed] {
        make_blocking(&other);
        let mut file = std::fs::File::from(other.try_clone().unwrap());
        promptly(move || {
            assert_eq!(event.drain(), Ok(0));
            event.signal().unwrap();
            event.signal().unwrap();
            assert_eq!((event.drain(), event.drain()), (Ok(2), Ok(0)));
            file.write_all(&(u64::MAX - 1).to_ne_bytes()).unwrap();
            event.signal().unwrap();
            assert!(event.drain().unwrap() >= u64::MAX - 1); // by the kernel itself it may be one more
            assert_eq!(event.drain(), Ok(0));
        });
    }
}

/// Rounds of a peer that leaves room for a few signals. Where we looked first and wrote then, ten were enough to be held.
const ROUNDS: u64 = 1000;

#[test]
fn device_23_two_threads_that_meet_at_the_last_room_of_a_blocking_eventfd_are_not_held() {
    let event = Arc::new(EventFd::new().unwrap());
    let peer = event.as_fd().try_clone_to_owned().unwrap();
    event.share();
    let over = Arc::new(AtomicBool::new(false));
    let signalled = [0; 2].map(|_| Arc::new(AtomicU64::new(0)));
    let threads = signalled.clone().map(|signalled| {
        let (event, over) = (event.clone(), over.clone());
        std::thread::spawn(move || {
            while !over.load(Relaxed) {
                event.signal().unwrap();
                signalled.fetch_add(1, Relaxed);
            }
        })
    });
    promptly(move || {
        let mut file = std::fs::File::from(peer.try_clone().unwrap());
        for round in 0..ROUNDS {
            // SAFETY: fcntl with this command touches no memory.
            assert_eq!(unsafe { libc::fcntl(peer.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) }, 0);
            file.read_exact(&mut [0; 8]).unwrap();
            let _ = file.write(&(u64::MAX - 1 - round % 16).to_ne_bytes()); // unless they were quicker
            make_blocking(&peer);
            for each in &signalled {
                let before = each.load(Relaxed);
                while each.load(Relaxed) < before + 16 {
                    std::thread::sleep(Duration::from_micros(1));
                }
            }
        }
        over.store(true, Relaxed);
    });
    for thread in threads {
        thread.join().unwrap();
    }
}

/// Lets this thread, and what it starts, make no such system call any more: it answers ENOSYS.
fn refuse(call: libc::c_long) {
    let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let number = step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0);
    let same = step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, call as u32);
    let answer = |k| step(libc::BPF_RET | libc::BPF_K, 0, 0, k);
    let mut steps = [number, same, answer(libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32), answer(libc::SECCOMP_RET_ALLOW)];
    let filter = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    // SAFETY: a filter that is only read.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter), 0);
    }
}

#[test]
fn without_asynchronous_requests_a_signal_is_a_write() {
    const PART: &str = "VIRTIO_REFUSED_CALL";
    let signals = || {
        let event = EventFd::new().unwrap();
        event.share();
        event.signal().unwrap();
        event.signal().unwrap();
        event
    };
    if let Ok(part) = std::env::var(PART) {
        match part.as_str() {
            "never" => refuse(libc::SYS_io_setup),
            "no more" => {
                assert_eq!(signals().drain(), Ok(2));
                refuse(libc::SYS_io_submit);
            }
            _ => unreachable!(),
        }
        let event = signals();
        assert_eq!(event.drain(), Ok(2));
        let mut file = std::fs::File::from(event.as_fd().try_clone_to_owned().unwrap());
        file.write_all(&(u64::MAX - 1).to_ne_bytes()).unwrap();
        event.signal().unwrap();
        assert_eq!(event.drain(), Ok(u64::MAX - 1));
        return;
    }
    for part in ["never", "no more"] {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "doorbell::without_asynchronous_requests_a_signal_is_a_write", "--test-threads=1"]);
        let output = child.env(PART, part).output().unwrap();
        assert!(output.status.success(), "{part}: {}", String::from_utf8_lossy(&output.stdout));
    }
}

#[test]
fn a_peer_that_makes_a_stream_blocking_holds_nobody() {
    let (pipe_read, pipe_write) = std::io::pipe().unwrap();
    let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    for (write_end, read_end) in [(OwnedFd::from(pipe_write), OwnedFd::from(pipe_read)), (near.into(), far.into())] {
        let other = write_end.try_clone().unwrap();
        let event = EventFd::from_fd_or_stream(write_end).unwrap();
        // SAFETY: eight readable bytes.
        while unsafe { libc::write(other.as_raw_fd(), 1u64.to_ne_bytes().as_ptr().cast(), 8) } > 0 {}
        make_blocking(&other);
        let event = promptly(move || event.signal().map(|()| event)).unwrap();
        let reader = EventFd::from_fd_or_stream(read_end).unwrap();
        make_blocking(&reader);
        let reader = promptly(move || {
            while reader.drain().unwrap() == 1 {}
            reader
        });
        event.signal().unwrap();
        assert_eq!(reader.drain(), Ok(1));
    }
}

#[test]
fn a_passed_descriptor_that_is_no_eventfd_is_refused() {
    let (read_end, write_end) = std::io::pipe().unwrap();
    for end in [OwnedFd::from(read_end), OwnedFd::from(write_end)] {
        let fd = end.as_raw_fd();
        assert_eq!(EventFd::from_fd(end).err(), Some(MemoryError::NotEventFd { fd }));
    }
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    assert!(matches!(EventFd::from_fd(file.into()), Err(MemoryError::NotEventFd { .. })));
}

#[test]
fn a_stream_that_takes_nothing_has_nobody_to_tell() {
    // SAFETY: socket touches no memory; a descriptor that comes back is ours alone.
    let socket = |kind| unsafe { OwnedFd::from_raw_fd(libc::socket(libc::AF_UNIX, kind, 0)) };
    let (read_end, _write_end) = std::io::pipe().unwrap();
    for end in [socket(libc::SOCK_STREAM), socket(libc::SOCK_DGRAM), read_end.into()] {
        assert_eq!(EventFd::from_fd_or_stream(end).unwrap().signal(), Ok(()));
    }
}

#[test]
fn a_stream_is_signalled_by_bytes_if_that_is_wanted() {
    let (mut read_end, write_end) = std::io::pipe().unwrap();
    let event = EventFd::from_fd_or_stream(write_end.into()).unwrap();
    event.signal().unwrap();
    let mut found = [0; 8];
    std::io::Read::read_exact(&mut read_end, &mut found).unwrap();
    assert_eq!(u64::from_ne_bytes(found), 1);
    // SAFETY: eight readable bytes.
    while unsafe { libc::write(event.as_fd().as_raw_fd(), found.as_ptr().cast(), 8) } > 0 {}
    event.signal().unwrap(); // full: whoever reads has enough to wake for
    drop(read_end);
    event.signal().unwrap(); // nobody reads
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    assert!(matches!(EventFd::from_fd_or_stream(file.into()), Err(MemoryError::NotEventFd { .. })));
}

#[test]
fn a_waiting_thread_is_woken() {
    let event = Arc::new(EventFd::new().unwrap());
    let waiter = std::thread::spawn({
        let event = event.clone();
        move || event.wait(None)
    });
    Doorbell::EventFd(event).ring(5).unwrap();
    assert_eq!(waiter.join().unwrap(), Ok(true));
}

#[test]
fn either_of_two_ends_a_wait() {
    let (one, other) = (EventFd::new().unwrap(), EventFd::new().unwrap());
    assert_eq!(one.wait_either(&other, NOW), Ok([false, false]));
    other.signal().unwrap();
    assert_eq!(one.wait_either(&other, None), Ok([false, true]));
    one.signal().unwrap();
    assert_eq!(one.wait_either(&other, None), Ok([true, true]));
}

#[test]
fn a_register_gets_the_value_at_its_width() {
    let device = memory(4096);
    let registers = Registers::new(device.span(0, 16).unwrap());
    Doorbell::register(registers.clone(), 4, 4).unwrap().ring(0x8001_0003).unwrap();
    Doorbell::register(registers.clone(), 10, 2).unwrap().ring(0x8001_0003).unwrap();
    let mut bytes = [0; 16];
    device.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [0, 0, 0, 0, 3, 0, 1, 0x80, 0, 0, 3, 0, 0, 0, 0, 0]);
    Doorbell::default().ring(1).unwrap();
}

#[test]
fn a_register_that_is_not_there_is_refused() {
    let registers = Registers::new(memory(4096).span(0, 16).unwrap());
    let make = |offset, width| Doorbell::register(registers.clone(), offset, width).err();
    for width in [0, 1, 3, 8] {
        assert!(matches!(make(0, width), Some(MemoryError::BadSize { value, min: 2, max: 4, .. }) if value == width as u64));
    }
    assert_eq!(make(2, 4), Some(MemoryError::Misaligned { address: 2, align: 4 }));
    assert_eq!(make(16, 2), Some(MemoryError::OutOfRange { offset: 16, len: 2, size: 16 }));
    assert_eq!(make(usize::MAX - 1, 2), Some(MemoryError::OutOfRange { offset: u64::MAX - 1, len: 2, size: 16 }));
    assert!(make(12, 4).is_none() && make(14, 2).is_none());
}
