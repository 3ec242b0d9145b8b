//! The end of a broker that is the first process of its container: its engines end with it. If another broker stands by,
//! it takes over while they serve and replaces them one by one. This process waits for that.
//!
//! It starts its own program again for that, which closes all its descriptors, the lock among them, and ends all its
//! threads, in one step. Its children stay its children.

use std::ffi::OsStr;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{WaitId, WaitIdOptions, waitid};

/// Longest wait. The grace period of the pod must be longer.
const LONGEST: Duration = Duration::from_secs(50);

/// Interval at which ended engines are looked for.
const INTERVAL: Duration = Duration::from_millis(20);

/// Becomes the process that waits: this program with one more argument. Returns only an error.
pub fn become_waiting(argument: &str) -> io::Error {
    let arguments = std::env::args_os().skip(1);
    Command::new("/proc/self/exe").arg0("virtiofs-broker").args(arguments).arg(OsStr::new(argument)).exec()
}

/// Waits until all engines of this process have ended.
pub fn await_engines() -> io::Result<()> {
    tracing::info!(longest = ?LONGEST, "engines serve until the next broker has replaced them");
    let begin = Instant::now();
    while begin.elapsed() < LONGEST {
        match waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
            Ok(Some(_)) | Err(Errno::INTR) => {}
            Ok(None) => thread::sleep(INTERVAL),
            Err(Errno::CHILD) => {
                tracing::info!(elapsed = ?begin.elapsed(), "all engines are replaced");
                return Ok(());
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    tracing::warn!("engines that are not replaced end now; the next broker recovers their sessions");
    Ok(())
}
