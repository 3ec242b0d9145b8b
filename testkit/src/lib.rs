//! A guest in a process: the vhost-user front-end of a VMM, the virtio-fs driver and the FUSE
//! client of a guest's kernel, in user space. Component tests, the harness that kills engines and
//! the benchmark drive our own engine and stock virtiofsd with it alike.
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
//! Errors distinguish what a guest's application may see (an errno), what a kernel would complain of
//! (a reply that breaks the protocol) and what would freeze it (no reply, or a reply without a
//! call): see [`fuse::call::CallError`].

pub mod broker;
pub mod fuse;
pub mod guest;
pub mod host;
pub mod memory;
pub mod model;
pub mod processes;
pub mod server;
pub mod skip;
pub mod vhost;
pub mod virtio;
pub mod workload;
