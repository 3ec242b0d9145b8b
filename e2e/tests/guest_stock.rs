//! Checks this harness against stock virtiofsd: if a test fails here, the harness is wrong.

use std::fs;

use anyhow::Result;
use e2e::guest::{Guest, GuestSpec};
use e2e::load::Load;
use e2e::parts::Parts;
use e2e::stock::Stock;
use e2e::tree;

#[test]
fn stock_serves_a_direct_mount_and_overlayfs_on_top() -> Result<()> {
    let parts = Parts::locate()?;
    let shared = tempfile::tempdir()?;
    for layer in ["base", "middle", "top"] {
        tree::plant(&shared.path().join(layer), 40)?;
    }
    let stock = Stock::start(&parts, shared.path(), &["--cache=auto"])?;
    let mut guest = Guest::boot(&parts, &GuestSpec::default().with_device("share", stock.socket()))?;
    println!("{} guest booted in {:?}", guest.accelerator().name(), guest.boot_time());

    let direct = guest.mount("share")?;
    guest.work(&Load::writing(&direct).and_reading(&direct), 3)?.must_be_clean()?;

    let layers: Vec<_> = ["top", "middle", "base"].iter().map(|layer| format!("{direct}/{layer}")).collect();
    let merged = guest.overlay("merged", &layers)?;
    let running = guest.start_work(&Load::writing(&merged).and_reading(&merged))?;
    guest.must("sleep 1")?;
    let summary = guest.stop_work(running)?;
    summary.must_be_clean()?;
    println!("{} operations in {} rounds", summary.operations, summary.rounds);
    guest.shutdown()
}

#[test]
fn the_guest_counts_what_the_host_does_to_its_files() -> Result<()> {
    let parts = Parts::locate()?;
    let shared = tempfile::tempdir()?;
    tree::plant(shared.path(), 20)?;
    let stock = Stock::start(&parts, shared.path(), &["--cache=auto"])?;
    let mut guest = Guest::boot(&parts, &GuestSpec::default().with_device("share", stock.socket()))?;
    let direct = guest.mount("share")?;
    let merged = guest.overlay("merged", std::slice::from_ref(&direct))?;
    guest.work(&Load::reading(&merged), 1)?.must_be_clean()?;

    let victim = "d0/p-3-23757";
    fs::write(shared.path().join("new"), "not what the name says")?;
    fs::rename(shared.path().join("new"), shared.path().join(victim))?;
    guest.must("sleep 2; echo the cached attributes have expired")?;
    let held = guest.run(&format!("cat {merged}/{victim}"))?;
    assert!(held.stderr.contains("Stale file handle"), "overlayfs still reads the replaced file: {held:?}");
    let fresh = guest.work(&Load::reading(&direct), 1)?;
    assert_eq!((fresh.error_count(), fresh.wrong > 0), (0, true), "unexpected result on the direct mount: {fresh:?}");
    guest.shutdown()
}
