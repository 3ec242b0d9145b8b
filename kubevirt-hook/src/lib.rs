//! A hook for KubeVirt: gives a virtual machine the shares whose volumes its pod has. KubeVirt has no field for a file system
//! with an external server, but its hooks can edit the libvirt domain before the machine starts.
//!
//! | file | |
//! |---|---|
//! | `filesystems.rs` | parses annotations of the VirtualMachineInstance into file systems |
//! | `domain.rs` | adds file systems to a domain |
//! | `hook.rs` | both, for one machine |
//! | `serve.rs` | the hook as a side-car: gRPC at a socket |

pub mod domain;
pub mod filesystems;
pub mod hook;
pub mod serve;

/// KubeVirt's hook protocol.
pub mod protocol {
    /// Discovery of a hook.
    pub mod info {
        tonic::include_proto!("kubevirt.hooks.info");
    }
    /// The callbacks.
    pub mod v1alpha3 {
        tonic::include_proto!("kubevirt.hooks.v1alpha3");
    }
}
