//! Attributes of CSI volumes. They are part of the API, although the kubelet transports them.

/// Name of the CSI driver.
pub const DRIVER: &str = "csi.virtiofs.dev";

/// The attribute that names the share of a volume.
pub const SHARE: &str = "share";

/// The attribute that names a directory below the source, which is served instead of it.
pub const SUB_PATH: &str = "subPath";
