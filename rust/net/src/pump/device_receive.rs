//! Frames of the TAP to receive chains.

use super::{ALL_PIECES, BURST, BURST_BYTES, EAGAIN, EFAULT, MAX_HEADER, PumpCounters, Step, behind, device_memory_lost, gone};
use crate::device::unmapped;
use crate::error::BurstError;
use crate::header::{Header, Reason};
use crate::port::Rules;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};
use virtio_memory::{IoVecs, MemoryError, RegionTable};
use virtqueue::{Chain, ChainBatch, Completion, DeviceQueue, DeviceRing};

/// Behind the chains of one frame: if anything arrives here, it did not fit.
const OVERFLOW: usize = 64;
/// How long a frame waits for more buffers than there are, while none are added.
const PATIENCE: Duration = Duration::from_millis(20);

/// Frames of the TAP to receive chains.
#[derive(Debug)]
pub struct DeviceReceive {
    rules: Rules,
    /// Bytes of the longest frame that is expected; a longer one is dropped.
    longest: usize,
    batch: ChainBatch,
    completions: Vec<Completion>,
    vecs: IoVecs,
    /// Room for a frame that may not fit, and one byte more.
    staging: Vec<u8>,
    /// The frame in there, judged, which waits for buffers.
    staged: Option<(Header, usize)>,
    /// Since when it waits for more than so many buffers.
    waits: Option<(Instant, usize)>,
    /// Bytes of a buffer, as last seen.
    buffer: usize,
    /// What it has done.
    pub counters: PumpCounters,
}

/// What became of one frame.
enum Read {
    Frame(usize),
    Dropped,
    Nothing,
    NoBuffers,
    /// There are some, too few for a frame that was read.
    TooFew,
}

impl DeviceReceive {
    /// For this queue; `rules` are the device's.
    ///
    /// # Errors
    /// None that a caller or a peer can cause.
    pub fn new<R: DeviceRing>(queue: &DeviceQueue<R>, rules: Rules, longest: usize) -> Result<Self, MemoryError> {
        let size = usize::from(queue.size());
        Ok(Self {
            rules,
            longest,
            batch: queue.batch(size),
            completions: Vec::with_capacity(size),
            vecs: IoVecs::new(ALL_PIECES)?,
            staging: vec![0; longest + 1],
            staged: None,
            waits: None,
            buffer: 0,
            counters: PumpCounters::default(),
        })
    }

