//! The device side's private table of chains in flight (device-06): what was popped, in which order, and what is done but not yet told.

use crate::error::RingError;
use crate::ring::{Completion, Completions};
use crate::spec::MAX_SIZE;
use crate::tracking::Footprint;

/// A chain in flight. Few words, since stores are what a ring's loops are made of; what stands there already from the last time is not
/// written again.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Flight {
    serial: u32,
    /// Slots, and the id above them.
    shape: u32,
    /// Writable bytes, and above them how many serials lie between this one and that of the chain that was popped before it: some only behind
    /// chains that were handed back.
    bytes: u64,
}

impl Flight {
    /// A chain of one slot that follows the one with the serial before.
    #[inline(always)]
    pub(crate) fn set_short(&mut self, serial: u32, id: u16, writable: u32) {
        let shape = 1 | u32::from(id) << 16;
        self.serial = serial;
        if self.shape != shape {
            self.shape = shape;
        }
        if writable != 0 || self.bytes != 0 {
            self.bytes = writable.into();
        }
    }

    pub(crate) fn set_gap(&mut self, gap: u32) {
        self.bytes = u64::from(self.writable()) | u64::from(gap) << 32;
    }

    /// Counts pops; 0 if nothing is in flight here. All else stays when it becomes 0, so that a refused batch can be undone.
    #[inline(always)]
    pub(crate) fn serial(&self) -> u32 {
        self.serial
    }

    #[inline(always)]
    pub(crate) fn set_serial(&mut self, serial: u32) {
        self.serial = serial;
    }

    /// Ring descriptors that it takes.
    #[inline(always)]
    pub(crate) fn slots(&self) -> u16 {
        self.shape as u16
    }

    /// Packed: the buffer id, only ever echoed.
    #[inline(always)]
    pub(crate) fn id(&self) -> u16 {
        (self.shape >> 16) as u16
    }

    #[inline(always)]
    pub(crate) fn writable(&self) -> u32 {
        self.bytes as u32
    }

    /// The serial of the chain that was popped before it.
    fn previous(&self) -> u32 {
        self.serial().wrapping_sub(1).wrapping_sub((self.bytes >> 32) as u32)
    }
}

/// In order: a chain that is done, perhaps before its turn.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    done: bool,
    len: u32,
}

/// All chains in flight. Split names them by their head, an index that was checked; packed by their place here, since the driver's id is no
/// index. The batch loops take it apart and keep its counts in locals.
#[derive(Debug)]
pub(crate) struct InFlight {
    pub entries: Box<[Flight]>,
    /// Split: heads in the order of their pops, round the table. Packed: empty.
    pub heads: Box<[u16]>,
    /// The place of the next pop.
    pub newest: usize,
    /// The serial that was given out last: none is given twice, so that a chain that was handed back is never taken for its successor.
    pub serial: u32,
    /// The serial of the newest chain that was not handed back.
    pub last: u32,
    pub chains: u16,
    /// Ring slots that the driver does not have back: of chains in flight, and of those that are done but not yet told.
    pub slots: u32,
    done_slots: u32,
    /// In order: the place of the oldest chain, and what is done.
    oldest: usize,
    held: Box<[Held]>,
    held_count: usize,
    /// Names that left the table since the last publish; kept only for an observer.
    told: Option<Vec<u16>>,
}

/// The place after this one, round the table.
#[inline(always)]
pub(crate) fn after(place: usize, size: usize) -> usize {
    if place + 1 == size { 0 } else { place + 1 }
}

/// The serial to count on from, so that as many chains as a ring holds get one each, and none gets 0.
#[inline(always)]
pub(crate) fn count_from(serial: u32) -> u32 {
    if serial < u32::MAX - MAX_SIZE { serial } else { 0 }
}

/// How chains in flight are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Names {
    /// By their head (split).
    Heads,
    /// By their place (packed).
    Places,
}

impl InFlight {
    /// `place` is where the first pop goes: split's first available position, round the table.
    pub(crate) fn new(size: u16, names: Names, place: usize) -> Self {
        let n = usize::from(size);
        InFlight {
            entries: vec![Flight::default(); n].into(),
            heads: vec![0; if names == Names::Heads { n } else { 0 }].into(),
            newest: place,
            serial: 0,
            last: 0,
            chains: 0,
            slots: 0,
            done_slots: 0,
            oldest: place,
            held: vec![Held::default(); n].into(),
            held_count: 0,
            told: None,
        }
    }

    /// Keeps the names that leave the table from here on.
    pub(crate) fn observe(&mut self) {
        self.told = Some(Vec::with_capacity(self.entries.len()));
    }

