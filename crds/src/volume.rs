//! How a pod's volume names a share: part of the API, though the kubelet carries it.

/// Name of the CSI driver.
pub const DRIVER: &str = "csi.virtiofs.dev";

/// The attribute of a volume that names its share.
pub const SHARE: &str = "share";

/// The attribute that names a directory below the share's, to be served instead of it.
pub const SUB_PATH: &str = "subPath";
