//! Changes to files, by the host (counted) and by the guest (not counted), and what the guest then sees.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use e2e::guest::Guest;

/// A file that is looked up last and then removed: its event shows that the audit has checked all names.
pub(crate) const SENTINEL: &str = "sentinel";

/// How a share's engine holds inodes, and how the guest caches.
#[derive(Debug)]
pub(crate) struct Mode {
    pub(crate) share: String,
    pub(crate) content: &'static str,
    pub(crate) engine: String,
}

impl Mode {
    pub(crate) fn all() -> Vec<Self> {
        let caches = [("auto", "Shared", "Auto"), ("never", "Shared", "Never"), ("always", "Exclusive", "Always")];
        let handles = ["Prefer", "Never"];
        let of = |handles: &str, (name, content, cache): (&str, &'static str, &str)| Self {
            share: format!("{}-{name}", handles.to_lowercase()),
            content,
            engine: format!("{{inodeFileHandles: {handles}, cache: {cache}}}"),
        };
        handles.iter().flat_map(|handles| caches.map(|cache| of(handles, cache))).collect()
    }

    pub(crate) fn merged(&self) -> String {
        format!("{}-merged", self.share)
    }
}

/// A change by the host to a name that the guest holds.
pub(crate) struct HostChange {
    pub(crate) what: &'static str,
    /// The name, relative to the share.
    pub(crate) path: &'static str,
    /// Where the guest reads it afterwards.
    pub(crate) view: View,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum View {
    Merged,
    /// On the direct mount, and also on overlayfs, to see the effect there.
    Direct,
    Open,
}

pub(crate) const HOST_CHANGES: [HostChange; 5] = [
    HostChange { what: "replaced by rename", path: "changed/replaced", view: View::Merged },
    HostChange { what: "deleted", path: "changed/deleted", view: View::Merged },
    HostChange { what: "directory recreated", path: "changed/dir", view: View::Merged },
    HostChange { what: "replaced, direct mount", path: "changed/direct", view: View::Direct },
    HostChange { what: "deleted while open", path: "changed/open", view: View::Open },
];

impl HostChange {
    /// True if an event with this path belongs to this cell.
    pub(crate) fn is_about(&self, path: &str) -> bool {
        path.strip_prefix(self.path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    /// Path of the file that the guest reads.
    fn file(&self) -> String {
        if self.path == "changed/dir" { format!("{}/inside", self.path) } else { self.path.to_owned() }
    }
}

/// A change or action of the guest, which must not be counted: its directory, and its script with `$d` and `$m` for the
/// directory on the direct mount and on overlayfs.
pub(crate) struct GuestAction {
    pub(crate) what: &'static str,
    pub(crate) directory: &'static str,
    script: &'static str,
}

pub(crate) const GUEST_ACTIONS: [GuestAction; 6] = [
    // First, because it also drops everything else from the guest's caches.
    GuestAction {
        what: "forget, look up again",
        directory: "forget",
        script: "cat $m/held && echo 3 >/proc/sys/vm/drop_caches && cat $m/held",
    },
    GuestAction {
        what: "the guest's own changes",
        directory: "own",
        script: "cd $d && echo a >made && mv made moved && mkdir sub && mv moved sub/in && mv sub other && \
                 ln other/in second && rm other/in && rmdir other && cat second && rm second && echo b >made && cat made",
    },
    GuestAction {
        what: "rename over a held name",
        directory: "over",
        script: "cat $d/held $d/from && mv $d/from $d/held && cat $d/held && ! cat $d/from",
    },
    GuestAction {
        what: "cache expiry",
        directory: "expiry",
        script: "cat $m/held $d/held && sleep 2 && cat $m/held $d/held",
    },
    GuestAction {
        what: "hard links",
        directory: "links",
        script: "cat $d/one $d/two $d/three && rm $d/one && cat $d/two && mv $d/two $d/four && cat $d/three $d/four",
    },
    GuestAction {
        what: "readdirplus",
        directory: "plus",
        script: "ls -l $d >/run/a && sleep 2 && ls -l $d >/run/b && cat $m/*",
    },
];

/// Writes the files of all cells.
pub(crate) fn plant(source: &Path) -> Result<()> {
    for cell in &HOST_CHANGES {
        write(source, &cell.file(), "old\n")?;
    }
    for cell in &GUEST_ACTIONS {
        fs::create_dir_all(source.join(cell.directory))?;
    }
    for path in ["over/held", "over/from", "expiry/held", "forget/held", "links/one", "plus/a", "plus/b", SENTINEL] {
        write(source, path, "x\n")?;
    }
    for name in ["links/two", "links/three"] {
        fs::hard_link(source.join("links/one"), source.join(name))?;
    }
    Ok(())
}

/// Writes the files of a source that is replaced later.
pub(crate) fn plant_root(source: &Path, contents: &str) -> Result<()> {
    write(source, "file", &format!("{contents}\n"))?;
    write(source, "dir/file", &format!("{contents}\n"))
}

fn write(source: &Path, path: &str, contents: &str) -> Result<()> {
    let path = source.join(path);
    let directory = path.parent().context("a path has a parent directory")?;
    fs::create_dir_all(directory).and_then(|()| fs::write(&path, contents)).with_context(|| path.display().to_string())
}

/// Runs all actions of the guest. None may fail.
pub(crate) fn run_guest_actions(guest: &mut Guest, modes: &[Mode]) -> Result<()> {
    for GuestAction { what, directory, script } in &GUEST_ACTIONS {
        for mode in modes {
            let (direct, merged) =
                (format!("/mnt/{}/{directory}", mode.share), format!("/mnt/{}/{directory}", mode.merged()));
            guest
                .must(&format!("d={direct}; m={merged}; ({script}) >/dev/null"))
                .with_context(|| format!("{what}, {mode:?}"))?;
        }
    }
    for mode in modes {
        // Through overlayfs, which holds the inode whatever the cache policy is.
        guest.must(&format!("cat /mnt/{}/{SENTINEL} >/dev/null", mode.merged()))?;
    }
    Ok(())
}

/// The guest looks up all files that the host will change, on overlayfs and on the direct mount.
pub(crate) fn look_up_all(guest: &mut Guest, mode: &Mode) -> Result<()> {
    let (direct, merged) = (format!("/mnt/{}", mode.share), format!("/mnt/{}", mode.merged()));
    let files: Vec<_> = HOST_CHANGES.iter().map(HostChange::file).collect();
    let names = |root: &str| files.iter().map(|file| format!("{root}/{file} ")).collect::<String>();
    let share = &mode.share;
    // A process of the guest keeps one of them open, and reads it on request.
    guest.must(&format!(
        "cat {} {} >/dev/null && (exec 5<{merged}/changed/open; touch /run/{share}.holds; \
         while [ ! -e /run/{share}.go ]; do sleep 0.1; done; cat <&5 >/run/{share}.out 2>&1; \
         echo $? >/run/{share}.status) >/dev/null 2>&1 & while [ ! -e /run/{share}.holds ]; do sleep 0.05; done",
        names(&direct),
        names(&merged)
    ))?;
    Ok(())
}

/// Makes all changes of the host.
pub(crate) fn change_files(source: &Path) -> Result<()> {
    for path in ["changed/replaced", "changed/direct"] {
        write(source, "changed/new", "new\n")?;
        fs::rename(source.join("changed/new"), source.join(path))?;
    }
    for path in ["changed/deleted", "changed/open"] {
        fs::remove_file(source.join(path))?;
    }
    fs::remove_dir_all(source.join("changed/dir"))?;
    write(source, "changed/dir/inside", "new\n")
}

/// A shell function that reads a file and prints its content or the error in one line.
pub(crate) const OBSERVE: &str = "cat >/run/observe <<'END'\n\
    o() { out=$(cat \"$2\" 2>/run/error) && echo \"$1=$out\" || echo \"$1=$(sed 's/.*: //' /run/error)\"; }\n\
    END";

/// What the guest now sees of each change by the host.
pub(crate) fn observe(guest: &mut Guest, mode: &Mode) -> Result<BTreeMap<String, String>> {
    let (direct, merged, share) = (format!("/mnt/{}", mode.share), format!("/mnt/{}", mode.merged()), &mode.share);
    let mut script = String::from(". /run/observe\n");
    for cell in &HOST_CHANGES {
        let (what, file) = (cell.what, cell.file());
        match cell.view {
            View::Merged => {}
            View::Direct => script.push_str(&format!("o '{what}' {direct}/{file}\n")),
            View::Open => script.push_str(&format!(
                "touch /run/{share}.go; while [ ! -e /run/{share}.status ]; do sleep 0.1; done; o '{what}' /run/{share}.out\n"
            )),
        }
        let overlay = if cell.view == View::Merged { what.to_owned() } else { on_overlayfs(cell) };
        script.push_str(&format!("o '{overlay}' {merged}/{file}\n"));
    }
    let output = guest.must(&script)?;
    Ok(output.lines().filter_map(|line| line.split_once('=')).map(|(what, seen)| (what.into(), seen.into())).collect())
}

/// Name of the result on overlayfs of a cell that is read in another way.
pub(crate) fn on_overlayfs(cell: &HostChange) -> String {
    format!("{}, overlayfs", cell.what)
}
