//! The vhost-user protocol: the broker is a back-end to the VMM and a front-end to the engine.
//!
//! It has a codec of its own because the `vhost` crate lacks three properties: a VMM's message is peeked before it is
//! consumed, every wait has a deadline, and every size that a VMM sends is bounded before use.
//! The protocol: <https://qemu.readthedocs.io/en/latest/interop/vhost-user.html>.

pub(crate) mod codec;
pub(crate) mod features;
pub(crate) mod front_end;
pub(crate) mod pipe;
pub(crate) mod socket;
