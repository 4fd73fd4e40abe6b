//! A virtqueue without a ring: what was added, made available, is in flight, done and used, as plain lists. It knows no descriptor and no
//! index, so that it cannot share a mistake with either format.

use std::collections::VecDeque;
use virtqueue::{Form, RingError, RingFeatures};

/// A chain as its driver made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    pub token: u64,
    /// Where its bytes lie in the data area.
    pub place: u64,
    pub readable: Vec<u32>,
    pub writable: Vec<u32>,
    pub slots: usize,
}

impl Made {
    pub fn readable_bytes(&self) -> u32 {
        self.readable.iter().sum()
    }

    pub fn writable_bytes(&self) -> u32 {
        self.writable.iter().sum()
    }
}

/// A chain that the device popped; what it wrote once it is done with it.
#[derive(Clone, Debug)]
struct Flight {
    made: Made,
    len: Option<u32>,
    /// Done, and its turn has come: it is no longer in flight.
    gone: bool,
}

/// One side's wish to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// It has said nothing yet, or was woken and has said nothing since: either answer is right.
    Any,
    /// It armed, saw nothing and sleeps.
    Asleep,
    /// It wants nothing.
    Disarmed,
}

pub struct Model {
    size: usize,
    table: usize,
    features: RingFeatures,
    free: usize,
    added: VecDeque<Made>,
    available: VecDeque<Made>,
    popped: Vec<Flight>,
    done: VecDeque<(Made, u32)>,
    used: VecDeque<(Made, u32)>,
    pub driver: Wish,
    pub device: Wish,
    pub device_decided: bool,
}

impl Model {
    pub fn new(size: usize, table: usize, features: RingFeatures) -> Self {
        Model {
            size,
            table,
            features,
            free: size,
            added: VecDeque::new(),
            available: VecDeque::new(),
            popped: Vec::new(),
            done: VecDeque::new(),
            used: VecDeque::new(),
            driver: Wish::Any,
            device: Wish::Any,
            device_decided: false,
        }
    }

    pub fn free(&self) -> usize {
        self.free
    }

    pub fn add(&mut self, mut made: Made, form: Form) -> Result<(), RingError> {
        let segments = made.readable.len() + made.writable.len();
        let (limit, needed) = match form {
            Form::Direct => (self.size, segments),
            Form::Indirect if self.features.indirect => (self.table.min(self.size), 1),
            Form::Indirect => return Err(RingError::IndirectRefused),
        };
        if segments > limit {
            return Err(RingError::TooManySegments { segments, limit });
        }
        if needed > self.free {
            return Err(RingError::Full { needed, free: self.free });
        }
        self.free -= needed;
        made.slots = needed;
        self.added.push_back(made);
        Ok(())
    }

    /// How many chains the driver's publish shows.
    pub fn publish(&mut self) -> usize {
        let count = self.added.len();
        self.available.append(&mut self.added);
        count
    }

    pub fn pop(&mut self) -> Option<Made> {
        let made = self.available.pop_front()?;
        self.popped.push(Flight { made: made.clone(), len: None, gone: false });
        Some(made)
    }

    /// Tokens of the chains in flight that are not done, oldest first.
    pub fn in_flight(&self) -> Vec<u64> {
        self.popped.iter().filter(|flight| flight.len.is_none()).map(|flight| flight.made.token).collect()
    }

    pub fn complete(&mut self, token: u64, len: u32) {
        let at = self.popped.iter().position(|flight| flight.made.token == token && flight.len.is_none()).expect("in flight");
        self.popped[at].len = Some(len);
        if self.features.in_order {
            for flight in &mut self.popped {
                match flight.len {
                    Some(len) if !flight.gone => {
                        flight.gone = true;
                        self.done.push_back((flight.made.clone(), len));
                    }
                    Some(_) => {}
                    None => break,
                }
            }
        } else {
            self.popped[at].gone = true;
            self.done.push_back((self.popped[at].made.clone(), len));
        }
    }

    /// Whether the newest `count` chains can be handed back; they are, then.
    pub fn rewind(&mut self, count: usize) -> bool {
        let from = self.popped.len().wrapping_sub(count);
        if from > self.popped.len() || self.popped[from..].iter().any(|flight| flight.len.is_some()) {
            return false;
        }
        for flight in self.popped.drain(from..).rev() {
            self.available.push_front(flight.made);
        }
        true
    }

    /// How many chains the device's publish shows.
    pub fn publish_used(&mut self) -> usize {
        let count = self.done.len();
        self.used.append(&mut self.done);
        count
    }

    pub fn reclaim(&mut self) -> Option<(Made, u32)> {
        let (made, len) = self.used.pop_front()?;
        self.free += made.slots;
        Some((made, len))
    }

    pub fn any_available(&self) -> bool {
        !self.available.is_empty()
    }

    pub fn any_used(&self) -> bool {
        !self.used.is_empty()
    }

    /// Chains that the driver has not got back.
    pub fn outstanding(&self) -> usize {
        let flying = self.popped.iter().filter(|flight| !flight.gone).count();
        self.added.len() + self.available.len() + flying + self.done.len() + self.used.len()
    }
}
