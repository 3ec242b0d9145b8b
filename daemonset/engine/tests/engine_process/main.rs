//! The engine as a process: by itself, and one after another.

#![allow(missing_docs, clippy::unwrap_used)]

mod alone;
mod bench;
#[cfg(feature = "die-at-store")]
mod between_stores;
mod hostile;
mod listing;
mod mounted;
mod nodes;
mod open_files;
mod removed;
mod rig;
mod staleness;
mod succession;
