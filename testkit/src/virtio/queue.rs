//! A virtqueue with requests in flight.
//!
//! Any number of threads can submit requests and wait. One of the waiting threads polls the call eventfd and wakes the
//! others, so a single thread can wait alone.

mod error;
mod eventfd;
mod segments;
mod state;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;
use zerocopy::IntoBytes;

use super::ring::{DESCRIPTOR_SIZE, Descriptor, INDIRECT, Layout, Ring, WRITE};
use crate::memory::{Allocator, GuestMemory, PAGE};
use crate::vhost::front_end::RingSetup;

pub use error::{QueueError, RingState};
use eventfd::{Woken, eventfd, wait_readable};
use segments::{Segments, linked};
pub use state::Violation;
use state::{Buffers, Progress, State};

/// Time after which a used chain without a call counts as a lost wake-up.
const CALL_GRACE: Duration = Duration::from_millis(200);
/// Buffer size for the part of a request that is not payload: header, structs, names, xattr values.
const REQUEST_ROOM: u64 = 24 * PAGE;
/// Buffer size for the part of a reply that is not payload.
const REPLY_ROOM: u64 = PAGE;

/// Settings of a queue.
#[derive(Debug, Clone, Copy)]
pub struct QueueConfig {
    /// Number of descriptors, a power of two.
    pub size: u16,
    /// Maximum number of requests in flight.
    pub in_flight: u16,
    /// Maximum payload of a request in bytes.
    pub payload: u64,
    /// Number of payload bytes per descriptor. A Linux guest uses one descriptor per page.
    pub segment: u64,
    /// Polls used.idx instead of waiting for the call.
    pub busy_poll: bool,
    /// Time after which an unanswered request counts as hung.
    pub timeout: Duration,
}

/// The buffers of a request: bytes that the device reads, and sizes of what it may write.
#[derive(Debug, Default, Clone, Copy)]
pub struct Message<'a> {
    /// Header: device-readable, in a descriptor of its own.
    pub header: &'a [u8],
    /// Structs and names: device-readable, in a descriptor of their own.
    pub arguments: &'a [&'a [u8]],
    /// Payload for the device.
    pub payload: &'a [u8],
    /// Size of the reply's header.
    pub reply_header: u32,
    /// Size of the reply's struct.
    pub reply_arguments: u32,
    /// Size of the reply's payload.
    pub reply_payload: u32,
}

impl Message<'_> {
    fn arguments_len(&self) -> u64 {
        self.arguments.iter().map(|part| part.len() as u64).sum()
    }
}

/// A request in flight. If it is dropped without a wait, the request stays in flight and its reply is discarded.
#[derive(Debug)]
pub struct Ticket {
    queue: Arc<Queue>,
    head: u16,
    serial: u64,
    buffers: Buffers,
}

/// A virtqueue with its buffers.
#[derive(Debug)]
pub struct Queue {
    index: u32,
    memory: Arc<GuestMemory>,
    config: QueueConfig,
    indirect: bool,
    event_idx: bool,
    kick: EventFd,
    call: EventFd,
    /// The vhost-user socket, watched for a hang-up.
    hangup: Mutex<Option<Arc<OwnedFd>>>,
    state: Mutex<State>,
    progress: Condvar,
}

impl Queue {
    /// Allocates a queue in guest memory.
    pub fn new(
        index: u32,
        memory: Arc<GuestMemory>,
        allocator: &mut Allocator,
        config: QueueConfig,
        indirect: bool,
        event_idx: bool,
    ) -> Result<Arc<Self>, QueueError> {
        let layout = Layout::allocate(allocator, config.size)?;
        let buffers = (0..config.in_flight).map(|_| Buffers::allocate(allocator, &config)).collect::<Result<_, _>>()?;
        let ring = Ring::new(Arc::clone(&memory), layout, event_idx)?;
        Ok(Arc::new(Self {
            index,
            memory,
            config,
            indirect,
            event_idx,
            kick: eventfd()?,
            call: eventfd()?,
            hangup: Mutex::new(None),
            state: Mutex::new(State::new(ring, buffers)),
            progress: Condvar::new(),
        }))
    }

