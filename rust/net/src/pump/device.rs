//! The device's far end.

use super::{BURST, BURST_BYTES, EAGAIN, EFAULT, MAX_HEADER, PumpCounters, Step, Written, behind, written};
use crate::device::unmapped;
use crate::device_port::judge;
use crate::error::BurstError;
use crate::header::{Header, Reason};
use crate::port::Rules;
use std::os::fd::BorrowedFd;
use virtio_memory::{IoVecs, MemoryError, RegionTable};
use virtqueue::{Chain, ChainBatch, Completion, DeviceQueue, DeviceRing, RingError, Segment};

const ALL_PIECES: usize = 1024;
/// Behind the chains of one frame: if anything arrives here, it did not fit.
const OVERFLOW: usize = 64;

/// The memory behind these segments was taken away while the kernel used it (device-24).
#[cold]
fn memory_lost<R: DeviceRing>(queue: &mut DeviceQueue<R>, first: Option<&Segment>) -> BurstError {
    let (address, len) = first.map_or((0, 0), |segment| (segment.address, segment.len.into()));
    let error = RingError::MemoryLost { address, len };
    queue.break_with(error.clone());
    error.into()
}

/// Transmitted chains to the TAP.
#[derive(Debug)]
pub struct DeviceTransmit {
    rules: Rules,
    batch: ChainBatch,
    completions: Vec<Completion>,
    vecs: IoVecs,
    /// What it has done.
    pub counters: PumpCounters,
}

impl DeviceTransmit {
    /// For this queue; `rules` are the device's.
    ///
    /// # Errors
    /// None that a caller or a peer can cause.
    pub fn new<R: DeviceRing>(queue: &DeviceQueue<R>, rules: Rules) -> Result<Self, MemoryError> {
        let completions = Vec::with_capacity(BURST);
        Ok(Self { rules, batch: queue.batch(BURST), completions, vecs: IoVecs::new(ALL_PIECES)?, counters: PumpCounters::default() })
    }

    /// Moves one burst; publish afterwards. Chains that are not believed, or that the TAP refuses, are completed all the same.
    ///
    /// # Errors
    /// `Ring` for a mistake of the driver, `Memory` with the kernel's answer if the TAP is gone.
    pub fn step<R: DeviceRing>(&mut self, queue: &mut DeviceQueue<R>, tap: BorrowedFd<'_>) -> Result<Step, BurstError> {
        self.batch.clear_for(BURST);
        let popped = queue.pop_batch(&mut self.batch)?;
        self.completions.clear();
        let (mut bytes, mut taken) = (0, 0);
        while taken < popped && bytes < BURST_BYTES {
            let chain = self.batch.chains()[taken];
            match self.write(queue.memory(), &chain, tap) {
                Ok(Ok(length)) => bytes += length,
                Ok(Err(Written::Lost)) => return Err(memory_lost(queue, self.batch.segments(&chain).first())),
                Ok(Err(_)) => {}
                Err(BurstError::Memory(error @ (MemoryError::Unmapped { .. } | MemoryError::Overflow { .. }))) => {
                    return Err(unmapped(queue, error));
                }
                Err(error) => {
                    queue.rewind_from(&mut self.batch, taken)?;
                    queue.complete_batch(&self.completions[..])?;
                    return Err(error);
                }
            }
            self.completions.push(Completion { head: chain.head, serial: chain.serial, len: 0 });
            taken += 1;
        }
        if taken < popped {
            queue.rewind_from(&mut self.batch, taken)?;
        }
        queue.complete_batch(&self.completions[..])?;
        Ok(Step { moved: taken, starved: true })
    }

    /// One chain; the bytes of its frame, 0 if it was dropped.
    fn write(&mut self, memory: &RegionTable, chain: &Chain, tap: BorrowedFd<'_>) -> Result<Result<usize, Written>, BurstError> {
        let segments = self.batch.readable(chain);
        let incoming = match judge(memory, segments, chain, &self.rules)? {
            Ok(incoming) => incoming,
            Err(reason) => {
                self.counters.traffic.drop(reason);
                return Ok(Ok(0));
            }
        };
        let mut head = [0; MAX_HEADER];
        head[..Header::SIZE].copy_from_slice(&Header { num_buffers: 0, ..incoming.header }.bytes());
        let frame = behind(segments.iter().map(|segment| (segment.address, segment.len)), self.rules.header);
        match written(memory.writev_after(tap, &head[..self.rules.header], frame, &mut self.vecs))? {
            Ok(Written::Taken) => {
                self.counters.traffic.count(1, incoming.length as u64);
                Ok(Ok(incoming.length))
            }
            Ok(Written::Refused) => {
                self.counters.refused += 1;
                Ok(Ok(0))
            }
            Ok(Written::Lost) => Ok(Err(Written::Lost)),
            Err(reason) => {
                self.counters.traffic.drop(reason);
                Ok(Ok(0))
            }
        }
    }
}

/// Frames of the TAP to receive chains.
#[derive(Debug)]
pub struct DeviceReceive {
    rules: Rules,
    /// Bytes of the longest frame that is expected; a longer one is dropped.
    longest: usize,
    batch: ChainBatch,
    completions: Vec<Completion>,
    vecs: IoVecs,
    /// What it has done.
    pub counters: PumpCounters,
}

