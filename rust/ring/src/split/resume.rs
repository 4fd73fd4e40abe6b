//! A split ring that another device takes over.

use super::SplitDriver;
use crate::error::RingError;
use crate::event::Cursor;
use crate::ring::{RingState, Takeover};

impl SplitDriver {
    /// Both positions are the used index. The available ring from there on names what is outstanding, oldest first: a device that used chains
    /// out of their order has left others before that position, and some behind it are done.
    #[cold]
    pub(super) fn take_over(&mut self, how: Takeover) -> Result<RingState, RingError> {
        let ready = self.ready(usize::MAX)?;
        let index = self.last_used.wrapping_add(ready);
        if how == Takeover::Again && !self.features.in_order {
            let published = self.published();
            let mut used = vec![false; usize::from(self.ring.size)];
            for k in 0..ready {
                let [id, _] = self.ring.elements.cells().load_pair(self.last_used.wrapping_add(k).into());
                let out = self.ids.get(id).is_some_and(|e| published.contains(e.position()));
                if !out || std::mem::replace(&mut used[id as usize], true) {
                    return Err(self.refused(id));
                }
            }
            let left: Vec<u16> = self.ids.oldest_first(published).iter().copied().filter(|id| !used[usize::from(*id)]).collect();
            for (position, id) in (0..).map(|k| index.wrapping_add(k)).zip(left) {
                let entry = &mut self.ids.entries[usize::from(id)];
                *entry = entry.at(position);
                self.ring.heads.cells().store(position.into(), id);
            }
        }
        let at = Cursor { offset: index, wrap: false };
        Ok(RingState { avail: at, used: at })
    }
}
