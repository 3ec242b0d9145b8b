//! For tests: an operator that ends itself, as by SIGKILL, before a given write. Between two writes nothing of an
//! operator outlives it, so this is every moment at which its death can make a difference.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Before which write, counted from 1; none: before no write.
static LAST: LazyLock<Option<u64>> =
    LazyLock::new(|| std::env::var("VIRTIOFS_DIE_AT_WRITE").ok().and_then(|text| text.parse().ok()));
static WRITES: AtomicU64 = AtomicU64::new(0);

/// Goes on, or does not.
pub(crate) fn step() {
    if LAST.is_some_and(|last| WRITES.fetch_add(1, Ordering::Relaxed) + 1 >= last) {
        std::process::abort();
    }
}
