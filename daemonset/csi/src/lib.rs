//! Protocols between a kubelet and a node plugin: the part of the Container Storage Interface that a plugin without controller
//! and without staging needs, and the registration of plugins. Calls that are left out are answered `UNIMPLEMENTED`.

/// The Container Storage Interface, version 1.
pub mod v1 {
    tonic::include_proto!("csi.v1");
}

/// Registration of plugins with a kubelet.
pub mod registration {
    tonic::include_proto!("pluginregistration");
}
