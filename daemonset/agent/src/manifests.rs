//! Desired state from a directory of documents.

mod document_store;
mod last_good;
mod watch;

pub(crate) use watch::{Manifests, follow};
