//! Builds container images from files of this host: an OCI archive with one layer, as containerd imports it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::initramfs;
use crate::parts::Parts;

/// The pause image, whose container holds a pod's namespaces.
pub(super) const PAUSE: &str = "localhost/pause:1";
/// Image with QEMU, a guest's kernel and initramfs, and a shell.
pub const VM: &str = "localhost/vm:1";
/// Path of the guest's kernel in that image.
pub(crate) const KERNEL: &str = "/guest/vmlinuz";
/// Path of its initramfs.
pub(crate) const INITRAMFS: &str = "/guest/initramfs";

/// Paths of the firmware that QEMU reads when it boots a kernel.
const FIRMWARE: [&str; 4] = [
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/kvmvapic.bin",
    "/usr/share/qemu/linuxboot.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
];

/// Writes the archives of both images into `dir`, and returns their paths.
pub(super) fn write_all(parts: &Parts, dir: &Path) -> Result<Vec<PathBuf>> {
    let (pause, vm) = (dir.join("pause"), dir.join("vm"));
    copy(&parts.busybox, &pause.join("bin/busybox"))?;
    let pause = archive(&pause, PAUSE, &["/bin/busybox", "sleep", "2147483647"])?;
    copy(&parts.busybox, &vm.join("bin/busybox"))?;
    std::os::unix::fs::symlink("busybox", vm.join("bin/sh")).context("creating the link of the shell")?;
    for file in qemu_needs(parts)? {
        copy(&file, &vm.join(file.strip_prefix("/").unwrap_or(&file)))?;
    }
    copy(&parts.kernel, &vm.join(&KERNEL[1..]))?;
    initramfs::write(parts, &vm.join(&INITRAMFS[1..]))?;
    let vm = archive(&vm, VM, &["/bin/sh"])?;
    Ok(vec![pause, vm])
}

/// QEMU, its libraries, its TCG module if there is one, and firmware.
fn qemu_needs(parts: &Parts) -> Result<Vec<PathBuf>> {
    let modules = fs::read_dir("/usr/lib/x86_64-linux-gnu/qemu").into_iter().flatten().flatten();
    let emulation = modules.map(|entry| entry.path()).filter(|path| path.ends_with("accel-tcg-x86_64.so"));
    let programs: Vec<PathBuf> = emulation.chain([parts.qemu.clone()]).collect();
    let output = Command::new("ldd").args(&programs).output().context("running ldd")?;
    ensure!(output.status.success(), "ldd: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)`, and the loader without an arrow.
    let libraries = text.split_whitespace().filter(|word| word.starts_with('/') && !word.ends_with(':'));
    let libraries = libraries.map(PathBuf::from);
    let firmware = FIRMWARE.iter().map(PathBuf::from).filter(|path| path.exists());
    Ok(programs.iter().cloned().chain(libraries).chain(firmware).collect())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let parent = to.parent().context("a file has a parent directory")?;
    fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
    fs::copy(from, to).map(drop).with_context(|| format!("copying {}", from.display()))
}

/// Turns a tree into the image archive `TREE.tar`. Removes the tree.
fn archive(tree: &Path, name: &str, entrypoint: &[&str]) -> Result<PathBuf> {
    let image = tree.with_extension("image");
    fs::create_dir_all(image.join("blobs/sha256")).context("creating an image")?;
    let layer = image.join("layer");
    tar(tree, &layer)?;
    fs::remove_dir_all(tree).context("removing the tree of an image")?;
    let layer = Blob::store(&image, &layer, "application/vnd.oci.image.layer.v1.tar")?;
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": entrypoint, "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [layer.0["digest"]]},
    });
    let config = Blob::write(&image, &config, "application/vnd.oci.image.config.v1+json")?;
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({"schemaVersion": 2, "mediaType": kind, "config": config.0, "layers": [layer.0]});
    let mut manifest = Blob::write(&image, &manifest, kind)?;
    manifest.0["annotations"] = json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name});
    let index = json!({"schemaVersion": 2, "manifests": [manifest.0]});
    fs::write(image.join("index.json"), index.to_string())
        .and_then(|()| fs::write(image.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#))
        .context("writing an image's index")?;
    let archive = tree.with_extension("tar");
    tar(&image, &archive)?;
    fs::remove_dir_all(&image).context("removing the directory of an archive")?;
    Ok(archive)
}

fn tar(tree: &Path, to: &Path) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.args(["--owner=0", "--group=0", "--create", "--file"]).arg(to).arg("--directory").arg(tree).arg(".");
    let output = tar.output().context("running tar")?;
    ensure!(output.status.success(), "tar: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Descriptor of a blob in an image.
struct Blob(Value);

impl Blob {
    fn write(image: &Path, value: &Value, kind: &str) -> Result<Self> {
        let file = image.join("value");
        fs::write(&file, value.to_string()).context("writing a blob of an image")?;
        Self::store(image, &file, kind)
    }

    /// Moves a file to the path that its digest names.
    fn store(image: &Path, file: &Path, kind: &str) -> Result<Self> {
        let output = Command::new("sha256sum").arg(file).output().context("running sha256sum")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let digest = text.split_whitespace().next().context("sha256sum printed nothing")?;
        let size = fs::metadata(file).context("reading metadata of a blob")?.len();
        fs::rename(file, image.join("blobs/sha256").join(digest)).context("moving a blob into an image")?;
        Ok(Blob(json!({"mediaType": kind, "digest": format!("sha256:{digest}"), "size": size})))
    }
}
