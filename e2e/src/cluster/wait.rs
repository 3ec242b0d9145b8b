//! Tests wait for states, never for a time.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How long anything may take on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks.
const GLANCE: Duration = Duration::from_millis(150);

/// Looks until there is something.
///
/// # Errors
/// When looking fails, or there is nothing for too long.
pub fn wait_for<T>(what: &str, look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    until(what, String::new, look)
}

/// The same; `explain` says how things are when it took too long.
///
/// # Errors
/// When looking fails, or there is nothing for too long.
pub fn until<T>(what: &str, explain: impl Fn() -> String, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            bail!("timed out waiting for {what}\n{}", explain());
        }
        sleep(GLANCE);
    }
}
