//! Waits for states, never for a fixed time.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Time limit on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(120);
/// Interval between two probes.
const POLL_INTERVAL: Duration = Duration::from_millis(150);

/// Calls `probe` until it returns a value.
///
/// # Errors
/// If `probe` fails, or returns no value in time.
pub fn wait_for<T>(what: &str, probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    until(what, String::new, probe)
}

/// Like [`wait_for`]; `explain` describes the state in the error message of a timeout.
///
/// # Errors
/// If `probe` fails, or returns no value in time.
pub fn until<T>(what: &str, explain: impl Fn() -> String, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        if let Some(found) = probe()? {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            bail!("timed out waiting for {what}\n{}", explain());
        }
        sleep(POLL_INTERVAL);
    }
}
