//! readv and writev between a descriptor and guest memory.

use crate::{counting, foreign, memory, unsealed};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Duration;
use virtio_memory::{DirtyBitmap, IoVecs, MemoryError, Region, RegionTable};

/// Two regions that touch, one that stands apart.
fn table(dirty: Option<Arc<DirtyBitmap>>) -> RegionTable {
    let make = |address| Region::new(address, 0x2000, memory(0x2000), 0).unwrap();
    RegionTable::new(vec![make(0x2000), make(0x4000), make(0x8000)], dirty).unwrap()
}

#[test]
fn segments_are_filled_one_after_the_other() {
    let (table, mut vecs) = (table(None), IoVecs::new(8).unwrap());
    let (from, mut to) = std::io::pipe().unwrap();
    to.write_all(&counting(0, 200)).unwrap();
    // The second one straddles a border, the third is empty and stands nowhere.
    let segments = [(0x8010, 50u32), (0x3ff0, 40), (0, 0), (0x2000, 60), (0x2100, 0)];
    assert_eq!(table.readv(from.as_fd(), segments, &mut vecs), Ok(150));
    let mut bytes = [0; 60];
    for (address, start, len) in [(0x8010, 0, 50), (0x3ff0, 50, 40), (0x2000, 90, 60)] {
        table.read(address, &mut bytes[..len]).unwrap();
        assert_eq!(bytes[..len], counting(start, len));
    }
    // A short read fills what there is.
    assert_eq!(table.readv(from.as_fd(), [(0x8000, 16), (0x9000, 4096)], &mut vecs), Ok(50));
}

#[test]
fn segments_are_written_one_after_the_other() {
    let (table, mut vecs) = (table(None), IoVecs::new(3).unwrap());
    let (mut from, to) = std::io::pipe().unwrap();
    table.write(0x3fff, &counting(1, 100)).unwrap();
    table.write(0x9000, &counting(101, 20)).unwrap();
    assert_eq!(table.writev(to.as_fd(), [(0x3fff, 100u32), (0x9000, 20)], &mut vecs), Ok(120));
    let mut bytes = [0; 120];
    from.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes[..], counting(1, 120));
    assert_eq!(table.writev(to.as_fd(), [], &mut vecs), Ok(0));
}

#[test]
fn nothing_moves_if_a_segment_is_not_mapped_or_there_are_too_many() {
    let (table, mut vecs) = (table(None), IoVecs::new(2).unwrap());
    let (mut from, mut to) = std::io::pipe().unwrap();
    to.write_all(&[7; 10]).unwrap();
    let unmapped = MemoryError::Unmapped { address: 0x5fff, len: 2 };
    assert_eq!(table.readv(from.as_fd(), [(0x2000, 1u32), (0x5fff, 2)], &mut vecs), Err(unmapped.clone()));
    assert_eq!(table.writev(to.as_fd(), [(0x2000, 1u32), (0x5fff, 2)], &mut vecs), Err(unmapped));
    let overflow = MemoryError::Overflow { address: u64::MAX, len: 2 };
    assert_eq!(table.readv(from.as_fd(), [(u64::MAX, 2u32)], &mut vecs), Err(overflow));
    let many = MemoryError::TooManySegments { limit: 2 };
    assert_eq!(table.readv(from.as_fd(), [(0x2000, 1u32), (0x3fff, 2)], &mut vecs), Err(many.clone()));
    assert_eq!(table.writev(to.as_fd(), [(0x2000, 1u32); 3], &mut vecs), Err(many));
    drop(to);
    let mut rest = Vec::new();
    from.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, [7; 10]);
    let mut byte = [0; 1];
    table.read(0x2000, &mut byte).unwrap();
    assert_eq!(byte, [0]);
}

#[test]
fn only_what_was_really_read_is_dirty() {
    let bitmap = Arc::new(DirtyBitmap::new(16).unwrap());
    let (table, mut vecs) = (table(Some(bitmap.clone())), IoVecs::new(8).unwrap());
    let (from, mut to) = std::io::pipe().unwrap();
    to.write_all(&[1; 4106]).unwrap();
    assert_eq!(table.readv(from.as_fd(), [(0x3ff8, 10u32), (0x8000, 4096), (0x9000, 10)], &mut vecs), Ok(4106));
    assert_eq!(bitmap.take(), [(0, 0b1_0001_1000)]);
    to.write_all(&[1; 5]).unwrap();
    assert_eq!(table.readv(from.as_fd(), [(0x2000, 4u32), (0x9000, 10), (0x3000, 10)], &mut vecs), Ok(5));
    assert_eq!(bitmap.take(), [(0, 0b10_0000_0100)]);
    assert_eq!(table.writev(to.as_fd(), [(0x2000, 10u32)], &mut vecs), Ok(10));
    assert_eq!(bitmap.take(), []);
}

#[test]
fn a_descriptor_that_would_block_says_so() {
    let (table, mut vecs) = (table(None), IoVecs::new(8).unwrap());
    let (from, _to) = std::io::pipe().unwrap();
    // SAFETY: fcntl with this command touches no memory.
    assert_eq!(unsafe { libc::fcntl(from.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) }, 0);
    let again = MemoryError::Os { operation: "readv", errno: libc::EAGAIN };
    assert_eq!(table.readv(from.as_fd(), [(0x2000, 10u32)], &mut vecs), Err(again));
    let bad = MemoryError::Os { operation: "writev", errno: libc::EBADF };
    assert_eq!(table.writev(from.as_fd(), [(0x2000, 10u32)], &mut vecs), Err(bad));
}