    /// Number of the queue.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Settings of the queue.
    pub fn config(&self) -> &QueueConfig {
        &self.config
    }

    /// Parameters with which the front-end starts this ring at `base`.
    pub fn setup(&self, base: u16) -> RingSetup<'_> {
        RingSetup {
            index: self.index,
            size: self.config.size,
            base,
            addresses: self.lock().ring.layout().addresses(),
            kick: self.kick.as_fd(),
            call: self.call.as_fd(),
        }
    }

    /// Watches a socket for a hang-up while waiting.
    pub fn watch(&self, socket: Option<OwnedFd>) {
        *lock(&self.hangup) = socket.map(Arc::new);
        self.lock().hung_up = false;
    }

    /// Kicks the device unconditionally.
    pub fn kick(&self) -> Result<(), QueueError> {
        self.kick.write(1).map(drop).map_err(|source| QueueError::Event { what: "kicking the device", source })
    }

    /// Indexes of both sides.
    pub fn ring_state(&self) -> Result<RingState, QueueError> {
        Ok(self.lock().ring_state()?)
    }

    /// Number of requests in flight, including abandoned ones.
    pub fn in_flight(&self) -> usize {
        self.lock().flights.iter().flatten().count()
    }

    /// Used-ring entries that belong to no request.
    pub fn violations(&self) -> Vec<Violation> {
        self.lock().violations.clone()
    }

    /// Gives access to the ring itself, without any tracking, for hostile tests.
    pub fn with_ring<T>(&self, act: impl FnOnce(&mut Ring, &GuestMemory) -> T) -> T {
        act(&mut self.lock().ring, &self.memory)
    }

    /// Resets the driver as a guest does: the ring is empty at index 0, and requests in flight are lost.
    pub fn reset(&self) -> Result<(), QueueError> {
        let mut state = self.lock();
        let layout = *state.ring.layout();
        state.ring = Ring::new(Arc::clone(&self.memory), layout, self.event_idx)?;
        let ended: Vec<_> = state.flights.iter_mut().filter_map(Option::take).collect();
        for flight in ended {
            state.recycle(flight);
        }
        self.progress.notify_all();
        Ok(())
    }

    /// Submits a request, and kicks the device if it requests a kick.
    pub fn submit(self: &Arc<Self>, message: &Message<'_>) -> Result<Ticket, QueueError> {
        self.check_room(message)?;
        let deadline = Instant::now() + self.config.timeout;
        let (state, buffers) = self.wait_until(self.lock(), deadline, State::take_buffers)?;
        drop(state);
        let segments = self.fill(&buffers, message)?;
        let needed = if self.indirect { 1 } else { segments.len() };
        let (mut state, descriptors) =
            self.wait_until(self.lock(), deadline, |state| state.take_descriptors(needed))?;
        let head = self.describe(&state, &buffers, &segments, &descriptors)?;
        let serial = state.take_off(head, buffers, descriptors, &segments);
        let wanted = state.ring.publish(head)?;
        drop(state);
        if wanted {
            self.kick()?;
        }
        Ok(Ticket { queue: Arc::clone(self), head, serial, buffers })
    }

    fn check_room(&self, message: &Message<'_>) -> Result<(), QueueError> {
        let request = message.header.len() as u64 + message.arguments_len();
        let reply = u64::from(message.reply_header) + u64::from(message.reply_arguments);
        let payload = (message.payload.len() as u64).max(message.reply_payload.into());
        for (what, len, room) in [
            ("a request", request, REQUEST_ROOM),
            ("a reply", reply, REPLY_ROOM),
            ("a payload", payload, self.config.payload),
        ] {
            if len > room {
                return Err(QueueError::TooLong { what, len, room });
            }
        }
        Ok(())
    }

    /// Copies the request to guest memory. Returns its descriptors, not linked yet.
    fn fill(&self, buffers: &Buffers, message: &Message<'_>) -> Result<Vec<Descriptor>, QueueError> {
        let mut segments = Segments::new(self.config.segment);
        self.memory.write(buffers.request, message.header)?;
        let mut at = buffers.request + message.header.len() as u64;
        segments.add(buffers.request, message.header.len() as u64, 0);
        for part in message.arguments {
            self.memory.write(at, part)?;
            at += part.len() as u64;
        }
        let arguments = message.arguments_len();
        segments.add(at - arguments, arguments, 0);
        self.memory.write(buffers.payload, message.payload)?;
        segments.add_pieces(buffers.payload, message.payload.len() as u64, 0);

        let reply_header = u64::from(message.reply_header);
        segments.add(buffers.reply, reply_header, WRITE);
        let arguments = u64::from(message.reply_arguments);
        segments.add(buffers.reply + reply_header, arguments, WRITE);
        segments.add_pieces(buffers.payload, message.reply_payload.into(), WRITE);
        Ok(segments.list)
    }

    /// Links the segments into a chain, in the ring or in an indirect table (section 2.7.5.3).
    fn describe(
        &self,
        state: &State,
        buffers: &Buffers,
        segments: &[Descriptor],
        descriptors: &[u16],
    ) -> Result<u16, QueueError> {
        let head = descriptors[0];
        if self.indirect {
            let table: Vec<Descriptor> = linked(segments, |i| i as u16 + 1).collect();
            self.memory.write(buffers.table, table.as_bytes())?;
            let entry = Descriptor {
                address: buffers.table,
                len: segments.len() as u32 * DESCRIPTOR_SIZE as u32,
                flags: INDIRECT,
                next: 0,
            };
            state.ring.write_descriptor(head, entry)?;
            return Ok(head);
        }
        let chain = linked(segments, |i| descriptors[i + 1]);
        for (descriptor, &index) in chain.zip(descriptors) {
            state.ring.write_descriptor(index, descriptor)?;
        }
        Ok(head)
    }

    /// Processes used chains until `ready` returns a value.
    fn wait_until<'a, T>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        deadline: Instant,
        mut ready: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<(MutexGuard<'a, State>, T), QueueError> {
        loop {
            if let Some(value) = ready(&mut state) {
                return Ok((state, value));
            }
            let now = Instant::now();
            if state.hung_up {
                return Err(QueueError::Disconnected { ring: self.index });
            }
            if now >= deadline {
                return Err(self.full(&state));
            }
            state = self.step(state, deadline - now)?;
        }
    }

    fn full(&self, state: &State) -> QueueError {
        QueueError::Full { ring: self.index, in_flight: state.flights.iter().flatten().count() }
    }

    /// One step of waiting: polls, or waits for the thread that polls. Returns when there is progress, at the latest
    /// after `timeout`.
    fn step<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        timeout: Duration,
    ) -> Result<MutexGuard<'a, State>, QueueError> {
        if state.polled {
            let (state, _) = self.progress.wait_timeout(state, timeout).unwrap_or_else(PoisonError::into_inner);
            return Ok(state);
        }
        if state.harvest(self.index)? || self.arm(&mut state)? {
            self.progress.notify_all();
            return Ok(state);
        }
        state.polled = true;
        drop(state);
        let polled = self.poll_once(timeout);
        let mut state = self.lock();
        state.polled = false;
        // The woken threads choose the next one that polls.
        self.progress.notify_all();
        let woken = polled?;
        // Only after a call: a used chain without a call is what this driver detects.
        if woken.called || woken.hung_up {
            state.harvest(self.index)?;
        }
        state.hung_up |= woken.hung_up;
        Ok(state)
    }

    /// Requests a call for the next used chain. True if one was used in the meantime.
    fn arm(&self, state: &mut State) -> Result<bool, QueueError> {
        if self.config.busy_poll {
            state.ring.disable_calls()?;
            return Ok(false);
        }
        Ok(state.ring.enable_calls()? && state.harvest(self.index)?)
    }

    /// Waits for the call.
    fn poll_once(&self, timeout: Duration) -> Result<Woken, QueueError> {
        if self.config.busy_poll {
            std::thread::yield_now();
            return Ok(Woken { called: true, hung_up: false });
        }
        let socket = lock(&self.hangup).clone();
        let watched = socket.as_deref().map(AsFd::as_fd);
        let woken = wait_readable(self.call.as_fd(), watched, timeout)?;
        if woken.called {
            self.clear_call();
        }
        Ok(woken)
    }

    fn clear_call(&self) {
        // Fails if another thread has already read it, which then processes the chains.
        let _ = self.call.read();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl Ticket {
    /// Waits for the device. Returns the number of bytes that it reports as written.
    pub fn wait(&self) -> Result<u32, QueueError> {
        self.wait_for(self.queue.config.timeout)
    }

    /// Waits at most `timeout`.
    pub fn wait_for(&self, timeout: Duration) -> Result<u32, QueueError> {
        let queue = &self.queue;
        let started = Instant::now();
        let deadline = started + timeout;
        let waited = queue.wait_until(queue.lock(), deadline, |state| state.outcome(self));
        match waited {
            Ok((_, Some(len))) => Ok(len),
            Ok((_, None)) => Err(QueueError::Reset { ring: queue.index }),
            Err(QueueError::Full { .. }) => self.late(started),
            Err(error) => Err(error),
        }
    }

    /// After the deadline: checks the used ring once more. If the request is used, waits a moment for its call, which
    /// the device sends after it has written the ring.
    fn late(&self, started: Instant) -> Result<u32, QueueError> {
        let queue = &self.queue;
        let woken = wait_readable(queue.call.as_fd(), None, CALL_GRACE)?;
        let mut state = queue.lock();
        if woken.called || queue.config.busy_poll {
            queue.clear_call();
            state.harvest(queue.index)?;
            queue.progress.notify_all();
        }
        match state.outcome(self) {
            Some(Some(len)) => Ok(len),
            _ => Err(state.timeout_error(queue.index, started.elapsed())),
        }
    }

    /// Copies from the reply, starting at `offset` from its header.
    pub fn reply(&self, offset: u32, data: &mut [u8]) -> Result<(), QueueError> {
        let at = self.buffers.reply + u64::from(offset);
        Ok(self.queue.memory.read(at, data)?)
    }

    /// Copies the reply's payload.
    pub fn payload(&self, data: &mut [u8]) -> Result<(), QueueError> {
        Ok(self.queue.memory.read(self.buffers.payload, data)?)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.queue.lock();
        if let Some(flight) = state.flight(self) {
            if flight.progress == Progress::InFlight {
                flight.progress = Progress::Abandoned;
            } else if let Some(flight) = state.flights[self.head as usize].take() {
                state.recycle(flight);
                self.queue.progress.notify_all();
            }
        }
    }
}

/// Locks even if another thread panicked, so that one failed test does not fail all others.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MESSAGE: Message<'static> = Message {
        header: b"header",
        arguments: &[b"arguments"],
        payload: &[],
        reply_header: 16,
        reply_arguments: 0,
        reply_payload: 0,
    };

    fn queue(indirect: bool) -> Arc<Queue> {
        let memory = Arc::new(GuestMemory::create(16 << 20, None).unwrap());
        let config = QueueConfig {
            size: 16,
            in_flight: 4,
            payload: 8192,
            segment: 4096,
            busy_poll: false,
            timeout: Duration::from_millis(50),
        };
        let mut allocator = Allocator::new(&memory);
        Queue::new(REQUESTS, Arc::clone(&memory), &mut allocator, config, indirect, true).unwrap()
    }

    const REQUESTS: u32 = 1;

    /// Returns the chain at `head` without a call, as a device does.
    fn device_returns(queue: &Queue, head: u32, len: u32) {
        queue.with_ring(|ring, memory| {
            let (layout, position) = (*ring.layout(), ring.used_index().unwrap());
            let slot = layout.used + 4 + 8 * u64::from(position % layout.size);
            memory.store(slot, head).unwrap();
            memory.store(slot + 4, len).unwrap();
            memory.store(layout.used + 2, position.wrapping_add(1)).unwrap();
        });
    }

    #[test]
    fn a_lost_wakeup_is_distinguished_from_a_hang() {
        let queue = queue(true);
        let ticket = queue.submit(&MESSAGE).unwrap();
        let waiting = std::thread::scope(|threads| {
            let waiting = threads.spawn(|| ticket.wait());
            std::thread::sleep(Duration::from_millis(20));
            device_returns(&queue, ticket.head.into(), 16);
            waiting.join().unwrap()
        });
        assert!(matches!(waiting, Err(QueueError::LostWakeup { .. })), "{waiting:?}");
        let hung = queue.submit(&MESSAGE).unwrap();
        // The forgotten reply is processed with the next chains; this request stays in flight.
        assert!(matches!(hung.wait(), Err(QueueError::Hung { .. })));
    }

    #[test]
    fn a_reply_with_a_call_is_received() {
        let queue = queue(true);
        let ticket = queue.submit(&MESSAGE).unwrap();
        device_returns(&queue, ticket.head.into(), 16);
        queue.call.write(1).unwrap();
        assert_eq!(ticket.wait().unwrap(), 16);
        assert_eq!(queue.violations(), []);
    }

    #[test]
    fn repeated_used_entries_are_violations() {
        let queue = queue(true);
        let ticket = queue.submit(&MESSAGE).unwrap();
        device_returns(&queue, ticket.head.into(), 16);
        device_returns(&queue, ticket.head.into(), 16);
        queue.call.write(1).unwrap();
        ticket.wait().unwrap();
        drop(ticket);
        device_returns(&queue, 3, 0);
        let other = queue.submit(&MESSAGE).unwrap();
        device_returns(&queue, other.head.into(), 17);
        queue.call.write(1).unwrap();
        other.wait().unwrap();
        let violations: Vec<String> = queue.violations().into_iter().map(|v| v.0).collect();
        assert_eq!(violations.len(), 3, "{violations:?}");
    }

    #[test]
    fn an_abandoned_request_releases_its_buffers_when_it_is_used() {
        let queue = queue(false);
        for _ in 0..8 {
            let ticket = queue.submit(&MESSAGE).unwrap();
            let head = ticket.head;
            drop(ticket);
            assert_eq!(queue.in_flight(), 1);
            device_returns(&queue, head.into(), 0);
            queue.call.write(1).unwrap();
            let probe = queue.submit(&MESSAGE).unwrap();
            device_returns(&queue, probe.head.into(), 0);
            probe.wait().unwrap();
            drop(probe);
            assert_eq!(queue.in_flight(), 0);
        }
    }

    #[test]
    fn a_reset_ends_requests_in_flight() {
        let queue = queue(false);
        let ticket = queue.submit(&MESSAGE).unwrap();
        queue.reset().unwrap();
        assert!(matches!(ticket.wait(), Err(QueueError::Reset { .. })));
        assert_eq!(queue.ring_state().unwrap().available, 0);
    }

    #[test]
    fn oversized_arguments_are_rejected() {
        let queue = queue(true);
        let long = vec![0; 8193];
        let message = Message { payload: &long, ..MESSAGE };
        assert!(matches!(queue.submit(&message), Err(QueueError::TooLong { .. })));
    }
}
