//! Random tables and random accesses, against a model that looks at every byte by itself.

use crate::memory;
use proptest::prelude::*;
use virtio_memory::{MemoryError, Region, RegionTable};

const SPACE: usize = 1024;

/// Bytes of the address space from `base` on; `None` where nothing is mapped, else the region's number and the byte.
struct Model {
    base: u64,
    bytes: Vec<Option<(usize, u8)>>,
}

impl Model {
    /// The model's answer for a span: the bytes, or the error.
    fn span(&self, address: u64, len: usize) -> Result<Vec<(usize, u8)>, MemoryError> {
        let whole = (address, len as u64);
        if len > 0 && address.checked_add(len as u64 - 1).is_none() {
            return Err(MemoryError::Overflow { address: whole.0, len: whole.1 });
        }
        (0..len as u64)
            .map(|step| {
                let index = usize::try_from((address + step).wrapping_sub(self.base)).ok();
                let byte = index.and_then(|index| *self.bytes.get(index)?);
                byte.ok_or(MemoryError::Unmapped { address: whole.0, len: whole.1 })
            })
            .collect()
    }

    fn write(&mut self, address: u64, bytes: &[u8]) {
        for (index, byte) in bytes.iter().enumerate() {
            self.bytes[(address + index as u64 - self.base) as usize].as_mut().unwrap().1 = *byte;
        }
    }
}

fn build(base: u64, wanted: &[(usize, usize)]) -> (RegionTable, Model) {
    let mapping = memory(2 * SPACE);
    let mut model = Model { base, bytes: vec![None; SPACE] };
    let mut regions: Vec<Region> = Vec::new();
    for (start, len) in wanted {
        let len = (*len).min(SPACE - start);
        if model.bytes[*start..start + len].iter().any(Option::is_some) {
            continue;
        }
        model.bytes[*start..start + len].fill(Some((regions.len(), 0)));
        // Host offsets in another order than addresses: a read that runs on into the neighbour would be seen.
        let offset = (start + 517) % SPACE;
        regions.push(Region::new(base + *start as u64, len as u64, mapping.clone(), offset).unwrap());
    }
    regions.reverse();
    (RegionTable::new(regions, None).unwrap(), model)
}

proptest! {
    #[test]
    fn tables_agree_with_the_model(
        base in prop_oneof![Just(0), Just(0x1_0000_0000), Just(u64::MAX - SPACE as u64 + 1)],
        regions in prop::collection::vec((0..SPACE, 1..200usize), 0..12),
        accesses in prop::collection::vec((0..SPACE + 20, 0..120usize, any::<bool>(), any::<u8>()), 1..60),
    ) {
        // Host ranges must not overlap either, or one write would be seen at two addresses: 517 + start wraps at most once, and the mapping
        // has room behind the wrap.
        let (table, mut model) = build(base, &regions);
        for (start, len, write, seed) in accesses {
            let address = base.wrapping_add(start as u64);
            let expected = model.span(address, len);
            prop_assert_eq!(table.check(address, len as u64), expected.clone().map(|_| ()));
            let pieces = expected.clone().map(|bytes| bytes.iter().map(|(region, _)| *region).collect::<Vec<_>>());
            if let (Ok(pieces), 1..) = (&pieces, len) {
                let one = pieces.iter().all(|region| *region == pieces[0]);
                let straddles = MemoryError::Straddles { address, len: len as u64 };
                prop_assert_eq!(table.span(address, len as u64).map(|span| span.len()), if one { Ok(len) } else { Err(straddles) });
            }
            if write {
                let bytes: Vec<u8> = (0..len).map(|index| seed.wrapping_mul(31).wrapping_add(index as u8)).collect();
                prop_assert_eq!(table.write(address, &bytes), expected.clone().map(|_| ()));
                if expected.is_ok() {
                    model.write(address, &bytes);
                }
            } else {
                let mut bytes = vec![0; len];
                let outcome = table.read(address, &mut bytes).map(|()| bytes);
                prop_assert_eq!(outcome, expected.map(|bytes| bytes.iter().map(|(_, byte)| *byte).collect()));
            }
        }
    }
}