    /// Moves one burst; publish afterwards. Without a buffer the TAP is not read. With too few of them for the longest frame it is read into
    /// private bytes; a frame for which there are too few waits a moment for more, and is then dropped. Merged packets fill every buffer but
    /// the last, and their number is written while all of them are still the device's (device-16).
    ///
    /// # Errors
    /// `Ring` for a mistake of the driver, `Memory` with the kernel's answer if the TAP is gone.
    pub fn step<R: DeviceRing>(&mut self, queue: &mut DeviceQueue<R>, tap: BorrowedFd<'_>) -> Result<Step, BurstError> {
        let each = if self.rules.mergeable { (self.longest + self.rules.header).div_ceil(self.buffer.max(1)) } else { 1 };
        // As many as a burst may take; what is left is handed back.
        self.batch.clear_for(if self.buffer == 0 || self.staged.is_some() { usize::MAX } else { BURST + each });
        queue.pop_batch(&mut self.batch)?;
        self.buffer = self.batch.chains().first().map_or(self.buffer, |chain| chain.writable as usize);
        self.completions.clear();
        let (mut bytes, mut moved) = (0, 0);
        let mut step = Step::default();
        let mut result = Ok(());
        while moved < BURST && bytes < BURST_BYTES {
            let from = self.completions.len();
            let read = match self.staged {
                Some((header, length)) => self.place(queue.memory(), from, header, length),
                None => self.read(queue.memory(), from, tap),
            };
            match read {
                Ok(Read::Frame(length)) => bytes += length,
                Ok(Read::Dropped) => {}
                Ok(Read::Nothing) => break,
                Ok(Read::NoBuffers) => {
                    step.starved = true;
                    break;
                }
                Ok(Read::TooFew) => {
                    step = Step { starved: true, soon: true, ..step };
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
                return Err(device_memory_lost(queue, at));
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

    /// One frame into the chains from this one on, or into the staging.
    fn read(&mut self, memory: &RegionTable, from: usize, tap: BorrowedFd<'_>) -> Result<Read, BurstError> {
        let (header, wanted) = (self.rules.header, self.longest + self.rules.header);
        let rest = &self.batch.chains()[from..];
        let Some(first) = rest.first() else { return Ok(Read::NoBuffers) };
        if (first.writable as usize) < header {
            self.counters.traffic.drop(Reason::Long);
            self.completions.push(Completion { head: first.head, serial: first.serial, len: 0 });
            return Ok(Read::Dropped);
        }
        let (chains, room) = enough(rest, wanted, self.rules.mergeable);
        let (mut head, mut tail) = ([0; MAX_HEADER], [0; OVERFLOW]);
        let mut answer = Err(MemoryError::TooManySegments { limit: ALL_PIECES });
        if room >= wanted || !self.rules.mergeable {
            let segments = chains.iter().flat_map(|chain| self.batch.writable(chain)).map(|segment| (segment.address, segment.len));
            answer = memory.readv_around(tap, &mut head[..header], behind(segments, header), &mut tail, &mut self.vecs);
        }
        // Too few buffers, or in too many pieces for one call.
        let staged = matches!(answer, Err(MemoryError::TooManySegments { .. }));
        if staged {
            answer = memory.readv_around(tap, &mut head[..header], [], &mut self.staging, &mut self.vecs);
        }
        let read = match answer {
            Ok(0) => return Err(gone()),
            Ok(read) => read,
            Err(MemoryError::Os { errno: EAGAIN, .. }) => return Ok(Read::Nothing),
            Err(error) => return Err(error.into()),
        };
        let length = read.saturating_sub(header);
        let mut known = [0; Header::SIZE];
        known.copy_from_slice(&head[..Header::SIZE]);
        let outgoing = match self.rules.outgoing.outgoing(Header::parse(&known), length as u64) {
            _ if length > self.longest || (!staged && read > room) => Err(Reason::Long),
            _ if length == 0 => Err(Reason::Short),
            // The TAP was told to complete checksums that the driver does not take.
            Ok((_, true)) => Err(Reason::Checksum),
            Ok((outgoing, false)) => Ok(outgoing),
            Err(reason) => Err(reason),
        };
        match outgoing {
            Err(reason) => {
                self.counters.traffic.drop(reason);
                Ok(Read::Dropped)
            }
            Ok(outgoing) if staged => {
                self.staged = Some((outgoing, length));
                self.place(memory, from, outgoing, length)
            }
            Ok(outgoing) => self.finish(memory, from, outgoing, length),
        }
    }

    /// The staged frame into the chains from this one on.
    fn place(&mut self, memory: &RegionTable, from: usize, header: Header, length: usize) -> Result<Read, BurstError> {
        let total = self.rules.header + length;
        let rest = &self.batch.chains()[from..];
        if rest.is_empty() {
            return Ok(Read::NoBuffers);
        }
        let (chains, room) = enough(rest, total, self.rules.mergeable);
        if room < total || (chains[0].writable as usize) < self.rules.header {
            return Ok(self.too_long(rest.len(), from));
        }
        (self.staged, self.waits) = (None, None);
        let segments = chains.iter().flat_map(|chain| self.batch.writable(chain)).map(|segment| (segment.address, segment.len));
        let mut at = 0;
        for (address, len) in behind(segments, self.rules.header) {
            let count = (length - at).min(len as usize);
            memory.write(address, &self.staging[at..at + count])?;
            at += count;
            if at == length {
                break;
            }
        }
        self.finish(memory, from, header, length)
    }

    /// The staged frame does not fit into so many chains: it waits, unless there never will be enough, or none come.
    fn too_long(&mut self, chains: usize, from: usize) -> Read {
        let never = !self.rules.mergeable || chains == self.batch.capacity();
        let since = match self.waits {
            Some((since, before)) if before >= chains => since,
            _ => Instant::now(),
        };
        if !never && (from > 0 || since.elapsed() < PATIENCE) {
            self.waits = (from == 0).then_some((since, chains));
            return Read::TooFew;
        }
        (self.staged, self.waits) = (None, None);
        self.counters.traffic.drop(Reason::Long);
        Read::Dropped
    }

    /// Completes the chains that a frame is in, its header last.
    fn finish(&mut self, memory: &RegionTable, from: usize, outgoing: Header, length: usize) -> Result<Read, BurstError> {
        let chains = &self.batch.chains()[from..];
        let mut left = (self.rules.header + length) as u32;
        for chain in chains {
            if left == 0 {
                break;
            }
            let len = left.min(chain.writable);
            left -= len;
            self.completions.push(Completion { head: chain.head, serial: chain.serial, len });
        }
        let buffers = (self.completions.len() - from) as u16;
        let mut head = [0; MAX_HEADER];
        head[..Header::SIZE].copy_from_slice(&outgoing.with_num_buffers(buffers).bytes());
        let mut at = 0;
        for segment in self.batch.writable(&chains[0]) {
            let count = (self.rules.header - at).min(segment.len as usize);
            if let Err(error) = memory.write(segment.address, &head[at..at + count]) {
                self.completions.truncate(from);
                return Err(error.into());
            }
            at += count;
            if at == self.rules.header {
                break;
            }
        }
        self.counters.traffic.count(1, length as u64);
        Ok(Read::Frame(length))
    }
}

/// As many of the first chains as have room for `wanted` bytes, or all that may be used, and their room.
fn enough(chains: &[Chain], wanted: usize, mergeable: bool) -> (&[Chain], usize) {
    let (mut room, mut count) = (0, 0);
    for chain in chains {
        if room >= wanted || (count > 0 && !mergeable) {
            break;
        }
        room += chain.writable as usize;
        count += 1;
    }
    (&chains[..count], room)
}
