//! A guest: memory, front-end, queues and FUSE client, and the events of a VM's life.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::fuse::call::CallError;
use crate::fuse::client::Fuse;
use crate::fuse::init::InitRequest;
use crate::memory::{Allocator, GuestMemory, MemoryError};
use crate::vhost::connection::VhostError;
use crate::vhost::front_end::{
    F_EVENT_IDX, F_INDIRECT, F_PROTOCOL_FEATURES, F_VERSION_1, FrontEnd, Negotiated, Offer, qemu_protocol_features,
};
use crate::virtio::queue::{Queue, QueueConfig, QueueError, Violation};

/// Number of the high-priority queue.
pub const HIPRIO: u32 = 0;
/// Number of the request queue.
pub const REQUESTS: u32 = 1;
/// Size of the memory in which tests place invalid descriptors and buffers.
const SCRATCH: u64 = 64 << 10;
/// FORGETs are small, and few are in flight at a time.
const HIPRIO_PAYLOAD: u64 = 4096;

/// A guest could not be started or changed.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// An error in guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// An error on the vhost-user connection.
    #[error(transparent)]
    Vhost(#[from] VhostError),
    /// An error of a virtqueue.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// FUSE_INIT failed.
    #[error("mounting: {0}")]
    Mount(#[from] CallError),
    /// The socket could not be watched.
    #[error("watching the vhost-user socket: {0}")]
    Watch(std::io::Error),
    /// After a disconnect another back-end offers fewer features than the first.
    #[error("the back-end now offers {now:?}, the guest's driver relies on {before:?}")]
    OffersLess {
        /// The features with which the driver was set up.
        before: Box<Negotiated>,
        /// The features that are offered now.
        now: Box<Negotiated>,
    },
}

/// Configuration of a guest.
#[derive(Debug, Clone)]
pub struct GuestConfig {
    /// The vhost-user socket.
    pub socket: PathBuf,
    /// RAM in bytes.
    pub memory: u64,
    /// File of its RAM; `None`: a memfd.
    pub memory_file: Option<Arc<File>>,
    /// Touches all RAM at the start.
    pub touch_memory: bool,
    /// Splits RAM into two regions at this offset.
    pub split_memory: Option<u64>,
    /// Number of descriptors of the request queue.
    pub queue_size: u16,
    /// Number of descriptors of the high-priority queue.
    pub hiprio_size: u16,
    /// Maximum number of requests in flight.
    pub in_flight: u16,
    /// Maximum length of a read or write in bytes.
    pub payload: u64,
    /// Number of payload bytes per descriptor.
    pub segment: u64,
    /// Polls the used ring instead of waiting for calls.
    pub busy_poll: bool,
    /// Time after which a request counts as hung.
    pub timeout: Duration,
    /// Time limit of a vhost-user reply.
    pub control_timeout: Duration,
    /// Virtio features that the guest accepts.
    pub features: u64,
    /// vhost-user protocol features that the guest accepts.
    pub protocol: u64,
    /// Requests an acknowledgement of every vhost-user message.
    pub acknowledge_all: bool,
    /// Content of FUSE_INIT.
    pub init: InitRequest,
}

impl GuestConfig {
    /// Like a small Linux guest under QEMU.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            memory: 256 << 20,
            memory_file: None,
            touch_memory: false,
            split_memory: None,
            queue_size: 1024,
            hiprio_size: 128,
            in_flight: 64,
            payload: 1 << 20,
            segment: 4096,
            busy_poll: false,
            timeout: Duration::from_secs(120),
            control_timeout: Duration::from_secs(120),
            features: F_VERSION_1 | F_INDIRECT | F_EVENT_IDX | F_PROTOCOL_FEATURES,
            protocol: qemu_protocol_features(),
            acknowledge_all: false,
            init: InitRequest::default(),
        }
    }

    /// Sets the size of RAM.
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory = bytes;
        self
    }

    /// Sets the time limit of requests.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Uses less memory, for many guests at once: 64 MiB and 16 requests in flight.
    pub fn small(mut self) -> Self {
        self.memory = 64 << 20;
        self.in_flight = 16;
        self
    }

    fn offer(&self) -> Offer {
        Offer { features: self.features, protocol: self.protocol, acknowledge_all: self.acknowledge_all }
    }

    fn requests(&self) -> QueueConfig {
        QueueConfig {
            size: self.queue_size,
            in_flight: self.in_flight,
            payload: self.payload,
            segment: self.segment,
            busy_poll: self.busy_poll,
            timeout: self.timeout,
        }
    }

    fn hiprio(&self) -> QueueConfig {
        QueueConfig {
            size: self.hiprio_size,
            in_flight: self.in_flight.min(self.hiprio_size),
            payload: HIPRIO_PAYLOAD,
            ..self.requests()
        }
    }
}

