//! Ctrl-C: children receive SIGTERM, waits for them fail, and the program cleans up.

use std::process::{self, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};

use crate::process::interrupt_all;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Exit status of a program that was ended by SIGINT, as in shells.
const STATUS: u8 = 130;

/// Runs a program that Ctrl-C ends. No other thread may have started: threads inherit the mask of signals. Prints the error.
pub fn run(name: &str, program: impl FnOnce() -> Result<()>) -> ExitCode {
    match arm().and_then(|()| program()) {
        _ if received() => ExitCode::from(STATUS),
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nThe {name} failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Blocks SIGINT, SIGTERM and SIGHUP and handles them in a thread. A second signal ends the program at once.
fn arm() -> Result<()> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block().context("blocking signals")?;
    thread::spawn(move || {
        while signals.wait().is_ok() {
            if INTERRUPTED.swap(true, Ordering::Relaxed) {
                process::exit(i32::from(STATUS));
            }
            eprintln!("\ninterrupted: cleaning up (press again to exit immediately)");
            interrupt_all();
        }
    });
    Ok(())
}

/// True if a signal was received.
fn received() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}
