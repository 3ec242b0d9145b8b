//! The options that attach a share to a VM, for each VMM. All require guest memory that is shared with the engine.

use std::path::Path;

use schemars::JsonSchema;
use serde::Serialize;
use virtiofs_config::Access;

/// Longest tag that a virtio-fs device can carry, in bytes (virtio 1.2, section 5.11.4).
const TAG_MAX: usize = 36;

/// Queue size for QEMU and libvirt: the number of requests in progress at once.
const QUEUE_SIZE: u32 = 1024;

/// Options for one share. `SIZE` stands for the VM's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Mount {
    /// Tag that the guest mounts.
    pub(crate) tag: String,
    /// Socket that the VMM connects to.
    pub(crate) socket: String,
    /// Options of QEMU.
    pub(crate) qemu: String,
    /// Elements of a libvirt domain: below `<domain>`, and below `<devices>`.
    pub(crate) libvirt: Libvirt,
    /// Options of cloud-hypervisor.
    pub(crate) cloud_hypervisor: String,
    /// Options of crosvm. Its other form, `--vhost-user fs`, reads the tag from the device's configuration space, which the
    /// broker does not offer: QEMU 7.1 to 8.0 crash on it.
    pub(crate) crosvm: String,
    /// The command in the guest.
    pub(crate) guest: String,
}

/// Elements of a libvirt domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Libvirt {
    /// Below `<domain>`, once.
    pub(crate) memory_backing: String,
    /// Below `<devices>`, one for each share.
    pub(crate) filesystem: String,
}

/// The options for a share.
pub(crate) fn mount(share: &str, socket: &Path, access: Access) -> Mount {
    let tag = tag(share);
    let socket = socket.display().to_string();
    let read_only = if access == Access::ReadOnly { "-o ro " } else { "" };
    Mount {
        qemu: qemu(&tag, &socket),
        libvirt: Libvirt {
            memory_backing: "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>".to_owned(),
            filesystem: format!(
                "<filesystem type='mount'><driver type='virtiofs' queue='{QUEUE_SIZE}'/>\
                 <source socket='{}'/><target dir='{tag}'/></filesystem>",
                xml(&socket)
            ),
        },
        cloud_hypervisor: format!(
            "--memory size=SIZE,shared=on --fs {}",
            shell(&format!("tag={tag},socket={}", quoted(&socket)))
        ),
        crosvm: format!("--vhost-user-fs {}", shell(&format!("socket-path={},tag={tag}", quoted(&socket)))),
        guest: format!("mount -t virtiofs {read_only}{tag} /mnt"),
        tag,
        socket,
    }
}

/// The share's name, truncated to the longest tag.
fn tag(share: &str) -> String {
    share.chars().take(TAG_MAX).collect()
}

fn qemu(tag: &str, socket: &str) -> String {
    let chardev = shell(&format!("socket,id=fs-{tag},path={}", socket.replace(',', ",,")));
    format!(
        "-m SIZE -object memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem \
         -chardev {chardev} -device vhost-user-fs-pci,chardev=fs-{tag},tag={tag},queue-size={QUEUE_SIZE}"
    )
}

/// A value in a comma-separated list of cloud-hypervisor or crosvm.
fn quoted(value: &str) -> String {
    if value.contains(',') { format!("\"{value}\"") } else { value.to_owned() }
}

/// One word of a shell command line.
fn shell(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-,=:+@".contains(c);
    if word.chars().all(plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

fn xml(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&apos;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_vmm_has_its_options() {
        let mount = mount("images", Path::new("/run/virtiofs/shares/images.sock"), Access::ReadOnly);
        assert_eq!(
            mount.qemu,
            "-m SIZE -object memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem \
             -chardev socket,id=fs-images,path=/run/virtiofs/shares/images.sock \
             -device vhost-user-fs-pci,chardev=fs-images,tag=images,queue-size=1024"
        );
        assert_eq!(
            mount.libvirt.filesystem,
            "<filesystem type='mount'><driver type='virtiofs' queue='1024'/>\
             <source socket='/run/virtiofs/shares/images.sock'/><target dir='images'/></filesystem>"
        );
        assert_eq!(
            mount.cloud_hypervisor,
            "--memory size=SIZE,shared=on --fs tag=images,socket=/run/virtiofs/shares/images.sock"
        );
        assert_eq!(mount.crosvm, "--vhost-user-fs socket-path=/run/virtiofs/shares/images.sock,tag=images");
        assert_eq!(mount.guest, "mount -t virtiofs -o ro images /mnt");
    }

    #[test]
    fn a_path_with_special_characters_is_quoted() {
        let mount = mount("x", Path::new("/tmp/a,b 'c'<&>/x.sock"), Access::ReadWrite);
        assert!(mount.qemu.contains(r"-chardev 'socket,id=fs-x,path=/tmp/a,,b '\''c'\''<&>/x.sock'"), "{}", mount.qemu);
        assert!(mount.libvirt.filesystem.contains("socket='/tmp/a,b &apos;c&apos;&lt;&amp;>/x.sock'"));
        assert!(mount.cloud_hypervisor.ends_with(r#"'tag=x,socket="/tmp/a,b '\''c'\''<&>/x.sock"'"#));
        assert_eq!(mount.guest, "mount -t virtiofs x /mnt");
    }

    #[test]
    fn a_long_name_is_truncated_to_a_tag() {
        let mount = mount(&"n".repeat(63), Path::new("/s"), Access::ReadOnly);
        assert_eq!(mount.tag.len(), TAG_MAX);
    }
}
