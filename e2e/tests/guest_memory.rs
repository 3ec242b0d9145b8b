//! Guest memory and the guest's page cache: programs read correct bytes or get an error, whatever memory the VMM shares
//! and whatever data the guest has not sent yet.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use e2e::guest::{Guest, GuestSpec};
use e2e::load::Load;
use e2e::node::{Declaration, Node};
use e2e::parts::Parts;
use serde_json::Value;
use tempfile::TempDir;

const SHARE: &str = "share";
/// Size of a file in MiB. It is read MiB by MiB.
const FILE: usize = 96;
/// Memory to plug in, in MiB, in blocks of 128 MiB.
const PLUGGED: u32 = 256;
/// Number of files that the guest writes, and their size in bytes.
const WRITES: usize = 32;
const WRITTEN: usize = 256 << 10;

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

    fn guest(&self, content: &str, engine: &str, spec: GuestSpec) -> Result<Guest> {
        let (source, access, staleness) = (self.source.path(), "ReadWrite", "{policy: Report}");
        self.node.declare(&Declaration { name: SHARE, source, access, content, engine, staleness })?;
        Guest::boot(&self.parts, &spec.with_device(SHARE, &self.node.socket(SHARE)?))
    }

    /// The share in the output of `virtiofsctl status`.
    fn share(&self) -> Result<Value> {
        let status: Value = serde_json::from_str(&self.node.status(&[SHARE, "-o", "json"])?)?;
        Ok(status["shares"][0].clone())
    }
}

/// Number of MiB that the guest read correctly, failed to read, or read wrong.
#[derive(Debug, PartialEq)]
struct Reads {
    right: usize,
    failed: usize,
    wrong_bytes: usize,
}

/// Reads a file that contains only `x`, MiB by MiB.
fn read(guest: &mut Guest, file: &str, options: &str) -> Result<Reads> {
    let script = format!(
        "right=0; failed=0; wrong=0
         for part in $(seq 0 {last}); do
             if dd if={file} bs=1M skip=$part count=1 {options} of=/run/part 2>/dev/null; then
                 right=$((right + 1))
             else
                 failed=$((failed + 1))
             fi
             wrong=$((wrong + $(tr -d x </run/part | wc -c)))
             rm -f /run/part
         done; echo $right $failed $wrong",
        last = FILE - 1,
    );
    let counts = guest.must(&script)?;
    let counts: Vec<usize> = counts.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    let [right, failed, wrong_bytes] = counts[..] else { anyhow::bail!("the guest printed {counts:?}") };
    Ok(Reads { right, failed, wrong_bytes })
}

/// Writes files that contain only `y`. Returns the names of those whose fsync succeeded.
fn write(guest: &mut Guest, directory: &str) -> Result<Vec<String>> {
    let written = guest.must(&format!(
        "for name in $(seq {WRITES}); do
             tr '\\0' y </dev/zero | dd of={directory}/out-$name bs={WRITTEN} count=1 iflag=fullblock conv=fsync \
                 2>/dev/null && echo out-$name
         done; true"
    ))?;
    Ok(written.lines().map(str::to_owned).collect())
}

fn check_content(path: &Path, byte: u8, length: usize) -> Result<()> {
    let bytes = fs::read(path)?;
    let right = bytes.len() == length && bytes.iter().all(|it| *it == byte);
    ensure!(right, "{}: wrong content after a successful write", path.display());
    Ok(())
}

#[test]
fn memory_that_is_not_shared_gives_errors_and_no_wrong_bytes() -> Result<()> {
    Host::run(|host| {
        fs::write(host.source.path().join("data"), vec![b'x'; FILE << 20])?;
        let mut guest = host.guest("Shared", "{}", GuestSpec { pluggable: PLUGGED, ..GuestSpec::default() })?;
        let at = guest.mount(SHARE)?;
        let file = format!("{at}/data");
        let before = read(&mut guest, &file, "")?;
        ensure!(before == Reads { right: FILE, failed: 0, wrong_bytes: 0 }, "with shared memory only: {before:?}");

        guest.plug_unshared_memory(PLUGGED)?;
        guest.must("echo 3 >/proc/sys/vm/drop_caches")?;
        for options in ["", "iflag=direct"] {
            let reads = read(&mut guest, &file, options)?;
            println!("reads {options}: {reads:?}");
            ensure!(reads.wrong_bytes == 0, "{} wrong bytes were read as data", reads.wrong_bytes);
            ensure!(reads.failed > 0, "the guest does not use the plugged-in memory: {reads:?}");
        }
        let written = write(&mut guest, &at)?;
        println!("{} of {WRITES} writes succeeded", written.len());
        written.iter().try_for_each(|name| check_content(&host.source.path().join(name), b'y', WRITTEN))?;

        let share = host.share()?;
        println!("{:#}", share["notices"]);
        let memory = &share["sessions"][0]["unreachableMemory"];
        ensure!(memory["waiting"] == false && memory["requests"].as_u64() > Some(0), "{memory}");
        ensure!(share["counts"]["malformed"] == 0, "{}", share["counts"]);
        let notices = share["notices"].to_string();
        ensure!(notices.contains("GuestMemoryUnreachable") && notices.contains("share=on"), "{notices}");
        let metrics = host.node.metrics()?;
        let metric = format!("virtiofs_unreachable_memory_requests_total{{share=\"{SHARE}\"}}");
        ensure!(metrics.contains(&metric), "no {metric} in\n{metrics}");
        Ok(())
    })
}

#[test]
fn a_copy_by_holes_is_whole_under_writeback() -> Result<()> {
    Host::run(|host| {
        let mut guest = host.guest("Exclusive", "{writeback: Enabled}", GuestSpec::default())?;
        let at = guest.mount(SHARE)?;
        let copies = guest.work(&Load::copying_by_holes(&at), 50)?;
        copies.must_be_clean()?;
        // This engine received the replayed FUSE_INIT.
        host.node.kill_engine(SHARE)?;
        guest.work(&Load::copying_by_holes(&at), 50)?.must_be_clean()?;
        guest.shutdown()
    })
}
