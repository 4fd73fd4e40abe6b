//! Mappings: memfds of our own, parts of passed files, words and bytes in them.

use crate::{counting, foreign, memory, unsealed};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use virtio_memory::{HugePages, Mapping, MemoryError};

#[test]
fn bytes_written_are_read_by_whoever_maps_the_same_file() {
    let ours = memory(10_000);
    let theirs = Mapping::from_fd(ours.fd().try_clone_to_owned().unwrap(), 0, 10_000).unwrap();
    ours.write(4090, &counting(1, 20)).unwrap();
    let mut bytes = [0; 20];
    theirs.read(4090, &mut bytes).unwrap();
    assert_eq!(bytes[..], counting(1, 20));
    assert!(theirs.foreign() && !ours.foreign() && !theirs.poisoned() && !ours.poisoned());
    theirs.zero(4095, 3).unwrap();
    ours.read(4090, &mut bytes).unwrap();
    assert_eq!(bytes[..10], [1, 2, 3, 4, 5, 0, 0, 0, 9, 10]);
}

#[test]
fn nobody_can_resize_or_unseal_our_memory() {
    let ours = memory(8192);
    let file = std::fs::File::from(ours.fd().try_clone_to_owned().unwrap());
    for size in [0, 4096, 16384] {
        assert_eq!(file.set_len(size).unwrap_err().raw_os_error(), Some(libc::EPERM));
    }
    // SAFETY: fcntl with these commands touches no memory.
    unsafe {
        let fd = file.as_raw_fd();
        assert_eq!(libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_FUTURE_WRITE), -1);
        assert_ne!(libc::fcntl(fd, libc::F_GETFD) & libc::FD_CLOEXEC, 0);
        assert_ne!(libc::fcntl(ours.fd().as_raw_fd(), libc::F_GETFD) & libc::FD_CLOEXEC, 0);
    }
}

#[test]
fn accesses_beyond_the_end_are_refused_with_the_numbers() {
    let ours = memory(100);
    let cases: [(usize, usize); 5] = [(0, 101), (100, 1), (101, 0), (usize::MAX, 1), (1, 100)];
    for (offset, len) in cases {
        let error = MemoryError::OutOfRange { offset: offset as u64, len: len as u64, size: 100 };
        assert_eq!(ours.read(offset, &mut vec![0; len]), Err(error.clone()));
        assert_eq!(ours.write(offset, &vec![0; len]), Err(error.clone()));
        assert_eq!(ours.zero(offset, len), Err(error.clone()));
        assert_eq!(ours.span(offset, len).err(), Some(error));
    }
    assert_eq!(ours.zero(1, usize::MAX), Err(MemoryError::OutOfRange { offset: 1, len: u64::MAX, size: 100 }));
    ours.read(100, &mut []).unwrap();
}

#[test]
fn words_are_little_endian_at_every_width() {
    let ours = memory(64);
    ours.write(8, &[0xef, 0xcd, 0xab, 0x89, 0x67, 0x45, 0x23, 0x01]).unwrap();
    for (width, value) in [(1, 0xef), (2, 0xcdef), (4, 0x89ab_cdef), (8, 0x0123_4567_89ab_cdef)] {
        assert_eq!(ours.load(8, width), Ok(value));
        ours.zero(24, 16).unwrap();
        ours.store(32, width, value).unwrap();
        let mut bytes = [0; 16];
        ours.read(24, &mut bytes).unwrap();
        assert_eq!(bytes[8..8 + width], value.to_le_bytes()[..width]);
        assert!(bytes[..8].iter().chain(&bytes[8 + width..]).all(|byte| *byte == 0), "only {width} bytes are written");
    }
}

#[test]
fn words_of_a_wrong_width_place_or_value_are_refused() {
    let ours = memory(64);
    for width in [0, 3, 5, 16] {
        assert_eq!(ours.load(0, width), Err(MemoryError::BadWidth { width }));
        assert_eq!(ours.store(0, width, 0), Err(MemoryError::BadWidth { width }));
    }
    for (offset, width) in [(1, 2), (2, 4), (4, 8), (63, 1)] {
        let outcome = ours.load(offset, width).err();
        let misaligned = MemoryError::Misaligned { address: offset as u64, align: width as u64 };
        assert_eq!(outcome, (width > 1).then_some(misaligned.clone()));
        assert_eq!(ours.store(offset, width, 0).err(), (width > 1).then_some(misaligned));
    }
    assert_eq!(ours.load(64, 1), Err(MemoryError::OutOfRange { offset: 64, len: 1, size: 64 }));
    for (width, max) in [(1, 0xff), (2, 0xffff), (4, 0xffff_ffff)] {
        let error = MemoryError::BadSize { what: "value", value: max + 1, min: 0, max, multiple_of: 1 };
        assert_eq!(ours.store(0, width, max + 1), Err(error));
        ours.store(0, width, max).unwrap();
    }
    ours.store(0, 8, u64::MAX).unwrap();
}

#[test]
fn a_part_of_a_file_may_start_anywhere() {
    let file = unsealed(20_000);
    file.write_all_at(&counting(0, 100), 4090).unwrap();
    let part = Mapping::from_fd(file.try_clone().unwrap().into(), 4091, 50).unwrap();
    assert_eq!(part.len(), 50);
    let mut bytes = [0; 50];
    part.read(0, &mut bytes).unwrap();
    assert_eq!(bytes[..], counting(1, 50));
    assert!(part.read(1, &mut bytes).is_err());
    // Alignment is that of the place in memory, not of the offset.
    assert_eq!(part.load(0, 2), Err(MemoryError::Misaligned { address: 0, align: 2 }));
    assert_eq!(part.load(1, 4), Ok(u64::from(u32::from_le_bytes([2, 3, 4, 5]))));
}

