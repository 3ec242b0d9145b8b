//! What follows when a session has no engine. Pure.
//!
//! An engine holds what its guest holds. One that never served can be replaced by any other; one that did can
//! be replaced by one that takes over its ledger, and by no other: the guest would find all its files gone.

use std::time::Duration;

/// First pause before another try, and the longest: a source that is missing for a minute must not cost a fork
/// a second, nor must one that is back wait for minutes.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Start another engine after this time.
    TryAfter(Duration),
    /// Answer the VMM from the record and wait for the VM's end.
    Rest,
}

/// Decides what follows after an engine could not be started or has gone.
pub(crate) fn after_failure(failures_in_a_row: u32, served: bool) -> Next {
    if served {
        return Next::Rest;
    }
    let doublings = failures_in_a_row.saturating_sub(1).min(16);
    Next::TryAfter(FIRST_PAUSE.saturating_mul(1 << doublings).min(LONGEST_PAUSE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_that_never_served_is_tried_again_ever_more_slowly() {
        let pauses: Vec<u64> = (1..8)
            .map(|failures| match after_failure(failures, false) {
                Next::TryAfter(pause) => pause.as_secs(),
                Next::Rest => 0,
            })
            .collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30]);
        assert_eq!(after_failure(u32::MAX, false), Next::TryAfter(LONGEST_PAUSE));
    }

    #[test]
    fn an_engine_that_served_is_not_replaced_by_one_that_knows_nothing() {
        assert_eq!(after_failure(1, true), Next::Rest);
    }
}
