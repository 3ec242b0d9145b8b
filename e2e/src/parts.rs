//! Where the parts are that set-up put in place, and where cargo put our own binaries.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// The parts a guest is made of, and the file servers it can mount.
#[derive(Debug, Clone)]
pub struct Parts {
    /// The guest's kernel; virtiofs is built in.
    pub kernel: PathBuf,
    /// The overlayfs module of that kernel, uncompressed.
    pub overlay_module: PathBuf,
    /// A root that has that kernel's modules for disks and file systems, and nothing else.
    pub modules: PathBuf,
    /// A statically linked busybox.
    pub busybox: PathBuf,
    /// QEMU for this architecture.
    pub qemu: PathBuf,
    /// Stock virtiofsd, the peer.
    pub virtiofsd: PathBuf,
    /// Directory of our own release binaries.
    pub release: PathBuf,
    /// Where what was found out about this machine is kept.
    pub(crate) state: PathBuf,
}

impl Parts {
    /// Reads what `make setup` wrote to `target/e2e/parts`.
    ///
    /// # Errors
    /// When set-up has not run, or a part it named is gone since.
    pub fn locate() -> Result<Self> {
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
        let list = target.join("e2e/parts");
        let text = fs::read_to_string(&list)
            .with_context(|| format!("{} cannot be read: run `make setup` first", list.display()))?;
        let named: HashMap<_, _> = text.lines().filter_map(|line| line.split_once('=')).collect();
        let part = |name: &str| -> Result<PathBuf> {
            let path = PathBuf::from(named.get(name).copied().unwrap_or_default());
            ensure!(path.exists(), "{name} is not at '{}': run `make setup` again", path.display());
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

    /// One of our own binaries, built by `make build`.
    ///
    /// # Errors
    /// When it has not been built.
    pub fn binary(&self, name: &str) -> Result<PathBuf> {
        let path = self.release.join(name);
        ensure!(path.exists(), "{} is not there: run `make build` first", path.display());
        Ok(path)
    }
}
