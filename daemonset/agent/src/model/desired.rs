//! The desired state of a host. The type is the same whatever source it comes from.

use std::collections::BTreeMap;

use virtiofs_client::report::Problem;
use virtiofs_crds::Share;

/// The desired state of this host.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Desired {
    /// Shares by name.
    pub(crate) shares: BTreeMap<String, Share>,
    /// Declarations that were rejected.
    pub(crate) problems: Vec<Problem>,
    /// True if there may be declarations that have not been read yet. Nothing is withdrawn then.
    pub(crate) partial: bool,
}
