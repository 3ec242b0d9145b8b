//! Paths of the parts that set-up prepares, and of this project's binaries.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// The parts of a guest, and the file servers that it can mount.
#[derive(Debug, Clone)]
pub struct Parts {
    /// The guest's kernel with virtiofs built in.
    pub kernel: PathBuf,
    /// The uncompressed overlayfs module of that kernel.
    pub overlay_module: PathBuf,
    /// A root directory that contains only that kernel's modules for disks and file systems.
    pub modules: PathBuf,
    /// A statically linked busybox.
    pub busybox: PathBuf,
    /// QEMU for this architecture.
    pub qemu: PathBuf,
    /// Stock virtiofsd, for comparison.
    pub virtiofsd: PathBuf,
    /// Directory of this project's release binaries.
    pub release: PathBuf,
    /// Directory of results about this machine.
    pub(crate) state: PathBuf,
}

impl Parts {
    /// Reads what `make setup` wrote to `target/e2e/parts`.
    ///
    /// # Errors
    /// If set-up has not run, or a part was removed since.
    pub fn locate() -> Result<Self> {
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
        let list = target.join("e2e/parts");
        let text = fs::read_to_string(&list)
            .with_context(|| format!("{} cannot be read: run `make setup` first", list.display()))?;
        let named: HashMap<_, _> = text.lines().filter_map(|line| line.split_once('=')).collect();
        let part = |name: &str| -> Result<PathBuf> {
            let path = PathBuf::from(named.get(name).copied().unwrap_or_default());
            ensure!(path.exists(), "{name}: '{}' does not exist: run `make setup` again", path.display());
            Ok(path)
        };
        Ok(Self {
            kernel: part("kernel")?,
            overlay_module: part("overlay_module")?,
            modules: part("modules")?,
            busybox: part("busybox")?,
            qemu: part("qemu")?,
            virtiofsd: part("virtiofsd")?,
            release: target.join("release"),
            state: target.join("e2e"),
        })
    }

    /// Path of a binary of this project, built by `make build`.
    ///
    /// # Errors
    /// If it is not built.
    pub fn binary(&self, name: &str) -> Result<PathBuf> {
        let path = self.release.join(name);
        ensure!(path.exists(), "{} does not exist: run `make build` first", path.display());
        Ok(path)
    }
}
