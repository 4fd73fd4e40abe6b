//! `PortGroup`: the ports of several queue pairs as one.

use crate::args::Int;
use crate::burst::Burst;
use crate::errors::Error;
use crate::lock::{lock, lock_pool};
use crate::port::{self, BothPorts};
use crate::port_device::DevicePort;
use crate::port_driver::DriverPort;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use virtio_net_path::{Dealer, Steering};

/// Which end of the device it is.
enum Ends {
    Driver(Vec<Py<DriverPort>>),
    Device(Vec<Py<DevicePort>>),
}

/// The ports of several queue pairs as one: what comes is taken in turn, what goes keeps each flow on one pair (5.1.6.5.5).
#[pyclass(frozen, module = "virtio._core")]
pub struct PortGroup {
    ends: Ends,
    /// How many of them, from the first on, are sent by.
    senders: u16,
    /// What the first is called in `steering`.
    number: u16,
    steering: Arc<Steering>,
    dealer: Mutex<Dealer>,
    /// The pair that is asked first.
    turn: AtomicUsize,
}

impl PortGroup {
    fn pairs(&self) -> usize {
        match &self.ends {
            Ends::Driver(ports) => ports.len(),
            Ends::Device(ports) => ports.len(),
        }
    }

    fn port(&self, pair: usize) -> &dyn BothPorts {
        match &self.ends {
            Ends::Driver(ports) => ports[pair].get(),
            Ends::Device(ports) => ports[pair].get(),
        }
    }

    /// Whether it remembers where flows came from: a device does.
    fn learns(&self) -> bool {
        matches!(self.ends, Ends::Device(_))
    }

    fn served(&self, pair: usize) {
        self.turn.store((pair + 1) % self.pairs(), Relaxed);
    }

    /// What the first pair gives that has something, or else the last; one that fails has had its turn.
    fn first<T>(&self, mut ask: impl FnMut(&dyn BothPorts) -> Result<T, Error>, something: impl Fn(&T) -> bool) -> Result<(u16, T), Error> {
        let mut left = self.pairs();
        let mut pair = self.turn.load(Relaxed);
        loop {
            let answer = ask(self.port(pair)).inspect_err(|_| self.served(pair))?;
            left -= 1;
            if left == 0 || something(&answer) {
                self.served(pair);
                return Ok((pair as u16, answer));
            }
            pair = (pair + 1) % self.pairs();
        }
    }
}

#[pymethods]
impl PortGroup {
    #[new]
    #[pyo3(signature = (ports, senders = None))]
    fn new(ports: &Bound<'_, PyTuple>, senders: Option<Int>) -> Result<Self, Error> {
        let ends = match ports.extract::<Vec<Py<DriverPort>>>() {
            Ok(ports) => Ends::Driver(ports),
            Err(_) => Ends::Device(ports.extract::<Vec<Py<DevicePort>>>()?),
        };
        if !(1..=0x8000).contains(&ports.len()) {
            return Err(Error::Value(format!("{} ports, not 1 to 32768 (5.1.4)", ports.len())));
        }
        let senders = senders.map_or(Ok(ports.len() as u16), |senders| senders.within("senders", 0, ports.len() as i128))?;
        Ok(PortGroup { ends, senders, number: 0, steering: Arc::default(), dealer: Mutex::default(), turn: AtomicUsize::new(0) })
    }

    /// One of the pairs as a group, which shares with this one what is known of flows.
    fn one(&self, py: Python<'_>, pair: Int) -> Result<Self, Error> {
        let pair: usize = pair.within("pair", 0, self.pairs() as i128 - 1)?;
        let ends = match &self.ends {
            Ends::Driver(ports) => Ends::Driver(vec![ports[pair].clone_ref(py)]),
            Ends::Device(ports) => Ends::Device(vec![ports[pair].clone_ref(py)]),
        };
        let (number, senders) = (self.number + pair as u16, u16::from(pair < self.senders.into()));
        Ok(PortGroup { ends, senders, number, steering: self.steering.clone(), dealer: Mutex::default(), turn: AtomicUsize::new(0) })
    }

    /// Fills the burst by the first pair that can, and takes back on the way what others hold; returns how many slots there are.
    fn take(&self, py: Python<'_>, burst: &Bound<'_, Burst>) -> Result<usize, Error> {
        let capacity = burst.get().rows.capacity();
        Ok(self.first(|port| port.take(py, burst), |taken| *taken == capacity)?.1)
    }

    /// Sends each packet by its flow's pair; returns how many.
    fn send(&self, py: Python<'_>, burst: &Bound<'_, Burst>) -> Result<usize, Error> {
        let rows = &burst.get().rows;
        burst.get().shared.check()?;
        let pairs = self.senders;
        match pairs {
            0 => return Ok(0),
            1 => return self.port(0).send(py, burst),
            _ => {}
        }
        let mut dealer = std::mem::take(&mut *lock(py, &self.dealer)); // no lock is held while the ports send
        let read = dealer.read(&mut lock_pool(py, rows.pool()), rows, &self.steering, pairs);
        let result = read.map_err(Error::from).and_then(|()| match dealer.only() {
            Some(pair) => self.port(pair.into()).send(py, burst),
            None => dealer.deal(rows, pairs, |pair| self.port(pair.into()).send(py, burst)),
        });
        *lock(py, &self.dealer) = dealer;
        result
    }

    /// Gives back what the burst holds, and fills it by the first pair that has something, in turn; returns how many packets.
    fn receive(&self, py: Python<'_>, burst: &Bound<'_, Burst>) -> Result<usize, Error> {
        let (pair, packets) = self.first(|port| port.receive(py, burst), |packets| *packets > 0)?;
        if self.learns() {
            self.steering.learn_burst(&burst.get().rows, self.number + pair);
        }
        Ok(packets)
    }

    /// Copies and sends frames, each by its flow's pair, up to the first for which there is no room; returns how many.
    fn send_frames(&self, py: Python<'_>, frames: &Bound<'_, PyAny>) -> Result<usize, Error> {
        let frames = port::outgoing(frames)?;
        let frames = port::slices(&frames);
        match self.senders {
            0 => return Ok(0),
            1 => return self.port(0).send_slices(py, &frames),
            _ => {}
        }
        let pair_of = |frame: &&[u8]| self.steering.choose(frame, self.senders);
        let mut done = 0;
        for run in frames.chunk_by(|one, next| pair_of(one) == pair_of(next)) {
            let sent = self.port(pair_of(&run[0]).into()).send_slices(py, run)?;
            done += sent;
            if sent < run.len() {
                break;
            }
        }
        Ok(done)
    }

    /// Copies of the frames of the first pair that has some, in turn, at most `limit`.
    #[pyo3(signature = (limit = Int::new(64)), text_signature = "($self, limit=64)")]
    fn receive_frames<'py>(&self, py: Python<'py>, limit: Int) -> Result<Bound<'py, PyList>, Error> {
        let limit = port::limit(&limit)?;
        let (pair, frames) = self.first(|port| port.receive_list(py, limit), |frames| !frames.is_empty())?;
        if self.learns() {
            let bytes = frames.iter().filter_map(|frame| frame.cast_into_exact::<PyBytes>().ok());
            bytes.for_each(|frame| self.steering.learn(frame.as_bytes(), self.number + pair));
        }
        Ok(frames)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        match &self.ends {
            Ends::Driver(ports) => ports.iter().try_for_each(|port| visit.call(port)),
            Ends::Device(ports) => ports.iter().try_for_each(|port| visit.call(port)),
        }
    }
}
