//! Guests' programs get correct replies while the host changes the same files: listings are complete, and every
//! successful write is on the host.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use anyhow::{Context, Result, ensure};
use e2e::guest::{Guest, GuestSpec};
use e2e::node::{Declaration, Node};
use e2e::parts::Parts;

const STABLE: usize = 300;
/// Scripts of ten listings each. A script must not exceed the time limit, even on a slow machine.
const BATCHES: usize = 12;
const LISTINGS: usize = 10 * BATCHES;

/// Serves `source` with these engine settings to a guest that has mounted it, and runs `test` on the mount point. A
/// failure includes the daemons' log.
fn serve(source: &Path, content: &str, engine: &str, test: impl FnOnce(&mut Guest, &str) -> Result<()>) -> Result<()> {
    let parts = Parts::locate()?;
    let node = Node::start(&parts)?;
    let run = || -> Result<()> {
        node.declare(&Declaration { name: "share", source, access: "ReadWrite", content, engine, staleness: "{}" })?;
        let mut guest = Guest::boot(&parts, &GuestSpec::default().with_device("share", &node.socket("share")?))?;
        let mount = guest.mount("share")?;
        test(&mut guest, &mount)?;
        guest.shutdown()
    };
    run().with_context(|| node.log_tail())?;
    node.stop()
}

/// Creates and removes names in `directory` until it is stopped.
fn churn(directory: &Path, stop: &AtomicBool, rounds: &AtomicU64) -> std::io::Result<()> {
    while !stop.load(Ordering::Relaxed) {
        let names: Vec<_> = (0..200).map(|n| directory.join(format!("churn-{n}"))).collect();
        names.iter().try_for_each(|name| fs::write(name, ""))?;
        names.iter().try_for_each(fs::remove_file)?;
        rounds.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// A script that lists `mount` ten times and prints the number of stable names in each listing, and how many of them
/// differ.
///
/// A program that stops at an error of getdents prints a short list. `find` requests attributes between two getdents,
/// so that the guest's kernel reads the directory with READDIRPLUS.
fn list(mount: &str) -> String {
    format!(
        "for n in $(seq 5); do for list in 'ls -1 {mount}' 'find {mount} -type f'; do \
           $list 2>/dev/null | grep -o 'stable-[0-9]*$' >/run/listed; \
           echo $(wc -l </run/listed) $(sort -u /run/listed | wc -l); done; done"
    )
}

#[test]
fn listings_are_complete_while_the_host_adds_and_removes_names() -> Result<()> {
    let source = tempfile::tempdir()?;
    for n in 0..STABLE {
        fs::write(source.path().join(format!("stable-{n}")), "")?;
    }
    serve(source.path(), "Shared", "{}", |guest, mount| {
        let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
        thread::scope(|scope| {
            let host = scope.spawn(|| churn(source.path(), &stop, &rounds));
            let listed = (0..BATCHES).map(|_| guest.must(&list(mount))).collect::<Result<String>>();
            stop.store(true, Ordering::Relaxed);
            host.join().map_err(|_| anyhow::anyhow!("the thread of the host panicked"))??;
            let (listed, complete) = (listed?, format!("{STABLE} {STABLE}"));
            ensure!(listed.lines().count() == LISTINGS, "{listed}");
            let short = listed.lines().filter(|line| *line != complete).count();
            let rounds = rounds.load(Ordering::Relaxed);
            println!(
                "{LISTINGS} listings, {short} incomplete, while the host went through {rounds} rounds of 200 names"
            );
            ensure!(short == 0, "{short} of {LISTINGS} listings were incomplete:\n{listed}");
            ensure!(rounds > 10, "the host made too few changes: {rounds} rounds");
            Ok(())
        })
    })
}

/// Commands with which the guest writes the file, and the content that the file must then have.
const WRITES: [(&str, &str, &str); 3] = [
    ("truncate and write", "echo kept >$f", "kept\n"),
    ("append", "echo kept >>$f", "new\nkept\n"),
    ("dd with fsync", "echo kept | dd of=$f conv=fsync 2>/dev/null", "kept\n"),
];

#[test]
fn a_write_to_a_file_that_the_host_removed_or_replaced_is_kept() -> Result<()> {
    for (content, handles) in [("Shared", "Never"), ("Exclusive", "Never"), ("Shared", "Prefer")] {
        let source = tempfile::tempdir()?;
        // Long enough that the guest's kernel still trusts the name on a slow machine.
        let engine = format!("{{inodeFileHandles: {handles}, entryTimeout: 1m, attrTimeout: 1m}}");
        serve(source.path(), content, &engine, |guest, mount| {
            for round in 0..4 {
                for (what, script, replaced) in WRITES {
                    for replace in [true, false] {
                        let name = format!("{}-{round}-{replace}", what.replace(' ', "-"));
                        let file = source.path().join(&name);
                        fs::write(&file, "old\n")?;
                        guest.must(&format!("cat {mount}/{name}"))?;
                        // A host process that has the file open keeps it reachable by its file handle.
                        let _open = fs::File::open(&file)?;
                        if replace {
                            fs::write(source.path().join("beside"), "new\n")?;
                            fs::rename(source.path().join("beside"), &file)?;
                        } else {
                            fs::remove_file(&file)?;
                        }
                        guest.must(&format!("f={mount}/{name}; {script}"))?;
                        let found = fs::read_to_string(&file)
                            .with_context(|| format!("{what}, {content}, {handles}: the guest's write is lost"))?;
                        let expected = if replace { replaced } else { "kept\n" };
                        ensure!(found == expected, "{what}, {content}, {handles}: the file contains {found:?}");
                    }
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}
