//! The cluster as the operator sees it: watched shares, exports, nodes and agents' pods, trimmed to the fields that are
//! used, and what to reconcile when one changes.

mod decode;
mod facts;
mod recent;
mod watch;

pub(crate) use facts::{LABEL_PREFIX, NodeFacts, share_labels};
pub(crate) use recent::Recent;
pub(crate) use watch::{Cluster, watch};
