//! `virtiofsctl dropin print`: what makes a tool start `virtiofsd-live` instead of its own virtiofsd.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use virtiofs_client::text::print;

use crate::args::{DropinArgs, DropinCommand, Tool};

/// Where packages install it.
const INSTALLED: &str = "/usr/bin/virtiofsd-live";

/// Prints what a tool needs.
pub(crate) fn dropin(args: &DropinArgs) -> Result<bool> {
    let DropinCommand::Print { tool, binary } = &args.command;
    let binary = binary.clone().unwrap_or_else(installed);
    ensure!(
        is_plain(&binary),
        "--binary {}: an absolute path of a-z, A-Z, 0-9 and any of /._+- is expected, because the tools quote differently",
        binary.display()
    );
    print(&lines(*tool, &binary))?;
    Ok(true)
}

/// The program next to this one, else where packages install it.
fn installed() -> PathBuf {
    let beside = std::env::current_exe().ok().map(|own| own.with_file_name("virtiofsd-live"));
    beside.filter(|path| path.is_file()).unwrap_or_else(|| INSTALLED.into())
}

/// True if the path needs no quotes, neither in a shell nor in XML, JSON, TOML or Nix.
fn is_plain(path: &Path) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._+-".contains(c);
    path.is_absolute() && path.to_str().is_some_and(|path| path.chars().all(plain))
}

fn lines(tool: Tool, binary: &Path) -> String {
    let path = binary.display();
    match tool {
        Tool::Libvirt => format!(
            "<!-- in <filesystem type='mount'> of the domain (virsh edit), beside <driver type='virtiofs'/> -->\n\
             <binary path='{path}'/>\n"
        ),
        Tool::VirtmeNg => format!(
            "# virtme-ng starts the first virtiofsd in PATH; run it as an ordinary user\n\
             mkdir -p ~/.local/lib/virtiofsd-live && ln -sf {path} ~/.local/lib/virtiofsd-live/virtiofsd\n\
             PATH=~/.local/lib/virtiofsd-live:$PATH vng\n"
        ),
        Tool::Bcvk => format!(
            "# or --virtiofsd {path}; the container that bcvk runs QEMU in has the host's /usr\n\
             export VIRTIOFSD_BIN={path}\n"
        ),
        Tool::Incus => format!(
            "# Incus starts the first virtiofsd in its service's PATH; then: systemctl restart incus\n\
             mkdir -p /usr/local/lib/virtiofsd-live /etc/systemd/system/incus.service.d\n\
             ln -sf {path} /usr/local/lib/virtiofsd-live/virtiofsd\n\
             printf '[Service]\\nEnvironment=PATH=/usr/local/lib/virtiofsd-live:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin\\n' \
             >/etc/systemd/system/incus.service.d/virtiofsd-live.conf && systemctl daemon-reload\n"
        ),
        Tool::Kata => format!(
            "# in configuration.toml of Kata Containers, in [hypervisor.qemu] or [hypervisor.clh]\n\
             virtio_fs_daemon = \"{path}\"\n\
             valid_virtio_fs_daemon_paths = [\"{path}\"]\n"
        ),
        Tool::MicrovmNix => format!(
            "# in the configuration of the VM\n\
             microvm.virtiofsd.package = pkgs.writeShellScriptBin \"virtiofsd\" ''exec {path} \"$@\"'';\n"
        ),
        Tool::VhostUser => format!(
            "{{\n  \"description\": \"virtiofsd-live: a virtiofsd that is replaced under running VMs\",\n  \"type\": \"fs\",\n  \
             \"binary\": \"{path}\"\n}}\n"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shipped_discovery_file_is_the_printed_one() {
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/vhost-user/60-virtiofsd-live.json");
        let shipped = std::fs::read_to_string(shipped).unwrap();
        assert_eq!(shipped, lines(Tool::VhostUser, Path::new(INSTALLED)));
        let parsed: serde_json::Value = serde_json::from_str(&shipped).unwrap();
        assert_eq!(parsed["type"], "fs");
    }
}
