//! Watches the source of an endpoint in a thread of its own, because a check of a hung file system hangs.

use std::path::PathBuf;
use std::sync::Weak;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

use crate::engine::root::{Mounts, Root};
use crate::engine::source::Sources;

/// Interval of checks without a mount event: a replaced directory causes none. A check takes three system calls.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// Whose source is watched.
pub(crate) trait Watched: Send + Sync + 'static {
    /// Path of the source.
    fn path(&self) -> PathBuf;

    /// Where sources are resolved.
    fn sources(&self) -> Sources;

    /// The sessions, and the directories that they are served from.
    fn served(&self) -> Vec<(String, Root)>;

    /// Records where the path leads. `served`: the directories that were served when it was checked.
    fn path_leads_to(&self, found: Result<Root, Errno>, served: &[(String, Root)]);
}

/// Starts the thread. It ends within one interval after the endpoint is dropped.
pub(crate) fn begin<E: Watched>(endpoint: Weak<E>) -> std::io::Result<()> {
    let mounts = Mounts::watch()?;
    thread::Builder::new().name("source".into()).spawn(move || watch(&endpoint, &mounts))?;
    Ok(())
}

fn watch<E: Watched>(endpoint: &Weak<E>, mounts: &Mounts) {
    // Hold no reference to the endpoint while the file system is checked.
    while let Some(path) = endpoint.upgrade().map(|endpoint| endpoint.path()) {
        // The result does not apply to sessions that serve another directory by then.
        let served = endpoint.upgrade().map_or_else(Vec::new, |endpoint| endpoint.served());
        // A source without sessions may be about to be unmounted, so it is not opened.
        if !served.is_empty() {
            let Some(sources) = endpoint.upgrade().map(|endpoint| endpoint.sources()) else { return };
            let found = Root::at(&path, &sources);
            if let Some(endpoint) = endpoint.upgrade() {
                endpoint.path_leads_to(found, &served);
            }
        }
        mounts.wait(CHECK_INTERVAL);
    }
}
