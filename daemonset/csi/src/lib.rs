//! What a kubelet and a node plugin say to each other: the part of the Container Storage Interface that a plugin without
//! a controller and without staging needs, and the registration of plugins. Both are fixed elsewhere; which fields and
//! calls there are here is ours, and what is left out is answered `UNIMPLEMENTED`.

/// The Container Storage Interface, version 1.
pub mod v1 {
    tonic::include_proto!("csi.v1");
}

/// How a kubelet gets to know plugins.
pub mod registration {
    tonic::include_proto!("pluginregistration");
}
