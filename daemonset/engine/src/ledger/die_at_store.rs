//! For the harness that kills: ends this engine at once, as SIGKILL would, before a given store to its ledger.
//!
//! Between two stores lie all other steps of a request: the system calls on the host, the reply, the used ring and
//! the call. So an engine that dies before its first, second, third ... store dies between every pair of them.

use std::process::abort;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// The environment variable with the number of the store, from 0.
const VARIABLE: &str = "VIRTIOFS_DIE_AT_STORE";

static STORES: AtomicU64 = AtomicU64::new(0);

/// Counts a store, and may not return.
pub(super) fn before_store() {
    static FATAL: OnceLock<Option<u64>> = OnceLock::new();
    let fatal = *FATAL.get_or_init(|| std::env::var(VARIABLE).ok()?.parse().ok());
    if fatal == Some(STORES.fetch_add(1, Ordering::Relaxed)) {
        abort();
    }
}
