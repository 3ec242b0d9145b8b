//! The guest's virtio driver: split virtqueues in guest memory.

pub mod queue;
pub mod ring;
