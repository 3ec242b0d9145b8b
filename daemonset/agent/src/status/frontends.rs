//! What a person writes to give a share to a VM: one line, or one piece of XML, for each VMM.
//!
//! All of them need the guest's memory to be shared with the process that serves the share.

use std::path::Path;

use schemars::JsonSchema;
use serde::Serialize;
use virtiofs_config::Access;

/// Longest tag that a virtio-fs device can carry, in bytes (virtio 1.2, section 5.11.4).
const TAG_MAX: usize = 36;

/// Requests that may be under way at once: what QEMU and libvirt are told to make the queues as long as.
const QUEUE_SIZE: u32 = 1024;

/// The lines that mount one share. `SIZE` stands for the VM's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Mount {
    /// Name by which the guest mounts the share.
    pub(crate) tag: String,
    /// Socket at which the VMM connects.
    pub(crate) socket: String,
    /// Options of QEMU.
    pub(crate) qemu: String,
    /// Elements of a libvirt domain: below `<domain>`, and below `<devices>`.
    pub(crate) libvirt: Libvirt,
    /// Options of cloud-hypervisor.
    pub(crate) cloud_hypervisor: String,
    /// Options of crosvm. With its other form, `--vhost-user fs`, it would ask the device for the tag, and the broker
    /// offers no configuration space: QEMU 7.1 to 8.0 crash on it.
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

/// The lines for a share.
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

/// The share's name, as much of it as fits.
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

/// A value between commas, as cloud-hypervisor and crosvm read it.
fn quoted(value: &str) -> String {
    if value.contains(',') { format!("\"{value}\"") } else { value.to_owned() }
}

/// One word of a shell's command line.
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
    fn every_vmm_gets_its_line() {
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
    fn a_strange_path_stays_one_value() {
        let mount = mount("x", Path::new("/tmp/a,b 'c'<&>/x.sock"), Access::ReadWrite);
        assert!(mount.qemu.contains(r"-chardev 'socket,id=fs-x,path=/tmp/a,,b '\''c'\''<&>/x.sock'"), "{}", mount.qemu);
        assert!(mount.libvirt.filesystem.contains("socket='/tmp/a,b &apos;c&apos;&lt;&amp;>/x.sock'"));
        assert!(mount.cloud_hypervisor.ends_with(r#"'tag=x,socket="/tmp/a,b '\''c'\''<&>/x.sock"'"#));
        assert_eq!(mount.guest, "mount -t virtiofs x /mnt");
    }

    #[test]
    fn a_long_name_gives_a_tag_that_fits() {
        let mount = mount(&"n".repeat(63), Path::new("/s"), Access::ReadOnly);
        assert_eq!(mount.tag.len(), TAG_MAX);
    }
}
