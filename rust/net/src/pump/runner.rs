//! The loop that runs pumps: any group of them, on the thread that calls it, asleep when none has anything to do.

use super::{Step, gone};
use crate::error::BurstError;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::time::{Duration, Instant};
use virtio_memory::{EventFd, MAX_WAITED, MemoryError, wait_ready};

/// The most pumps of one runner: each has a TAP and an event to wait for, and all have one that wakes the runner.
pub const MAX_STATIONS: usize = (MAX_WAITED - 1) / 2;

/// How long a pump sleeps whose buffers come back without anybody telling it.
const SOON: Duration = Duration::from_millis(1);

/// How long a thread that has something to do beside lets it wait, and how many rounds go by before it looks at the time.
const BESIDE: Duration = Duration::from_millis(200);
const ROUNDS: u32 = 64;

/// Linux' EINTR: a signal handler ran.
const EINTR: i32 = 4;
/// Linux' EPIPE: nobody is at the other end any more.
const EPIPE: i32 = 32;

/// A pump with its queue, its TAP and what wakes it.
pub trait Station {
    /// What stops it.
    type Error: From<BurstError>;

    /// Moves one burst, publishes and notifies: all under the queue's lock, which nobody holds between two calls.
    ///
    /// # Errors
    /// Whatever ends this pump: [`Station::ended`] gets it.
    fn step(&mut self) -> Result<Step, Self::Error>;

    /// Asks for a notification; true if there is something to look at already.
    ///
    /// # Errors
    /// As [`Station::step`].
    fn arm(&mut self) -> Result<bool, Self::Error>;

    /// Asks for no notifications.
    fn disarm(&mut self);

    /// The TAP; non-blocking.
    fn tap(&self) -> BorrowedFd<'_>;

    /// What the other end signals: the interrupt of a driver's queue, the doorbell of a device's.
    fn event(&self) -> &EventFd;

    /// The runner goes to sleep.
    fn sleeps(&mut self);

    /// It is not called any more.
    fn ended(&mut self, error: Self::Error);
}

/// What ends a runner, or wakes it so that it looks at its queues: for other threads.
#[derive(Debug)]
pub struct Wake {
    event: EventFd,
    stop: AtomicBool,
}

impl Wake {
    /// For one runner.
    ///
    /// # Errors
    /// `Os` if the process has no descriptor left.
    pub fn new() -> Result<Self, MemoryError> {
        Ok(Self { event: EventFd::new()?, stop: AtomicBool::new(false) })
    }

    /// Ends the runner after the step that it is in, or as soon as it starts.
    pub fn stop(&self) {
        self.stop.store(true, Release);
        self.look();
    }

    /// Makes the runner look at all its queues, if it sleeps: one was closed, or broke.
    pub fn look(&self) {
        // Our own eventfd takes every signal.
        let _ = self.event.signal();
    }

    /// Whether it was stopped.
    pub fn stopped(&self) -> bool {
        self.stop.load(Acquire)
    }
}

/// A station, and what the runner knows of it.
struct Place<'a, S> {
    station: &'a mut S,
    last: Step,
    armed: bool,
}

impl<S: Station> Place<'_, S> {
    fn disarm(&mut self) {
        if std::mem::take(&mut self.armed) {
            self.station.disarm();
        }
    }
}

/// What the runner's thread does beside: true ends the runner.
pub type Beside<'a> = &'a mut (dyn FnMut() -> bool + Send);

/// Runs these pumps until [`Wake::stop`], or until all of them have ended. One that fails is told so by [`Station::ended`]; the others go on.
/// `beside` is called a few times a second, and when a signal handler ran while they slept.
///
/// # Errors
/// `BadSize` for more than [`MAX_STATIONS`]; `Os` if the kernel lets nobody sleep.
pub fn run<S: Station>(stations: &mut [S], wake: &Wake, mut beside: Option<Beside<'_>>) -> Result<(), MemoryError> {
    if stations.len() > MAX_STATIONS {
        let (value, max) = (stations.len() as u64, MAX_STATIONS as u64);
        return Err(MemoryError::BadSize { what: "number of pumps", value, min: 0, max, multiple_of: 1 });
    }
    let mut places: Vec<_> = stations.iter_mut().map(|station| Place { station, last: Step::default(), armed: false }).collect();
    let longest = beside.as_ref().map(|_| BESIDE);
    let (mut rounds, mut last) = (0u32, Instant::now());
    while !places.is_empty() && !wake.stopped() {
        let mut moved = false;
        keep(&mut places, |place| {
            place.last = place.station.step()?;
            moved |= place.last.moved > 0;
            Ok(())
        });
        let interrupted = !moved && !places.is_empty() && rest(&mut places, wake, longest)?;
        let Some(beside) = &mut beside else { continue };
        rounds = rounds.wrapping_add(1);
        if interrupted || ((!moved || rounds.is_multiple_of(ROUNDS)) && last.elapsed() >= BESIDE) {
            last = Instant::now();
            if beside() {
                break;
            }
        }
    }
    Ok(())
}

/// Calls this with every place; those where it fails have ended.
fn keep<S: Station>(places: &mut Vec<Place<'_, S>>, mut call: impl FnMut(&mut Place<'_, S>) -> Result<(), S::Error>) {
    places.retain_mut(|place| match call(place) {
        Ok(()) => true,
        Err(error) => {
            place.station.ended(error);
            false
        }
    });
}

/// Nothing moved: asks to be told, looks again, and sleeps, at most as long as this; whether a signal handler ran.
fn rest<S: Station>(places: &mut Vec<Place<'_, S>>, wake: &Wake, longest: Option<Duration>) -> Result<bool, MemoryError> {
    let (before, mut found) = (places.len(), false);
    keep(places, |place| {
        if place.last.starved {
            place.armed = true;
            // Buffers that were not enough are there still, and no news.
            found |= place.station.arm()? && !place.last.soon;
        }
        Ok(())
    });
    let interrupted = !found && places.len() == before && sleep(places, wake, longest)?;
    places.iter_mut().for_each(Place::disarm);
    Ok(interrupted)
}

/// Sleeps until somebody signals, or a TAP that is wanted has a frame; whether a signal handler ran instead.
fn sleep<S: Station>(places: &mut Vec<Place<'_, S>>, wake: &Wake, longest: Option<Duration>) -> Result<bool, MemoryError> {
    places.iter_mut().for_each(|place| place.station.sleeps());
    let soon = places.iter().any(|place| place.last.soon).then_some(SOON).or(longest);
    let all = places.iter().flat_map(|place| {
        let Place { station, last, armed } = place;
        [(station.tap(), !last.starved), (station.event().as_fd(), *armed)]
    });
    let ready = match wait_ready(std::iter::once((wake.event.as_fd(), true)).chain(all), soon) {
        Err(MemoryError::Os { errno: EINTR, .. }) => return Ok(true),
        ready => ready?,
    };
    if ready.readable & 1 != 0 {
        wake.event.drain()?;
    }
    let mut bit = 1;
    keep(places, |place| {
        let (tap, event) = (1 << bit, 1 << (bit + 1));
        bit += 2;
        // The other end may fill an eventfd to where the kernel calls it an error, and until it is drained nobody sleeps.
        if (ready.readable | ready.failed) & event != 0 {
            place.station.event().drain().map_err(BurstError::from)?;
        }
        if ready.failed & tap != 0 {
            place.disarm();
            return Err(gone().into());
        }
        if ready.lost & event != 0 {
            place.disarm();
            return Err(BurstError::from(MemoryError::Os { operation: "poll", errno: EPIPE }).into());
        }
        Ok(())
    });
    Ok(false)
}
