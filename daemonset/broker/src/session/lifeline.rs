//! Ends a session without its thread, which a VMM or a broken engine may have blocked in a system call.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::{Arc, OnceLock};

use rustix::net::{Shutdown, shutdown};

use crate::descriptor::Registry;
use crate::disposal::Foreign;
use crate::engine::persistent::PersistentState;
use crate::holder::Hold;
use crate::interrupt::ThreadId;

/// What a session holds that others must be able to take from it.
#[derive(Clone, Debug)]
pub(crate) struct Lifeline {
    /// The connection of the VMM.
    pub(crate) vmm: Arc<Foreign>,
    /// The descriptors that the VMM sent.
    pub(crate) registry: Arc<Registry>,
    pub(crate) persistent: Arc<PersistentState>,
    /// Its descriptors that outlive the broker.
    pub(crate) hold: Hold,
    /// The thread of the session, once it runs.
    pub(crate) thread: Arc<OnceLock<ThreadId>>,
}

impl Lifeline {
    /// Kills the engines of the session and shuts the connection down. That ends every wait of its thread for either. Does
    /// not block.
    pub(crate) fn cut(&self) {
        self.persistent.kill_switch.throw();
        // It fails only if the VMM has closed the connection.
        let _ = shutdown(&*self.vmm, Shutdown::Both);
    }

    /// Releases guest memory, the connection and stashed files, whether the thread of the session still exists or not. May
    /// block, because it closes what the VMM sent.
    pub(crate) fn revoke(&self) {
        self.thread.get().copied().iter().for_each(|thread| thread.interrupt());
        self.persistent.stash.clear();
        self.hold.end();
        match File::open("/dev/null") {
            Ok(null) => {
                self.registry.revoke(null.as_fd());
                self.vmm.revoke(null.as_fd());
            }
            Err(error) => tracing::error!(%error, "/dev/null: what a stuck session holds stays open"),
        }
    }
}
