//! Requests in flight: their descriptors, buffers and progress.

use std::time::Duration;

use super::{QueueConfig, QueueError, REPLY_ROOM, REQUEST_ROOM, RingState, Ticket};
use crate::memory::{Allocator, MemoryError};
use crate::virtio::ring::{DESCRIPTOR_SIZE, Descriptor, Ring, WRITE};

/// Additional entries of an indirect table: header and struct in both directions.
const FIXED_SEGMENTS: u64 = 8;

/// Guest addresses of the buffers of a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Buffers {
    pub(super) table: u64,
    pub(super) request: u64,
    pub(super) reply: u64,
    pub(super) payload: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    InFlight,
    Done(u32),
    /// No thread waits any more; the device may still write to the buffers.
    Abandoned,
}

#[derive(Debug)]
pub(super) struct Flight {
    pub(super) serial: u64,
    pub(super) buffers: Buffers,
    pub(super) descriptors: Vec<u16>,
    pub(super) writable: u64,
    pub(super) progress: Progress,
}

/// A chain on the used ring that the driver did not expect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation(pub String);

#[derive(Debug)]
pub(super) struct State {
    pub(super) ring: Ring,
    pub(super) free_descriptors: Vec<u16>,
    pub(super) free_buffers: Vec<Buffers>,
    pub(super) flights: Vec<Option<Flight>>,
    pub(super) serial: u64,
    pub(super) polled: bool,
    pub(super) hung_up: bool,
    pub(super) violations: Vec<Violation>,
}

impl Buffers {
    pub(super) fn allocate(allocator: &mut Allocator, config: &QueueConfig) -> Result<Self, MemoryError> {
        let pieces = config.payload.div_ceil(config.segment) + FIXED_SEGMENTS;
        Ok(Self {
            table: allocator.take(pieces * DESCRIPTOR_SIZE)?,
            request: allocator.take(REQUEST_ROOM)?,
            reply: allocator.take(REPLY_ROOM)?,
            payload: allocator.take(config.payload)?,
        })
    }
}

impl State {
    pub(super) fn new(ring: Ring, free_buffers: Vec<Buffers>) -> Self {
        let size = ring.layout().size;
        Self {
            ring,
            free_descriptors: (0..size).rev().collect(),
            free_buffers,
            flights: (0..size).map(|_| None).collect(),
            serial: 0,
            polled: false,
            hung_up: false,
            violations: Vec::new(),
        }
    }

    pub(super) fn ring_state(&self) -> Result<RingState, MemoryError> {
        Ok(RingState {
            available: self.ring.next_available(),
            used: self.ring.used_index()?,
            last_used: self.ring.last_used(),
            avail_event: self.ring.avail_event()?,
        })
    }

    pub(super) fn take_buffers(&mut self) -> Option<Buffers> {
        self.free_buffers.pop()
    }

    pub(super) fn take_descriptors(&mut self, count: usize) -> Option<Vec<u16>> {
        let rest = self.free_descriptors.len().checked_sub(count)?;
        Some(self.free_descriptors.split_off(rest))
    }

    pub(super) fn take_off(
        &mut self,
        head: u16,
        buffers: Buffers,
        descriptors: Vec<u16>,
        segments: &[Descriptor],
    ) -> u64 {
        self.serial += 1;
        let writable = segments.iter().filter(|s| s.flags & WRITE != 0);
        self.flights[head as usize] = Some(Flight {
            serial: self.serial,
            buffers,
            descriptors,
            writable: writable.map(|s| u64::from(s.len)).sum(),
            progress: Progress::InFlight,
        });
        self.serial
    }

    /// Processes all used chains. True if there were any.
    pub(super) fn harvest(&mut self, ring: u32) -> Result<bool, MemoryError> {
        let mut any = false;
        while let Some(used) = self.ring.pop_used()? {
            any = true;
            if let Err(what) = self.land(used.head, used.len) {
                self.violations.push(Violation(format!("ring {ring}: {what}")));
            }
        }
        Ok(any)
    }

    pub(super) fn land(&mut self, head: u32, len: u32) -> Result<(), String> {
        let flight =
            self.flights.get_mut(head as usize).ok_or_else(|| format!("used head {head} is not a descriptor"))?;
        let Some(current) = flight else {
            return Err(format!("used head {head} was not in flight (used twice?)"));
        };
        match current.progress {
            Progress::InFlight => current.progress = Progress::Done(len),
            Progress::Done(_) => return Err(format!("head {head} was used twice")),
            Progress::Abandoned => {
                if let Some(flight) = flight.take() {
                    self.recycle(flight);
                }
                return Ok(());
            }
        }
        if u64::from(len) > current.writable {
            return Err(format!("head {head}: {len} bytes written into {}", current.writable));
        }
        Ok(())
    }

    pub(super) fn recycle(&mut self, flight: Flight) {
        self.free_descriptors.extend(flight.descriptors);
        self.free_buffers.push(flight.buffers);
    }

    pub(super) fn flight(&mut self, ticket: &Ticket) -> Option<&mut Flight> {
        self.flights[ticket.head as usize].as_mut().filter(|flight| flight.serial == ticket.serial)
    }

    /// `Some(None)` if a reset ended the request.
    pub(super) fn outcome(&mut self, ticket: &Ticket) -> Option<Option<u32>> {
        match self.flight(ticket) {
            None => Some(None),
            Some(flight) => match flight.progress {
                Progress::Done(len) => Some(Some(len)),
                Progress::InFlight | Progress::Abandoned => None,
            },
        }
    }

    /// The error of a request that was not used in time.
    pub(super) fn timeout_error(&self, ring: u32, waited: Duration) -> QueueError {
        match self.ring_state() {
            Ok(state) if state.used != state.last_used => QueueError::LostWakeup { ring, waited },
            Ok(state) => QueueError::Hung { ring, waited, state },
            Err(error) => error.into(),
        }
    }
}
