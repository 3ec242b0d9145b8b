//! Declares shares, on which real guests work without errors.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use e2e::guest::{Guest, GuestSpec};
use e2e::load::Load;
use e2e::node::{Declaration, Node};
use e2e::parts::Parts;
use e2e::tree;
use tempfile::TempDir;

/// Agent and broker, and a directory to share. A failure includes the daemons' log.
struct Host {
    parts: Parts,
    node: Node,
    source: TempDir,
}

impl Host {
    fn run(test: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        let parts = Parts::locate()?;
        let road = Self { node: Node::start(&parts)?, source: tempfile::tempdir()?, parts };
        test(&road).with_context(|| road.node.log_tail())?;
        road.node.stop()
    }

    fn source(&self) -> &Path {
        self.source.path()
    }

    fn declare(&self, name: &str, access: &str, content: &str) -> Result<()> {
        let (engine, staleness) = ("{}", "{}");
        self.node.declare(&Declaration { name, source: self.source(), access, content, engine, staleness })
    }

    /// Boots a guest with the share as the device `share`.
    fn guest_on(&self, share: &str) -> Result<Guest> {
        Guest::boot(&self.parts, &GuestSpec::default().with_device("share", &self.node.socket(share)?))
    }
}

#[test]
fn a_guest_reads_and_writes_a_share() -> Result<()> {
    Host::run(|road| {
        tree::plant(road.source(), 40)?;
        road.declare("road", "ReadWrite", "Exclusive")?;
        let mut guest = road.guest_on("road")?;

        let direct = guest.mount("share")?;
        guest.work(&Load::writing(&direct).and_reading(&direct), 5)?.must_be_clean()?;
        guest.must(&format!("echo from the guest > {direct}/note && chown 7:8 {direct}/note"))?;
        let note = road.source().join("note");
        assert_eq!((fs::read_to_string(&note)?.as_str(), fs::metadata(&note)?.uid()), ("from the guest\n", 7));
        assert_metric_counts(&road.node.metrics()?, "virtiofs_requests_total{", "road")?;
        guest.shutdown()
    })
}

#[test]
fn overlayfs_on_a_read_only_share_leaves_the_source_alone() -> Result<()> {
    Host::run(|road| {
        for layer in ["base", "top"] {
            tree::plant(&road.source().join(layer), 40)?;
        }
        let before = listing(road.source())?;
        road.declare("layers", "ReadOnly", "Immutable")?;
        let mut guest = road.guest_on("layers")?;

        let direct = guest.mount("share")?;
        let refused = guest.run(&format!("echo no > {direct}/no"))?;
        assert!(refused.stderr.contains("Read-only file system"), "writing to a read-only share: {refused:?}");
        let merged = guest.overlay("merged", &[format!("{direct}/top"), format!("{direct}/base")])?;
        guest.work(&Load::writing(&merged).and_reading(&merged), 5)?.must_be_clean()?;
        assert_eq!(listing(road.source())?, before);
        guest.shutdown()
    })
}

#[test]
fn two_guests_share_one_socket_and_see_each_others_files() -> Result<()> {
    Host::run(|road| {
        tree::plant(road.source(), 20)?;
        road.declare("both", "ReadWrite", "Shared")?;
        let (mut first, mut second) = (road.guest_on("both")?, road.guest_on("both")?);
        for (guest, own) in [(&mut first, "one"), (&mut second, "two")] {
            let direct = guest.mount("share")?;
            guest.must(&format!("mkdir {direct}/{own} && echo {own} > {direct}/{own}/name"))?;
        }

        let own = |name: &str| Load::writing(&format!("/mnt/share/{name}")).and_reading("/mnt/share/d0");
        let working = first.start_work(&own("one"))?;
        second.work(&own("two"), 5)?.must_be_clean()?;
        first.stop_work(working)?.must_be_clean()?;
        assert_eq!(first.must("cat /mnt/share/two/name")?, "two\n");
        assert_eq!(second.must("cat /mnt/share/one/name")?, "one\n");
        first.shutdown()?;
        second.shutdown()
    })
}

/// Checks that a metric with this prefix and the label of the share is greater than zero.
fn assert_metric_counts(page: &str, prefix: &str, share: &str) -> Result<()> {
    let label = format!("\"{share}\"");
    let mut samples = page.lines().filter(|line| line.starts_with(prefix) && line.contains(&label));
    let counted = samples.any(|line| line.rsplit(' ').next().is_some_and(|value| value != "0"));
    ensure!(counted, "no metric {prefix}* of share {share} is greater than 0:\n{page}");
    Ok(())
}

/// Every path below a directory, with the length of files.
fn listing(root: &Path) -> Result<Vec<(String, u64)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root)? {
        let (path, length) = entry.and_then(|entry| Ok((entry.path(), entry.metadata()?.len())))?;
        if path.is_dir() {
            found.extend(listing(&path)?);
        }
        found.push((path.display().to_string(), length));
    }
    found.sort();
    Ok(found)
}
