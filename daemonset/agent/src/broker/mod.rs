//! The broker, seen from the agent: its process, its control socket, its counts.

pub(crate) mod client;
pub(crate) mod observer;
pub(crate) mod process;
pub(crate) mod totals;
