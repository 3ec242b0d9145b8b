//! Resources of processes from /proc, to detect leaks at the end of a run.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

/// Resources of one process or several processes.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Holdings {
    /// Number of processes.
    pub processes: usize,
    /// Number of threads.
    pub threads: usize,
    /// Number of open file descriptors.
    pub fds: usize,
    /// Number of descriptors of memfds.
    pub memfds: usize,
    /// Number of descriptors by kind: `socket`, `eventfd`, `memfd`, `pipe`, `path` and so on.
    pub by_kind: BTreeMap<String, usize>,
    /// Number of descriptors of kind `path` by their path.
    pub paths: BTreeMap<String, usize>,
    /// Number of mappings of memfds, whose descriptors may be closed.
    pub memfd_mappings: usize,
    /// Resident memory in bytes.
    pub resident: u64,
}

impl Holdings {
    /// Resources of a process.
    pub fn of(pid: i32) -> io::Result<Self> {
        let mut holdings = Self {
            processes: 1,
            threads: fs::read_dir(proc(pid, "task"))?.count(),
            memfd_mappings: memfd_mappings(pid)?,
            resident: resident(pid)?,
            ..Self::default()
        };
        for fd in fs::read_dir(proc(pid, "fd"))? {
            // The descriptor may have been closed since the listing.
            if let Ok(target) = fs::read_link(fd?.path()) {
                holdings.count(&target);
            }
        }
        Ok(holdings)
    }

    /// Resources of a process and all its descendants. Processes that end meanwhile count as ended.
    pub fn of_tree(pid: i32) -> io::Result<Self> {
        let mut total = Self::of(pid)?;
        for child in descendants(pid)? {
            if let Ok(holdings) = Self::of(child) {
                total.add(&holdings);
            }
        }
        Ok(total)
    }

    /// Resources beyond `before`, by name; empty if nothing leaked. Memory and threads vary without a leak and are not
    /// compared. Leaked paths are also listed one by one.
    pub fn leaked_since(&self, before: &Self) -> BTreeMap<String, usize> {
        let mut leaked = BTreeMap::new();
        let mut compare = |name: &str, now: usize, then: usize| {
            if now > then {
                leaked.insert(name.to_owned(), now - then);
            }
        };
        compare("process", self.processes, before.processes);
        compare("memfd mapping", self.memfd_mappings, before.memfd_mappings);
        for (kind, &now) in &self.by_kind {
            compare(kind, now, before.by_kind.get(kind).copied().unwrap_or(0));
        }
        if leaked.contains_key("path") {
            for (path, &now) in &self.paths {
                let then = before.paths.get(path).copied().unwrap_or(0);
                leaked.extend((now > then).then(|| (path.clone(), now - then)));
            }
        }
        leaked
    }

    fn count(&mut self, target: &Path) {
        let kind = kind_of(target);
        self.fds += 1;
        self.memfds += usize::from(kind == "memfd");
        if kind == "path" {
            *self.paths.entry(target.to_string_lossy().into_owned()).or_default() += 1;
        }
        *self.by_kind.entry(kind).or_default() += 1;
    }

    fn add(&mut self, other: &Self) {
        self.processes += other.processes;
        self.threads += other.threads;
        self.fds += other.fds;
        self.memfds += other.memfds;
        self.memfd_mappings += other.memfd_mappings;
        self.resident += other.resident;
        for (kind, count) in &other.by_kind {
            *self.by_kind.entry(kind.clone()).or_default() += count;
        }
        for (path, count) in &other.paths {
            *self.paths.entry(path.clone()).or_default() += count;
        }
    }
}

/// All living descendants of a process, nearest first.
pub fn descendants(pid: i32) -> io::Result<Vec<i32>> {
    let mut parents = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(child) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if let Some(parent) = fs::read_to_string(proc(child, "stat")).ok().as_deref().and_then(parent_in_stat) {
            parents.push((child, parent));
        }
    }
    let mut found = vec![pid];
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(parents.iter().filter(|p| p.1 == parent).map(|p| p.0));
        next += 1;
    }
    Ok(found.split_off(1))
}

