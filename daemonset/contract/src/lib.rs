//! The types that the node's processes exchange, and the channels they travel on.
//!
//! | module | between | carried by |
//! |---|---|---|
//! | [`config`] | everyone: what an engine is to do | inside the messages below |
//! | [`preflight`] | engine -> broker -> agent | inside the messages below |
//! | [`engine`] | broker <-> engine | [`channel::PacketChannel`], one datagram a message, file descriptors beside it |
//! | [`control`] | agent <-> broker | [`channel::FramedStream`], a length and a JSON document |
//! | [`counters`], [`staleness`] | engine -> broker | a shared page of atomics, never a message |
//! | [`trace`] | engine -> broker | a shared ring of atomics likewise |
//!
//! Every first message carries [`VERSION`]; a peer of another version is refused by name, never guessed at.

pub mod channel;
pub mod config;
pub mod control;
pub mod counters;
pub mod engine;
pub mod preflight;
pub mod staleness;
pub mod trace;

/// Version of every message in this crate. Raised when a change would be misread by the other side.
pub const VERSION: u32 = 2;
