//! Selects QEMU's accelerator: KVM if it runs a guest on this machine, otherwise TCG.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::parts::Parts;
use crate::process::Process;

/// Time limit of the KVM trial. A kernel that boots under KVM is done long before.
const TRIAL: Duration = Duration::from_secs(20);

/// How QEMU executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// The host's own virtualisation.
    Kvm,
    /// QEMU's emulation.
    Tcg,
}

impl Accelerator {
    /// QEMU's options for this accelerator. The CPU model `max` has every feature that can be emulated.
    pub(crate) fn options(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max"],
        }
    }

    /// The accelerator of this machine. Boots a kernel to find it, once per boot of the host: `/dev/kvm` may exist and
    /// still not run a guest.
    ///
    /// # Errors
    /// If QEMU does not start, or the result cannot be written.
    pub fn of_this_machine(parts: &Parts) -> Result<Self> {
        if !Path::new("/dev/kvm").exists() {
            return Ok(Self::Tcg);
        }
        let result = result_file(parts)?;
        if let Some(known) = fs::read_to_string(&result).ok().and_then(|word| Self::named(word.trim())) {
            return Ok(known);
        }
        let found = if runs_under_kvm(parts)? { Self::Kvm } else { Self::Tcg };
        fs::write(&result, found.name()).with_context(|| format!("writing {}", result.display()))?;
        Ok(found)
    }

    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    fn named(name: &str) -> Option<Self> {
        [Self::Kvm, Self::Tcg].into_iter().find(|known| known.name() == name)
    }
}

/// Path of the file that records the result. Its name contains the boot id of the host.
fn result_file(parts: &Parts) -> Result<PathBuf> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").context("reading the host's boot id")?;
    Ok(parts.state.join(format!("accelerator-{}", boot.trim())))
}

fn runs_under_kvm(parts: &Parts) -> Result<bool> {
    let dir = tempfile::tempdir().context("making a directory for the KVM trial")?;
    let console = dir.path().join("console");
    let mut qemu = Command::new(&parts.qemu);
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "256"])
        .args(Accelerator::Kvm.options())
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .arg("-kernel")
        .arg(&parts.kernel)
        // Without a root file system the kernel boots, panics, and the VM ends at once.
        .args(["-append", "console=ttyS0 panic=-1"]);
    let trial = Process::start(qemu, &dir.path().join("qemu.log"), Duration::ZERO)?;
    let ended = trial.wait_for(TRIAL)?;
    let output = fs::read(&console).unwrap_or_default();
    Ok(ended.is_some() && String::from_utf8_lossy(&output).contains("Unable to mount root fs"))
}
