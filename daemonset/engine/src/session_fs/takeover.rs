//! What this engine may do with the ledger: whose it is, and which requests of a dead engine are still to be repeated.

use virtiofs_contract::engine::QUEUES;

/// The engine's relation to the ledger.
#[derive(Debug)]
pub(super) struct Takeover {
    /// True while another engine owns the ledger, or is about to.
    quiesced: bool,
    /// Rings whose request in flight a dead engine had started. Until it has been repeated, the ledger and the host may
    /// differ by the guest's own doing.
    unfinished: [bool; QUEUES],
    /// True if the engine before this one served another directory.
    root_changed: bool,
}

impl Default for Takeover {
    fn default() -> Self {
        Takeover { quiesced: true, unfinished: [false; QUEUES], root_changed: false }
    }
}

impl Takeover {
    /// The ledger is this engine's from now on.
    pub(super) fn take_over(&mut self, unfinished: [bool; QUEUES], root_changed: bool) {
        *self = Takeover { quiesced: false, unfinished, root_changed };
    }

    /// This engine stops writing to the ledger, or continues.
    pub(super) fn set_quiesced(&mut self, quiesced: bool) {
        self.quiesced = quiesced;
    }

    /// Records whether the request in flight of `ring` is one that a dead engine had started.
    pub(super) fn set_unfinished(&mut self, ring: usize, unfinished: bool) {
        self.unfinished[ring] = unfinished;
    }

    /// True if the engine before this one served another directory.
    pub(super) fn root_changed(&self) -> bool {
        self.root_changed
    }

    /// True if the ledger is this engine's and has every change of names that the guest has made.
    pub(super) fn may_audit(&self) -> bool {
        !self.quiesced && !self.unfinished.contains(&true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_audited_before_repeated_requests_are_done() {
        let mut takeover = Takeover::default();
        assert!(!takeover.may_audit(), "another engine owns the ledger");
        takeover.take_over([false, true], false);
        assert!(!takeover.may_audit());
        takeover.set_unfinished(1, false);
        assert!(takeover.may_audit());
        takeover.set_quiesced(true);
        assert!(!takeover.may_audit());
    }
}
