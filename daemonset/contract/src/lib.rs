//! The messages between the processes of a node, and the channels that carry them.
//!
//! | module | between | carried by |
//! |---|---|---|
//! | [`preflight`] | engine -> broker -> agent | the messages below |
//! | [`engine`] | broker <-> engine | [`channel::PacketChannel`], one datagram a message, with file descriptors |
//! | [`control`] | agent <-> broker | [`channel::FramedStream`], a length and a JSON document |
//! | [`counters`], [`staleness`] | engine -> broker | a shared page of atomics |
//! | [`trace`] | engine -> broker | a shared ring of atomics |
//!
//! Every first message carries [`VERSION`]; a peer of another version is rejected.

pub mod channel;
pub mod control;
pub mod counters;
pub mod engine;
pub mod preflight;
pub mod staleness;
pub mod trace;

/// Version of every message in this crate. It increases with each change that the peer would misread.
pub const VERSION: u32 = 4;