    /// Names that left since this was last cleared.
    pub(crate) fn told(&self) -> &[u16] {
        self.told.as_deref().unwrap_or_default()
    }

    pub(crate) fn clear_told(&mut self) {
        if let Some(told) = &mut self.told {
            told.clear();
        }
    }

    #[inline(always)]
    fn name(&self, place: usize) -> u16 {
        self.heads.get(place).copied().unwrap_or(place as u16)
    }

    /// Packed: the next place that is free. Room for the chain's slots was checked, so there is one.
    pub(crate) fn free_place(entries: &[Flight], mut place: usize) -> usize {
        while entries[place].serial() != 0 {
            place = after(place, entries.len());
        }
        place
    }

    /// Packed: the name of the next chain.
    pub(crate) fn next_place(&mut self) -> u16 {
        self.newest = Self::free_place(&self.entries, self.newest);
        self.newest as u16
    }

    /// A chain was popped; gives its serial.
    pub(crate) fn start(&mut self, head: u16, id: u16, slots: u16, writable: u32) -> u32 {
        self.serial = count_from(self.serial) + 1;
        let gap = self.serial.wrapping_sub(1).wrapping_sub(std::mem::replace(&mut self.last, self.serial));
        self.entries[usize::from(head)] = Flight {
            serial: self.serial,
            shape: u32::from(slots) | u32::from(id) << 16,
            bytes: u64::from(writable) | u64::from(gap) << 32,
        };
        if let Some(place) = self.heads.get_mut(self.newest) {
            *place = head;
        }
        self.newest = after(self.newest, self.entries.len());
        self.chains += 1;
        self.slots += u32::from(slots);
        self.serial
    }

    /// Checks a completion.
    pub(crate) fn check(&self, completion: &Completion) -> Result<(), RingError> {
        let head = usize::from(completion.head);
        match self.entries.get(head) {
            Some(f) if f.serial() == completion.serial && completion.serial != 0 && !self.held[head].done => {
                if completion.len > f.writable() {
                    return Err(RingError::UsedTooLong { len: completion.len, writable: f.writable() });
                }
                Ok(())
            }
            _ => Err(RingError::NotInFlight { head: completion.head }),
        }
    }

    /// Checks a batch without doing anything: each is in flight, none stands there twice.
    #[inline(always)]
    pub(crate) fn check_batch<C: Completions>(&mut self, completions: C) -> Result<(), RingError> {
        let mut result = Ok(());
        let mut done = 0;
        for completion in completions.all() {
            // Out of the table for the length of this check: a second one of its kind is not found.
            match find(&mut self.entries, completion.head, completion.serial, completion.len) {
                Some(flight) => flight.set_serial(0),
                None => {
                    result = Err(self.refuse(completion.head, completion.serial, completion.len));
                    break;
                }
            }
            done += 1;
        }
        self.put_back(completions, done);
        result
    }

    /// Undoes the first completions of a batch.
    #[inline(always)]
    fn put_back<C: Completions>(&mut self, completions: C, count: usize) {
        for undo in completions.all().take(count) {
            self.entries[usize::from(undo.head)].set_serial(undo.serial);
        }
    }

    /// Takes plain values: what is passed by address is written to memory in every turn of a loop.
    #[cold]
    #[inline(never)]
    fn refuse(&self, head: u16, serial: u32, len: u32) -> RingError {
        self.check(&Completion { head, serial, len }).err().unwrap_or(RingError::NotInFlight { head })
    }

    /// Takes chains out of the table in the given order, telling `each` (name, flight, length): all of them; or none, and what `each` did is void.
    #[inline(always)]
    pub(crate) fn finish_batch<C: Completions>(
        &mut self,
        completions: C,
        mut each: impl FnMut(u16, &Flight, u32),
    ) -> Result<(), RingError> {
        let (mut slots, mut done) = (0, 0);
        let entries = &mut self.entries[..];
        for completion in completions.all() {
            let Some(flight) = find(entries, completion.head, completion.serial, completion.len) else {
                let error = self.refuse(completion.head, completion.serial, completion.len);
                self.put_back(completions, done);
                return Err(error);
            };
            flight.set_serial(0);
            slots += u32::from(flight.slots());
            each(completion.head, flight, completion.len);
            done += 1;
        }
        self.done_slots += slots;
        self.chains -= done as u16;
        if let Some(told) = &mut self.told {
            told.extend(completions.all().map(|c| c.head));
        }
        Ok(())
    }

