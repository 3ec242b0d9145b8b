//! `virtiofs-engine`: the file server of one guest.
//!
//! The broker starts it with a control channel as the only descriptor besides standard input, output and error. The
//! configuration arrives on that channel. The engine is not started by hand.

mod capabilities;
mod confinement;
mod control;
mod device;
mod guard;
mod kernel_mounts;
mod landlock;
mod ledger;
mod limits;
mod mapped_ids;
mod mountinfo;
mod orphaned;
mod passthrough;
mod preflight;
mod prepare;
mod regular_file;
mod root;
mod sandbox;
mod seccomp;
mod serve;
mod session_fs;
mod stale_handle;

use std::io::{self, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

use tracing_subscriber::EnvFilter;
use virtiofs_contract::channel::PacketChannel;
use virtiofs_contract::engine::CONTROL_FD;

fn main() -> ExitCode {
    log_to_stderr();
    // SAFETY: the broker created this descriptor for this process, and nothing else here uses it.
    let channel = PacketChannel::from_fd(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) });
    match serve::run(channel) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Logs lines without time or colour; the broker that reads them adds time and session.
fn log_to_stderr() {
    tracing_subscriber::fmt()
        .with_writer(|| Lossy)
        .with_ansi(false)
        .without_time()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")))
        .init();
}

/// Logging never blocks a guest: the pipe is non-blocking, and lines that do not fit are lost. Errors are not returned,
/// because the logging library would report them on the same pipe, and panic.
struct Lossy;

impl Write for Lossy {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        Ok(io::stderr().write(line).unwrap_or(line.len()))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
