//! `virtiofs-engine`: one guest's file server.
//!
//! Started by the broker with a control channel as its only inherited descriptor besides the standard ones;
//! what to serve, and how, arrives there. Nobody starts it by hand.

mod adopted;
mod capabilities;
mod control;
mod device;
mod guard;
mod kernel_mounts;
mod ledger;
mod limits;
mod passthrough;
mod preflight;
mod prepare;
mod root;
mod sandbox;
mod seccomp;
mod serve;
mod stale_handle;
mod tracked;

use std::io::{self, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

use tracing_subscriber::EnvFilter;
use virtiofs_contract::channel::PacketChannel;
use virtiofs_contract::engine::CONTROL_FD;

fn main() -> ExitCode {
    log_to_stderr();
    // SAFETY: the broker made this descriptor for us, and nothing else in this process has touched it.
    let channel = PacketChannel::from_fd(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) });
    match serve::run(channel) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Lines without time or colour: the broker that reads them adds what it knows.
fn log_to_stderr() {
    tracing_subscriber::fmt()
        .with_writer(|| Lossy)
        .with_ansi(false)
        .without_time()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")))
        .init();
}

/// The log must never hold a guest up: its pipe does not block, and what does not fit is lost. An error would make
/// the logging library complain on the very same pipe, and panic.
struct Lossy;

impl Write for Lossy {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        Ok(io::stderr().write(line).unwrap_or(line.len()))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
