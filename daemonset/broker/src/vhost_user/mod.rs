//! The vhost-user protocol, both ways: the broker is a back-end to the VMM and a front-end to the engine.
//!
//! An own codec, for three needs that the `vhost` crate does not meet: a message of the VMM is looked at
//! before it is consumed, every wait has a deadline, and whatever a VMM sends is bounded before it is kept.
//! The protocol: <https://qemu.readthedocs.io/en/latest/interop/vhost-user.html>.

pub(crate) mod codec;
pub(crate) mod front_end;
pub(crate) mod offer;
pub(crate) mod socket;
