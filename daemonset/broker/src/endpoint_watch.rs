//! The watch over an endpoint's source: a thread of its own, because looking at a file system that hangs hangs.

use std::sync::Weak;
use std::thread;
use std::time::Duration;

use crate::endpoint::Endpoint;
use crate::engine::root::{Mounts, Root};

/// How often the path is looked at where nobody is told of changes: a directory that is replaced is no mount. It costs
/// three system calls.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Begins to watch; ends a while after the endpoint.
pub(crate) fn begin(endpoint: Weak<Endpoint>) -> std::io::Result<()> {
    let mounts = Mounts::watch()?;
    thread::Builder::new().name("source".into()).spawn(move || watch(&endpoint, &mounts))?;
    Ok(())
}

fn watch(endpoint: &Weak<Endpoint>, mounts: &Mounts) {
    // Nothing of the endpoint is held while the file system is asked.
    while let Some(path) = endpoint.upgrade().map(|endpoint| endpoint.place().path()) {
        // Who serves another directory by the time of the answer is not meant by it.
        let served = endpoint.upgrade().map_or_else(Vec::new, |endpoint| endpoint.served());
        // A source that nobody serves may be about to be unmounted: it is not to be touched.
        if !served.is_empty() {
            let Some(sources) = endpoint.upgrade().map(|endpoint| endpoint.sources()) else { return };
            let found = Root::at(&path, &sources);
            if let Some(endpoint) = endpoint.upgrade() {
                endpoint.path_leads_to(found, &served);
            }
        }
        mounts.wait(LOOK_EVERY);
    }
}
