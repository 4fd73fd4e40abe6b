//! Transmitted chains to the TAP.

use super::{ALL_PIECES, BURST, BURST_BYTES, MAX_HEADER, PumpCounters, Step, Written, behind, device_memory_lost, written};
use crate::device::unmapped;
use crate::device_port::judge;
use crate::error::BurstError;
use crate::header::Header;
use crate::port::Rules;
use std::os::fd::BorrowedFd;
use virtio_memory::{IoVecs, MemoryError, RegionTable};
use virtqueue::{Chain, ChainBatch, Completion, DeviceQueue, DeviceRing};

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
                Ok(Err(Written::Lost)) => return Err(device_memory_lost(queue, self.batch.segments(&chain).first())),
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
        Ok(Step { moved: taken, starved: true, soon: false })
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
        head[..Header::SIZE].copy_from_slice(&incoming.header.with_num_buffers(0).bytes());
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
