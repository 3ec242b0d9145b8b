//! The VMM's side of the vhost-user protocol.

pub mod connection;
pub mod front_end;
