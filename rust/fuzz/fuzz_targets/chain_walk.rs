//! Arbitrary descriptors, tables and indexes, popped by a device of either format: it never panics and always ends, its chains are those
//! that a second reading of the same memory gives, and what it refuses is the driver's fault.
#![no_main]

use libfuzzer_sys::fuzz_target;
use virtio_fuzz::common::raw::{Desc, RawDriver, desc};
use virtio_fuzz::common::{Rig, done};
use virtio_fuzz::reference::{chains, without_empty};
use virtio_fuzz::{Bytes, check_chain, rig};
use virtqueue::spec::{DESC_F_AVAIL, DESC_F_USED};
use virtqueue::{Fault, Format};

/// One descriptor, most often one that makes some sense.
fn descriptor(bytes: &mut Bytes, rig: &Rig) -> Desc {
    let address = match bytes.u8() % 8 {
        0 => bytes.u64(),
        1 => u64::MAX - u64::from(bytes.u8()),
        2 => rig.areas.descriptor + u64::from(bytes.u8()),
        _ => rig.data + u64::from(bytes.u8()),
    };
    let len = match bytes.u8() % 8 {
        0 => bytes.u32(),
        1 => u32::MAX - u32::from(bytes.u8() % 4),
        2 => 0,
        3..=5 => 16 * u32::from(bytes.u8() % 32),
        _ => bytes.u8().into(),
    };
    let flags = match bytes.u8() {
        wild if wild & 0xf8 == 0xf8 => bytes.u16(),
        usual => u16::from(usual & 7),
    };
    Desc { tag: u16::from(bytes.u8() % 32), ..desc(address, len, flags) }
}

fn run(bytes: &mut Bytes) {
    let format = bytes.format();
    let size = bytes.size(format);
    let limit = [size, 1024, 2, 1][bytes.below(4)];
    let rig = rig(format, size, bytes.features(), limit);

    // Tables first, at any byte of the data area; then the ring's own descriptors; then what is made available of them.
    let shift = u64::from(bytes.u8() % 32);
    for entry in 0..bytes.u8() % 40 {
        let d = descriptor(bytes, &rig);
        let (low, high) = if format == Format::Split { (d.flags, d.tag) } else { (d.tag, d.flags) };
        let rest = u64::from(d.len) | u64::from(low) << 32 | u64::from(high) << 48;
        rig.write(rig.data + shift + 16 * u64::from(entry), &[d.address.to_le_bytes(), rest.to_le_bytes()].concat());
    }
    match rig.raw_driver() {
        RawDriver::Split { ring, .. } => {
            for index in 0..size {
                ring.set_desc(index, descriptor(bytes, &rig));
            }
            for position in 0..size {
                ring.offer(position, (bytes.u8() % 20).into());
            }
            let idx = bytes.u8();
            ring.set_avail_idx(if idx < 0xf0 { u16::from(idx) % (size + 1) } else { bytes.u16() });
        }
        RawDriver::Packed { ring, .. } => {
            for offset in 0..size {
                let d = descriptor(bytes, &rig);
                // Available in the first lap, in the second one, or as the descriptor says.
                let flags = match bytes.u8() {
                    0..0xe0 => d.flags & !DESC_F_USED | DESC_F_AVAIL,
                    0xe0..0xf0 => d.flags & !DESC_F_AVAIL | DESC_F_USED,
                    _ => d.flags,
                };
                ring.set(offset, Desc { flags, ..d });
            }
        }
    }

    let (expected, broken) = chains(&rig, limit);
    let mut device = rig.device();
    let mut batch = device.batch(1 + bytes.below(20));
    let mut popped = Vec::new();
    let mut rewound = 0;
    let error = loop {
        batch.clear();
        match device.pop_batch(&mut batch) {
            Ok(0) => break None,
            Ok(count) => {
                assert_eq!(count, batch.chains().len());
                for chain in batch.chains() {
                    check_chain(&batch, chain, limit);
                    assert_eq!(batch.segments(chain), without_empty(&expected[popped.len()]));
                    popped.push(*chain);
                }
                // Now and then some go back, to come again.
                let back = bytes.below(4);
                if back > 0 && rewound < 20 && back <= popped.len() {
                    rewound += 1;
                    device.rewind(back).expect("the newest");
                    popped.truncate(popped.len() - back);
                }
            }
            Err(error) => break Some(error),
        }
    };
    assert_eq!(popped.len(), expected.len());
    assert_eq!(usize::from(device.outstanding()), popped.len());
    assert_eq!(error.is_some(), broken, "{error:?}");
    if let Some(error) = error {
        assert_eq!((error.fault(), device.broken()), (Fault::Driver, Some(&error)));
        assert_eq!(device.pop_batch(&mut batch), Ok(0));
    } else {
        let completions: Vec<_> = popped.iter().map(|chain| done(chain, chain.writable)).collect();
        device.complete_batch(&completions[..]).expect("in flight");
        device.publish();
        assert_eq!((device.outstanding(), device.counters().used), (0, popped.len() as u64));
        device.arm();
    }
}

fuzz_target!(|input: &[u8]| run(&mut Bytes(input)));
