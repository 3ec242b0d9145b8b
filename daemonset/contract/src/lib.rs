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
//! # Versions
//!
//! Every first message carries the [`Versions`] that its sender speaks, and the reply the highest common one. Two
//! neighbouring releases have a common version, because each speaks [`OLDEST`] to [`VERSION`].
//!
//! Unknown fields of a message are ignored, with one exception. A configuration, endpoint or socket that is *requested* may
//! have none: a field that the receiver does not know may restrict what a guest can do, and to ignore it would lift that
//! restriction. The same types in a *report* are read with [`lenient`], because a reader of a status restricts nothing. So a
//! new field of them is omitted from messages while it has its default, which must mean what was done without it.

pub mod channel;
pub mod control;
pub mod counters;
pub mod engine;
pub mod lenient;
pub mod preflight;
pub mod staleness;
pub mod trace;
mod versions;

pub use versions::{OLDEST, VERSION, Versions};
