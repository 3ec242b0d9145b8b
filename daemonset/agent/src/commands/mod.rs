//! Commands that have the broker do something, for a person at a shell. None needs an agent: what they change, an
//! agent reads back.

mod bundle;
mod close;
mod handover;
mod release;
mod socket;
mod target;
mod trace;

pub(crate) use bundle::support_bundle;
pub(crate) use close::close;
pub(crate) use handover::handover;
pub(crate) use release::{release, resume};
pub(crate) use socket::socket;
pub(crate) use trace::trace;

use std::path::Path;

use crate::broker::client::{Client, ClientError};
use crate::runtime_dir::RuntimeDir;

/// A conversation with the broker of this runtime directory.
fn broker(runtime_dir: &Path) -> Result<Client, ClientError> {
    Client::connect(&RuntimeDir::at(runtime_dir).broker_socket())
}
