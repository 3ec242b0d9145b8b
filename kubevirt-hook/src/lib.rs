//! A hook for KubeVirt: gives a virtual machine the shares whose volumes its pod has. KubeVirt knows no file system whose
//! server is somebody else's; its hooks may edit the libvirt domain before the machine starts, and that is what is done.
//!
//! | file | |
//! |---|---|
//! | `filesystems.rs` | from annotations of the VirtualMachineInstance to file systems |
//! | `domain.rs` | from a domain and file systems to the domain that has them |
//! | `hook.rs` | both, for one machine |
//! | `serve.rs` | the hook as virt-launcher calls it: gRPC at a socket |

pub mod domain;
pub mod filesystems;
pub mod hook;
pub mod serve;

/// What virt-launcher and a hook say to each other.
pub mod protocol {
    /// The first question.
    pub mod info {
        tonic::include_proto!("kubevirt.hooks.info");
    }
    /// The calls that follow.
    pub mod v1alpha3 {
        tonic::include_proto!("kubevirt.hooks.v1alpha3");
    }
}
