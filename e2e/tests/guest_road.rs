//! The road, end to end: a share is declared, real guests work on it, and count no error.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use e2e::guest::{Guest, GuestSpec};
use e2e::load::Load;
use e2e::node::{Declaration, Node};
use e2e::parts::Parts;
use e2e::tree;

/// Boots a guest that has the share as the device `share`.
fn guest_on(parts: &Parts, node: &Node, share: &str) -> Result<Guest> {
    let socket = node.socket(share)?;
    Guest::boot(parts, &GuestSpec::default().with_device("share", &socket)).with_context(|| node.log_tail())
}

#[test]
fn a_guest_reads_and_writes_a_share() -> Result<()> {
    let (parts, source) = (Parts::locate()?, tempfile::tempdir()?);
    tree::plant(source.path(), 40)?;
    let node = Node::start(&parts)?;
    node.declare(&Declaration { name: "road", source: source.path(), access: "ReadWrite", content: "Exclusive" })?;
    let mut guest = guest_on(&parts, &node, "road")?;

    let direct = guest.mount("share")?;
    guest.work(&Load::writing(&direct).and_reading(&direct), 5)?.must_be_clean().with_context(|| node.log_tail())?;
    guest.must(&format!("echo from the guest > {direct}/note && chown 7:8 {direct}/note"))?;
    assert_eq!(fs::read_to_string(source.path().join("note"))?, "from the guest\n");
    assert_metric_counts(&node.metrics()?, "virtiofs_requests_total{", "road")?;

    guest.shutdown()?;
    node.stop()
}

#[test]
fn overlayfs_on_a_read_only_share_leaves_the_source_alone() -> Result<()> {
    let (parts, source) = (Parts::locate()?, tempfile::tempdir()?);
    for layer in ["base", "top"] {
        tree::plant(&source.path().join(layer), 40)?;
    }
    let before = listing(source.path())?;
    let node = Node::start(&parts)?;
    node.declare(&Declaration { name: "layers", source: source.path(), access: "ReadOnly", content: "Immutable" })?;
    let mut guest = guest_on(&parts, &node, "layers")?;

    let direct = guest.mount("share")?;
    let refused = guest.run(&format!("echo no > {direct}/no"))?;
    assert!(refused.stderr.contains("Read-only file system"), "writing to a read-only share: {refused:?}");
    let merged = guest.overlay("merged", &[format!("{direct}/top"), format!("{direct}/base")])?;
    guest.work(&Load::writing(&merged).and_reading(&merged), 5)?.must_be_clean().with_context(|| node.log_tail())?;
    assert_eq!(listing(source.path())?, before);

    guest.shutdown()?;
    node.stop()
}

#[test]
fn two_guests_share_one_socket_and_see_each_others_files() -> Result<()> {
    let (parts, source) = (Parts::locate()?, tempfile::tempdir()?);
    tree::plant(source.path(), 20)?;
    let node = Node::start(&parts)?;
    node.declare(&Declaration { name: "both", source: source.path(), access: "ReadWrite", content: "Shared" })?;
    let mut guests = [guest_on(&parts, &node, "both")?, guest_on(&parts, &node, "both")?];

    for (guest, own) in guests.iter_mut().zip(["one", "two"]) {
        let direct = guest.mount("share")?;
        guest.must(&format!("mkdir {direct}/{own} && echo {own} > {direct}/{own}/name"))?;
    }
    let [first, second] = &mut guests;
    let own = |name: &str| Load::writing(&format!("/mnt/share/{name}")).and_reading("/mnt/share/d0");
    let working = first.start_work(&own("one"))?;
    second.work(&own("two"), 5)?.must_be_clean().with_context(|| node.log_tail())?;
    first.stop_work(working)?.must_be_clean().with_context(|| node.log_tail())?;
    assert_eq!(first.must("cat /mnt/share/two/name")?, "two\n");
    assert_eq!(second.must("cat /mnt/share/one/name")?, "one\n");

    for guest in guests {
        guest.shutdown()?;
    }
    node.stop()
}

/// Some sample of that prefix is labelled with the share and counts more than nothing.
fn assert_metric_counts(page: &str, prefix: &str, share: &str) -> Result<()> {
    let label = format!("\"{share}\"");
    let mut samples = page.lines().filter(|line| line.starts_with(prefix) && line.contains(&label));
    let counted = samples.any(|line| line.rsplit(' ').next().is_some_and(|value| value != "0"));
    ensure!(counted, "no metric {prefix}* of share {share} counts anything:\n{page}");
    Ok(())
}

/// Every path below a directory with the length of what is there.
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
