//! Tests with real guests: boots Linux in QEMU, mounts virtiofs in it and lets the guest count its own errors.
//!
//! What a test asserts about guests is observed in a guest: [`load::Summary`] is counted there, because some errors (an
//! `ESTALE` of the guest kernel itself) never pass through a file server.

pub mod accelerator;
mod broker;
mod channel;
pub mod cluster;
pub mod debian;
pub mod document;
pub mod guest;
mod initramfs;
pub mod interrupt;
pub mod isolation;
pub mod load;
mod monitor;
pub mod node;
pub mod parts;
pub mod process;
pub mod replacement;
pub mod report;
mod services;
pub mod stock;
pub mod suite;
pub mod tree;
pub mod upgrade;

pub use channel::Output;
