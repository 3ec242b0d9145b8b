//! Staleness under real guests, repaired by the policy alone: no one edits a share, replaces an engine or touches a VM.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use e2e::guest::{Guest, GuestSpec};
use e2e::load::{Load, Summary};
use e2e::node::{Declaration, Node};
use e2e::parts::Parts;
use e2e::report::{self, FILES, LAYERS, REREAD_FILES};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;
use tempfile::TempDir;

const SHARE: &str = "share";
const TIMEOUT: Duration = Duration::from_secs(90);
const HEAL: &str = "{policy: Heal, threshold: 10, window: 10s}";
const REPORT: &str = "{policy: Report, threshold: 10, window: 10s}";
/// A descriptor for each inode, and far fewer descriptors than files.
const SCARCE: &str = "{inodeFileHandles: Never, openFiles: 2000}";

/// Agent and broker, and a directory to share. A failure includes the daemons' log.
struct Host {
    parts: Parts,
    node: Node,
    source: TempDir,
}

impl Host {
    fn run(test: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        let parts = Parts::locate()?;
        let host = Self { node: Node::start(&parts)?, source: tempfile::tempdir()?, parts };
        test(&host).with_context(|| host.node.log_tail())?;
        host.node.stop()
    }

    fn guest(&self, content: &str, engine: &str, staleness: &str) -> Result<Guest> {
        let (source, access) = (self.source.path(), "ReadOnly");
        self.node.declare(&Declaration { name: SHARE, source, access, content, engine, staleness })?;
        Guest::boot(&self.parts, &GuestSpec::default().with_device(SHARE, &self.node.socket(SHARE)?))
    }

    /// The share in the output of `virtiofsctl status`.
    fn share(&self) -> Result<Value> {
        let status: Value = serde_json::from_str(&self.node.status(&[SHARE, "-o", "json"])?)?;
        Ok(status["shares"][0].clone())
    }

    /// Waits until `wanted` is true for the share.
    fn until(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let end = Instant::now() + TIMEOUT;
        loop {
            let share = self.share()?;
            if wanted(&share) {
                return Ok(share);
            }
            if Instant::now() > end {
                bail!("timed out waiting for the share to be {what}: {share:#}");
            }
            sleep(Duration::from_millis(50));
        }
    }
}

fn is_verified(share: &Value) -> bool {
    share["staleness"]["lastRemedy"]["outcome"] == "Verified"
}

fn stale_events(share: &Value, cause: &str) -> u64 {
    share["counts"]["staleByCause"][cause].as_u64().unwrap_or(0)
}

fn print(what: &str, count: &Summary) {
    println!("{what}: {} operations, errors {:?}, {} wrong results", count.operations, count.errors, count.wrong);
}

/// Mounts the share, and overlayfs on its layers.
fn mount_layers(guest: &mut Guest) -> Result<()> {
    let direct = guest.mount(SHARE)?;
    guest.overlay("merged", &LAYERS.map(|layer| format!("{direct}/{layer}")))?;
    report::copy_list(guest, &direct)
}

#[test]
fn policy_heal_hands_over_to_file_handles() -> Result<()> {
    Host::run(|host| {
        report::plant(host.source.path())?;
        let mut guest = host.guest("Shared", SCARCE, HEAL)?;
        mount_layers(&mut guest)?;
        let stale_read = guest.work(&Load::listed("/run/list"), 1)?;
        print("descriptors, every file", &stale_read);
        ensure!(stale_read.error_count() > 0, "the engine did not run out of descriptors");

        let share = host.until("recovered, and the remedy verified", is_verified)?;
        println!("stale: {}; {}", share["counts"]["staleByCause"], share["staleness"]["lastRemedy"]);
        ensure!(stale_events(&share, "FdExhausted") > 10, "{share:#}");
        ensure!(share["staleness"]["lastRemedy"]["remedy"] == "FileHandles", "{share:#}");
        ensure!(share["sessions"][0]["engine"]["inodeFileHandles"] == "Prefer", "{share:#}");

        let whole = guest.work(&Load::listed("/run/list"), 1)?;
        print("file handles, every file", &whole);
        whole.must_be_clean()?;
        ensure!(whole.operations == FILES, "{} files were read", whole.operations);
        guest.shutdown()
    })
}

