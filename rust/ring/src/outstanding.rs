//! The driver side's private table: which ids are outstanding, what they stand for, which are free (driver-01).

/// What one id stands for. Two words, since stores are what a ring's loops are made of.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Entry {
    pub token: u64,
    /// Writable bytes, slots and position, from the low end.
    shape: u64,
}

impl Entry {
    /// `writable` bytes were posted in so many ring descriptors. `position` is the chain's number since set-up, counted in 16 bits: in the split
    /// ring its position in the available ring.
    #[inline(always)]
    pub(crate) fn new(token: u64, writable: u32, slots: u16, position: u16) -> Self {
        Entry { token, shape: u64::from(writable) | u64::from(slots) << 32 | u64::from(position) << 48 }
    }

    #[inline(always)]
    pub(crate) fn writable(&self) -> u32 {
        self.shape as u32
    }

    /// 0 if it is not outstanding.
    #[inline(always)]
    pub(crate) fn slots(&self) -> u16 {
        (self.shape >> 32) as u16
    }

    #[inline(always)]
    pub(crate) fn position(&self) -> u16 {
        (self.shape >> 48) as u16
    }

    /// The same at another position.
    pub(crate) fn at(&self, position: u16) -> Self {
        Entry::new(self.token, self.writable(), self.slots(), position)
    }

    /// It is no longer outstanding; gives the slots that it took.
    #[inline(always)]
    pub(crate) fn take_out(&mut self) -> u16 {
        let slots = self.slots();
        self.shape = 0;
        slots
    }
}

/// Ids and their entries. The batch loops take it apart and keep its counts in locals.
#[derive(Debug)]
pub(crate) struct Outstanding {
    pub entries: Box<[Entry]>,
    /// Free ids; the first `free` are valid. Not used in order.
    pub stack: Box<[u16]>,
    pub free: usize,
    pub chains: u16,
}

impl Outstanding {
    pub(crate) fn new(size: u16) -> Self {
        Outstanding {
            entries: vec![Entry::default(); usize::from(size)].into(),
            stack: (0..size).rev().collect(),
            free: usize::from(size),
            chains: 0,
        }
    }

    /// The entry, if the id is in range and outstanding.
    pub(crate) fn get(&self, id: u32) -> Option<&Entry> {
        self.entries.get(id as usize).filter(|e| e.slots() != 0)
    }

    pub(crate) fn set(&mut self, id: u16, entry: Entry) {
        self.entries[usize::from(id)] = entry;
        self.chains += 1;
    }

    /// A free id. The caller knows that there is one.
    pub(crate) fn take(&mut self) -> u16 {
        self.free -= 1;
        self.stack[self.free]
    }

    /// The ids of all published chains that are outstanding, oldest first: they fit above the free ids. Not used in order.
    #[cold]
    pub(crate) fn oldest_first(&mut self, published: Published) -> &mut [u16] {
        let (entries, room) = (&self.entries, &mut self.stack[self.free..]);
        let out = entries.iter().enumerate().filter(|(_, e)| e.slots() != 0 && published.contains(e.position()));
        let count = out.zip(room.iter_mut()).map(|((id, _), place)| *place = id as u16).count();
        let found = &mut room[..count];
        found.sort_unstable_by_key(|id| entries[usize::from(*id)].position().wrapping_sub(published.end));
        found
    }

    /// Chains may stay out while others come and go and positions go round: from time to time all of them, published up to `end`, are
    /// renumbered in their order, so that no position is ever mistaken for one that is only added. Not used in order.
    #[cold]
    pub(crate) fn renumber(&mut self, end: u16) {
        let count = self.oldest_first(Published { end, unpublished: 0 }).len();
        for k in 0..count {
            let entry = &mut self.entries[usize::from(self.stack[self.free + k])];
            *entry = entry.at(end.wrapping_sub((count - k) as u16));
        }
    }

    /// All tokens that are outstanding; forgets them.
    pub(crate) fn drain(&mut self) -> Vec<u64> {
        self.chains = 0;
        self.entries.iter_mut().filter(|e| e.slots() != 0).map(|e| std::mem::take(e).token).collect()
    }
}

/// Which chains were published: one that was only added cannot have been used.
#[derive(Clone, Copy)]
pub(crate) struct Published {
    /// The first position that was not published.
    pub end: u16,
    /// How many were added from there on.
    pub unpublished: u16,
}

impl Published {
    #[inline(always)]
    pub(crate) fn contains(self, position: u16) -> bool {
        position.wrapping_sub(self.end) >= self.unpublished
    }

    /// Whether going from `old` to `new` (at most 32768 further) is half of the positions' way round.
    #[inline(always)]
    pub(crate) fn half_way(old: u16, new: u16) -> bool {
        (old ^ new) & 0x8000 != 0
    }
}

/// A used length is at most what was posted (driver-03); a lie is counted.
#[inline(always)]
pub(crate) fn clamp(len: u32, writable: u32, clamped: &mut u64) -> u32 {
    if len > writable {
        *clamped += 1;
        return writable;
    }
    len
}
