//! State of the host that matters to shares. What cannot be read is noted in its place.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::utsname::uname;
use virtiofs_contract::control::Status;

use super::mask;

/// Number of log lines to take.
const LOG_LINES: &str = "5000";

/// Versions, kernel, limits, cgroups and mounts.
pub(super) fn describe(status: Option<&Status>) -> String {
    let mut text = format!("virtiofsctl {}\n", env!("CARGO_PKG_VERSION"));
    if let Ok(kernel) = uname() {
        let of = |part: &std::ffi::OsStr| part.to_string_lossy().into_owned();
        _ = writeln!(
            text,
            "{} {} {} {}",
            of(kernel.sysname()),
            of(kernel.release()),
            of(kernel.version()),
            of(kernel.machine())
        );
    }
    for file in ["/etc/os-release", "/proc/meminfo", "/proc/loadavg"] {
        add(&mut text, Path::new(file));
    }
    for limit in ["file-max", "file-nr", "nr_open", "pipe-max-size"] {
        add(&mut text, &Path::new("/proc/sys/fs").join(limit));
    }
    let Some(status) = status else {
        text.push_str("\nthe broker does not answer: its process and its sources are unknown\n");
        return text;
    };
    let sessions = status.endpoints.iter().flat_map(|it| &it.sessions);
    for pid in std::iter::once(status.pid).chain(sessions.filter_map(|it| it.engine_pid)) {
        process(&mut text, pid);
    }
    mounts(&mut text, status);
    text
}

fn add(text: &mut String, file: &Path) {
    let content = fs::read_to_string(file).unwrap_or_else(|error| format!("({error})\n"));
    _ = write!(text, "\n== {}\n{content}", file.display());
}

/// Limits, capabilities and cgroup of the broker or an engine.
fn process(text: &mut String, pid: u32) {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let program =
        fs::read_link(proc.join("exe")).map_or_else(|error| format!("({error})"), |it| it.display().to_string());
    _ = writeln!(text, "\n== process {pid}: {program}");
    for file in ["status", "limits", "oom_score_adj", "cgroup"] {
        add(text, &proc.join(file));
    }
    let cgroups = fs::read_to_string(proc.join("cgroup")).unwrap_or_default();
    // The one line of the unified hierarchy: 0::PATH.
    if let Some(group) = cgroups.lines().find_map(|line| line.strip_prefix("0::/")) {
        let files = ["cpu.max", "cpu.weight", "io.max", "io.weight", "memory.max", "memory.current", "pids.max"];
        for file in files.iter().map(|file| Path::new("/sys/fs/cgroup").join(group).join(file)).filter(|it| it.exists())
        {
            add(text, &file);
        }
    }
}

/// The mounts that sources are on, and those below them, in the broker's mount namespace.
fn mounts(text: &mut String, status: &Status) {
    let file = format!("/proc/{}/mountinfo", status.pid);
    _ = writeln!(text, "\n== {file}: at and below sources");
    let all = fs::read_to_string(&file).unwrap_or_else(|error| format!("({error})\n"));
    let sources: BTreeSet<&Path> = status.endpoints.iter().map(|it| it.endpoint.source.as_path()).collect();
    let matters = |line: &&str| {
        let point = Path::new(line.split(' ').nth(4).unwrap_or_default());
        sources.iter().any(|source| point.starts_with(source) || source.starts_with(point))
    };
    for line in all.lines().filter(matters) {
        _ = writeln!(text, "{}", mask::mount(line));
    }
}

/// The journal of the units. Under `virtiofs-agent up` the log is on its standard error.
pub(super) fn log() -> String {
    let mut journal = Command::new("journalctl");
    journal.args(["--no-pager", "--output", "short-iso-precise", "--lines", LOG_LINES]);
    journal.args(["--unit", "virtiofs-agent", "--unit", "virtiofs-broker"]);
    match journal.output() {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
        Ok(output) => format!("journalctl: {}\n", String::from_utf8_lossy(&output.stderr).trim()),
        Err(error) => format!("journalctl: {error}; `virtiofs-agent up` logs on its standard error\n"),
    }
}
