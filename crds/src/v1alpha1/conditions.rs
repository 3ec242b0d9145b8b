//! Conditions of shares and exports, and what their reasons mean.

/// The condition that says whether a share is served.
pub const READY: &str = "Ready";
/// The condition of a share that says whether a change is on its way.
pub const PROGRESSING: &str = "Progressing";
/// The condition of a share that is to be deleted.
pub const DELETING: &str = "Deleting";
/// The condition of an export that is served, but not as declared.
pub const DEGRADED: &str = "Degraded";

/// Reasons of a share's conditions, each with what it means.
pub const SHARE_REASONS: &[(&str, &str, &str)] = &[
    (READY, ALL_NODES_READY, "Every selected node serves the share."),
    (READY, NODES_NOT_READY, "Some of the selected nodes do not serve it; the message names the first and why."),
    (READY, NO_NODES, "No node is selected: mend `spec.nodes.selector`, or label nodes."),
    (READY, INVALID, "The operator does not accept the share; the message names the field. Nodes go on as before."),
    (READY, DELETING, "The share is to be deleted: no more VMs may connect."),
    (PROGRESSING, COMPLETE, "Every node that is alive has taken up the current revision."),
    (PROGRESSING, ROLLING_OUT, "Nodes are taking up the current revision, `spec.rollout.maxUnavailable` at a time."),
    (
        PROGRESSING,
        ROLLOUT_HALTED,
        "A node does worse since the current revision came to it; the message says which and how. It goes on when that \
         node is well again, or with the next change of the share.",
    ),
    (DELETING, IN_USE, "VMs still use it; the message says where. Deletion goes on when they have left."),
    (DELETING, WITHDRAWING, "Nodes have been told, and have not all answered yet."),
];

/// Reasons of an export's conditions that are not findings of a node.
pub const EXPORT_REASONS: &[(&str, &str, &str)] = &[
    (READY, SERVING, "VMs may connect."),
    (READY, PENDING, "The agent has seen the export and has not tried it yet."),
    (READY, DRAINING, "No more VMs may connect; those that are connected are served."),
    (READY, DRAINED, "No more VMs may connect, and none is connected."),
    (READY, INVALID, "The agent does not accept the export; the message names the field."),
    (DEGRADED, AS_DECLARED, "Nothing to complain of."),
    (DEGRADED, REMEDY_FAILED, "Guests see stale names or handles, and no remedy has helped."),
];

/// Every selected node serves the share.
pub const ALL_NODES_READY: &str = "AllNodesReady";
/// Some of the selected nodes do not.
pub const NODES_NOT_READY: &str = "NodesNotReady";
/// No node is selected.
pub const NO_NODES: &str = "NoNodes";
/// The object is not accepted.
pub const INVALID: &str = "Invalid";
/// All nodes are up to date.
pub const COMPLETE: &str = "Complete";
/// Nodes are being brought up to date.
pub const ROLLING_OUT: &str = "RollingOut";
/// A node does worse.
pub const ROLLOUT_HALTED: &str = "RolloutHalted";
/// VMs use a share that is to be deleted.
pub const IN_USE: &str = "InUse";
/// Nodes are letting go of a share.
pub const WITHDRAWING: &str = "Withdrawing";
/// VMs may connect.
pub const SERVING: &str = "Serving";
/// Not tried yet.
pub const PENDING: &str = "Pending";
/// Running out.
pub const DRAINING: &str = "Draining";
/// Run out.
pub const DRAINED: &str = "Drained";
/// Served as declared.
pub const AS_DECLARED: &str = "AsDeclared";
/// No remedy against staleness has helped.
pub const REMEDY_FAILED: &str = "RemedyFailed";
