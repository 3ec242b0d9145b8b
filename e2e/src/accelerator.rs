//! KVM where it runs a guest for real, TCG elsewhere.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::parts::Parts;
use crate::process::Process;

/// A kernel that gets this far under KVM in this time runs there; one that does not is not worth waiting for.
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
    /// QEMU's options for it. `max` has every feature that can be emulated.
    pub(crate) fn options(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max"],
        }
    }

    /// The verdict for this machine, found once per boot of it by booting a kernel: a `/dev/kvm` that is
    /// there may still not run a guest.
    ///
    /// # Errors
    /// When the trial cannot be made at all.
    pub fn of_this_machine(parts: &Parts) -> Result<Self> {
        if !Path::new("/dev/kvm").exists() {
            return Ok(Self::Tcg);
        }
        let verdict = verdict_file(parts)?;
        if let Some(known) = fs::read_to_string(&verdict).ok().and_then(|word| Self::named(word.trim())) {
            return Ok(known);
        }
        let found = if runs_under_kvm(parts)? { Self::Kvm } else { Self::Tcg };
        fs::write(&verdict, found.name()).with_context(|| format!("writing {}", verdict.display()))?;
        Ok(found)
    }

    /// The name QEMU has for it.
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

/// Beside the list of parts, named after this boot of the host.
fn verdict_file(parts: &Parts) -> Result<PathBuf> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").context("reading the host's boot id")?;
    Ok(parts.state.join(format!("accelerator-{}", boot.trim())))
}

fn runs_under_kvm(parts: &Parts) -> Result<bool> {
    let dir = tempfile::tempdir().context("making a directory for the trial of KVM")?;
    let console = dir.path().join("console");
    let mut qemu = Command::new(&parts.qemu);
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "256"])
        .args(Accelerator::Kvm.options())
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .arg("-kernel")
        .arg(&parts.kernel)
        // No root file system: the kernel comes up, panics without one, and the VM ends at once.
        .args(["-append", "console=ttyS0 panic=-1"]);
    let trial = Process::start(qemu, &dir.path().join("qemu.log"), Duration::ZERO)?;
    let ended = trial.wait_for(TRIAL)?;
    let said = fs::read(&console).unwrap_or_default();
    Ok(ended.is_some() && String::from_utf8_lossy(&said).contains("Unable to mount root fs"))
}