    /// In order: takes chains out of the table that are the oldest ones, in their order, each of them without a writable part or filled
    /// completely, so that one element may stand for them. Gives the last one's name, flight and length, the slots of all and their number;
    /// or nothing, and then nothing was done.
    #[inline(always)]
    pub(crate) fn finish_run<const HEADS: bool, C: Completions>(&mut self, completions: C) -> Option<(u16, Flight, u32, u32, u32)> {
        if self.held_count != 0 {
            return None;
        }
        let (size, first) = (self.entries.len(), self.oldest);
        let (mut slots, mut last, mut done) = (0, 0, 0);
        let entries = &mut self.entries[..];
        let mut take = |c: Completion, turn: u16| {
            // A second one of its kind is not found: the first is out of the table.
            let flight = &mut entries[usize::from(turn)];
            if c.head != turn || flight.serial() != c.serial || c.serial == 0 || c.len != flight.writable() {
                return false;
            }
            flight.set_serial(0);
            slots += u32::from(flight.slots());
            last = turn;
            done += 1;
            true
        };
        // Up to the end of the table, and on from its start.
        let (near, far) = (completions.all().take(size - first), completions.all().skip(size - first));
        let whole = if HEADS {
            near.zip(&self.heads[first..]).all(|(c, &turn)| take(c, turn)) && far.zip(&self.heads[..]).all(|(c, &turn)| take(c, turn))
        } else {
            near.zip(first..).all(|(c, turn)| take(c, turn as u16)) && far.zip(0..size).all(|(c, turn)| take(c, turn as u16))
        };
        if !whole || done == 0 {
            self.put_back(completions, done);
            return None;
        }
        self.oldest = if first + done < size { first + done } else { first + done - size };
        self.done_slots += slots;
        self.chains -= done as u16;
        if let Some(told) = &mut self.told {
            told.extend(completions.all().map(|c| c.head));
        }
        let flight = self.entries[usize::from(last)];
        Some((last, flight, flight.writable(), slots, done as u32))
    }

    /// In order: takes chains out of the table from the oldest on, telling `each` (name, flight, length). Those that are done before their turn
    /// are held. All of the batch is done, or none.
    #[inline(always)]
    pub(crate) fn finish_in_order<C: Completions>(
        &mut self,
        completions: C,
        mut each: impl FnMut(u16, &Flight, u32),
    ) -> Result<(), RingError> {
        let (size, mut place, mut left) = (self.entries.len(), self.oldest, self.chains);
        // Whoever is not held and comes in the order of the pops is in turn.
        let in_turn = self.held_count == 0
            && completions.all().all(|c| {
                // Once round the table the first chain would be met again.
                let Some(fewer) = left.checked_sub(1) else { return false };
                left = fewer;
                let turn = self.name(place);
                place = after(place, size);
                let flight = &self.entries[usize::from(turn)];
                c.head == turn && flight.serial() == c.serial && c.serial != 0 && c.len <= flight.writable()
            });
        if in_turn {
            let (mut slots, mut done) = (0, 0);
            let entries = &mut self.entries[..];
            for c in completions.all() {
                let flight = &mut entries[usize::from(c.head)];
                flight.set_serial(0);
                slots += u32::from(flight.slots());
                each(c.head, flight, c.len);
                done += 1;
            }
            self.oldest = place;
            self.done_slots += slots;
            self.chains -= done;
            if let Some(told) = &mut self.told {
                told.extend(completions.all().map(|c| c.head));
            }
        } else {
            self.hold_batch(completions)?;
            self.finish_held(each);
        }
        Ok(())
    }

    /// In order: marks chains as done: all of them, or none.
    fn hold_batch<C: Completions>(&mut self, completions: C) -> Result<(), RingError> {
        for (i, completion) in completions.all().enumerate() {
            if let Err(error) = self.check(&completion) {
                for undo in completions.all().take(i) {
                    self.held[usize::from(undo.head)].done = false;
                }
                return Err(error);
            }
            self.held[usize::from(completion.head)] = Held { done: true, len: completion.len };
        }
        self.held_count += completions.all().count();
        Ok(())
    }

    /// In order: takes the oldest chains that are held out of the table, telling `each` (name, flight, length).
    fn finish_held(&mut self, mut each: impl FnMut(u16, &Flight, u32)) {
        while self.chains > 0 {
            let head = self.name(self.oldest);
            let held = &mut self.held[usize::from(head)];
            if !held.done {
                break;
            }
            held.done = false;
            self.held_count -= 1;
            let flight = &mut self.entries[usize::from(head)];
            flight.set_serial(0);
            each(head, flight, held.len);
            self.done_slots += u32::from(flight.slots());
            self.chains -= 1;
            if let Some(told) = &mut self.told {
                told.push(head);
            }
            self.oldest = after(self.oldest, self.entries.len());
        }
    }

