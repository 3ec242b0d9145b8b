//! The virtio-fs device: serves the rings in guest memory through the library's FUSE server.
//!
//! The library's own loop can continue to write to a stopped ring, ends the process on a malformed request, and cannot
//! resume after a stop. This one takes one request at a time under the ring's lock, checks before each whether it may, and
//! answers malformed requests with an error.

mod init;
mod reach;
mod request;
mod ring;
mod scratch;
mod trace;
mod unreachable;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VringMutex, VringT};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, QueueT};
use virtiofs_contract::counters::Counters;
use virtiofs_contract::engine::{MAX_QUEUE_SIZE, Predecessor, QUEUES};
use virtiofs_contract::trace::TraceRing;
use virtiofsd::filesystem::FileSystem;
use virtiofsd::server::Server;
use vm_memory::{GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use ring::Progress;
use scratch::Scratch;
use unreachable::Reported;

use crate::ledger::CompletionLog;
use crate::session_fs::SharedState;

/// Guest memory, with the bitmap that the library's types require.
pub(crate) type Memory = GuestMemoryMmap<BitmapMmapRegion>;
type AtomicMemory = GuestMemoryAtomic<Memory>;
type Vring = VringMutex<AtomicMemory>;
/// The descriptor chain of a request.
type Chain = DescriptorChain<GuestMemoryLoadGuard<Memory>>;

/// Event number of Resume for the ring thread. The numbers up to [`QUEUES`] are those of the rings and of the thread's
/// exit.
pub(crate) const RESUME_EVENT: u16 = QUEUES as u16 + 1;

/// Event number of a change of this process's mount table.
pub(crate) const MOUNTS_EVENT: u16 = QUEUES as u16 + 2;

/// The device of one guest.
pub(crate) struct Device<F: FileSystem + Sync> {
    server: Server<F>,
    /// The ledger, shared with the file system inside `server`.
    shared: Arc<SharedState>,
    log: CompletionLog,
    counters: Arc<Counters>,
    trace: TraceRing,
    /// How the engine before this one ended; none after the take-over.
    predecessor: Mutex<Option<Predecessor>>,
    /// The FUSE_INIT request that `server` answered last.
    init_request: Mutex<Option<Vec<u8>>>,
    memory: OnceLock<AtomicMemory>,
    event_idx: AtomicBool,
    paused: AtomicBool,
    resumed: EventFd,
    /// True if the ring thread is to notify the guest of each ring when it wakes.
    notify_guest: AtomicBool,
    /// Takes replies for which the guest left no room, by ring.
    scratch: [Scratch; QUEUES],
    /// Held while a request of that ring is served.
    request_locks: [Mutex<()>; QUEUES],
    /// Reports of guest memory out of reach that this engine has logged.
    reported: Reported,
}

impl<F: FileSystem + Send + Sync + 'static> Device<F> {
    pub(crate) fn new(
        fs: F,
        shared: Arc<SharedState>,
        counters: Arc<Counters>,
        trace: TraceRing,
        predecessor: Predecessor,
    ) -> io::Result<Self> {
        Ok(Device {
            server: Server::new(fs),
            log: shared.completion_log(),
            shared,
            counters,
            trace,
            predecessor: Mutex::new(Some(predecessor)),
            init_request: Mutex::new(None),
            memory: OnceLock::new(),
            event_idx: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            resumed: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            notify_guest: AtomicBool::new(false),
            scratch: [Scratch::new()?, Scratch::new()?],
            request_locks: Default::default(),
            reported: Reported::default(),
        })
    }

    /// Stops all rings from beginning another request.
    pub(crate) fn pause(&self) {
        self.paused.store(true, Ordering::SeqCst);
    }

    /// Waits until the request of `ring` that is in progress, if any, is done. After [`pause`](Self::pause) the ring is
    /// quiesced then.
    pub(crate) fn wait_until_idle(&self, ring: usize) {
        drop(self.request_lock(ring));
    }

    /// Stops this engine from writing to the ledger, with all rings quiesced.
    pub(crate) fn quiesce(&self) {
        self.shared.quiesce();
    }

    /// Serves the rings again, including requests that were queued meanwhile.
    pub(crate) fn resume(&self) {
        self.shared.resume();
        self.paused.store(false, Ordering::SeqCst);
        self.wake();
    }

    /// Serves what waits in the rings, and notifies the guest of each ring.
    pub(crate) fn kick(&self) {
        self.notify_guest.store(true, Ordering::SeqCst);
        self.wake();
    }

    fn wake(&self) {
        if let Err(error) = self.resumed.write(1) {
            tracing::warn!("waking the ring thread: {error}");
        }
    }

    /// The descriptor that the ring thread watches, as [`RESUME_EVENT`].
    pub(crate) fn resume_fd(&self) -> RawFd {
        self.resumed.as_raw_fd()
    }

    /// The path of a node, if no request holds the lock.
    pub(crate) fn try_path_of(&self, node: u64) -> Option<Vec<u8>> {
        self.shared.try_path_of(node)
    }

    /// Takes the ledger over when the first ring starts: the engine before this one has ended.
    fn take_over(&self) {
        let mut predecessor = self.predecessor.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(predecessor) = predecessor.take() {
            self.shared.take_over(predecessor);
            // The requests of that engine are not in progress any more. Unfinished ones begin again.
            (0..QUEUES).for_each(|ring| self.counters.set_in_progress(ring, None));
            (0..QUEUES).for_each(|ring| self.counters.set_waiting_for_memory(ring, false));
            // The guest may have mounted again after this engine was prepared. Nothing has been begun yet, and another
            // engine may be able to serve the mount.
            if let Err(error) = self.replay_init() {
                tracing::error!("cannot serve the guest's mount: {error}");
                std::process::exit(1);
            }
        }
    }

    fn request_lock(&self, ring: usize) -> MutexGuard<'_, ()> {
        self.request_locks[ring].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves a ring until it is empty, stopped or paused.
    fn drain(&self, ring: usize, vring: &Vring) {
        loop {
            match self.serve_one(ring, vring) {
                Progress::Served => {}
                Progress::Stopped => return,
                // Without EVENT_IDX the guest always kicks. With it, only if notifications are enabled: enable, check again.
                Progress::Empty if !self.event_idx.load(Ordering::Relaxed) => return,
                Progress::Empty if !self.has_more_after_enabling_notification(ring, vring) => return,
                Progress::Empty => {}
            }
        }
    }

    fn has_more_after_enabling_notification(&self, ring: usize, vring: &Vring) -> bool {
        let _locked = self.request_lock(ring);
        let mut state = vring.get_mut();
        if !self.may_serve(&state) {
            return false;
        }
        state.enable_notification().unwrap_or_else(|error| {
            tracing::warn!(ring, "enabling notifications: {error}");
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
        // Always a handle of the same memory: the daemon replaces what it refers to.
        self.memory.get_or_init(|| memory);
        // A ring may wait for this memory.
        self.resumed.write(1)
    }

    fn handle_event(&self, event: u16, events: EventSet, vrings: &[Vring], _thread: usize) -> io::Result<()> {
        if event == RESUME_EVENT {
            // Several Resumes and changes of memory may have come before this thread woke.
            let _ = self.resumed.read();
            let notify_guest = self.notify_guest.swap(false, Ordering::SeqCst);
            for (ring, vring) in vrings.iter().enumerate() {
                self.drain(ring, vring);
                if notify_guest {
                    notify(ring, vring);
                }
            }
        } else if event == MOUNTS_EVENT {
            self.shared.mounts_changed();
        } else if let Some(vring) = vrings.get(usize::from(event))
            && events.contains(EventSet::IN)
        {
            self.drain(usize::from(event), vring);
        }
        // An error would end the ring thread, and with it the guest's mount.
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }
}

/// Notifies the guest of a started ring, whatever it has seen of it.
fn notify(ring: usize, vring: &Vring) {
    let state = vring.get_ref();
    if state.get_queue().ready()
        && let Err(error) = state.signal_used_queue()
    {
        tracing::warn!(ring, "notifying the guest: {error}");
    }
}
