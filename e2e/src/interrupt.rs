//! Ctrl-C: children receive SIGTERM, waiting for them fails, and everything is cleaned up.

use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};

use crate::process::interrupt_all;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Exit status of a program that SIGINT ended, as shells have it.
pub const STATUS: u8 = 130;

/// Takes SIGINT, SIGTERM and SIGHUP out of the hands of the default action. Call it before any other thread
/// is started, as they inherit what is blocked. A second signal ends the program at once.
///
/// # Errors
/// When the signals cannot be blocked.
pub fn arm() -> Result<()> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block().context("blocking signals")?;
    thread::spawn(move || {
        while signals.wait().is_ok() {
            if INTERRUPTED.swap(true, Ordering::Relaxed) {
                process::exit(i32::from(STATUS));
            }
            eprintln!("\ninterrupted: cleaning up (press again to leave at once)");
            interrupt_all();
        }
    });
    Ok(())
}

/// Has a signal come?
pub fn came() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}
