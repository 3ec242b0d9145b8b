//! Condition types and reasons of shares and exports.
//!
//! `Ready`, `Reconciling` and `Stalled` follow kstatus, so that generic tools can determine whether a share is current, in
//! progress or failed.

/// Condition of a share and of an export: it is served.
pub const READY: &str = "Ready";
/// Condition of a share: a change is being rolled out.
pub const RECONCILING: &str = "Reconciling";
/// Condition of a share: no progress without a person's or a node's help.
pub const STALLED: &str = "Stalled";
/// Condition of a share and of an export: it is served, but not as specified.
pub const DEGRADED: &str = "Degraded";
/// Condition of a share whose deletion was requested.
pub const DELETING: &str = "Deleting";

/// Reasons of a share's conditions, each with its meaning.
pub const SHARE_REASONS: &[(&str, &str, &str)] = &[
    (READY, ALL_NODES_READY, "Every selected node that is reachable serves the share."),
    (
        READY,
        NODES_NOT_READY,
        "Some selected nodes do not serve the share. The message names the first of them and why.",
    ),
    (READY, NODES_UNREACHABLE, "More than half of the selected nodes are unreachable."),
    (READY, NO_NODES_SELECTED, "No node matches. Correct `spec.nodes.selector`, or label nodes."),
    (READY, INVALID_SPEC, "The operator rejects the spec. The message names the field. Nodes keep what they serve."),
    (READY, DELETING, "The share is being deleted. No VM can connect any more."),
    (RECONCILING, COMPLETE, "Every reachable node serves the current revision."),
    (
        RECONCILING,
        ROLLING_OUT,
        "Nodes are changing to the current revision, at most `spec.rollout.maxUnavailable` at a time.",
    ),
    (RECONCILING, ROLLOUT_HALTED, "The roll-out has stopped; see `Stalled`."),
    (RECONCILING, INVALID_SPEC, "Nothing is rolled out, because the operator rejects the spec."),
    (STALLED, NOT_STALLED, "Nothing blocks the share."),
    (
        STALLED,
        ROLLOUT_HALTED,
        "A node regressed after the change. The message names the node and the reason. The roll-out continues when the \
         node has recovered, or with the next change of the share.",
    ),
    (STALLED, INVALID_SPEC, "The operator rejects the spec. Correct the field that the message names."),
    (DEGRADED, AS_EXPECTED, "Every selected node is reachable and serves the share as specified."),
    (
        DEGRADED,
        NODES_DEGRADED,
        "Some nodes serve the share, but not as specified. The message names the first of them.",
    ),
    (DEGRADED, NODES_UNREACHABLE, "Some selected nodes are unreachable. They follow when they are back."),
    (DELETING, IN_USE, "VMs are connected. The message names them. Deletion continues when they have disconnected."),
    (DELETING, DRAINING, "Nodes stop serving the share, and some have not confirmed it yet."),
];

/// Reasons of an export's conditions, apart from the findings of the node.
pub const EXPORT_REASONS: &[(&str, &str, &str)] = &[
    (READY, SERVING, "VMs can connect."),
    (READY, PENDING, "The agent knows the export and has not applied it yet."),
    (READY, DRAINING, "No VM can connect any more. Connected VMs are still served."),
    (READY, DRAINED, "No VM can connect any more, and none is connected."),
    (READY, INVALID_SPEC, "The agent rejects the spec. The message names the field."),
    (DEGRADED, AS_EXPECTED, "The share is served as specified."),
    (DEGRADED, REMEDY_FAILED, "Guests see stale names or handles, and no remedy has helped."),
];

/// Every selected node that is reachable serves the share.
pub const ALL_NODES_READY: &str = "AllNodesReady";
/// Some selected nodes do not serve the share.
pub const NODES_NOT_READY: &str = "NodesNotReady";
/// Selected nodes are unreachable.
pub const NODES_UNREACHABLE: &str = "NodesUnreachable";
/// Some nodes serve the share, but not as specified.
pub const NODES_DEGRADED: &str = "NodesDegraded";
/// No node is selected.
pub const NO_NODES_SELECTED: &str = "NoNodesSelected";
/// The spec is rejected.
pub const INVALID_SPEC: &str = "InvalidSpec";
/// All reachable nodes serve the current revision.
pub const COMPLETE: &str = "Complete";
/// Nodes are changing to the current revision.
pub const ROLLING_OUT: &str = "RollingOut";
/// A node regressed after the change.
pub const ROLLOUT_HALTED: &str = "RolloutHalted";
/// Nothing blocks the share.
pub const NOT_STALLED: &str = "NotStalled";
/// VMs are connected to a share that is being deleted.
pub const IN_USE: &str = "InUse";
/// VMs can connect.
pub const SERVING: &str = "Serving";
/// Not applied yet.
pub const PENDING: &str = "Pending";
/// No VM can connect any more.
pub const DRAINING: &str = "Draining";
/// No VM can connect any more, and none is connected.
pub const DRAINED: &str = "Drained";
/// Served as specified.
pub const AS_EXPECTED: &str = "AsExpected";
/// No remedy against staleness has helped.
pub const REMEDY_FAILED: &str = "RemedyFailed";
