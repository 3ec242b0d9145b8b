//! The virtio-fs device: rings in guest memory, answered through the library's FUSE server.
//!
//! The library's own loop can go on writing to a ring that has been stopped, ends the process on a malformed
//! request, and knows no way back from a stop. This one takes one request at a time under the ring's lock, looks
//! before each whether it may, and answers whatever cannot be understood with an error.

mod init;
mod request;
mod ring;
mod scratch;
mod trace;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VringMutex, VringT};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtiofs_contract::counters::Counters;
use virtiofs_contract::engine::{MAX_QUEUE_SIZE, Predecessor, QUEUES};
use virtiofs_contract::trace::TraceRing;
use virtiofsd::filesystem::FileSystem;
use virtiofsd::server::Server;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use ring::Progress;
use scratch::Scratch;

use crate::ledger::Log;
use crate::tracked::Core;

/// Guest memory, with the bitmap the library's types carry.
pub(crate) type Memory = GuestMemoryMmap<BitmapMmapRegion>;
type AtomicMemory = GuestMemoryAtomic<Memory>;
type Vring = VringMutex<AtomicMemory>;

/// Event number by which a ring thread learns of Resume; those up to [`QUEUES`] are taken by the rings and by
/// the thread's end.
pub(crate) const RESUME_EVENT: u16 = QUEUES as u16 + 1;

/// The device of one guest.
pub(crate) struct Device<F: FileSystem + Sync> {
    server: Server<F>,
    /// The ledger, shared with the file system inside `server`.
    core: Arc<Core>,
    log: Log,
    counters: Arc<Counters>,
    trace: TraceRing,
    /// How the engine before this one ended, until this one has taken over.
    predecessor: Mutex<Option<Predecessor>>,
    /// The FUSE_INIT that `server` was last told of.
    told: Mutex<Option<Vec<u8>>>,
    memory: OnceLock<AtomicMemory>,
    event_idx: AtomicBool,
    paused: AtomicBool,
    resumed: EventFd,
    /// Where replies go that a guest has left no room for, by ring.
    scratch: [Scratch; QUEUES],
    /// Held by a ring's thread while it works on a request of that ring.
    turns: [Mutex<()>; QUEUES],
}

impl<F: FileSystem + Send + Sync + 'static> Device<F> {
    pub(crate) fn new(
        fs: F,
        core: Arc<Core>,
        counters: Arc<Counters>,
        trace: TraceRing,
        predecessor: Predecessor,
    ) -> io::Result<Self> {
        Ok(Device {
            server: Server::new(fs),
            log: core.log(),
            core,
            counters,
            trace,
            predecessor: Mutex::new(Some(predecessor)),
            told: Mutex::new(None),
            memory: OnceLock::new(),
            event_idx: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            resumed: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            scratch: [Scratch::new()?, Scratch::new()?],
            turns: Default::default(),
        })
    }

    /// From now on no ring begins another request.
    pub(crate) fn pause(&self) {
        self.paused.store(true, Ordering::SeqCst);
    }

    /// Waits until `ring`'s request in progress, if any, is done. After [`pause`](Self::pause) the ring is at
    /// rest from then on: whoever takes the turn next sees the pause.
    pub(crate) fn wait_for_rest(&self, ring: usize) {
        drop(self.turn(ring));
    }

    /// From now on, with all rings at rest, this engine writes nothing to the ledger.
    pub(crate) fn rest(&self) {
        self.core.rest();
    }

    /// Serves the rings again, whatever the guest has queued meanwhile included.
    pub(crate) fn resume(&self) {
        self.core.go_on();
        self.paused.store(false, Ordering::SeqCst);
        if let Err(error) = self.resumed.write(1) {
            tracing::warn!("resume: {error}");
        }
    }

    /// What ring threads are to listen to, as [`RESUME_EVENT`].
    pub(crate) fn resume_fd(&self) -> RawFd {
        self.resumed.as_raw_fd()
    }

    /// The path of a node, if it can be told at once.
    pub(crate) fn path_at_once(&self, node: u64) -> Option<Vec<u8>> {
        self.core.path_at_once(node)
    }

    /// The first ring starts, so the engine before this one has come to its end: the ledger is ours from here on.
    fn take_over(&self) {
        let mut predecessor = self.predecessor.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(predecessor) = predecessor.take() {
            self.core.take_over(predecessor);
            // What that engine was working on is not in progress any more; what it has not finished begins anew.
            (0..QUEUES).for_each(|ring| self.counters.set_in_progress(ring, None));
            // The guest may have mounted anew after this engine was prepared. Nothing has been begun yet: another
            // engine may be able to, and wrong answers help nobody.
            if let Err(error) = self.replay_init() {
                tracing::error!("the guest's mount cannot be taken over as it was agreed: {error}");
                std::process::exit(1);
            }
        }
    }

    fn turn(&self, ring: usize) -> MutexGuard<'_, ()> {
        self.turns[ring].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves a ring until it is empty, stopped or paused.
    fn drain(&self, ring: usize, vring: &Vring) {
        loop {
            match self.serve_one(ring, vring) {
                Progress::Served => {}
                Progress::Stopped => return,
                // Without EVENT_IDX the guest always kicks; with it, only where it was asked to: ask, look again.
                Progress::Empty if !self.event_idx.load(Ordering::Relaxed) => return,
                Progress::Empty if !self.more_after_asking(ring, vring) => return,
                Progress::Empty => {}
            }
        }
    }

    fn more_after_asking(&self, ring: usize, vring: &Vring) -> bool {
        let _turn = self.turn(ring);
        let mut state = vring.get_mut();
        if !self.may_serve(&state) {
            return false;
        }
        state.enable_notification().unwrap_or_else(|error| {
            tracing::warn!(ring, "notification: {error}");
            false
        })
    }
}

impl<F: FileSystem + Send + Sync + 'static> VhostUserBackend for Device<F> {
    type Bitmap = BitmapMmapRegion;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        usize::from(MAX_QUEUE_SIZE)
    }

    fn features(&self) -> u64 {
        (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_INDIRECT_DESC)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn reset_device(&self) {
        self.server.destroy();
    }

    fn set_event_idx(&self, enabled: bool) {
        self.event_idx.store(enabled, Ordering::Relaxed);
    }

    fn update_memory(&self, memory: AtomicMemory) -> io::Result<()> {
        // Always a handle on the same memory: the daemon replaces what is behind it.
        self.memory.get_or_init(|| memory);
        Ok(())
    }

    fn handle_event(&self, event: u16, events: EventSet, vrings: &[Vring], _thread: usize) -> io::Result<()> {
        if event == RESUME_EVENT {
            // Drained, not read: several Resumes may have come before this thread woke.
            let _ = self.resumed.read();
            for (ring, vring) in vrings.iter().enumerate() {
                self.drain(ring, vring);
            }
        } else if let Some(vring) = vrings.get(usize::from(event))
            && events.contains(EventSet::IN)
        {
            self.drain(usize::from(event), vring);
        }
        // An error would end the ring's thread, and with it the guest's mount.
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }
}
