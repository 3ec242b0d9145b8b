//! The engine as a process: by itself, and one after another.

#![allow(missing_docs, clippy::unwrap_used)]

mod arbitrary;
mod engine;
mod file_capabilities;
mod file_systems;
mod fixture;
mod held_names;
mod hostile;
mod inode_numbers;
#[cfg(feature = "die-at-store")]
mod kill_at_store;
mod listing;
mod mounted;
mod names;
mod nodes;
mod open_files;
mod removed;
mod removed_directory;
mod replaced_often;
mod replacement;
mod semantics;
mod single_engine;
mod staleness;
mod unreachable;
mod writeback;
