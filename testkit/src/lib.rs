//! A guest in a process: the vhost-user front-end of a VMM, the virtio-fs driver and the FUSE
//! client of a guest's kernel, in user space. Component tests, the harness that kills engines and
//! the benchmark drive our own engine and stock virtiofsd with it alike.

pub mod fuse;
pub mod guest;
pub mod memory;
pub mod model;
pub mod processes;
pub mod server;
pub mod vhost;
pub mod virtio;
pub mod workload;
