//! Desired state from a directory of documents.

mod last_good;
mod memory;
mod watch;

pub(crate) use watch::{Manifests, follow};
