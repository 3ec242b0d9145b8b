//! READDIRPLUS while names are added and removed, and with names that cannot be looked up.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use testkit::fuse::call::CallError;
use testkit::fuse::dirent::Entry;
use virtiofs_config::{EngineConfig, InodeFileHandles};
use virtiofs_contract::staleness::Cause;

use crate::fixture::{Fixture, ROOT, config};

/// The kernel reads a page at a time.
const PAGE: u32 = 4096;

/// Lists the root once, from the beginning to the end.
fn list(fixture: &Fixture) -> Result<Vec<Entry>, CallError> {
    let fuse = fixture.guest.fuse();
    let stream = fuse.opendir(ROOT)?.fh;
    let mut entries: Vec<Entry> = Vec::new();
    loop {
        let position = entries.last().map_or(0, |entry| entry.next);
        let more = fuse.readdirplus(ROOT, stream, position, PAGE)?;
        if more.is_empty() {
            fuse.releasedir(ROOT, stream)?;
            return Ok(entries);
        }
        entries.extend(more);
    }
}

fn node(entry: &Entry) -> u64 {
    entry.found.map_or(0, |found| found.nodeid)
}

/// Drops the references of a listing.
fn forget(fixture: &Fixture, entries: &[Entry]) {
    for node in entries.iter().map(node).filter(|node| *node != 0) {
        fixture.guest.fuse().forget(node, 1).unwrap();
    }
}

/// Waits until the guest holds nothing but the root: FORGET is not answered.
fn expect_nothing_held(fixture: &mut Fixture, empty: u64) {
    let held = |fixture: &mut Fixture| fixture.engine().counters.held().inodes;
    for _ in 0..1000 {
        // What is held is published after each request.
        fixture.guest.fuse().getattr(ROOT, None).unwrap();
        if held(fixture) == empty {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert_eq!(held(fixture), empty, "inodes held after all references were dropped");
}

/// Creates and removes names in `directory`, 64 at a time, until `stop` is set.
fn churn(directory: &Path, stop: &AtomicBool, rounds: &AtomicU64) {
    while !stop.load(Ordering::Relaxed) {
        let names: Vec<_> = (0..64).map(|n| directory.join(format!("churn-{n}"))).collect();
        names.iter().for_each(|name| fs::write(name, "").unwrap());
        names.iter().for_each(|name| fs::remove_file(name).unwrap());
        rounds.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn listings_succeed_while_the_host_adds_and_removes_names() {
    for config in [config(), EngineConfig { inode_file_handles: InodeFileHandles::Never, ..config() }] {
        let mut fixture = Fixture::new(config);
        (0..100).for_each(|n| fixture.write(&format!("stable-{n}"), ""));
        fixture.guest.fuse().getattr(ROOT, None).unwrap();
        let empty = fixture.engine().counters.held().inodes;
        let (stop, rounds, directory) = (AtomicBool::new(false), AtomicU64::new(0), fixture.path().to_owned());
        std::thread::scope(|scope| {
            scope.spawn(|| churn(&directory, &stop, &rounds));
            for run in 0..300 {
                let entries = list(&fixture);
                let entries = entries.unwrap_or_else(|error| {
                    stop.store(true, Ordering::Relaxed);
                    panic!("listing {run}: {error}")
                });
                let mut seen = BTreeMap::<&[u8], usize>::new();
                for entry in entries.iter().filter(|entry| entry.name.starts_with(b"stable-")) {
                    *seen.entry(&entry.name).or_default() += 1;
                    assert_ne!(node(entry), 0, "a stable name is looked up");
                }
                let complete = seen.len() == 100 && seen.values().all(|times| *times == 1);
                if !complete {
                    stop.store(true, Ordering::Relaxed);
                    panic!("listing {run} has {} stable names", seen.len());
                }
                forget(&fixture, &entries);
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(rounds.load(Ordering::Relaxed) > 10, "the host changed nothing: {rounds:?} rounds");
        expect_nothing_held(&mut fixture, empty);
    }
}

#[test]
fn names_that_cannot_be_looked_up_are_listed_without_a_node() {
    let inodes = EngineConfig { max_inodes: 10, ..config() };
    let descriptors = EngineConfig { inode_file_handles: InodeFileHandles::Never, open_files: Some(400), ..config() };
    for (config, exhausted) in [(inodes, false), (descriptors, true)] {
        let mut fixture = Fixture::new(config);
        fixture.guest.fuse().getattr(ROOT, None).unwrap();
        let empty = fixture.engine().counters.held().inodes;
        (0..400).for_each(|n| fixture.write(&format!("f{n}"), ""));
        let entries = list(&fixture).unwrap();
        assert_eq!(entries.iter().filter(|entry| entry.name.starts_with(b"f")).count(), 400);
        let refused = entries.iter().filter(|entry| entry.name.starts_with(b"f") && node(entry) == 0).count() as u64;
        assert!((1..400).contains(&refused), "{refused} of 400");
        let stale = fixture.stale();
        match exhausted {
            // The last name of a page may not fit, and is looked up for the next page too.
            true => assert!(matches!(stale[..], [(Cause::FdExhausted, count)] if count >= refused), "{stale:?}"),
            false => assert_eq!(stale, []),
        }
        forget(&fixture, &entries);
        expect_nothing_held(&mut fixture, empty);
    }
}

#[test]
fn a_stale_name_in_a_listing_is_counted_once() {
    let fixture = Fixture::new(config());
    (0..3).for_each(|n| fixture.write(&format!("f{n}"), ""));
    for n in 0..3 {
        fixture.guest.fuse().lookup(ROOT, format!("f{n}")).unwrap();
    }
    fs::remove_file(fixture.path().join("f1")).unwrap();
    fixture.write("f1", "another file");
    for _ in 0..2 {
        assert!(
            list(&fixture).unwrap().iter().filter(|entry| entry.name.starts_with(b"f")).all(|entry| node(entry) != 0)
        );
    }
    assert_eq!(fixture.stale(), [(Cause::SourceReplaced, 1)]);
}
