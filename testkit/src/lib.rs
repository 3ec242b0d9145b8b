//! A guest in a process: a VMM's vhost-user front-end, a guest's virtio-fs driver and FUSE client in user space.
//! Component tests, the chaos harness and the benchmark use it with this project's engine and with stock virtiofsd.
//!
//! ```no_run
//! use testkit::fuse::wire::ROOT;
//! use testkit::guest::{Guest, GuestConfig};
//! use testkit::workload::{Config, Limit, Workload};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let guest = Guest::boot(GuestConfig::new("/run/virtiofs/shares/data.sock").small())?;
//! let made = guest.fuse().create(ROOT, "file", libc::O_RDWR, 0o644)?;
//! guest.fuse().write(made.entry.nodeid, made.open.fh, 0, b"bytes", libc::O_RDWR)?;
//!
//! let mut workload = Workload::start(Config::new(42).lanes(4), &[guest.fuse()]);
//! workload.run(Limit::steps(10_000));
//! let report = workload.finish();
//! assert!(report.is_clean() && guest.violations().is_empty(), "{report}");
//! # Ok(())
//! # }
//! ```
//!
//! [`fuse::call::CallError`] distinguishes errors that applications of a guest may see (an errno), replies that violate
//! the protocol, and what would block a guest forever (no reply, or a reply without a call).

pub mod broker;
pub mod fuse;
pub mod guest;
pub mod host;
pub mod layouts;
pub mod memory;
pub mod model;
pub mod processes;
pub mod server;
pub mod skip;
pub mod tmpfs;
pub mod vhost;
pub mod virtio;
pub mod workload;