    /// So many chains of one slot were popped and done at once; the next pop goes to `newest`. None of them can be handed back, nor anything
    /// that was popped before.
    #[inline(always)]
    pub(crate) fn passed(&mut self, count: usize, newest: usize) {
        if count > 0 {
            self.serial = count_from(self.serial) + count as u32;
            self.last = self.serial;
            self.slots += count as u32;
            self.done_slots += count as u32;
            if self.chains == 0 {
                self.oldest = newest;
            }
            self.newest = newest;
        }
    }

    /// What is done was told: the driver may use its slots again.
    #[inline(always)]
    pub(crate) fn published(&mut self) {
        self.slots -= std::mem::take(&mut self.done_slots);
    }

    /// The place of the chain with this serial, before `place`; the nearest but for chains that stay out (packed).
    fn place_of(&self, serial: u32, mut place: usize) -> Option<usize> {
        for _ in 0..self.entries.len() {
            place = if place == 0 { self.entries.len() - 1 } else { place - 1 };
            let head = usize::from(self.name(place));
            if self.entries[head].serial() == serial {
                return (!self.held[head].done).then_some(place);
            }
        }
        None
    }

    /// Checks that the newest `count` chains can be handed back.
    pub(crate) fn check_rewind(&self, count: usize) -> Result<(), RingError> {
        self.walk_newest(count, |_, _| ())
    }

    /// Tells of the newest `count` chains, by name and serial, if they can be handed back; the newest first.
    pub(crate) fn walk_newest(&self, count: usize, mut each: impl FnMut(u16, u32)) -> Result<(), RingError> {
        if count > usize::from(self.chains) {
            return Err(RingError::CannotRewind { count, reason: "fewer are in flight" });
        }
        let (mut place, mut serial) = (self.newest, self.last);
        for _ in 0..count {
            place = self.place_of(serial, place).ok_or(RingError::CannotRewind { count, reason: "a newer chain was completed" })?;
            let name = self.name(place);
            each(name, serial);
            serial = self.entries[usize::from(name)].previous();
        }
        Ok(())
    }

    pub(crate) fn footprint(&self, name: u16) -> Footprint {
        let flight = self.entries[usize::from(name)];
        Footprint { slots: flight.slots(), id: flight.id() }
    }

    /// Hands back the newest chain; tells what it was. Checked before.
    pub(crate) fn rewind_one(&mut self) -> Option<Flight> {
        self.newest = self.place_of(self.last, self.newest)?;
        let head = self.name(self.newest);
        let flight = &mut self.entries[usize::from(head)];
        self.last = flight.previous();
        flight.set_serial(0);
        self.chains -= 1;
        self.slots -= u32::from(flight.slots());
        Some(*flight)
    }
}

/// The chain that a completion names, if it is in flight and so many bytes fit.
#[inline(always)]
fn find(entries: &mut [Flight], head: u16, serial: u32, len: u32) -> Option<&mut Flight> {
    let flight = entries.get_mut(usize::from(head))?;
    let found = flight.serial() == serial && serial != 0 && len <= flight.writable();
    found.then_some(flight)
}

/// In order: chains that one used element stands for (device-21).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run<P> {
    /// Where the element goes: the place of the run's first chain.
    pub place: P,
    /// The last chain's id and length.
    pub id: u16,
    pub len: u32,
    /// Whether the last chain has no writable part or was filled completely, so that the run may go on.
    pub full: bool,
}

impl<P> Run<P> {
    pub(crate) fn new(place: P, id: u16, flight: &Flight, len: u32) -> Self {
        Run { place, id, len, full: len == flight.writable() }
    }

    #[inline(always)]
    pub(crate) fn extend(&mut self, id: u16, flight: &Flight, len: u32) {
        (self.id, self.len, self.full) = (id, len, len == flight.writable());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serials_start_again_before_they_run_out_and_chains_can_still_be_handed_back() {
        for names in [Names::Heads, Names::Places] {
            let mut flights = InFlight::new(8, names, 0);
            flights.serial = u32::MAX - MAX_SIZE - 3;
            flights.last = flights.serial;
            let serials: Vec<u32> = (0..6).map(|head| flights.start(head, head, 1, 0)).collect();
            let last = u32::MAX - MAX_SIZE;
            assert_eq!(serials, [last - 2, last - 1, last, 1, 2, 3]);
            flights.check_rewind(6).expect("all are in flight");
            for left in (0..6).rev() {
                assert!(flights.rewind_one().is_some());
                assert_eq!((flights.chains, flights.newest), (left, usize::from(left)));
            }
            assert_eq!(flights.start(0, 0, 1, 0), 4, "no serial is given twice");
            flights.check_rewind(1).expect("in flight");
            assert!(flights.rewind_one().is_some());
            assert!(flights.check_rewind(1).is_err(), "nothing is before it");
        }
    }
}
