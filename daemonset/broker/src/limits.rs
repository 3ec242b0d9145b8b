//! Limits of this process.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the soft limit of open files to the hard limit: each session holds a dozen descriptors of its VMM. Nothing here
/// uses select(2), which would not support that.
pub(crate) fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::warn!(%error, "limit of open files not raised from {:?}", limit.current);
    }
}

/// Limit of stashed files of all sessions: half of the limit of open files, so that guests that fill their stash cannot
/// prevent VMMs from connecting.
pub(crate) fn stashed_files() -> usize {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(limit / 2).unwrap_or(usize::MAX)
}
