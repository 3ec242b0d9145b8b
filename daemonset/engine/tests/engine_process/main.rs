//! The engine as a process: by itself, and one after another.

#![allow(missing_docs, clippy::unwrap_used)]

mod alone;
mod rig;
mod succession;
