//! Guests' programs get correct replies while the host changes the same files: listings are complete, and every
//! successful write is on the host.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use anyhow::{Context, Result, ensure};
use e2e::guest::{Guest, GuestSpec};
use e2e::node::{Declaration, Node};
use e2e::parts::Parts;
use e2e::stock::Stock;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

const STABLE: usize = 300;
/// Scripts of ten listings each. A script must not exceed the time limit, even on a slow machine.
const BATCHES: usize = 12;
const LISTINGS: usize = 10 * BATCHES;

/// Serves `source` with these engine settings to a guest that has mounted it, and runs `test` on the mount point. A
/// failure includes the daemons' log.
fn serve(source: &Path, content: &str, engine: &str, test: impl FnOnce(&mut Guest, &str) -> Result<()>) -> Result<()> {
    serve_node(source, content, engine, |_, guest, mount| test(guest, mount))
}

/// The same, for a test that also needs the node.
fn serve_node(
    source: &Path,
    content: &str,
    engine: &str,
    test: impl FnOnce(&Node, &mut Guest, &str) -> Result<()>,
) -> Result<()> {
    let parts = Parts::locate()?;
    let node = Node::start(&parts)?;
    let run = || -> Result<()> {
        node.declare(&Declaration { name: "share", source, access: "ReadWrite", content, engine, staleness: "{}" })?;
        let mut guest = Guest::boot(&parts, &GuestSpec::default().with_device("share", &node.socket("share")?))?;
        let mount = guest.mount("share")?;
        test(&node, &mut guest, &mount)?;
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

/// A script that runs in the guest over a hand-over: it begins with `before` and ends with `after`, in directory `at`. What
/// it prints is read by [`finish`].
fn begin(at: &str, before: &str, after: &str) -> String {
    format!(
        "rm -f /run/go /run/out; cd {at}; {before}; \
         (while [ ! -e /run/go ]; do sleep 0.1; done; {after}; echo end) </dev/null >/run/out 2>&1 &"
    )
}

fn finish(guest: &mut Guest) -> Result<String> {
    guest.must("touch /run/go; for n in $(seq 300); do grep -q ^end /run/out && break; sleep 0.1; done; cat /run/out")
}

#[test]
fn a_write_by_name_to_a_removed_open_file_is_kept_after_a_hand_over() -> Result<()> {
    for handles in ["Never", "Prefer"] {
        let source = tempfile::tempdir()?;
        let engine = format!("{{inodeFileHandles: {handles}, entryTimeout: 1m, attrTimeout: 1m}}");
        serve_node(source.path(), "Shared", &engine, |node, guest, mount| {
            let file = source.path().join("f");
            fs::write(&file, "old\n")?;
            // The open file is in the fd stash after the hand-over: the node can be opened.
            let after = format!("cat <&3; echo kept >>{mount}/f; cat {mount}/f");
            guest.must(&begin("/", &format!("exec 3<{mount}/f"), &after))?;
            fs::remove_file(&file)?;
            println!("{}", node.hand_over("share")?);
            let said = finish(guest)?;
            let found = fs::read_to_string(&file).context("the guest's write is lost")?;
            ensure!(found == "kept\n" && said == "old\nkept\nend\n", "{handles}: {found:?}, {said:?}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_removed_working_directory_is_empty_after_a_hand_over() -> Result<()> {
    for handles in ["Never", "Prefer"] {
        let source = tempfile::tempdir()?;
        let engine = format!("{{inodeFileHandles: {handles}}}");
        serve_node(source.path(), "Shared", &engine, |node, guest, mount| {
            let after =
                "stat -c '%h %F' . && ls -a . && cat . ; echo x >name; stat -c %a .; chmod 700 . && stat -c %a .";
            let before = format!("mkdir -m 750 {mount}/d; cd {mount}/d; rmdir {mount}/d");
            guest.must(&begin("/", &before, after))?;
            println!("{}", node.hand_over("share")?);
            // The guest trusts attributes for a second.
            guest.must("sleep 2")?;
            let said = finish(guest)?;
            let lines: Vec<&str> = said.lines().collect();
            ensure!(lines.first() == Some(&"0 directory"), "{handles}: {said}");
            ensure!(lines.iter().any(|line| line.contains("Is a directory")), "{handles}: {said}");
            ensure!(
                lines.iter().any(|line| line.contains("nonexistent") || line.contains("No such")),
                "{handles}: {said}"
            );
            ensure!(lines.ends_with(&["750", "700", "end"]), "{handles}: {said}");
            ensure!(!said.contains("Stale"), "{handles}: {said}");
            Ok(())
        })?;
    }
    Ok(())
}

/// A tmpfs that is unmounted when dropped, with all that is mounted below it.
struct Scratch(tempfile::TempDir);

impl Scratch {
    fn mount() -> Result<Self> {
        let at = tempfile::tempdir()?;
        mount(Some("tmpfs"), at.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
        Ok(Scratch(at))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

#[test]
fn files_that_are_mounted_one_by_one_are_copied_whole() -> Result<()> {
    let (source, beside) = (Scratch::mount()?, Scratch::mount()?);
    let (source, beside) = (source.0.path(), beside.0.path());
    // Both file systems count from the same number. Programs look for hard links only where a file has several names.
    for (directory, contents) in [(source, "of the source"), (beside, "of another file system")] {
        fs::write(directory.join("file"), contents)?;
        fs::hard_link(directory.join("file"), directory.join("link"))?;
    }
    fs::write(source.join("mounted"), "")?;
    mount(Some(&beside.join("file")), &source.join("mounted"), None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    let [own, other] = ["file", "mounted"].map(|name| fs::metadata(source.join(name)).map(|found| found.ino()));
    ensure!(own? == other?, "the test needs two files with the same number");
    let copy = |guest: &mut Guest, mount: &str| {
        guest.must(&format!(
            "rm -rf /run/copy /run/tar; cp -a {mount} /run/copy; mkdir /run/tar; tar -C {mount} -cf - . | tar -C /run/tar -xf -; \
             for at in /run/copy /run/tar; do for name in file link mounted; do cat $at/$name; echo; done; done"
        ))
    };
    let right = "of the source\nof the source\nof another file system\n".repeat(2);
    serve(source, "Shared", "{}", |guest, mount| {
        let found = copy(guest, mount)?;
        ensure!(found == right, "{found}");
        Ok(())
    })?;
    let parts = Parts::locate()?;
    let stock = Stock::start(&parts, source, &["--cache=auto", "--announce-submounts"])?;
    let mut guest = Guest::boot(&parts, &GuestSpec::default().with_device("share", stock.socket()))?;
    let mount = guest.mount("share")?;
    println!("stock: {}", if copy(&mut guest, &mount)? == right { "right" } else { "wrong contents" });
    guest.shutdown()
}
