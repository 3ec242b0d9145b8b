//! Watches the source of an endpoint in a thread of its own, because a check of a hung file system hangs.

use std::sync::Weak;
use std::thread;
use std::time::Duration;

use crate::endpoint::Endpoint;
use crate::engine::root::{Mounts, Root};

/// Interval of checks without a mount event: a replaced directory causes none. A check takes three system calls.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// Starts the thread. It ends within one interval after the endpoint is dropped.
pub(crate) fn begin(endpoint: Weak<Endpoint>) -> std::io::Result<()> {
    let mounts = Mounts::watch()?;
    thread::Builder::new().name("source".into()).spawn(move || watch(&endpoint, &mounts))?;
    Ok(())
}

fn watch(endpoint: &Weak<Endpoint>, mounts: &Mounts) {
    // Hold no reference to the endpoint while the file system is checked.
    while let Some(path) = endpoint.upgrade().map(|endpoint| endpoint.location().path()) {
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
