//! The broker, seen from the agent: its process and its status.

pub(crate) mod observer;
pub(crate) mod process;
