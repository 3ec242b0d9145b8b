//! What a node has of pods and shares: mounts, files, sockets, processes. To be compared with what it had before.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::kubelet;
use super::sessions::{RUNTIME_DIR, processes_of};

/// Programs of which none may be left.
const PROGRAMS: [&str; 4] = ["virtiofs-engine", "virtiofs-broker", "virtiofs-agent", "qemu-system-x86_64"];

/// What there is, in words, and how many of each. Names that are generated each time are one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traces(BTreeMap<String, usize>);

impl Traces {
    /// What there is now.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn now() -> Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").context("reading mounts")?;
        let mounts = mounts.lines().filter_map(|line| Some(format!("mount {}", line.split(' ').nth(4)?)));
        let places = [Path::new(RUNTIME_DIR), &Path::new(kubelet::ROOT).join("pods")];
        let files = places.into_iter().flat_map(files_below).map(|path| format!("file {}", path.display()));
        let processes = PROGRAMS.into_iter().flat_map(|program| {
            let count = processes_of(program).len();
            std::iter::repeat_n(format!("process {program}"), count)
        });
        let mut found = BTreeMap::new();
        for word in mounts.chain(files).chain(processes) {
            *found.entry(nameless(&word)).or_default() += 1;
        }
        Ok(Traces(found))
    }

    /// What of it is about mounts.
    #[must_use]
    pub fn mounts(self) -> Self {
        Traces(self.0.into_iter().filter(|(word, _)| word.starts_with("mount ")).collect())
    }

    /// What there is of something more than there was before: a line for each.
    pub fn since(&self, before: &Self) -> String {
        let count = |word: &str| before.0.get(word).copied().unwrap_or_default();
        let more = self.0.iter().filter(|(word, now)| **now > count(word));
        more.map(|(word, now)| format!("{word}: {} before, now {now}\n", count(word))).collect()
    }
}

/// Every socket below the runtime directory and in pods' volumes, with its inode: rebound, it has another.
pub fn sockets() -> BTreeMap<PathBuf, u64> {
    let places = [Path::new(RUNTIME_DIR), &Path::new(kubelet::ROOT).join("pods")];
    let found = places.into_iter().flat_map(files_below).filter_map(|path| {
        let found = fs::symlink_metadata(&path).ok()?;
        found.file_type().is_socket().then_some((path, found.ino()))
    });
    found.collect()
}

fn files_below(place: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    // What goes while it is looked for is not there.
    for entry in fs::read_dir(place).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(files_below(&path));
        }
        found.push(path);
    }
    found
}

/// The ids of pods and containers, and the time in a token's directory, are other ones each time.
fn nameless(word: &str) -> String {
    let parts = word.split('/').map(|part| {
        let id = part.strip_prefix("cni-").unwrap_or(part);
        // A container's file has the beginning of its name.
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
        assert_eq!(nameless(one), "file /pods/*/volumes/*/*/token");
        assert_eq!(nameless("mount /run/netns/cni-0235352b-f4a3-2caf-1821-fd8ab60a2256"), "mount /run/netns/*");
        assert_eq!(nameless("file /pods/x/containers/vm/0a7f31d2"), "file /pods/x/containers/vm/*");
        assert_eq!(nameless("mount /srv/data"), "mount /srv/data");
    }

    #[test]
    fn additions_are_reported_and_removals_are_not() {
        let traces = |words: &[&str]| Traces(words.iter().map(|word| ((*word).to_owned(), 1)).collect());
        let (before, after) = (traces(&["mount /a", "mount /b"]), traces(&["mount /b", "mount /c"]));
        assert_eq!(after.since(&before), "mount /c: 0 before, now 1\n");
        assert_eq!(before.since(&before), "");
    }
}
