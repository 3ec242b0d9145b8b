//! The packages of `make packages`: installed and upgraded under a guest. Other tests run with what the first one of them has
//! installed.

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::world::{PATIENCE, World};

/// Beside the checkout: the same programs in a package of the next revision.
const NEXT_DEB: &str = "/root/next/virtiofs-operator_*-2_*.deb";
const SERVICES: [&str; 3] = ["virtiofs-keeper", "virtiofs-broker", "virtiofs-agent"];

impl World {
    fn main_pids(&self) -> Result<[String; 3]> {
        let mut pids = SERVICES.map(str::to_owned);
        for pid in &mut pids {
            *pid = self.main_pid(pid)?;
        }
        Ok(pids)
    }

    /// Upgrades under a guest. Agent and broker are new afterwards; the keeper, the session and its engine are not.
    fn upgrade(&self, command: &str) -> Result<()> {
        let session = self.start_guest()?;
        let before = self.main_pids()?;
        println!("{}", self.host.must(command)?);
        let after = self.main_pids()?;
        ensure!(after[0] == before[0] && after[1] != before[1] && after[2] != before[2], "{before:?} {after:?}");
        self.host.until("the broker answers", PATIENCE, "virtiofsctl status disk")?;
        self.expect_same_engine(&session)?;
        self.until_state("disk", "Ready")?;
        self.finish_guest()
    }

    fn expect_same_engine(&self, session: &Value) -> Result<()> {
        let after = self.session("it still has its guest", |after| after["state"] == "Serving")?;
        ensure!(after["id"] == session["id"] && after["enginePid"] == session["enginePid"], "{session:#}\n{after:#}");
        Ok(())
    }
}

pub(crate) fn a_package_is_upgraded_under_a_guest(world: &mut World) -> Result<()> {
    world.serve_disk()?;
    world.host.must("man -w virtiofsctl-status || ls /usr/share/man/man1/virtiofsctl-status.1.gz")?;
    world.host.must("bash -c '. /usr/share/bash-completion/completions/virtiofsctl && complete -p virtiofsctl'")?;
    let discovered = "sed -n 's/.*\"binary\": \"\\(.*\\)\"/\\1/p' /usr/share/qemu/vhost-user/60-virtiofsd-live.json";
    world.host.must(&format!("$({discovered}) --print-capabilities | grep '\"type\": \"fs\"'"))?;
    world.upgrade(&format!("apt-get install -y {NEXT_DEB}"))?;
    world.host.must("dpkg-query -W -f '${Version}' virtiofs-operator | grep -e -2$")?;
    Ok(())
}

pub(crate) fn an_upgrade_without_a_keeper_ends_no_session(world: &mut World) -> Result<()> {
    world.serve_disk()?;
    let session = world.start_guest()?;
    let broker = world.main_pid("virtiofs-broker")?;
    world.host.must("systemctl stop virtiofs-keeper")?;
    let printed = world.host.must(&format!("apt-get install -y --reinstall {NEXT_DEB} 2>&1"))?;
    ensure!(printed.contains("systemctl start virtiofs-keeper"), "{printed}");
    ensure!(world.main_pid("virtiofs-broker")? == broker, "another broker runs");
    world.expect_same_engine(&session)?;
    world.finish_guest()?;
    world.host.must("systemctl start virtiofs-keeper")?;
    Ok(())
}