#[test]
fn policy_report_counts_and_changes_nothing() -> Result<()> {
    Host::run(|host| {
        report::plant(host.source.path())?;
        let mut guest = host.guest("Shared", SCARCE, REPORT)?;
        mount_layers(&mut guest)?;
        guest.work(&Load::listed("/run/list"), 1)?;
        report::provoke_estale(&host.node, SHARE, &mut guest)?;
        let engines = host.share()?["sessions"][0]["engines"].clone();
        let first = Load::listed("/run/list").at_most(REREAD_FILES);
        let stale_read = guest.work(&first, 1)?;
        print("descriptors, the first files", &stale_read);
        let stale = stale_read.errors.get("ESTALE").copied().unwrap_or_default();
        ensure!(stale > u64::from(REREAD_FILES) * 9 / 10, "the bug report is not reproduced: {stale_read:?}");

        // Wait until the condition expires: a remedy would have been applied before.
        let is = |share: &Value, reason: &str| share["staleness"]["conditions"][0]["reason"] == reason;
        let share = host.until("stale", |share| is(share, "FdExhausted"))?;
        ensure!(stale_events(&share, "FdExhausted") >= stale, "{share:#}");
        let share = host.until("quiet", |share| is(share, "None"))?;
        ensure!(share["staleness"]["lastRemedy"].is_null(), "{share:#}");
        ensure!(share["sessions"][0]["engines"] == engines, "an engine was replaced: {share:#}");
        let still = guest.work(&first, 1)?;
        ensure!(still.error_count() > 0, "the guest has already recovered: {still:?}");
        guest.shutdown()
    })
}

/// A tmpfs on a directory. Unmounted on drop.
struct Tmpfs<'a>(&'a Path);

impl<'a> Tmpfs<'a> {
    fn mount(directory: &'a Path, file: &str) -> Result<Self> {
        mount(Some("tmpfs"), directory, Some("tmpfs"), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mounting on {}", directory.display()))?;
        let mounted = Tmpfs(directory);
        fs::write(directory.join("which"), format!("{file}\n"))?;
        Ok(mounted)
    }
}

impl Drop for Tmpfs<'_> {
    fn drop(&mut self) {
        // Engines may still have open files on it.
        let _ = umount2(self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_mounted_guest_follows_a_replaced_source() -> Result<()> {
    Host::run(|host| {
        let first = Tmpfs::mount(host.source.path(), "first")?;
        let mut guest = host.guest("Shared", "{}", HEAL)?;
        let direct = guest.mount(SHARE)?;
        let which = format!("cat {direct}/which");
        ensure!(guest.must(&which)? == "first\n");

        drop(first);
        let second = Tmpfs::mount(host.source.path(), "second")?;
        let share = host.until("handed over to the new source", is_verified)?;
        ensure!(share["staleness"]["lastRemedy"]["cause"] == "SourceGone", "{share:#}");
        println!("{}", share["staleness"]["lastRemedy"]);
        // The guest caches names for one second.
        sleep(Duration::from_secs(1));
        ensure!(guest.must(&which)? == "second\n");
        guest.must(&format!("ls -l {direct} && stat {direct}/which"))?;
        guest.shutdown()?;
        drop(second);
        Ok(())
    })
}

#[test]
fn a_content_violation_names_the_file_and_replaces_no_engine() -> Result<()> {
    Host::run(|host| {
        fs::create_dir(host.source.path().join("etc"))?;
        for number in 0..50 {
            fs::write(host.source.path().join(format!("etc/{number}")), "before\n")?;
        }
        let mut guest = host.guest("Immutable", "{}", HEAL)?;
        let direct = guest.mount(SHARE)?;
        guest.must(&format!("cat {direct}/etc/* >/dev/null"))?;
        let engines = host.share()?["sessions"][0]["engines"].clone();
        for number in 0..50 {
            fs::write(host.source.path().join("new"), "after\n")?;
            fs::rename(host.source.path().join("new"), host.source.path().join(format!("etc/{number}")))?;
        }

        // The audit finds it, whether the file is opened again or not.
        let _ = guest.run(&format!("cat {direct}/etc/7"))?;
        let share = host
            .until("reported as changed", |share| share["staleness"]["conditions"][0]["reason"] == "SourceReplaced")?;
        let said = share["notices"][0]["message"].as_str().unwrap_or_default().to_owned();
        println!("{said}");
        ensure!(said.contains("etc/"), "{share:#}");
        ensure!(share["staleness"]["lastRemedy"].is_null(), "{share:#}");
        ensure!(share["sessions"][0]["engines"] == engines, "an engine was replaced: {share:#}");
        ensure!(
            guest.must(&format!("ls {direct}/etc | wc -l"))?.trim() == "50",
            "the directory is not served completely"
        );
        guest.shutdown()
    })
}
