//! For tests: an operator that aborts before a given write, after all writes before it. The operator has no state of its
//! own between two writes, so these are all moments at which its death can have different effects.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The write to abort before, counted from 1; none: run on.
static LAST: LazyLock<Option<u64>> =
    LazyLock::new(|| std::env::var("VIRTIOFS_DIE_AT_WRITE").ok().and_then(|text| text.parse().ok()));
static BEGUN: AtomicU64 = AtomicU64::new(0);
static DONE: AtomicU64 = AtomicU64::new(0);

/// A write in progress.
pub(crate) struct Step;

/// Starts a write, or aborts.
pub(crate) async fn step() -> Step {
    let number = BEGUN.fetch_add(1, Ordering::Relaxed) + 1;
    if let Some(last) = LAST.filter(|last| number >= *last) {
        while DONE.load(Ordering::Relaxed) + 1 < last {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        std::process::abort();
    }
    Step
}

impl Drop for Step {
    fn drop(&mut self) {
        DONE.fetch_add(1, Ordering::Relaxed);
    }
}
