//! What is done to files, by the host (loud) and by the guest (quiet), and what the guest then sees.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use e2e::guest::Guest;

/// The file whose removal shows how far the audit has come.
pub(crate) const SENTINEL: &str = "sentinel";

/// How a share's engine holds inodes, and how its guest caches.
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

/// One thing that the host does to a name that the guest holds.
pub(crate) struct Loud {
    pub(crate) what: &'static str,
    /// The name, below the share.
    pub(crate) path: &'static str,
    /// What the guest reads then: on overlayfs, or directly, or what it has open.
    pub(crate) look: Look,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Look {
    Merged,
    /// And then on overlayfs as well: would it be hurt there?
    Direct,
    Open,
}

pub(crate) const LOUD: [Loud; 5] = [
    Loud { what: "replaced by rename", path: "loud/replaced", look: Look::Merged },
    Loud { what: "deleted", path: "loud/deleted", look: Look::Merged },
    Loud { what: "directory recreated", path: "loud/dir", look: Look::Merged },
    Loud { what: "replaced, direct mount", path: "loud/direct", look: Look::Direct },
    Loud { what: "deleted while open", path: "loud/open", look: Look::Open },
];

impl Loud {
    /// Is an event of this path about this cell?
    pub(crate) fn is_about(&self, path: &str) -> bool {
        path.strip_prefix(self.path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    /// The file that is read.
    fn file(&self) -> String {
        if self.path == "loud/dir" { format!("{}/inside", self.path) } else { self.path.to_owned() }
    }
}

/// One thing that is nobody's fault: the directory in which it happens, and the script, with `$d` and `$m` for the
/// directory on the direct mount and on overlayfs.
pub(crate) struct Quiet {
    pub(crate) what: &'static str,
    pub(crate) directory: &'static str,
    script: &'static str,
}

pub(crate) const QUIET: [Quiet; 6] = [
    // First, because it makes the guest forget everything else as well.
    Quiet {
        what: "forget, look up again",
        directory: "forget",
        script: "cat $m/held && echo 3 >/proc/sys/vm/drop_caches && cat $m/held",
    },
    Quiet {
        what: "the guest's own changes",
        directory: "own",
        script: "cd $d && echo a >made && mv made moved && mkdir sub && mv moved sub/in && mv sub other && \
                 ln other/in second && rm other/in && rmdir other && cat second && rm second && echo b >made && cat made",
    },
    Quiet {
        what: "rename over a held name",
        directory: "over",
        script: "cat $d/held $d/from && mv $d/from $d/held && cat $d/held && ! cat $d/from",
    },
    Quiet {
        what: "cache expiry",
        directory: "expiry",
        script: "cat $m/held $d/held && sleep 2 && cat $m/held $d/held",
    },
    Quiet {
        what: "hard links",
        directory: "links",
        script: "cat $d/one $d/two $d/three && rm $d/one && cat $d/two && mv $d/two $d/four && cat $d/three $d/four",
    },
    Quiet {
        what: "readdirplus",
        directory: "plus",
        script: "ls -l $d >/run/a && sleep 2 && ls -l $d >/run/b && cat $m/*",
    },
];

/// Puts everything in place.
pub(crate) fn plant(source: &Path) -> Result<()> {
    for cell in &LOUD {
        write(source, &cell.file(), "old\n")?;
    }
    for cell in &QUIET {
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

/// Files for a source that is to be another one later.
pub(crate) fn plant_root(source: &Path, contents: &str) -> Result<()> {
    write(source, "file", &format!("{contents}\n"))?;
    write(source, "dir/file", &format!("{contents}\n"))
}

fn write(source: &Path, path: &str, contents: &str) -> Result<()> {
    let path = source.join(path);
    let directory = path.parent().context("a file without a directory")?;
    fs::create_dir_all(directory).and_then(|()| fs::write(&path, contents)).with_context(|| path.display().to_string())
}

/// The guest by itself. None of it may fail.
pub(crate) fn be_quiet(guest: &mut Guest, modes: &[Mode]) -> Result<()> {
    for Quiet { what, directory, script } in &QUIET {
        for mode in modes {
            let (direct, merged) =
                (format!("/mnt/{}/{directory}", mode.share), format!("/mnt/{}/{directory}", mode.merged()));
            guest
                .must(&format!("d={direct}; m={merged}; ({script}) >/dev/null"))
                .with_context(|| format!("{what}, {mode:?}"))?;
        }
    }
    for mode in modes {
        // On overlayfs, which holds on to it whatever the cache policy.
        guest.must(&format!("cat /mnt/{}/{SENTINEL} >/dev/null", mode.merged()))?;
    }
    Ok(())
}

/// The guest takes hold of everything that the host will touch, on overlayfs and below it.
pub(crate) fn hold(guest: &mut Guest, mode: &Mode) -> Result<()> {
    let (direct, merged) = (format!("/mnt/{}", mode.share), format!("/mnt/{}", mode.merged()));
    let files: Vec<_> = LOUD.iter().map(Loud::file).collect();
    let names = |root: &str| files.iter().map(|file| format!("{root}/{file} ")).collect::<String>();
    let share = &mode.share;
    // A program of the guest's keeps one of them open, and reads it on request.
    guest.must(&format!(
        "cat {} {} >/dev/null && (exec 5<{merged}/loud/open; touch /run/{share}.holds; \
         while [ ! -e /run/{share}.go ]; do sleep 0.1; done; cat <&5 >/run/{share}.out 2>&1; \
         echo $? >/run/{share}.status) >/dev/null 2>&1 & while [ ! -e /run/{share}.holds ]; do sleep 0.05; done",
        names(&direct),
        names(&merged)
    ))?;
    Ok(())
}

/// The host's doing.
pub(crate) fn be_loud(source: &Path) -> Result<()> {
    for path in ["loud/replaced", "loud/direct"] {
        write(source, "loud/new", "new\n")?;
        fs::rename(source.join("loud/new"), source.join(path))?;
    }
    for path in ["loud/deleted", "loud/open"] {
        fs::remove_file(source.join(path))?;
    }
    fs::remove_dir_all(source.join("loud/dir"))?;
    write(source, "loud/dir/inside", "new\n")
}

/// A shell function that reads a file and says how that went, in one line.
pub(crate) const OBSERVE: &str = "cat >/run/observe <<'END'\n\
    o() { out=$(cat \"$2\" 2>/run/complaint) && echo \"$1=$out\" || echo \"$1=$(sed 's/.*: //' /run/complaint)\"; }\n\
    END";

/// What the guest sees of each cell now.
pub(crate) fn observe(guest: &mut Guest, mode: &Mode) -> Result<BTreeMap<String, String>> {
    let (direct, merged, share) = (format!("/mnt/{}", mode.share), format!("/mnt/{}", mode.merged()), &mode.share);
    let mut script = String::from(". /run/observe\n");
    for cell in &LOUD {
        let (what, file) = (cell.what, cell.file());
        match cell.look {
            Look::Merged => {}
            Look::Direct => script.push_str(&format!("o '{what}' {direct}/{file}\n")),
            Look::Open => script.push_str(&format!(
                "touch /run/{share}.go; while [ ! -e /run/{share}.status ]; do sleep 0.1; done; o '{what}' /run/{share}.out\n"
            )),
        }
        let overlay = if cell.look == Look::Merged { what.to_owned() } else { would(cell) };
        script.push_str(&format!("o '{overlay}' {merged}/{file}\n"));
    }
    let said = guest.must(&script)?;
    Ok(said.lines().filter_map(|line| line.split_once('=')).map(|(what, seen)| (what.into(), seen.into())).collect())
}

/// What overlayfs makes of a cell that is otherwise looked at without it.
pub(crate) fn would(cell: &Loud) -> String {
    format!("{}, overlayfs", cell.what)
}
