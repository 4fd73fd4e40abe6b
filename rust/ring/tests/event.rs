//! The notification decisions as functions, against their definitions: every case at small widths, and the 16-bit wrap.

use proptest::prelude::*;
use virtqueue::event::{Cursor, need_event, packed_event, packed_word, split_event};
use virtqueue::spec::{EVENT_FLAGS_DESC, EVENT_FLAGS_DISABLE, EVENT_FLAGS_ENABLE};

/// The definition: going from `old` to `new` one entry at a time, some index reached is the one after `event`. Numbers of `width` bits.
fn passes(event: u32, new: u32, old: u32, width: u32) -> bool {
    let mask = (1 << width) - 1;
    let mut index = old;
    while index != new {
        index = (index + 1) & mask;
        if index == (event + 1) & mask {
            return true;
        }
    }
    false
}

/// 16-bit arithmetic on numbers shifted up is arithmetic of the smaller width: the shipped function is what runs here.
#[test]
fn need_event_is_its_definition_at_every_small_width() {
    for width in 1..=6 {
        let (numbers, shift) = (1 << width, 16 - width);
        for (event, new, old) in (0..numbers).flat_map(|e| (0..numbers).flat_map(move |n| (0..numbers).map(move |o| (e, n, o)))) {
            let shipped = need_event((event << shift) as u16, (new << shift) as u16, (old << shift) as u16);
            assert_eq!(shipped, passes(event, new, old, width), "event {event}, {old} to {new}, {width} bits");
        }
    }
}

#[test]
fn need_event_is_its_definition_around_the_wrap() {
    let near = || (0xffe8..=0xffff_u32).chain(0..24);
    for (event, old) in near().flat_map(|e| near().map(move |o| (e, o))) {
        for count in 0..=24 {
            let new = (old + count) & 0xffff;
            assert_eq!(need_event(event as u16, new as u16, old as u16), passes(event, new, old, 16), "event {event}, {old} to {new}");
        }
    }
}

/// A batch passes exactly the events that stand on its entries, wherever it starts.
#[test]
fn a_batch_passes_its_own_entries_and_no_other() {
    for old in [0, 1, 255, 32767, 65520, 65535_u16] {
        for count in [0, 1, 2, 8, 64, 256, 32768, 65535_u16] {
            let new = old.wrapping_add(count);
            let passed = (0..=u16::MAX).filter(|&event| need_event(event, new, old)).count();
            assert_eq!(passed, usize::from(count));
            if count > 0 {
                assert!(need_event(old, new, old), "its first entry");
                assert!(need_event(new.wrapping_sub(1), new, old), "its last entry");
            }
            assert!(!need_event(old.wrapping_sub(1), new, old), "the entry before it");
            assert!(count == u16::MAX || !need_event(new, new, old), "the entry after it");
        }
    }
}

#[test]
fn split_event_covers_more_entries_than_the_index_can_tell_apart() {
    for event in [0, 77, u16::MAX] {
        assert!(!split_event(event, 77, 0));
        assert!(split_event(event, 77, 65536), "a whole round passes every event");
        assert!(split_event(event, 77, 70_000));
        assert!(split_event(event, 77, u32::MAX));
    }
    assert!(!split_event(77, 77, 65535), "all but one");
}

proptest! {
    #[test]
    fn need_event_is_its_definition_anywhere(event: u16, old: u16, count in 0..3000_u16, near in -3..3_i32) {
        let event = if near < 0 { event } else { old.wrapping_add(count).wrapping_sub(near as u16) };
        let new = old.wrapping_add(count);
        prop_assert_eq!(need_event(event, new, old), passes(event.into(), new.into(), old.into(), 16));
        prop_assert_eq!(split_event(event, new, count.into()), need_event(event, new, old));
    }
}

/// The place of a running number of slots.
fn cursor(number: u32, size: u32) -> Cursor {
    Cursor { offset: (number % size) as u16, wrap: (number / size).is_multiple_of(2) }
}

/// Every size, both laps, every place that the structure can name, every batch up to more than a lap: the event was passed exactly if its
/// running number lies in what was published. A place names one number in the lap before `next` or the lap after it.
#[test]
fn packed_event_is_a_range_of_running_numbers() {
    for size in 1..=9_u32 {
        for next in 2 * size..4 * size {
            for event in next - size..next + size {
                let word = packed_word(EVENT_FLAGS_DESC, cursor(event, size));
                for since in 0..=size {
                    let shipped = packed_event(word, cursor(next, size), since, size as u16, true);
                    assert_eq!(shipped, (next - since..next).contains(&event), "size {size}, {since} slots up to {next}, event {event}");
                }
                let more = packed_event(word, cursor(next, size), 3 * size + 1, size as u16, true);
                assert_eq!(more, event < next, "size {size}, more than a lap up to {next}, event {event}");
            }
        }
    }
}

#[test]
fn packed_event_at_the_largest_ring() {
    let size = 32768_u32;
    for next in [size, size + 1, 2 * size - 1, 2 * size, 3 * size + 5] {
        for since in [1, 2, 255, size - 1, size] {
            let decide =
                |event| packed_event(packed_word(EVENT_FLAGS_DESC, cursor(event, size)), cursor(next, size), since, size as u16, true);
            assert!(decide(next - 1) && decide(next - since));
            assert!(!decide(next) && !decide(next + size - 1));
            assert!(since == size || !decide(next - since - 1));
        }
    }
}

/// DESC without EVENT_IDX, the reserved value and an offset beyond the ring make no sense: they mean "notify" (device-20).
#[test]
fn device_20_words_that_make_no_sense_notify() {
    for size in 1..=9_u16 {
        for next in 0..2 * u32::from(size) {
            let next = cursor(next, size.into());
            for low in (0..=9).chain([100, 0x7fff]).flat_map(|offset: u16| [offset, offset | 0x8000]) {
                let at = Cursor::from_bits(low);
                for event_idx in [false, true] {
                    let decide = |flags| packed_event(packed_word(flags, at), next, 1, size, event_idx);
                    assert!(decide(EVENT_FLAGS_ENABLE) && !decide(EVENT_FLAGS_DISABLE) && decide(3));
                    assert!((event_idx && at.offset < size) || decide(EVENT_FLAGS_DESC));
                    // The bits above the two of the flags are reserved.
                    assert!(!decide(EVENT_FLAGS_DISABLE | 0xfffc) && decide(EVENT_FLAGS_ENABLE | 0x8000));
                }
            }
        }
    }
}

/// A cursor is a running number: steps add up, toggle the wrap counter at any size, and can be taken back.
#[test]
fn cursors_are_running_numbers() {
    for size in (1..=9).chain([100, 32767, 32768]) {
        for number in (0..18).chain([size - 1, size, 2 * size - 1]) {
            let at = cursor(number, size);
            assert_eq!(Cursor::from_bits(at.to_bits()), at);
            for slots in (0..=9.min(size)).chain([size - 1, size]) {
                let further = cursor(number + slots, size);
                assert_eq!(at.step(slots as u16, size as u16), further, "size {size}, {slots} from {number}");
                assert_eq!(further.back(slots as u16, size as u16), at, "size {size}, {slots} back to {number}");
            }
        }
    }
    assert_eq!(cursor(0, 4), Cursor::START);
    assert_eq!((Cursor { offset: 5, wrap: true }).to_bits(), 0x8005);
}
