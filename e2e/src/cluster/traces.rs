//! What pods and shares leave on a node: mounts, files, sockets, processes. Compares two points in time.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::kubelet;
use super::sessions::{RUNTIME_DIR, processes_of};

/// Programs that have to end.
const PROGRAMS: [&str; 4] = ["virtiofs-engine", "virtiofs-broker", "virtiofs-agent", "qemu-system-x86_64"];

/// Descriptions of all mounts, files and processes, with their number. Generated names are replaced by `*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traces(BTreeMap<String, usize>);

impl Traces {
    /// The current state of the node.
    ///
    /// # Errors
    /// If the mounts cannot be read.
    pub fn now() -> Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").context("reading mounts")?;
        let mounts = mounts.lines().filter_map(|line| Some(format!("mount {}", line.split(' ').nth(4)?)));
        let roots = [Path::new(RUNTIME_DIR), &Path::new(kubelet::ROOT).join("pods")];
        let files = roots.into_iter().flat_map(files_below).map(|path| format!("file {}", path.display()));
        let processes = PROGRAMS.into_iter().flat_map(|program| {
            let count = processes_of(program).len();
            std::iter::repeat_n(format!("process {program}"), count)
        });
        let mut found = BTreeMap::new();
        for item in mounts.chain(files).chain(processes) {
            *found.entry(without_generated_names(&item)).or_default() += 1;
        }
        Ok(Traces(found))
    }

    /// Only the mounts.
    #[must_use]
    pub fn mounts(self) -> Self {
        Traces(self.0.into_iter().filter(|(item, _)| item.starts_with("mount ")).collect())
    }

    /// What exists more often than `before`: one line for each.
    pub fn since(&self, before: &Self) -> String {
        let count = |item: &str| before.0.get(item).copied().unwrap_or_default();
        let more = self.0.iter().filter(|(item, now)| **now > count(item));
        more.map(|(item, now)| format!("{item}: {} before, now {now}\n", count(item))).collect()
    }
}

/// Every socket below the runtime directory and in pods' volumes, with its inode number. A socket that is bound again
/// has another number.
pub fn sockets() -> BTreeMap<PathBuf, u64> {
    let roots = [Path::new(RUNTIME_DIR), &Path::new(kubelet::ROOT).join("pods")];
    let found = roots.into_iter().flat_map(files_below).filter_map(|path| {
        let found = fs::symlink_metadata(&path).ok()?;
        found.file_type().is_socket().then_some((path, found.ino()))
    });
    found.collect()
}

fn files_below(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    // Skips files that are removed during the walk.
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(files_below(&path));
        }
        found.push(path);
    }
    found
}

/// Replaces generated parts of a path, which differ in each run: ids of pods and containers, and the time in the name
/// of a token's directory.
fn without_generated_names(item: &str) -> String {
    let parts = item.split('/').map(|part| {
        let id = part.strip_prefix("cni-").unwrap_or(part);
        // A file of a container has the beginning of the container's id in its name.
        let is_id = (id.len() == 8 || id.len() >= 32) && id.chars().all(|c| c.is_ascii_hexdigit() || c == '-');
        let is_token = part.contains("kube-api-access-") || part.starts_with("..2");
        if is_id || is_token { "*" } else { part }
    });
    parts.collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_names_count_as_one() {
        let one = "file /pods/1aa28ee6-31d4-4fcc-a3d5-ec4f7b63b1f1/volumes/kube-api-access-x7j2k/..2026_11_25/token";
        assert_eq!(without_generated_names(one), "file /pods/*/volumes/*/*/token");
        assert_eq!(
            without_generated_names("mount /run/netns/cni-0235352b-f4a3-2caf-1821-fd8ab60a2256"),
            "mount /run/netns/*"
        );
        assert_eq!(without_generated_names("file /pods/x/containers/vm/0a7f31d2"), "file /pods/x/containers/vm/*");
        assert_eq!(without_generated_names("mount /srv/data"), "mount /srv/data");
    }

    #[test]
    fn additions_are_reported_and_removals_are_not() {
        let traces = |words: &[&str]| Traces(words.iter().map(|item| ((*item).to_owned(), 1)).collect());
        let (before, after) = (traces(&["mount /a", "mount /b"]), traces(&["mount /b", "mount /c"]));
        assert_eq!(after.since(&before), "mount /c: 0 before, now 1\n");
        assert_eq!(before.since(&before), "");
    }
}
