//! Setting a ring up: its size (device-01), its areas (device-02), the features that it takes from the negotiated ones, and a driver's own
//! mistakes, which change nothing.

mod common;

use common::*;
use virtqueue::{Areas, Buffer, Direction, Fault, Form, Format, RingError, RingFeatures, Segment, Used, check_size, layout, spans, spec};

#[test]
fn device_01_sizes() {
    for format in BOTH {
        for max in [1, 256, 32768, u64::MAX] {
            for size in [0, 32769, 65535, 65536, 65536 + 256, 1 << 32, u64::MAX] {
                assert_eq!(check_size(format, size, max), Err(RingError::BadSize { size, max: max.min(32768) }));
            }
        }
        assert_eq!(check_size(format, 512, 256), Err(RingError::BadSize { size: 512, max: 256 }));
        for size in (0..=15).map(|shift| 1_u16 << shift) {
            assert_eq!(check_size(format, size.into(), 32768), Ok(size));
        }
    }
    for size in [3, 6, 100, 32767] {
        assert_eq!(check_size(Format::Split, size, 32768), Err(RingError::SizeNotPowerOfTwo { size }));
        assert_eq!(check_size(Format::Packed, size, 32768), Ok(size as u16));
    }
    assert_eq!(RingError::BadSize { size: 0, max: 1 }.fault(), Fault::Caller);
}

#[test]
fn device_02_layout() {
    assert_eq!(layout(Format::Split, 256), [(4096, 16), (518, 2), (2054, 4)]);
    assert_eq!(layout(Format::Packed, 100), [(1600, 16), (4, 4), (4, 4)]);
    assert_eq!(layout(Format::Split, 32768), [(524_288, 16), (65_542, 2), (262_150, 4)]);
}

/// Each area moved in turn to where it may not be; the other two stay where they are right.
#[test]
fn device_02_areas() {
    each(PLAIN, |rig| {
        let end = BASE + rig.mapping.len() as u64;
        let table = rig.memory.table();
        let names = ["descriptor", "driver", "device"];
        for (which, (len, align)) in layout(rig.format, rig.size).into_iter().enumerate() {
            let place = |address| {
                let mut areas = [rig.areas.descriptor, rig.areas.driver, rig.areas.device];
                areas[which] = address;
                let [descriptor, driver, device] = areas;
                spans(&table, rig.format, rig.size, Areas { descriptor, driver, device }).err()
            };
            let area = names[which];
            let down = |address: u64| address / align * align;
            for shift in 1..align {
                let address = BASE + shift;
                assert_eq!(place(address), Some(RingError::AreaUnaligned { area, address, align }));
            }
            for address in [0, BASE - align, end, down(end - len) + align, 1 << 40] {
                assert_eq!(place(address), Some(RingError::AreaUnmapped { area, address, len }), "{area} at {address:#x}");
            }
            for address in [down(u64::MAX), down(u64::MAX - len + align)] {
                assert_eq!(place(address), Some(RingError::AreaOverflow { area, address, len }), "{area} at {address:#x}");
            }
            assert_eq!(place(down(end - len)), None, "the last place that is right");
            assert_eq!(place(BASE), None, "the first one");
        }
    });
}

#[test]
fn features_are_taken_from_the_negotiated_bits() {
    let bit = |n: u32| 1_u128 << n;
    assert_eq!(RingFeatures::from_bits(0), (Format::Split, PLAIN));
    assert_eq!(RingFeatures::from_bits(bit(spec::F_RING_PACKED) | bit(32) | bit(127)), (Format::Packed, PLAIN));
    assert_eq!(RingFeatures::from_bits(bit(29)), (Format::Split, EVENT_IDX));
    assert_eq!(RingFeatures::from_bits(bit(28)), (Format::Split, INDIRECT));
    assert_eq!(RingFeatures::from_bits(bit(35) | bit(38)), (Format::Split, IN_ORDER));
}

