//! Messages of a VMM to a vhost-user-fs back-end, in QEMU's order (`vhost_user_backend_init`, `vhost_dev_start`,
//! `vhost_virtqueue_start`).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use ::vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::connection::{Connection, Request, VERSION, VhostError};
use crate::memory::{GuestMemory, Region};

/// VHOST_USER_F_PROTOCOL_FEATURES.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// VIRTIO_F_VERSION_1.
pub const F_VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
/// VIRTIO_F_INDIRECT_DESC.
pub const F_INDIRECT: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// VIRTIO_F_EVENT_IDX.
pub const F_EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// The protocol features that QEMU uses if the back-end offers them, as far as this front-end implements them. Like
/// QEMU without CONFIG: the tag of vhost-user-fs is from the command line.
pub fn qemu_protocol_features() -> u64 {
    (Protocol::MQ
        | Protocol::REPLY_ACK
        | Protocol::BACKEND_REQ
        | Protocol::BACKEND_SEND_FD
        | Protocol::CONFIGURE_MEM_SLOTS
        | Protocol::RESET_DEVICE)
        .bits()
}

/// Features that the front-end accepts.
#[derive(Debug, Clone, Copy)]
pub struct Offer {
    /// Virtio feature bits.
    pub features: u64,
    /// vhost-user protocol feature bits.
    pub protocol: u64,
    /// Requests an acknowledgement of every message, not only of memory.
    pub acknowledge_all: bool,
}

/// Result of the negotiation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Negotiated {
    /// Virtio feature bits the back-end offered.
    pub offered_features: u64,
    /// Protocol feature bits the back-end offered.
    pub offered_protocol: u64,
    /// Negotiated virtio feature bits.
    pub features: u64,
    /// Negotiated protocol feature bits.
    pub protocol: u64,
    /// Number of rings that the back-end supports, if MQ was negotiated.
    pub queues: Option<u64>,
    /// Number of memory slots that the back-end supports, if CONFIGURE_MEM_SLOTS was negotiated.
    pub memory_slots: Option<u64>,
}

impl Negotiated {
    /// True if a virtio feature was negotiated.
    pub fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    fn has_protocol(&self, feature: Protocol) -> bool {
        self.protocol & feature.bits() != 0
    }
}

/// Parameters that a back-end needs to start a ring.
#[derive(Debug)]
pub struct RingSetup<'a> {
    /// Number of the ring.
    pub index: u32,
    /// Number of its descriptors.
    pub size: u16,
    /// Index in the available ring at which to continue.
    pub base: u16,
    /// Guest addresses of descriptor table, available ring and used ring.
    pub addresses: [u64; 3],
    /// The eventfd the guest kicks.
    pub kick: BorrowedFd<'a>,
    /// The eventfd the back-end calls.
    pub call: BorrowedFd<'a>,
}

/// A connection with negotiated features.
#[derive(Debug)]
pub struct FrontEnd {
    connection: Connection,
    negotiated: Negotiated,
    acknowledge_all: bool,
    /// The front-end's end of the back-end's request channel. virtiofs does not use it, but a VMM opens it.
    _requests: Option<UnixStream>,
}

impl FrontEnd {
    /// Connects and negotiates.
    pub fn connect(path: &Path, offer: &Offer, timeout: Duration) -> Result<Self, VhostError> {
        Self::negotiate(Connection::connect(path, timeout)?, offer)
    }

    /// Negotiates features on a connection.
    pub fn negotiate(mut connection: Connection, offer: &Offer) -> Result<Self, VhostError> {
        let offered_features = connection.request(Request::GET_FEATURES)?;
        if offered_features & F_VERSION_1 == 0 {
            return Err(VhostError::NotOffered("VIRTIO_F_VERSION_1"));
        }
        let mut negotiated = Negotiated {
            offered_features,
            offered_protocol: 0,
            features: offered_features & offer.features,
            protocol: 0,
            queues: None,
            memory_slots: None,
        };
        if negotiated.has(F_PROTOCOL_FEATURES) {
            agree_on_protocol(&mut connection, offer, &mut negotiated)?;
        }
        let requests = request_channel(&mut connection, &negotiated)?;
        connection.send(Request::SET_OWNER, VERSION, &[], &[])?;
        let mut front_end =
            Self { connection, negotiated, acknowledge_all: offer.acknowledge_all, _requests: requests };
        front_end.set_features()?;
        Ok(front_end)
    }

