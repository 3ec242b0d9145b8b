//! The request trace, while it is wanted.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use virtiofs_contract::trace::Record;
use virtiofsd::filesystem::FileSystem;
use virtiofsd::fuse::{InHeader, Opcode};

use super::Device;
use super::request::{Reply, Request};

/// Longest name in a request (NAME_MAX), and longest argument before a name.
const NAME: usize = 255;
const ARGUMENT: usize = 16;

impl<F: FileSystem + Send + Sync + 'static> Device<F> {
    /// Records a request that has been answered, if a trace is wanted.
    pub(super) fn trace(&self, ring: usize, request: &Request<'_>, reply: &Reply, start_ns: u64, duration_ns: u64) {
        if self.trace.is_enabled(start_ns) {
            let path = self.shared.path_of(request.node());
            let name = name_in(request);
            self.trace.log(&Record {
                at_ns: realtime_ns(),
                duration_ns,
                unique: request.unique(),
                node: request.node(),
                opcode: request.opcode(),
                errno: reply.errno.unsigned_abs(),
                queue: ring as u32,
                path: path.as_deref(),
                name: name.as_deref(),
            });
        }
    }
}

/// The name in a request; the first if it has two.
fn name_in(request: &Request<'_>) -> Option<Vec<u8>> {
    let start = size_of::<InHeader>() + argument_before_name(request.opcode())?;
    let sent = request.sent(size_of::<InHeader>() + ARGUMENT + NAME + 1);
    let name = sent.get(start..)?;
    Some(name.split(|byte| *byte == 0).next().unwrap_or_default().to_vec())
}

/// Bytes between the header and the name of a request; none: it has no name.
fn argument_before_name(opcode: u32) -> Option<usize> {
    let named = [
        (Opcode::Lookup, 0),
        (Opcode::Symlink, 0),
        (Opcode::Unlink, 0),
        (Opcode::Rmdir, 0),
        (Opcode::Removexattr, 0),
        (Opcode::Mkdir, 8),
        (Opcode::Link, 8),
        (Opcode::Rename, 8),
        (Opcode::Getxattr, 8),
        (Opcode::Mknod, 16),
        (Opcode::Create, 16),
        (Opcode::Rename2, 16),
    ];
    named.into_iter().find(|(named, _)| *named as u32 == opcode).map(|(_, argument)| argument)
}

fn realtime_ns() -> u64 {
    // The clock cannot fail on Linux; if it did, times would be 0.
    clock_gettime(ClockId::CLOCK_REALTIME).map_or(0, |now| Duration::from(now).as_nanos() as u64)
}
