//! Real guests on real shares: boots Linux in QEMU, mounts virtiofs in it and has it count its own errors.
//!
//! What a test claims about guests, a guest saw: [`load::Summary`] is counted inside the guest, because the
//! errors that hurt there (a guest kernel's own `ESTALE`) never pass through a file server.

pub mod accelerator;
mod broker;
mod channel;
pub mod cluster;
pub mod debian;
pub mod document;
pub mod guest;
mod initramfs;
pub mod interrupt;
pub mod load;
mod monitor;
pub mod node;
pub mod parts;
pub mod process;
pub mod replacement;
pub mod report;
pub mod seclusion;
pub mod stock;
pub mod suite;
pub mod tree;

pub use channel::Output;
