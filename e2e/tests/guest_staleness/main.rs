//! Compares the detector with real guests: a stale event is counted if and only if the guest is affected, directly or
//! through overlayfs.
//!
//! One guest has a share for each way of holding inodes and each cache policy, as a direct mount and with overlayfs on
//! top. The test prints the result as the table of docs/STALENESS.md.

mod cells;
mod host;
mod table;

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::guest::{Guest, GuestSpec};
use e2e::load::{Load, Summary};
use virtiofs_contract::staleness::Cause;

use cells::{GUEST_ACTIONS, HOST_CHANGES, Mode, SENTINEL};
use host::{Host, Mounted};
use table::Table;

/// Longer than a guest caches a name or attributes of `Shared` content.
const EXPIRY: Duration = Duration::from_secs(2);

#[test]
fn events_are_counted_only_if_the_guest_is_affected() -> Result<()> {
    Host::run(|host| {
        let modes = Mode::all();
        let mut spec = GuestSpec::default();
        for mode in &modes {
            cells::plant(&host.source(&mode.share))?;
            host.declare(&mode.share, "ReadWrite", mode.content, &mode.engine)?;
            spec = spec.with_device(&mode.share, &host.node.socket(&mode.share)?);
        }
        let mut guest = Guest::boot(&host.parts, &spec)?;
        for mode in &modes {
            let direct = guest.mount(&mode.share)?;
            guest.overlay(&mode.merged(), &[direct])?;
        }
        let mut table = Table::default();

        // Actions of the guest and of its caches. The audit has checked all names as soon as it reports the sentinel,
        // which the guest looked up last and the host removed.
        guest.must(cells::OBSERVE)?;
        cells::run_guest_actions(&mut guest, &modes)?;
        for mode in &modes {
            fs::remove_file(host.source(&mode.share).join(SENTINEL))?;
        }
        for mode in &modes {
            let events = host.events_when(&mode.share, |paths| paths.contains(&SENTINEL.to_owned()))?;
            GUEST_ACTIONS.iter().for_each(|cell| table.add_guest_action(mode, cell, &events));
        }

        // Changes by the host to names that the guest holds.
        for mode in &modes {
            cells::look_up_all(&mut guest, mode)?;
        }
        for mode in &modes {
            cells::change_files(&host.source(&mode.share))?;
        }
        sleep(EXPIRY);
        for mode in &modes {
            let seen = cells::observe(&mut guest, mode)?;
            let all = |paths: &[String]| HOST_CHANGES.iter().all(|cell| paths.iter().any(|path| cell.is_about(path)));
            let events = host.events_when(&mode.share, all)?;
            HOST_CHANGES.iter().for_each(|cell| table.add_host_change(mode, cell, &seen, &events));
            table.check_counted_once(mode, &host.session(&mode.share)?)?;
        }
        println!("{table}");
        guest.shutdown()?;
        table.check()
    })
}

/// The first table of the page: a guest that holds more inodes than its engine may have open files. Smaller here.
#[test]
fn missing_descriptors_are_counted_only_if_requests_fail() -> Result<()> {
    const FILES: u64 = 1500;
    let full = |share: &'static str, engine: &'static str, content: &'static str| (share, engine, content);
    let shares = [
        full("auto", "{inodeFileHandles: Never, openFiles: 1100}", "Shared"),
        full("never", "{inodeFileHandles: Never, openFiles: 1100, cache: Never}", "Shared"),
        full("always", "{inodeFileHandles: Never, openFiles: 1100}", "Exclusive"),
        full("handles", "{inodeFileHandles: Mandatory, openFiles: 1100}", "Shared"),
    ];
    Host::run(|host| {
        let mut spec = GuestSpec::default();
        for (share, engine, content) in shares {
            host.plant_list(share, FILES)?;
            host.declare(share, "ReadWrite", content, engine)?;
            spec = spec.with_device(share, &host.node.socket(share)?);
        }
        let mut guest = Guest::boot(&host.parts, &spec)?;
        println!("| files | phase | the guest counted | FdExhausted |\n|---|---|---|---|");
        for (share, engine, content) in shares {
            let direct = guest.mount(share)?;
            guest.overlay(&format!("{share}-merged"), std::slice::from_ref(&direct))?;
            guest.must(&format!("cp {direct}/list /run/{share}"))?;
            let all = Load::listed(&format!("/run/{share}"));
            let phase = |guest: &mut Guest, what: &str, load: &Load| -> Result<Summary> {
                let before = host.session(share)?.totals.stale(Cause::FdExhausted);
                let summary = guest.work(load, 1)?;
                let session = host.session(share)?;
                let events = session.totals.stale(Cause::FdExhausted) - before;
                println!("| {share} | {what} | {:?} | {events} |", summary.errors);
                ensure!((summary.error_count() > 0) == (events > 0), "{share}, {what}: {summary:?}, {events} events");
                let others = session.totals.stale.iter().filter(|total| total.cause != Cause::FdExhausted);
                ensure!(others.count() == 0, "{share}, {what}: {:?}", session.totals.stale);
                Ok(summary)
            };
            let filled = phase(&mut guest, "fill", &all)?;
            sleep(EXPIRY);
            phase(&mut guest, "the first 100 again", &all.clone().at_most(100))?;
            ensure!(
                (filled.error_count() > 0) == (share != "handles"),
                "{share}: unexpected errors while filling: {filled:?}"
            );
            if share == "auto" {
                // An engine that holds none of the inodes needs a descriptor to find each.
                host.node.kill_engine(share)?;
                guest.must(&format!("tail -n 900 /run/{share} >/run/last"))?;
                phase(&mut guest, "another engine, the last 900", &Load::listed("/run/last"))?;
                sleep(EXPIRY);
                let again = phase(&mut guest, "the first 100 again", &all.clone().at_most(100))?;
                ensure!(again.errors.contains_key("ESTALE"), "the bug report is not reproduced: {again:?}");
                let cure = "{inodeFileHandles: Mandatory, openFiles: 1100}";
                host.reconfigure(share, "ReadWrite", content, cure)?;
                let recovered = phase(&mut guest, "handed over to file handles, all", &all)?;
                recovered.must_be_clean().with_context(|| format!("after {engine}"))?;
            }
        }
        guest.shutdown()
    })
}

