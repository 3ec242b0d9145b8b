//! For tests: ends an operation before a store, as SIGKILL does.

use std::cell::{Cell, RefCell};
use std::panic::{self, AssertUnwindSafe};

use super::words::Words;

thread_local! {
    static LOADS_LEFT: Cell<Option<u64>> = const { Cell::new(None) };
    static STORES_LEFT: Cell<Option<u64>> = const { Cell::new(None) };
    static LOG: RefCell<Option<Vec<(u32, u64)>>> = const { RefCell::new(None) };
}

struct Killed;

/// Runs `work`, then reverts all its stores to `words`.
pub(super) fn taken_back<T>(words: &Words, work: impl FnOnce() -> T) -> T {
    LOG.with(|log| *log.borrow_mut() = Some(Vec::new()));
    let result = work();
    let stored = LOG.with(|log| log.borrow_mut().take()).unwrap_or_default();
    for (at, before) in stored.into_iter().rev() {
        words.set(at, before);
    }
    result
}

/// Called before each store to a ledger, with the value that it will replace.
pub(super) fn before_store(at: u32, before: u64) {
    LOG.with(|log| {
        if let Some(log) = log.borrow_mut().as_mut() {
            log.push((at, before));
        }
    });
    STORES_LEFT.with(|left| match left.get() {
        None => {}
        Some(0) => panic::resume_unwind(Box::new(Killed)),
        Some(n) => left.set(Some(n - 1)),
    });
}

/// Runs `work` and ends it before its store number `stores` (from 0). True if it was ended; false if it had fewer stores.
pub(super) fn killed_after(stores: u64, work: impl FnOnce()) -> bool {
    STORES_LEFT.with(|left| left.set(Some(stores)));
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    STORES_LEFT.with(|left| left.set(None));
    match result {
        Ok(()) => false,
        Err(cause) if cause.is::<Killed>() => true,
        Err(cause) => panic::resume_unwind(cause),
    }
}

/// Called before each load from a ledger.
pub(super) fn before_load() {
    LOADS_LEFT.with(|left| match left.get() {
        None => {}
        Some(0) => {
            left.set(None);
            panic!("more loads than allowed")
        }
        Some(n) => left.set(Some(n - 1)),
    });
}

/// Runs `work`, which may load so many words.
///
/// # Panics
/// If it loads more.
pub(super) fn within_loads<T>(loads: u64, work: impl FnOnce() -> T) -> T {
    LOADS_LEFT.with(|left| left.set(Some(loads)));
    let result = work();
    LOADS_LEFT.with(|left| left.set(None));
    result
}