#[test]
fn a_drivers_own_mistakes_change_nothing() {
    for features in [PLAIN, INDIRECT] {
        each(features, |rig| {
            let (mut driver, mut device) = (rig.driver(), rig.device());
            let (r, w) = (Segment::readable(rig.data, 4), Segment::writable(rig.data, 4));
            let long = Segment::writable(rig.data, u32::MAX);
            let nine = vec![r; 9];
            let cases = [
                (&[][..], RingError::EmptyBuffer),
                (&[r, Segment::readable(rig.data, 0)], RingError::EmptySegment { index: 1 }),
                (&[r, w, r], RingError::SegmentOrder { index: 2 }),
                (&nine, RingError::TooManySegments { segments: 9, limit: 8 }),
                (&[r, long], RingError::BufferTooLong { bytes: (1 << 32) + 3 }),
            ];
            for form in [Form::Direct, Form::Indirect] {
                for (segments, error) in &cases {
                    let refused = if form == Form::Indirect && !features.indirect { RingError::IndirectRefused } else { error.clone() };
                    assert_eq!(driver.add(1, segments, form), Err(refused.clone()));
                    assert_eq!(refused.fault(), Fault::Caller);
                }
            }
            let batch = [buffer(1, 4, Direction::Readable), buffer(2, 0, Direction::Writable)];
            assert_eq!(driver.add_batch(&batch), Err(RingError::EmptySegment { index: 1 }));
            assert_eq!((driver.free(), driver.outstanding(), driver.broken()), (8, 0, None));
            assert!(!driver.publish());
            assert_eq!(pop(&mut device, 4), []);
            // No room: a long chain does not fit, a short one does, and a batch goes as far as it can.
            driver.add(1, &[r; 6], Form::Direct).expect("added");
            let full = RingError::Full { needed: 3, free: 2 };
            assert_eq!(driver.add(2, &[r; 3], Form::Direct), Err(full.clone()));
            assert_eq!(full.fault(), Fault::Full);
            let batch: Vec<Buffer> = (2..9).map(|token| buffer(token, 4, Direction::Readable)).collect();
            assert_eq!(driver.add_batch(&batch), Ok(2));
            driver.publish();
            for _ in 0..2 {
                let chains = pop(&mut device, 4);
                complete(&mut device, &chains);
            }
            assert_eq!(reclaim(&mut driver), [(1, 0), (2, 0), (3, 0)]);
            assert_eq!(driver.free(), 8);
        });
    }
}

#[test]
fn a_devices_own_mistakes_change_nothing() {
    for features in all_features() {
        each(features, |rig| {
            let (mut driver, mut device) = (rig.driver(), rig.device());
            publish(&mut driver, 0, 4);
            let chains = pop(&mut device, 4);
            let good = done(&chains[0], 16);
            let stale = virtqueue::Completion { serial: good.serial.wrapping_add(77), ..good };
            let unknown = virtqueue::Completion { head: 999, ..good };
            let too_long = virtqueue::Completion { len: 17, ..done(&chains[1], 16) };
            let not_here = |c: virtqueue::Completion| RingError::NotInFlight { head: c.head };
            let cases = [
                ([good, stale], not_here(stale)),
                ([good, unknown], not_here(unknown)),
                ([good, good], not_here(good)),
                ([good, too_long], RingError::UsedTooLong { len: 17, writable: 16 }),
            ];
            for (completions, error) in cases {
                assert_eq!(give_back(&mut device, &completions), Err(error.clone()), "{:?} {features:?}", rig.format);
                assert_eq!(error.fault(), Fault::Caller);
                assert_eq!(device.check(&good), Ok(()));
            }
            assert!(!device.publish(), "all of a batch or none");
            assert_eq!((device.outstanding(), reclaim(&mut driver)), (4, vec![]));
            let mut small = virtqueue::ChainBatch::new(1, 1);
            let error = RingError::BatchTooSmall { room: 2, limit: 8 };
            assert_eq!(device.pop_batch(&mut small), Err(error));
            assert_eq!(device.broken(), None);
            complete(&mut device, &chains);
            assert_eq!(reclaim(&mut driver).len(), 4);
            assert_eq!(give_back(&mut device, &[good]), Err(not_here(good)), "used already");
        });
    }
}

/// A ring of one entry has no other place to look at: the same chain twice in one batch is refused there too.
#[test]
fn the_same_chain_twice_on_the_smallest_ring() {
    for features in all_features() {
        for format in BOTH {
            for size in [1, 2] {
                let rig = Rig::new(format, size, features);
                let (mut driver, mut device) = (rig.driver(), rig.device());
                publish(&mut driver, 0, size.into());
                let chains = pop(&mut device, size.into());
                let once: Vec<_> = chains.iter().map(|chain| done(chain, 16)).collect();
                let twice = [&once[..], &once].concat();
                assert_eq!(give_back(&mut device, &twice), Err(RingError::NotInFlight { head: once[0].head }), "{format:?} {features:?}");
                assert_eq!(device.outstanding(), size);
                complete(&mut device, &chains);
                let mut out = [Used::default(); 4];
                assert_eq!(driver.pop_used_batch(&mut out), Ok(size.into()));
                assert_eq!((device.outstanding(), driver.free()), (0, size));
            }
        }
    }
}