    /// Result of the negotiation.
    pub fn negotiated(&self) -> &Negotiated {
        &self.negotiated
    }

    /// The connection, for other messages.
    pub fn connection(&mut self) -> &mut Connection {
        &mut self.connection
    }

    /// Sends the negotiated features (again), as at each start of the device.
    pub fn set_features(&mut self) -> Result<(), VhostError> {
        let features = self.negotiated.features;
        self.send(Request::SET_FEATURES, &features.to_le_bytes(), &[])
    }

    /// Sends the regions of guest memory: slot by slot if CONFIGURE_MEM_SLOTS was negotiated (like QEMU), otherwise in
    /// one table.
    pub fn set_memory(&mut self, memory: &GuestMemory) -> Result<(), VhostError> {
        let regions = memory.regions();
        if self.negotiated.has_protocol(Protocol::CONFIGURE_MEM_SLOTS) {
            return regions.iter().try_for_each(|region| self.plug(memory, region));
        }
        let mut body = (regions.len() as u64).to_le_bytes().to_vec();
        for region in &regions {
            body.extend(words(&[], region));
        }
        let fds = vec![memory.fd(); regions.len()];
        self.send_memory(Request::SET_MEM_TABLE, &body, &fds)
    }

    /// Adds a region, if CONFIGURE_MEM_SLOTS was negotiated.
    pub fn plug(&mut self, memory: &GuestMemory, region: &Region) -> Result<(), VhostError> {
        self.send_memory(Request::ADD_MEM_REG, &words(&[0], region), &[memory.fd()])
    }

    /// Removes a region, if CONFIGURE_MEM_SLOTS was negotiated.
    pub fn unplug(&mut self, region: &Region) -> Result<(), VhostError> {
        self.send_memory(Request::REM_MEM_REG, &words(&[0], region), &[])
    }

    /// Sets up a ring. The first kick starts it.
    pub fn start_ring(&mut self, ring: &RingSetup<'_>, memory: &GuestMemory) -> Result<(), VhostError> {
        let [descriptors, available, used] = ring.addresses;
        let address =
            [memory.user_address(descriptors)?, memory.user_address(used)?, memory.user_address(available)?, 0];
        let mut addresses = state(ring.index, 0);
        addresses.extend(address.iter().flat_map(|word| word.to_le_bytes()));
        self.send(Request::SET_VRING_NUM, &state(ring.index, ring.size.into()), &[])?;
        self.send(Request::SET_VRING_BASE, &state(ring.index, ring.base.into()), &[])?;
        self.send(Request::SET_VRING_ADDR, &addresses, &[])?;
        self.ring_fd(Request::SET_VRING_KICK, ring.index, ring.kick)?;
        self.ring_fd(Request::SET_VRING_CALL, ring.index, ring.call)
    }

    /// Sends a kick, call or err descriptor of any type.
    pub fn ring_fd(&mut self, request: Request, index: u32, fd: BorrowedFd<'_>) -> Result<(), VhostError> {
        let body = u64::from(index).to_le_bytes();
        self.send(request, &body, &[fd.as_raw_fd()])
    }

    /// Enables or disables a ring.
    pub fn enable_ring(&mut self, index: u32, enable: bool) -> Result<(), VhostError> {
        if !self.negotiated.has(F_PROTOCOL_FEATURES) {
            // Without protocol features rings are enabled initially.
            return Ok(());
        }
        let body = state(index, enable.into());
        self.send(Request::SET_VRING_ENABLE, &body, &[])
    }

