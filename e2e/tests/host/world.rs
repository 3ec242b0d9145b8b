//! The host that all tests share, and their common operations.

use std::cell::Cell;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::debian::Debian;
use e2e::document::{self, Step};
use e2e::parts::Parts;
use e2e::suite;

/// Time limit on an emulated host on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);

pub(crate) struct World {
    pub(crate) host: Debian,
    /// True if agent and broker are installed as services and run.
    installed: Cell<bool>,
}

impl suite::World for World {
    fn start() -> Result<Self> {
        let root = std::env::var_os("HOST_ROOT").map(PathBuf::from).context("HOST_ROOT: run `make host`")?;
        let host = Debian::boot(&Parts::locate()?, &root)?;
        Ok(World { host, installed: Cell::new(false) })
    }

    fn ready(&mut self) -> Result<()> {
        Ok(())
    }

    fn explain(&self) -> String {
        self.host.explain()
    }

    /// Removes all shares, guests and mounts. Services continue to run, as on a host.
    fn clean_up(&mut self) {
        let cleaned = self.host.must(
            "systemctl stop 'up*.service' 'up*.scope' 'guest*.service'
             rm -rf /etc/virtiofs/shares/* /run/guest.*
             for _ in $(seq 50); do [ -S /run/virtiofs/shares/disk.sock ] || break; sleep 0.2; done
             umount --recursive --lazy /srv/disk 2>/dev/null
             rm -rf /srv/* /dev/shm/*",
        );
        if let Err(error) = cleaned {
            println!("{error:?}");
        }
    }
}

impl World {
    /// Runs the commands of a document's section, as a user in a checkout, except those that begin with one of `skip`.
    pub(crate) fn follow(&self, document: &str, section: &str, skip: &[&str]) -> Result<()> {
        for step in document::examples(document, section)?.into_iter().flatten() {
            let (Step::Shell(command) | Step::Guest(command)) = &step;
            if skip.iter().any(|beginning| command.starts_with(beginning)) {
                continue;
            }
            ensure!(step == Step::Shell(command.clone()), "{step:?}: there is no guest");
            println!("# {command}\n{}", self.host.must(command)?);
        }
        Ok(())
    }

    /// The command of a document's section that begins with `beginning`.
    pub(crate) fn command(&self, document: &str, section: &str, beginning: &str) -> Result<String> {
        let mut steps = document::examples(document, section)?.into_iter().flatten();
        let found = steps.find_map(|step| match step {
            Step::Shell(command) if command.starts_with(beginning) => Some(command),
            _ => None,
        });
        found.with_context(|| format!("{document} has no `{beginning}` in {section}"))
    }

    /// Declares a share of this name. `spec` is YAML with one field per line.
    pub(crate) fn declare(&self, directory: &str, name: &str, spec: &str) -> Result<()> {
        let spec: String = spec.lines().map(|line| format!("  {}\n", line.trim())).collect();
        let manifest = format!(
            "apiVersion: virtiofs.dev/v1alpha1\nkind: VirtiofsShare\nmetadata: {{name: {name}}}\nspec:\n{spec}"
        );
        self.host.must(&format!("mkdir -p {directory}; cat >{directory}/{name}.yaml <<'EOF'\n{manifest}EOF"))?;
        Ok(())
    }

    /// Mounts a file system on a loop device at /srv/disk.
    pub(crate) fn mount_disk(&self) -> Result<()> {
        self.host.must(
            "set -e; modprobe loop; truncate -s 256M /dev/shm/disk; mkfs.ext4 -q /dev/shm/disk
             mkdir -p /srv/disk; mount -o loop /dev/shm/disk /srv/disk; mkdir /srv/disk/data",
        )?;
        Ok(())
    }

    /// Installs and starts agent and broker as in the manual, unless an earlier test has.
    pub(crate) fn install_services(&self) -> Result<()> {
        if !self.installed.replace(true) {
            self.follow("docs/MANUAL.md", "## As a service", &["make packages"])?;
        }
        Ok(())
    }

    /// Waits until a share has this state, and returns its part of the status.
    pub(crate) fn until_state(&self, share: &str, state: &str) -> Result<serde_json::Value> {
        let ctl = "/root/virtiofs-operator/target/release/virtiofsctl";
        let script = format!(
            "{ctl} status {share} -o json >/run/status.json && grep -q '\"state\": *\"{state}\"' /run/status.json \
             && cat /run/status.json || {{ cat /run/status.json; false; }}"
        );
        let status = self.host.until(&format!("{share} is {state}"), PATIENCE, &script)?;
        let mut status: serde_json::Value = serde_json::from_str(&status).context("status -o json")?;
        let shares = status["shares"].as_array_mut().context("shares")?;
        let found = shares.iter().position(|found| found["name"] == share).context("the share is in the status")?;
        Ok(shares.swap_remove(found))
    }
}
