//! The cluster as the operator sees it: reflected shares, exports, nodes and agents' pods, each kept no larger than it
//! is needed, and who is to be looked at when one changes.

mod facts;
mod recent;
mod reflect;

pub(crate) use facts::{LABEL_PREFIX, NodeFacts, share_labels};
pub(crate) use recent::Recent;
pub(crate) use reflect::{Cluster, Triggers, reflect};