#[test]
fn what_a_file_does_not_hold_is_not_mapped() {
    let file = unsealed(8192);
    let map = |offset, size| Mapping::from_fd(file.try_clone().unwrap().into(), offset, size).map(|mapping| mapping.len());
    assert_eq!(map(0, 8192), Ok(8192));
    assert_eq!(map(8191, 1), Ok(1));
    for (offset, len) in [(0, 8193), (8192, 1), (4096, 4097), (1 << 40, 4096)] {
        assert_eq!(map(offset, len), Err(MemoryError::FileTooSmall { offset, len, file: 8192 }));
    }
    for (address, len) in [(u64::MAX, 1), (u64::MAX - 4095, 8192), (1 << 63, 4096)] {
        assert_eq!(map(address, len), Err(MemoryError::Overflow { address, len }));
    }
    for value in [0, u64::MAX, 1 << 63] {
        let error = MemoryError::BadSize { what: "memory size", value, min: 1, max: i64::MAX as u64, multiple_of: 1 };
        assert_eq!(map(0, value), Err(error));
    }
}

#[test]
fn a_descriptor_that_cannot_be_mapped_gives_the_systems_answer() {
    let (read_end, _write_end) = std::io::pipe().unwrap();
    let error = Mapping::from_fd(OwnedFd::from(read_end), 0, 4096).unwrap_err();
    assert_eq!(error, MemoryError::FileTooSmall { offset: 0, len: 4096, file: 0 });
    let read_only = std::fs::File::open(std::env::current_exe().unwrap()).unwrap();
    let error = Mapping::from_fd(read_only.into(), 0, 4096).unwrap_err();
    assert_eq!(error, MemoryError::Os { operation: "mmap", errno: libc::EACCES });
}

#[test]
fn sizes_and_names_that_no_memory_has_are_refused() {
    let make = |size, name: &str| Mapping::memfd(size, name, HugePages::Off).map(|mapping| mapping.len());
    for size in [0, usize::MAX] {
        assert!(matches!(make(size, "x"), Err(MemoryError::BadSize { value, min: 1, .. }) if value == size as u64));
    }
    let invalid = MemoryError::Os { operation: "memfd_create", errno: libc::EINVAL };
    assert_eq!(make(1, "a\0b"), Err(invalid.clone()));
    assert_eq!(make(1, &"n".repeat(250)), Err(invalid));
    assert_eq!(make(1, &"n".repeat(249)), Ok(1));
}

#[test]
fn huge_pages_are_there_or_a_clear_error() {
    let size = 2 << 20;
    match Mapping::memfd(2 * size, "huge", HugePages::Size(size)) {
        Ok(mapping) => {
            mapping.write(2 * size - 3, &[1, 2, 3]).unwrap();
            // The page size of a passed file is found out, so that any part of it can be mapped and unmapped.
            let part = Mapping::from_fd(mapping.fd().try_clone_to_owned().unwrap(), size as u64 + 100, 1000).unwrap();
            part.write(0, &[7]).unwrap();
            drop(part);
            let mut bytes = [0; 1];
            mapping.read(size + 100, &mut bytes).unwrap();
            assert_eq!(bytes, [7]);
        }
        Err(MemoryError::HugePages { size: 2_097_152, len: 4_194_304, errno }) => {
            assert!([libc::ENOMEM, libc::ENODEV, libc::ENOSYS, libc::EINVAL].contains(&errno), "errno {errno}");
        }
        Err(other) => panic!("{other}"),
    }
    assert_eq!(HugePages::from(None), HugePages::Off);
    assert_eq!(HugePages::from(Some(size)), HugePages::Size(size));
}

#[test]
fn huge_page_sizes_that_no_machine_has_are_refused() {
    for page in [0, 1, 4097, 3 << 20] {
        let error = Mapping::memfd(3 << 20, "huge", HugePages::Size(page)).unwrap_err();
        assert_eq!(error, MemoryError::HugePages { size: page as u64, len: 3 << 20, errno: libc::EINVAL });
    }
    let error = Mapping::memfd(3 << 20, "huge", HugePages::Size(2 << 20)).unwrap_err();
    assert!(matches!(error, MemoryError::BadSize { value: 3_145_728, multiple_of: 2_097_152, .. }));
    assert!(error.to_string().starts_with("memory size 3145728 is not a multiple of 2097152 in 2097152 to "));
    let unknown = Mapping::memfd(1 << 40, "huge", HugePages::Size(1 << 40)).unwrap_err();
    assert!(matches!(unknown, MemoryError::HugePages { size, .. } if size == 1 << 40));
}

#[test]
fn overlapping_copies_within_one_mapping_are_whole() {
    let ours = memory(4096);
    ours.write(0, &counting(0, 200)).unwrap();
    let table = virtio_memory::RegionTable::new(vec![virtio_memory::Region::new(0x1000, 4096, ours.clone(), 0).unwrap()], None).unwrap();
    table.copy_out(0x1000, 200, &ours, 10).unwrap();
    let mut bytes = [0; 200];
    ours.read(10, &mut bytes).unwrap();
    assert_eq!(bytes[..], counting(0, 200));
}

#[test]
fn the_last_user_unmaps() {
    let (_file, mapping) = foreign(4096);
    let span = mapping.span(0, 16).unwrap();
    let words = span.u32s(0, 4).unwrap();
    let watched = Arc::downgrade(&mapping);
    drop(mapping);
    drop(span);
    words.store(3, 7);
    assert_eq!(words.load(3), 7);
    drop(words);
    assert!(watched.upgrade().is_none());
}