/// A guest whose driver uses a device.
#[derive(Debug)]
pub struct Guest {
    config: GuestConfig,
    memory: Arc<GuestMemory>,
    front_end: Mutex<FrontEnd>,
    negotiated: Negotiated,
    queues: [Arc<Queue>; 2],
    scratch: u64,
    fuse: Fuse,
}

impl Guest {
    /// Connects, starts the rings and mounts (FUSE_INIT).
    pub fn boot(config: GuestConfig) -> Result<Self, GuestError> {
        let guest = Self::power_on(config)?;
        guest.mount()?;
        Ok(guest)
    }

    /// Connects and starts the rings, without any request.
    pub fn power_on(config: GuestConfig) -> Result<Self, GuestError> {
        let memory = Arc::new(match &config.memory_file {
            Some(file) => GuestMemory::in_file(Arc::clone(file), config.memory, config.split_memory)?,
            None => GuestMemory::create(config.memory, config.split_memory)?,
        });
        if config.touch_memory {
            memory.touch()?;
        }
        let front_end = FrontEnd::connect(&config.socket, &config.offer(), config.control_timeout)?;
        let negotiated = *front_end.negotiated();
        let indirect = negotiated.has(F_INDIRECT);
        let event_idx = negotiated.has(F_EVENT_IDX);
        let mut allocator = Allocator::new(&memory);
        let scratch = allocator.take(SCRATCH)?;
        let mut queue = |index, config| {
            let memory = Arc::clone(&memory);
            Queue::new(index, memory, &mut allocator, config, indirect, event_idx)
        };
        let hiprio = queue(HIPRIO, config.hiprio())?;
        let requests = queue(REQUESTS, config.requests())?;
        let guest = Self {
            fuse: Fuse::new(Arc::clone(&requests), Arc::clone(&hiprio)),
            queues: [hiprio, requests],
            scratch,
            front_end: Mutex::new(front_end),
            negotiated,
            memory,
            config,
        };
        guest.start_device(&mut guest.front_end(), [0, 0])?;
        Ok(guest)
    }

    /// Sends FUSE_INIT, as at a mount.
    pub fn mount(&self) -> Result<(), GuestError> {
        self.fuse.init(&self.config.init)?;
        Ok(())
    }

    /// The FUSE client.
    pub fn fuse(&self) -> &Fuse {
        &self.fuse
    }

    /// The configuration of the guest.
    pub fn config(&self) -> &GuestConfig {
        &self.config
    }

    /// Guest RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The features that VMM and back-end negotiated.
    pub fn negotiated(&self) -> &Negotiated {
        &self.negotiated
    }

    /// The high-priority queue and the request queue.
    pub fn queues(&self) -> &[Arc<Queue>; 2] {
        &self.queues
    }

    /// Guest address of 64 KiB of unused memory, for descriptors and buffers of hostile tests.
    pub fn scratch(&self) -> u64 {
        self.scratch
    }

    /// The front-end, for other messages.
    pub fn front_end(&self) -> MutexGuard<'_, FrontEnd> {
        self.front_end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Unexpected used-ring entries of both queues, for example of a request that was done twice.
    pub fn violations(&self) -> Vec<Violation> {
        self.queues.iter().flat_map(|q| q.violations()).collect()
    }

