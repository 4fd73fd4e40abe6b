//! device-24: a peer truncates a file that we map.
//!
//! What kills a process, and what depends on the handler that was there before, runs in a child: this binary again, with one test chosen
//! and a variable that tells it to play its part.

use crate::{foreign, memory, unsealed};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use virtio_memory::{Mapping, Region, RegionTable};

const PART: &str = "VIRTIO_MEMORY_TEST_PART";

#[test]
fn a_truncated_mapping_reads_as_zeros_and_is_poisoned() {
    let (file, mapping) = foreign(3 * 4096);
    let (_other_file, other) = foreign(4096);
    mapping.write(0, &[1; 3 * 4096]).unwrap();
    other.write(0, &[5; 4096]).unwrap();
    let regions =
        vec![Region::new(0x10000, 4096, other.clone(), 0).unwrap(), Region::new(0x20000, 2 * 4096, mapping.clone(), 4096).unwrap()];
    let table = RegionTable::new(regions, None).unwrap();
    let words = mapping.span(0, 4096).unwrap().u32s(0, 1024).unwrap();
    assert_eq!(table.poisoned(), None);
    file.set_len(4096 + 100).unwrap();
    let mut bytes = [9; 4096];
    // What is left of the file is still the file's.
    table.read(0x20000, &mut bytes).unwrap();
    assert_eq!((bytes[..100].to_vec(), bytes[100..].to_vec()), (vec![1; 100], vec![0; 3996]));
    assert!(!mapping.poisoned());

    table.read(0x21000, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0));
    assert!(mapping.poisoned() && !other.poisoned());
    assert_eq!(table.poisoned(), Some((0x20000, 8192)));
    assert_eq!(table.poisoned(), Some((0x20000, 8192)), "it stays so");
    // All of it is zeros now, through every pointer into it.
    assert_eq!(words.load(0), 0);
    words.store(0, 7);
    assert_eq!(words.load(0), 7);
    table.write(0x21ffe, &[1, 2]).unwrap();
    other.read(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 5));
    // A table made later knows too.
    let later = RegionTable::new(vec![Region::new(0, 16, mapping, 0).unwrap()], None).unwrap();
    assert_eq!(later.poisoned(), Some((0, 16)));
    let sound = RegionTable::new(vec![Region::new(0, 16, other, 0).unwrap()], None).unwrap();
    assert_eq!((sound.poisoned(), sound.poisoned()), (None, None));
}

#[test]
fn every_kind_of_access_survives() {
    let accesses: [fn(&RegionTable, &Mapping); 7] = [
        |table, _| table.write(0, &[1; 8192]).unwrap(),
        |table, _| assert_eq!(table.load(4096, 8), Ok(0)),
        |table, _| table.store(8184, 8, 1).unwrap(),
        |table, ours| table.copy_out(0, 8192, ours, 0).unwrap(),
        |table, ours| table.copy_in(0, 8192, ours, 0).unwrap(),
        |table, _| table.span(4096, 8).unwrap().u64s(0, 1).unwrap().store_release(0, 1),
        |table, _| table.regions()[0].mapping().zero(4095, 2).unwrap(),
    ];
    for access in accesses {
        let (file, mapping) = foreign(8192);
        let table = RegionTable::new(vec![Region::new(0, 8192, mapping.clone(), 0).unwrap()], None).unwrap();
        file.set_len(0).unwrap();
        access(&table, &memory(8192));
        assert!(mapping.poisoned());
    }
}

#[test]
fn a_part_that_starts_inside_a_page_is_covered_whole() {
    let file = unsealed(3 * 4096);
    let part = Mapping::from_fd(file.try_clone().unwrap().into(), 4000, 5000).unwrap();
    file.set_len(0).unwrap();
    let mut bytes = [1; 5000];
    part.read(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0) && part.poisoned());
}

#[test]
fn threads_may_meet_the_hole_at_the_same_time() {
    for _ in 0..20 {
        let (file, mapping) = foreign(64 * 4096);
        file.set_len(0).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let mapping = &mapping;
                scope.spawn(move || {
                    for page in 0..64 {
                        assert_eq!(mapping.load((page + 16 * thread) % 64 * 4096, 8), Ok(0));
                    }
                });
            }
        });
        assert!(mapping.poisoned());
    }
}

#[test]
fn errno_is_kept() {
    let (file, mapping) = foreign(4096);
    file.set_len(0).unwrap();
    // SAFETY: errno's location is this thread's own.
    unsafe {
        *libc::__errno_location() = 77;
        mapping.read(0, &mut [0]).unwrap();
        assert_eq!(*libc::__errno_location(), 77);
    }
}