/// device-24
#[test]
fn a_truncated_file_is_answered_with_efault() {
    let (file, mapping) = foreign(8192);
    let table = RegionTable::new(vec![Region::new(0, 8192, mapping, 0).unwrap()], None).unwrap();
    let mut vecs = IoVecs::new(8).unwrap();
    let (from, mut to) = std::io::pipe().unwrap();
    to.write_all(&[1; 10]).unwrap();
    file.set_len(4096).unwrap();
    let fault = |operation| Err(MemoryError::Os { operation, errno: libc::EFAULT });
    assert_eq!(table.writev(to.as_fd(), [(4096, 10u32)], &mut vecs), fault("writev"));
    assert_eq!(table.readv(from.as_fd(), [(4096, 10u32)], &mut vecs), fault("readv"));
    assert_eq!(table.poisoned(), None, "the kernel met the hole, not we");
}

#[test]
fn private_bytes_stand_before_and_behind_guest_segments() {
    let bitmap = Arc::new(DirtyBitmap::new(16).unwrap());
    let (table, mut vecs) = (table(Some(bitmap.clone())), IoVecs::new(4).unwrap());
    let (mut from, mut to) = std::io::pipe().unwrap();
    to.write_all(&counting(0, 60)).unwrap();
    let (mut head, mut tail) = ([0; 12], [0; 64]);
    assert_eq!(table.readv_around(from.as_fd(), &mut head, [(0x2000, 20u32), (0x9000, 20)], &mut tail, &mut vecs), Ok(60));
    let mut bytes = [0; 20];
    for (address, start) in [(0x2000, 12), (0x9000, 32)] {
        table.read(address, &mut bytes).unwrap();
        assert_eq!(bytes[..], counting(start, 20));
    }
    assert_eq!((&head[..], &tail[..8], tail[8]), (&counting(0, 12)[..], &counting(52, 8)[..], 0));
    assert_eq!(bitmap.take(), [(0, 0b10_0000_0100)], "private bytes are nobody's page");
    assert_eq!(table.writev_after(to.as_fd(), &[7; 12], [(0x2000, 20u32)], &mut vecs), Ok(32));
    let mut all = [0; 32];
    from.read_exact(&mut all).unwrap();
    assert_eq!((&all[..12], &all[12..]), (&[7; 12][..], &counting(12, 20)[..]));
    // Each private part is a piece of its own, and a short read leaves what it did not reach.
    to.write_all(&[9; 5]).unwrap();
    let many = MemoryError::TooManySegments { limit: 4 };
    assert_eq!(table.readv_around(from.as_fd(), &mut head, [(0x2000, 1u32); 3], &mut tail, &mut vecs), Err(many));
    assert_eq!(table.readv_around(from.as_fd(), &mut head, [(0x2000, 1u32)], &mut [], &mut vecs), Ok(5));
    assert_eq!((head[4], head[5]), (9, counting(5, 1)[0]));
    assert_eq!(bitmap.take(), []);
}

#[test]
fn whoever_waits_wakes_when_one_of_several_can_be_read_or_has_failed() {
    let ((quiet, keep), (from, mut to)) = (std::io::pipe().unwrap(), std::io::pipe().unwrap());
    to.write_all(&[1]).unwrap();
    let ready = |readable, lost| Ok(virtio_memory::Ready { readable, failed: lost, lost });
    assert_eq!(virtio_memory::wait_ready([(quiet.as_fd(), true), (from.as_fd(), true)], None), ready(2, 0));
    assert_eq!(virtio_memory::wait_ready([(quiet.as_fd(), true), (from.as_fd(), false)], Some(Duration::ZERO)), ready(0, 0));
    drop(keep);
    assert_eq!(virtio_memory::wait_ready([(quiet.as_fd(), false), (from.as_fd(), false)], None), ready(0, 1));
    let many = std::iter::repeat_n((from.as_fd(), true), 65);
    assert!(matches!(virtio_memory::wait_ready(many, None), Err(MemoryError::BadSize { value: 65, max: 64, .. })));
    let event = virtio_memory::EventFd::new().unwrap();
    event.share();
    std::fs::File::from(event.as_fd().try_clone_to_owned().unwrap()).write_all(&(u64::MAX - 1).to_ne_bytes()).unwrap();
    event.signal().unwrap(); // as the kernel signals: one more than a write can
    let full = virtio_memory::wait_ready([(event.as_fd(), true)], None).unwrap();
    assert_eq!((full.readable, full.lost), (1, 0));
}

#[test]
fn a_regular_file_is_a_descriptor_like_any_other() {
    let (table, mut vecs) = (table(None), IoVecs::new(1024).unwrap());
    let file = unsealed(0);
    table.write(0x2000, &counting(0, 4096)).unwrap();
    let pieces: Vec<(u64, u32)> = (0..1024).map(|piece| (0x2000 + piece * 4, 4)).collect();
    assert_eq!(table.writev(file.as_fd(), pieces, &mut vecs), Ok(4096));
    let copy = virtio_memory::Mapping::from_fd(file.into(), 0, 4096).unwrap();
    let mut bytes = vec![0; 4096];
    copy.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, counting(0, 4096));
}

#[test]
fn room_for_no_or_too_many_pieces_is_refused() {
    for limit in [0, 1025] {
        assert!(matches!(IoVecs::new(limit), Err(MemoryError::BadSize { value, max: 1024, .. }) if value == limit as u64));
    }
    assert_eq!(IoVecs::new(1024).unwrap().limit(), 1024);
}