/// Another file system is mounted at the source's path: the guest continues there without a new mount. For a VM the
/// changes of a second VM are like those of any host process.
#[test]
fn a_source_that_is_replaced_and_a_second_vm() -> Result<()> {
    Host::run(|host| {
        let source = host.source("moving");
        let first = Mounted::tmpfs(&source)?;
        cells::plant_root(&source, "first")?;
        for (share, content) in [("cached", "Immutable"), ("asking", "Shared")] {
            host.declare_at(share, &source, "ReadOnly", content, "{}")?;
        }
        fs::create_dir_all(host.source("both"))?;
        fs::write(host.source("both").join("held"), "x")?;
        host.declare("both", "ReadWrite", "Shared", "{}")?;
        let device = |spec: GuestSpec, tag: &str, share: &str| -> Result<GuestSpec> {
            Ok(spec.with_device(tag, &host.node.socket(share)?))
        };
        let mut spec = GuestSpec::default();
        for (tag, share) in [("cached", "cached"), ("asking", "asking"), ("one", "both"), ("two", "both")] {
            spec = device(spec, tag, share)?;
        }
        let mut guest = Guest::boot(&host.parts, &spec)?;
        for tag in ["cached", "asking", "one", "two"] {
            guest.mount(tag)?;
        }

        guest.must("cat /mnt/one/held && rm /mnt/two/held")?;
        sleep(EXPIRY);
        guest.must("! cat /mnt/one/held")?;
        let counts: Vec<_> = host.sessions("both")?.iter().map(|it| it.totals.stale(Cause::SourceRemoved)).collect();
        ensure!(
            counts.iter().sum::<u64>() == 1,
            "the VM that made the change must count 0 events and the other one 1: {counts:?}"
        );

        let read = "cat /mnt/$s/file /mnt/$s/dir/file && cd /mnt/$s/dir && cat file";
        for share in ["cached", "asking"] {
            ensure!(guest.must(&format!("s={share}; {read}"))? == "first\nfirst\nfirst\n", "{share}");
        }
        drop(first);
        let _second = Mounted::tmpfs(&source)?;
        cells::plant_root(&source, "second")?;
        for share in ["cached", "asking"] {
            let seen = host.until(share, |session| session.source_gone.is_some())?;
            ensure!(seen.totals.stale(Cause::SourceGone) == 1, "{share}: {:?}", seen.totals.stale);
            ensure!(
                guest.must(&format!("s={share}; {read}"))? == "first\nfirst\nfirst\n",
                "{share} must still be served from the old source"
            );
            host.node.reopen_source(share)?;
            let now = guest.must(&format!("s={share}; {read}"))?;
            ensure!(now == "second\nsecond\nsecond\n", "{share} after the hand-over: {now}");
            let session = host.until(share, |session| session.source_gone.is_none())?;
            let others = session.totals.stale.iter().filter(|total| total.cause != Cause::SourceGone).count();
            ensure!(others == 0, "a replacement must not be counted: {share}: {:?}", session.stale_events);
        }
        guest.shutdown()
    })
}
