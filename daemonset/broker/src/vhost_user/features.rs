//! The features that the broker offers to VMMs.

/// `VIRTIO_RING_F_INDIRECT_DESC`.
pub(crate) const RING_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_RING_F_EVENT_IDX`.
pub(crate) const RING_EVENT_IDX: u64 = 1 << 29;
/// `VHOST_USER_F_PROTOCOL_FEATURES`.
pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
/// `VIRTIO_F_VERSION_1`.
pub(crate) const VERSION_1: u64 = 1 << 32;

/// Device features offered. Not offered: `VHOST_F_LOG_ALL`. Dirty logging makes the library walk the
/// whole share, and a hand-over while logging would lose dirty pages.
pub(crate) const FEATURES: u64 = VERSION_1 | RING_INDIRECT_DESC | RING_EVENT_IDX | PROTOCOL_FEATURES;

/// `VHOST_USER_PROTOCOL_F_MQ`: VMMs query the number of queues.
pub(crate) const MQ: u64 = 1 << 0;
/// `VHOST_USER_PROTOCOL_F_REPLY_ACK`: a VMM can wait until the broker has a change of memory.
pub(crate) const REPLY_ACK: u64 = 1 << 3;
/// `VHOST_USER_PROTOCOL_F_RESET_DEVICE`: the engine receives a reset of the guest as a reset.
pub(crate) const RESET_DEVICE: u64 = 1 << 13;
/// `VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS`: memory hot-plug by region, and more than eight regions.
pub(crate) const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;

/// Protocol features offered. Not offered:
/// - `CONFIG`: QEMU 7.1 to 8.0 crash on it, and a VMM knows the tag.
/// - `LOG_SHMFD`: see [`FEATURES`].
/// - `BACKEND_REQ`: there is no DAX window to map, and QEMU logs an error at every replacement of its holder.
/// - `INFLIGHT_SHMFD`, `PAGEFAULT`: the ledger has this function.
/// - `DEVICE_STATE`: the stream is hostile input.
pub(crate) const PROTOCOL: u64 = MQ | REPLY_ACK | RESET_DEVICE | CONFIGURE_MEM_SLOTS;
