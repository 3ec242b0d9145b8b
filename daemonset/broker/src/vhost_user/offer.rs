//! What the broker offers to VMMs, and why not more.

/// `VIRTIO_RING_F_INDIRECT_DESC`.
pub(crate) const RING_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_RING_F_EVENT_IDX`.
pub(crate) const RING_EVENT_IDX: u64 = 1 << 29;
/// `VHOST_USER_F_PROTOCOL_FEATURES`.
pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
/// `VIRTIO_F_VERSION_1`.
pub(crate) const VERSION_1: u64 = 1 << 32;

/// Device features offered. `VHOST_F_LOG_ALL` is not among them: dirty logging sends the library walking
/// the whole share, and a hand-over under logging would lose dirty pages.
pub(crate) const FEATURES: u64 = VERSION_1 | RING_INDIRECT_DESC | RING_EVENT_IDX | PROTOCOL_FEATURES;

/// `VHOST_USER_PROTOCOL_F_MQ`: VMMs ask how many queues there are instead of guessing.
pub(crate) const MQ: u64 = 1 << 0;
/// `VHOST_USER_PROTOCOL_F_REPLY_ACK`: a VMM can wait until memory is known here before it goes on.
pub(crate) const REPLY_ACK: u64 = 1 << 3;
/// `VHOST_USER_PROTOCOL_F_RESET_DEVICE`: a guest's reset reaches the engine as what it is.
pub(crate) const RESET_DEVICE: u64 = 1 << 13;
/// `VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS`: memory hot-plug by region, and more than eight regions.
pub(crate) const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;

/// Protocol features offered. Left out on purpose:
/// - `CONFIG`: QEMU 7.1 to 8.0 crash on it, and a VMM knows the tag itself.
/// - `LOG_SHMFD`: see [`FEATURES`].
/// - `BACKEND_REQ`: there is no DAX window to map, and QEMU complains at every exchange of the holder.
/// - `INFLIGHT_SHMFD`, `PAGEFAULT`: the ledger does that work; a VMM must not hold half of it.
/// - `DEVICE_STATE`: a hostile stream; only for shares that opt in.
pub(crate) const PROTOCOL: u64 = MQ | REPLY_ACK | RESET_DEVICE | CONFIGURE_MEM_SLOTS;
