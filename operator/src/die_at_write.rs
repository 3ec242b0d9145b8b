//! For tests: an operator that ends itself, as by SIGKILL, before a given write and when all before it are done. Between
//! two writes nothing of an operator outlives it, so this is every moment at which its death can make a difference.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Before which write, counted from 1; none: before no write.
static LAST: LazyLock<Option<u64>> =
    LazyLock::new(|| std::env::var("VIRTIOFS_DIE_AT_WRITE").ok().and_then(|text| text.parse().ok()));
static BEGUN: AtomicU64 = AtomicU64::new(0);
static DONE: AtomicU64 = AtomicU64::new(0);

/// A write that is under way.
pub(crate) struct Step;

/// Goes on, or does not.
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