/// True if the process exists and is not a zombie.
pub fn is_alive(pid: i32) -> bool {
    fs::read_to_string(proc(pid, "stat")).is_ok_and(|stat| parent_in_stat(&stat).is_some())
}

/// The fourth field of /proc/PID/stat. The second field may contain spaces and parentheses.
fn parent_in_stat(stat: &str) -> Option<i32> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    // A zombie has no resources.
    if fields.next()? == "Z" {
        return None;
    }
    fields.next()?.parse().ok()
}

fn proc(pid: i32, file: &str) -> String {
    format!("/proc/{pid}/{file}")
}

/// Kind of descriptor from its link target: `anon_inode:[eventfd]`, `socket:[123]`, `/memfd:name (deleted)`,
/// `/some/path`.
fn kind_of(target: &Path) -> String {
    let target = target.to_string_lossy();
    if target.starts_with("/memfd:") {
        return "memfd".to_owned();
    }
    if target.starts_with('/') {
        return "path".to_owned();
    }
    match target.split_once(':') {
        Some(("anon_inode", name)) => name.trim_matches(['[', ']']).to_owned(),
        Some((kind, _)) => kind.to_owned(),
        None => target.into_owned(),
    }
}

fn memfd_mappings(pid: i32) -> io::Result<usize> {
    let maps = fs::read_to_string(proc(pid, "maps"))?;
    Ok(maps.lines().filter(|line| line.contains("/memfd:")).count())
}

/// Memory in bytes of a process and all its descendants, in which a page that several processes have counts once (`Pss`).
/// Needs the right to trace them.
pub fn proportional_memory(pid: i32) -> io::Result<u64> {
    let of = |pid| Ok::<_, io::Error>(kib_line(&fs::read_to_string(proc(pid, "smaps_rollup"))?, "Pss:"));
    // Processes that end meanwhile have none.
    let below: u64 = descendants(pid)?.into_iter().filter_map(|pid| of(pid).ok()).sum();
    Ok(of(pid)? + below)
}

fn resident(pid: i32) -> io::Result<u64> {
    let status = fs::read_to_string(proc(pid, "status"))?;
    Ok(kib_line(&status, "VmRSS:"))
}

/// Bytes of a line such as `VmRSS:  12 kB`; 0 without it.
fn kib_line(text: &str, label: &str) -> u64 {
    let kib = text.lines().find_map(|line| line.strip_prefix(label)?.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leaked_memfd_is_named() {
        use nix::sys::memfd::{MFdFlags, memfd_create};
        let pid = std::process::id() as i32;
        let before = Holdings::of(pid).unwrap();
        let leak: Vec<_> = (0..40).map(|_| memfd_create("leak", MFdFlags::MFD_CLOEXEC).unwrap()).collect();
        let after = Holdings::of(pid).unwrap();
        // Other tests in this process create and close memfds concurrently.
        assert!(after.leaked_since(&before)["memfd"] >= 20);
        drop(leak);
    }

    #[test]
    fn the_parent_is_parsed_after_any_name() {
        assert_eq!(parent_in_stat("7 (a) b (c) S 5 7 7 0"), Some(5));
        assert_eq!(parent_in_stat("7 (a) Z 5 7 7 0"), None);
    }

    #[test]
    fn shared_pages_count_in_proportion() {
        let text = "55d0-7ffd ---p 0 00:00 0 [rollup]\nRss:  4096 kB\nPss:  1024 kB\nPss_Anon:  512 kB\n";
        assert_eq!(kib_line(text, "Pss:"), 1 << 20);
        assert!(proportional_memory(std::process::id() as i32).unwrap() > 1 << 20);
    }

    #[test]
    fn descriptors_are_distinguished() {
        assert_eq!(kind_of(Path::new("/memfd:ram (deleted)")), "memfd");
        assert_eq!(kind_of(Path::new("anon_inode:[eventfd]")), "eventfd");
        assert_eq!(kind_of(Path::new("socket:[12]")), "socket");
        assert_eq!(kind_of(Path::new("/etc/passwd")), "path");
    }
}