/// Runs `name`, a test of this file, in a child that is told to play `part`.
fn child(name: &str, part: &str) -> ExitStatus {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("sigbus::{name}"), "--test-threads=1"]).env(PART, part);
    command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    command.status().unwrap()
}

/// The part that this process is to play, if it is a child; its death leaves no core file.
fn part() -> Option<String> {
    let part = std::env::var(PART).ok()?;
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a limit that is only read.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_CORE, &none) }, 0);
    Some(part)
}

/// A mapping that this crate knows nothing about, beyond the end of its file.
fn foreign_fault() -> ! {
    let file = unsealed(4096);
    // SAFETY: a new mapping at an address of the kernel's choice; the read that follows is meant to fault.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0);
        assert_ne!(at, libc::MAP_FAILED);
        file.set_len(0).unwrap();
        at.cast::<u8>().read_volatile();
    }
    panic!("the access came back")
}

fn guarded_fault() {
    let (file, mapping) = foreign(4096);
    file.set_len(0).unwrap();
    let mut byte = [0];
    mapping.read(0, &mut byte).unwrap();
    std::hint::black_box(byte); // a byte that nobody wants is not read, where the compiler optimizes
    assert!(mapping.poisoned());
}

fn set_handler(handler: usize, flags: libc::c_int) {
    // SAFETY: a structure of zeros with a handler of the kind that the flags say, or SIG_DFL or SIG_IGN.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        assert_eq!(libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()), 0);
    }
}

extern "C" fn exit_with_address(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel's siginfo, passed on; _exit is async-signal-safe.
    unsafe { libc::_exit(if signal == libc::SIGBUS && !(*info).si_addr().is_null() { 42 } else { 1 }) }
}

extern "C" fn exit_plainly(signal: libc::c_int) {
    // SAFETY: _exit is async-signal-safe.
    unsafe { libc::_exit(if signal == libc::SIGBUS { 43 } else { 1 }) }
}

#[test]
fn other_faults_go_to_whoever_was_there_before() {
    let Some(part) = part() else {
        let run = |part| child("other_faults_go_to_whoever_was_there_before", part);
        assert_eq!(run("three arguments").code(), Some(42));
        assert_eq!(run("one argument").code(), Some(43));
        assert_eq!(run("default").signal(), Some(libc::SIGBUS));
        assert_eq!(run("ignored").signal(), Some(libc::SIGBUS), "the kernel does not let a fault be ignored");
        assert_eq!(run("rust").signal(), Some(libc::SIGBUS));
        return;
    };
    match part.as_str() {
        "three arguments" => set_handler(exit_with_address as *const () as usize, libc::SA_SIGINFO),
        "one argument" => set_handler(exit_plainly as *const () as usize, 0),
        "default" => set_handler(libc::SIG_DFL, 0),
        "ignored" => set_handler(libc::SIG_IGN, 0),
        _ => {} // Rust's own handler, which looks for stack overflows
    }
    guarded_fault();
    foreign_fault();
}

#[test]
fn a_signal_that_was_sent_is_not_taken_for_a_fault() {
    let Some(part) = part() else {
        let run = |part| child("a_signal_that_was_sent_is_not_taken_for_a_fault", part);
        assert_eq!(run("default").signal(), Some(libc::SIGBUS));
        assert_eq!(run("one argument").code(), Some(43));
        assert_eq!(run("ignored").code(), Some(0));
        return;
    };
    match part.as_str() {
        "one argument" => set_handler(exit_plainly as *const () as usize, 0),
        "ignored" => set_handler(libc::SIG_IGN, 0),
        _ => set_handler(libc::SIG_DFL, 0),
    }
    guarded_fault();
    // SAFETY: raise takes a number.
    unsafe { libc::raise(libc::SIGBUS) };
    // Only if it is ignored does anybody come here, and the guard still works.
    assert_eq!(part, "ignored");
    guarded_fault();
}

#[test]
fn addresses_of_a_mapping_that_is_gone_are_not_guarded() {
    if part().is_none() {
        assert_eq!(child("addresses_of_a_mapping_that_is_gone_are_not_guarded", "child").signal(), Some(libc::SIGBUS));
        return;
    }
    let (_file, mapping) = foreign(4096);
    let at = mapping.as_ptr();
    drop(mapping);
    let file = unsealed(4096);
    // SAFETY: the address was just unmapped, and the kernel refuses it if something else is there by now; the read is meant to fault.
    unsafe {
        let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE;
        let again = libc::mmap(at.cast(), 4096, libc::PROT_READ, flags, file.as_raw_fd(), 0);
        assert_eq!(again, at.cast());
        file.set_len(0).unwrap();
        again.cast::<u8>().read_volatile();
    }
}