    /// Pauses the VM as a VMM does: stops both rings. Returns the indexes at which they continue, for
    /// [`Guest::resume`]. Requests that the guest makes meanwhile wait on the ring.
    pub fn pause(&self) -> Result<[u16; 2], GuestError> {
        let mut front_end = self.front_end();
        let mut bases = [0; 2];
        for (queue, base) in self.queues.iter().zip(&mut bases) {
            front_end.enable_ring(queue.index(), false)?;
            *base = front_end.stop_ring(queue.index())?;
        }
        Ok(bases)
    }

    /// Resumes the VM as a VMM does (`vhost_dev_start`: features, known memory, rings).
    pub fn resume(&self, bases: [u16; 2]) -> Result<(), GuestError> {
        let mut front_end = self.front_end();
        front_end.set_features()?;
        self.start_rings(&mut front_end, bases)?;
        drop(front_end);
        // A kick may have been sent between stop and start, which the VMM cannot know.
        Ok(self.kick_all()?)
    }

    /// Reboots the guest: stops the rings, resets the device if possible, restarts the driver and mounts again. All
    /// requests in flight, nodes and files are lost.
    pub fn reboot(&self) -> Result<(), GuestError> {
        self.pause()?;
        let mut front_end = self.front_end();
        if front_end.can_reset() {
            front_end.reset_device()?;
        }
        drop(front_end);
        self.reboot_on_running_rings()
    }

    /// Reboots the guest under a VMM that stops and resets nothing (cloud-hypervisor): it sets up the rings again at
    /// the same addresses while they run.
    pub fn reboot_on_running_rings(&self) -> Result<(), GuestError> {
        let mut front_end = self.front_end();
        for queue in &self.queues {
            queue.reset()?;
        }
        front_end.set_features()?;
        self.start_rings(&mut front_end, [0, 0])?;
        drop(front_end);
        self.mount()
    }

    /// Connects again, as cloud-hypervisor does after a disconnect, and continues at the end of the used ring: requests
    /// in flight are served again.
    pub fn reconnect(&self) -> Result<(), GuestError> {
        self.reconnect_to(&self.config.socket)
    }

    /// Like [`Guest::reconnect`], to another socket.
    pub fn reconnect_to(&self, socket: &Path) -> Result<(), GuestError> {
        let mut now = FrontEnd::connect(socket, &self.config.offer(), self.config.control_timeout)?;
        if now.negotiated().features != self.negotiated.features {
            return Err(GuestError::OffersLess { before: Box::new(self.negotiated), now: Box::new(*now.negotiated()) });
        }
        let mut bases = [0; 2];
        for (queue, base) in self.queues.iter().zip(&mut bases) {
            *base = queue.ring_state()?.used;
        }
        self.start_device(&mut now, bases)?;
        *self.front_end() = now;
        Ok(self.kick_all()?)
    }

    fn start_device(&self, front_end: &mut FrontEnd, bases: [u16; 2]) -> Result<(), GuestError> {
        front_end.set_memory(&self.memory)?;
        self.start_rings(front_end, bases)?;
        for queue in &self.queues {
            let socket = front_end.as_fd().try_clone_to_owned();
            queue.watch(Some(socket.map_err(GuestError::Watch)?));
        }
        Ok(())
    }

    fn start_rings(&self, front_end: &mut FrontEnd, bases: [u16; 2]) -> Result<(), VhostError> {
        for (queue, base) in self.queues.iter().zip(bases) {
            front_end.start_ring(&queue.setup(base), &self.memory)?;
        }
        for queue in &self.queues {
            front_end.enable_ring(queue.index(), true)?;
        }
        Ok(())
    }

    fn kick_all(&self) -> Result<(), QueueError> {
        self.queues.iter().try_for_each(|queue| queue.kick())
    }
}