    /// Stops a ring. Returns the index in the available ring at which to continue.
    pub fn stop_ring(&mut self, index: u32) -> Result<u16, VhostError> {
        let request = Request::GET_VRING_BASE;
        let body = state(index, 0);
        self.connection.send(request, VERSION, &body, &[])?;
        let reply = self.connection.reply(request)?;
        let malformed = |what: String| VhostError::Malformed { request, what };
        let reply = <[u8; 8]>::try_from(reply.as_slice())
            .map_err(|_| malformed(format!("{} bytes instead of 8", reply.len())))?;
        let base = u64::from_le_bytes(reply) >> 32;
        u16::try_from(base).map_err(|_| malformed(format!("base {base} in a split ring")))
    }

    /// Resets the device, if RESET_DEVICE was negotiated.
    pub fn reset_device(&mut self) -> Result<(), VhostError> {
        if !self.negotiated.has_protocol(Protocol::RESET_DEVICE) {
            return Err(VhostError::NotOffered("RESET_DEVICE"));
        }
        self.send(Request::RESET_DEVICE, &[], &[])
    }

    /// True if RESET_DEVICE was negotiated.
    pub fn can_reset(&self) -> bool {
        self.negotiated.has_protocol(Protocol::RESET_DEVICE)
    }

    fn send(&mut self, request: Request, body: &[u8], fds: &[RawFd]) -> Result<(), VhostError> {
        if self.acknowledge_all {
            return self.send_memory(request, body, fds);
        }
        self.connection.send(request, VERSION, body, fds)
    }

    /// Sends a message about memory, with an acknowledgement if possible: a ring must not be set up in memory that the
    /// back-end could not map.
    fn send_memory(&mut self, request: Request, body: &[u8], fds: &[RawFd]) -> Result<(), VhostError> {
        if self.negotiated.has_protocol(Protocol::REPLY_ACK) {
            self.connection.send_acknowledged(request, body, fds)
        } else {
            self.connection.send(request, VERSION, body, fds)
        }
    }
}

impl AsFd for FrontEnd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.stream().as_fd()
    }
}

fn agree_on_protocol(
    connection: &mut Connection,
    offer: &Offer,
    negotiated: &mut Negotiated,
) -> Result<(), VhostError> {
    let offered = connection.request(Request::GET_PROTOCOL_FEATURES)?;
    negotiated.offered_protocol = offered;
    negotiated.protocol = offered & offer.protocol;
    let body = negotiated.protocol.to_le_bytes();
    connection.send(Request::SET_PROTOCOL_FEATURES, VERSION, &body, &[])?;
    if negotiated.has_protocol(Protocol::MQ) {
        negotiated.queues = Some(connection.request(Request::GET_QUEUE_NUM)?);
    }
    if negotiated.has_protocol(Protocol::CONFIGURE_MEM_SLOTS) {
        negotiated.memory_slots = Some(connection.request(Request::GET_MAX_MEM_SLOTS)?);
    }
    Ok(())
}

fn request_channel(connection: &mut Connection, negotiated: &Negotiated) -> Result<Option<UnixStream>, VhostError> {
    if !negotiated.has_protocol(Protocol::BACKEND_REQ) {
        return Ok(None);
    }
    let (ours, theirs) = UnixStream::pair()
        .map_err(|source| VhostError::Descriptor { what: "the back-end's request channel", source })?;
    let fds = [theirs.as_raw_fd()];
    if negotiated.has_protocol(Protocol::REPLY_ACK) {
        connection.send_acknowledged(Request::SET_BACKEND_REQ_FD, &[], &fds)?;
    } else {
        connection.send(Request::SET_BACKEND_REQ_FD, VERSION, &[], &fds)?;
    }
    Ok(Some(ours))
}

/// "A vring state description": index and number.
fn state(index: u32, number: u32) -> Vec<u8> {
    [index, number].iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// "Memory region description" after `before`.
fn words(before: &[u64], region: &Region) -> Vec<u8> {
    before
        .iter()
        .chain(&[region.guest, region.size, region.user, region.offset])
        .flat_map(|word| word.to_le_bytes())
        .collect()
}