impl DeviceReceive {
    /// For this queue; `rules` are the device's.
    ///
    /// # Errors
    /// None that a caller or a peer can cause.
    pub fn new<R: DeviceRing>(queue: &DeviceQueue<R>, rules: Rules, longest: usize) -> Result<Self, MemoryError> {
        let size = usize::from(queue.size());
        let (batch, completions) = (queue.batch(size), Vec::with_capacity(size));
        Ok(Self { rules, longest, batch, completions, vecs: IoVecs::new(ALL_PIECES)?, counters: PumpCounters::default() })
    }

    /// Moves one burst; publish afterwards. As long as the queue has too few buffers for the longest frame, the TAP is not read. Merged
    /// packets fill every buffer but the last, and their number is written while all of them are still the device's (device-16).
    ///
    /// # Errors
    /// `Ring` for a mistake of the driver, `Memory` with the kernel's answer if the TAP is gone.
    pub fn step<R: DeviceRing>(&mut self, queue: &mut DeviceQueue<R>, tap: BorrowedFd<'_>) -> Result<Step, BurstError> {
        self.batch.clear_for(usize::MAX);
        queue.pop_batch(&mut self.batch)?;
        self.completions.clear();
        let (mut bytes, mut moved) = (0, 0);
        let mut step = Step::default();
        let mut result = Ok(());
        while moved < BURST && bytes < BURST_BYTES {
            let from = self.completions.len();
            match self.read(queue.memory(), from, tap) {
                Ok(Read::Frame(length)) => bytes += length,
                Ok(Read::Dropped) => {}
                Ok(Read::Nothing) => break,
                Ok(Read::NoBuffers) => {
                    step.starved = true;
                    break;
                }
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
            moved += 1;
        }
        step.moved = moved;
        match result {
            Err(BurstError::Memory(MemoryError::Os { errno: EFAULT, .. })) => {
                let at = self.batch.chains().get(self.completions.len()).and_then(|chain| self.batch.writable(chain).first());
                return Err(memory_lost(queue, at));
            }
            Err(BurstError::Memory(error @ (MemoryError::Unmapped { .. } | MemoryError::Overflow { .. }))) => {
                return Err(unmapped(queue, error));
            }
            _ => {}
        }
        queue.rewind_from(&mut self.batch, self.completions.len())?;
        queue.complete_batch(&self.completions[..])?;
        result.map(|()| step)
    }

    /// One frame into the chains from this one on.
    fn read(&mut self, memory: &RegionTable, from: usize, tap: BorrowedFd<'_>) -> Result<Read, BurstError> {
        let (header, wanted) = (self.rules.header, self.longest + self.rules.header);
        let (mut room, mut chains) = (0, 0);
        let rest = &self.batch.chains()[from..];
        for chain in rest {
            if room >= wanted || (chains > 0 && !self.rules.mergeable) {
                break;
            }
            room += chain.writable as usize;
            chains += 1;
        }
        // A ring that holds no more than this never gives more: what is too long for it is dropped.
        let all = self.rules.mergeable && rest.len() == self.batch.capacity();
        if chains == 0 || (self.rules.mergeable && room < wanted && !all) {
            return Ok(Read::NoBuffers);
        }
        let chains = &rest[..chains];
        if room <= header || (chains[0].writable as usize) < header {
            self.counters.traffic.drop(Reason::Long);
            self.completions.push(Completion { head: chains[0].head, serial: chains[0].serial, len: 0 });
            return Ok(Read::Dropped);
        }
        let segments = || chains.iter().flat_map(|chain| self.batch.writable(chain)).map(|segment| (segment.address, segment.len));
        let (mut head, mut tail) = ([0; MAX_HEADER], [0; OVERFLOW]);
        let read = match memory.readv_around(tap, &mut head[..header], behind(segments(), header), &mut tail, &mut self.vecs) {
            Ok(read) => read,
            Err(MemoryError::Os { errno: EAGAIN, .. }) => return Ok(Read::Nothing),
            Err(error) => return Err(error.into()),
        };
        let length = read.saturating_sub(header);
        let mut known = [0; Header::SIZE];
        known.copy_from_slice(&head[..Header::SIZE]);
        let outgoing = match self.rules.outgoing.outgoing(Header::parse(&known), length as u64) {
            _ if read > room => Err(Reason::Long),
            _ if length == 0 => Err(Reason::Short),
            // The TAP was told to complete checksums that the driver does not take.
            Ok((_, true)) => Err(Reason::Checksum),
            Ok((outgoing, false)) => Ok(outgoing),
            Err(reason) => Err(reason),
        };
        let mut outgoing = match outgoing {
            Ok(outgoing) => outgoing,
            Err(reason) => {
                self.counters.traffic.drop(reason);
                return Ok(Read::Dropped);
            }
        };
        let mut left = read as u32;
        for chain in chains {
            if left == 0 {
                break;
            }
            let len = left.min(chain.writable);
            left -= len;
            self.completions.push(Completion { head: chain.head, serial: chain.serial, len });
        }
        outgoing.num_buffers = (self.completions.len() - from) as u16;
        head = [0; MAX_HEADER];
        head[..Header::SIZE].copy_from_slice(&outgoing.bytes());
        let mut at = 0;
        for segment in self.batch.writable(&chains[0]) {
            let count = (header - at).min(segment.len as usize);
            memory.write(segment.address, &head[at..at + count])?;
            at += count;
            if at == header {
                break;
            }
        }
        self.counters.traffic.count(1, length as u64);
        Ok(Read::Frame(length))
    }
}

/// What became of one frame.
enum Read {
    Frame(usize),
    Dropped,
    Nothing,
    NoBuffers,
}
