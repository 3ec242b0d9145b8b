//! Control groups for sessions and engines, below the broker's own group, where the host allows it.
//!
//! ```text
//! broker's own group              gives controllers to those below, so it has no processes itself
//!   virtiofs-broker               the broker, and trial engines
//!   virtiofs-session-N            memory of one session, see `session_group`; weights of its engine
//!     virtiofs-engine-N           one engine; its other limits
//! ```
//!
//! In version 1, where each controller has a hierarchy, the groups of engines are below the broker's own group. So they are
//! in version 2 if sessions have no groups.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use super::session_group::SessionGroup;
use super::settings::{DEFAULT_WEIGHT, Knob, Setting, Version, is_in, name_of};
use crate::control_group::{Controller, Group, Written};
use crate::poll::monotonic_ns;

/// Prefix of group names. Groups that a killed broker left are found by it.
const PREFIX: &str = "virtiofs-engine-";
const SESSION_PREFIX: &str = "virtiofs-session-";

/// The leaf that the broker moves to, with all that is in its own group, before that group gives controllers to others.
const LEAF: &str = "virtiofs-broker";

/// How often the members of a group are listed and moved: processes fork meanwhile.
const MOVES: u32 = 10;

/// Number of attempts to remove a group whose process has just been reaped.
const REMOVALS: u32 = 50;

/// A hierarchy in which engines have groups.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    version: Version,
    /// The broker's own group in it.
    base: PathBuf,
    /// The hierarchy is mounted from this very group on: it is the top of a container or of a cgroup namespace.
    is_top: bool,
}

/// The hierarchies of this host.
#[derive(Debug, Default)]
pub(crate) struct Cgroups {
    cpu: Option<Hierarchy>,
    io: Option<Hierarchy>,
    memory: Option<Hierarchy>,
    serial: AtomicU64,
    /// True once it is logged that sessions have no groups.
    reported: AtomicBool,
}

/// Why groups below the broker's own are needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    /// A share has a limit.
    Limit,
    /// Every session has one. It is no reason to move processes in a group that is not delegated.
    Session,
}

impl Cgroups {
    /// Finds the broker's groups and removes those that an earlier broker left.
    pub(crate) fn find() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let (mounts, own) = (read("/proc/self/mountinfo"), read("/proc/self/cgroup"));
        let of = |controller| hierarchy(controller, &mounts, &own, &|path| fs::read_to_string(path).ok());
        let (cpu, io, memory) = (of(Controller::Cpu), of(Controller::Io), of(Controller::Memory));
        let found = Cgroups { cpu, io, memory, ..Cgroups::default() };
        found.all().for_each(|hierarchy| sweep(&hierarchy.base));
        if let Some((base, _)) = group_of(&mounts, &own, "cgroup2", None) {
            spare_the_others(&base);
        }
        found
    }

    fn all(&self) -> impl Iterator<Item = &Hierarchy> {
        [&self.cpu, &self.io, &self.memory].into_iter().flatten()
    }

    /// A name for the groups of one engine.
    pub(super) fn next_name(&self) -> String {
        format!("{PREFIX}{}-{}", std::process::id(), self.serial.fetch_add(1, Relaxed))
    }

    /// Creates the group of a session; none: the host does not allow it, which is logged once.
    pub(crate) fn new_session_group(&self) -> Option<SessionGroup> {
        let created = self.enabled(Controller::Memory, Need::Session).and_then(|(version, base)| {
            let (pid, serial) = (std::process::id(), self.serial.fetch_add(1, Relaxed));
            // The time makes it different from those of brokers in other containers, which may have the same number.
            SessionGroup::create(version, base.join(format!("{SESSION_PREFIX}{pid}-{serial}-{}", monotonic_ns())))
        });
        created.inspect_err(|error| self.report(error)).ok()
    }

    /// The group of a session that began under an earlier broker; none: it has none here.
    pub(crate) fn restored_session_group(&self, path: &Path) -> Option<SessionGroup> {
        let (version, base) = self.enabled(Controller::Memory, Need::Session).ok()?;
        (path.parent() == Some(base) && path.is_dir()).then(|| SessionGroup::restored(version, path.into()))
    }

    fn report(&self, error: &io::Error) {
        if !self.reported.swap(true, Relaxed) {
            let remedy = "run it in a control group that is delegated to it";
            tracing::info!(%error, remedy, "guest memory that engines touch is charged to the broker's control group");
        }
    }

    /// The group of this name in the hierarchy of a controller, below that of the session; created if missing.
    pub(super) fn group(
        &self,
        controller: Controller,
        name: &str,
        session: Option<&SessionGroup>,
    ) -> io::Result<(Version, PathBuf)> {
        let (version, base) = self.enabled(controller, Need::Limit)?;
        let above = below_session(version, session, controller)?.unwrap_or(base);
        Ok((version, created(above.join(name))?))
    }

    /// The broker's own group in the hierarchy of a controller, which groups below it can use.
    fn enabled(&self, controller: Controller, need: Need) -> io::Result<(Version, &Path)> {
        let hierarchy = match controller {
            Controller::Cpu => &self.cpu,
            Controller::Io => &self.io,
            Controller::Memory => &self.memory,
        };
        let Some(Hierarchy { version, base, is_top }) = hierarchy else {
            return Err(io::Error::other(format!("no control groups with {}", name_of(controller, Version::Two))));
        };
        if *version == Version::Two {
            enable(base, *is_top, name_of(controller, Version::Two), need)?;
        }
        Ok((*version, base))
    }

    /// Writes again what was set in the groups of an engine. A service manager that starts another broker in the group of
    /// the one before takes their controllers away first.
    pub(crate) fn renew(&self, groups: &[Group], session: Option<&SessionGroup>) -> io::Result<()> {
        for written in groups.iter().flat_map(|group| &group.written) {
            let (version, _) = self.enabled(written.controller, Need::Limit)?;
            below_session(version, session, written.controller)?;
            write(written)?;
        }
        Ok(())
    }
}

/// The group of the session if groups of engines are below it, with the controller for them.
fn below_session(
    version: Version,
    session: Option<&SessionGroup>,
    controller: Controller,
) -> io::Result<Option<&Path>> {
    let Some(path) = session.filter(|_| version == Version::Two).and_then(SessionGroup::parent_of_engines) else {
        return Ok(None);
    };
    // It never has processes of its own.
    fs::write(path.join("cgroup.subtree_control"), format!("+{}", name_of(controller, version)))?;
    Ok(Some(path))
}

/// Creates a group, unless it exists.
fn created(group: PathBuf) -> io::Result<PathBuf> {
    match fs::create_dir(&group) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(group),
    }
}

/// Writes the value and reads it back.
fn write(written: &Written) -> io::Result<()> {
    let Written { file, value, shown, .. } = written;
    let sent = |error: io::Error| io::Error::other(format!("{}: {error}", file.display()));
    fs::write(file, value).map_err(sent)?;
    let found = fs::read_to_string(file).map_err(sent)?;
    if is_in(shown, &found) {
        return Ok(());
    }
    Err(io::Error::other(format!("{} says {:?} after {value:?} was written", file.display(), found.trim())))
}

/// Groups of one engine. Dropping removes them; the engine must be reaped before.
#[derive(Debug, Default)]
pub(crate) struct EngineGroups {
    pub(crate) own: Vec<Group>,
    /// That of its session, which the last of its engines removes if the session has ended.
    session: Option<Arc<SessionGroup>>,
}

impl EngineGroups {
    /// Those of an engine that an earlier broker started.
    pub(crate) fn restored(own: Vec<Group>, session: Option<Arc<SessionGroup>>) -> Self {
        EngineGroups { own, session }
    }

    pub(crate) fn session(&self) -> Option<&SessionGroup> {
        self.session.as_deref()
    }

    /// Moves a process into the group of its session.
    pub(super) fn join(&mut self, session: Arc<SessionGroup>, name: &str, pid: u32) -> io::Result<()> {
        // Another broker that has just started here may have removed it while it was empty.
        fs::create_dir_all(session.path())?;
        match session.parent_of_engines() {
            Some(parent) => self.enter(&created(parent.join(name))?, pid)?,
            None => enter(session.path(), pid)?,
        }
        self.session = Some(session);
        Ok(())
    }

    /// Moves a process into a group, unless it is in it.
    pub(super) fn enter(&mut self, path: &Path, pid: u32) -> io::Result<()> {
        if self.own.iter().any(|group| group.path == path) {
            return Ok(());
        }
        // Listed first, so that it is removed in any case.
        self.own.push(Group { path: path.into(), written: Vec::new() });
        enter(path, pid)
    }

    /// Writes a setting to a group that the process has entered, and reads it back. Groups of engines are compared with
    /// others of the same session only, so their weights are those of the session's group.
    pub(super) fn set(&mut self, path: &Path, knob: Knob, setting: Setting) -> io::Result<()> {
        let Setting { files, value, shown } = setting;
        let parent = self.session().and_then(SessionGroup::parent_of_engines);
        let of_session = parent.filter(|parent| knob.is_weight() && path.parent() == Some(parent));
        let at = of_session.unwrap_or(path);
        let file = files.iter().map(|file| at.join(file)).find(|file| file.exists());
        let file = file.ok_or_else(|| io::Error::other(format!("{} has no {}", at.display(), files[0])))?;
        let written = Written { controller: knob.controller(), file, value, shown };
        write(&written)?;
        let group = self.own.iter_mut().find(|group| group.path == path);
        group.into_iter().for_each(|group| group.written.push(written.clone()));
        Ok(())
    }

    /// Gives the session the usual weight, which an earlier engine may have changed.
    pub(super) fn reset_weight(&self, setting: &Setting) {
        let Some(group) = self.session().and_then(SessionGroup::parent_of_engines) else { return };
        let file = setting.files.iter().map(|file| group.join(file)).find(|file| file.exists());
        // Without the file no group is compared with another.
        if let Some(Err(error)) = file.map(|file| fs::write(file, DEFAULT_WEIGHT.to_string())) {
            tracing::warn!(group = %group.display(), %error, "weight not reset");
        }
    }
}

impl Drop for EngineGroups {
    fn drop(&mut self) {
        self.own.iter().for_each(|group| remove(&group.path));
    }
}

/// Removes a group and those below it.
pub(super) fn remove(group: &Path) {
    // A group is busy for a moment after its process was reaped.
    let removed = (0..REMOVALS).any(|_| {
        sweep(group);
        match fs::remove_dir(group) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                thread::sleep(Duration::from_millis(10));
                false
            }
            _ => true,
        }
    });
    if !removed {
        tracing::warn!(group = %group.display(), "control group not removed");
    }
}

/// Moves a process into a group.
fn enter(group: &Path, pid: u32) -> io::Result<()> {
    fs::write(group.join("cgroup.procs"), pid.to_string())
}

/// Lets groups below `base` have a controller.
///
/// Version 2 has no processes in a group that gives controllers to groups below it. The order matters: `cpu` can be
/// enabled while there are processes, and makes the group the root of a threaded domain, below which no process can
/// live (`EOPNOTSUPP`).
fn enable(base: &Path, is_top: bool, controller: &str, need: Need) -> io::Result<()> {
    let switches = base.join("cgroup.subtree_control");
    if has_word(&fs::read_to_string(&switches)?, controller) {
        return Ok(());
    }
    // The root of all groups, which alone has no type, may have both.
    if base.join("cgroup.type").exists() {
        move_members(base, is_top, need)?;
    }
    fs::write(&switches, format!("+{controller}"))
}

/// Moves all processes of a group that is the broker's to a leaf below it.
fn move_members(base: &Path, is_top: bool, need: Need) -> io::Result<()> {
    let delegated = is_top || is_delegated(base);
    if need == Need::Session && !delegated {
        return Err(io::Error::other(format!("control group {} is not delegated to the broker", base.display())));
    }
    let members = || Ok::<_, io::Error>(numbers(&fs::read_to_string(base.join("cgroup.procs"))?));
    if !may_empty(delegated, &members()?, std::process::id(), parent_of) {
        let reason = "has processes that are not the broker's, and is not delegated to it";
        return Err(io::Error::other(format!("control group {} {reason}", base.display())));
    }
    let leaf = base.join(LEAF);
    fs::create_dir_all(&leaf)?;
    // First the process whose children would be the next members.
    enter(&leaf, std::process::id())?;
    for _ in 0..MOVES {
        let members = members()?;
        if members.is_empty() {
            return Ok(());
        }
        for pid in members {
            match enter(&leaf, pid) {
                Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(error),
                _ => {}
            }
        }
    }
    Err(io::Error::other(format!("control group {} does not become empty", base.display())))
}

/// Whether all members of a group may be moved: it is delegated, or has nothing but the broker and its children.
///
/// A process of another PID namespace is listed as 0, which as an order to move means the process that gives it.
fn may_empty(delegated: bool, members: &[u32], broker: u32, parent_of: impl Fn(u32) -> Option<u32>) -> bool {
    let is_ours = |pid: u32| pid == broker || parent_of(pid) == Some(broker);
    members.iter().all(|pid| *pid != 0 && (delegated || is_ours(*pid)))
}

/// systemd marks groups that it has delegated; everyone may read the second mark, which is newer.
fn is_delegated(group: &Path) -> bool {
    ["trusted.delegate", "user.delegate"].iter().any(|name| {
        let mut value = [0; 8];
        rustix::fs::getxattr(group, *name, &mut value[..]).is_ok_and(|length| &value[..length] == b"1")
    })
}

/// Field 4 of proc_pid_stat(5).
fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

fn numbers(list: &str) -> Vec<u32> {
    list.lines().filter_map(|line| line.parse().ok()).collect()
}

/// Kubernetes kills all processes of a container together with one that is out of memory. Here, one engine would end the
/// mounts of all guests of the host.
fn spare_the_others(base: &Path) {
    let switch = base.join("memory.oom.group");
    if fs::read_to_string(&switch).is_ok_and(|value| value.trim() == "1")
        && let Err(error) = fs::write(&switch, "0")
    {
        tracing::warn!(file = %switch.display(), %error, "one engine that runs out of memory ends all of them");
    }
}

/// Removes groups without processes below this one; others are busy.
fn sweep(base: &Path) {
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let (name, path) = (entry.file_name(), entry.path());
        if name.to_string_lossy().starts_with(SESSION_PREFIX) {
            sweep(&path);
        } else if !name.to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let _ = fs::remove_dir(path);
    }
}

/// Finds the hierarchy of a controller: version 2 if it has it, else version 1.
fn hierarchy(
    controller: Controller,
    mounts: &str,
    own: &str,
    read: &dyn Fn(&Path) -> Option<String>,
) -> Option<Hierarchy> {
    let two = group_of(mounts, own, "cgroup2", None);
    let two = two.map(|(base, is_top)| Hierarchy { version: Version::Two, base, is_top });
    let offers = |it: &Hierarchy| {
        let offered = read(&it.base.join("cgroup.controllers")).unwrap_or_default();
        has_word(&offered, name_of(controller, Version::Two))
    };
    two.filter(offers).or_else(|| {
        let name = name_of(controller, Version::One);
        let (base, is_top) = group_of(mounts, own, "cgroup", Some(name))?;
        Some(Hierarchy { version: Version::One, base, is_top })
    })
}

/// The directory of the own group, from proc_pid_mountinfo(5) and proc_pid_cgroup(5), and whether it is where the
/// hierarchy is mounted.
fn group_of(mounts: &str, own: &str, fs_type: &str, controller: Option<&str>) -> Option<(PathBuf, bool)> {
    let path = own.lines().find_map(|line| {
        let (names, path) = line.split_once(':')?.1.split_once(':')?;
        let meant = controller.map_or(names.is_empty(), |name| names.split(',').any(|it| it == name));
        meant.then_some(path)
    })?;
    let (root, at) = mounts.lines().find_map(|line| {
        let (mount, rest) = line.split_once(" - ")?;
        let (found, options) = rest.split_once(' ')?;
        let meant = controller.is_none_or(|name| options.split([' ', ',']).any(|it| it == name));
        let fields: Vec<&str> = mount.split(' ').collect();
        (found == fs_type && meant).then_some((*fields.get(3)?, *fields.get(4)?))
    })?;
    // In a container, the mount may begin at the broker's own group.
    let below = Path::new(path).strip_prefix(root).unwrap_or(Path::new(""));
    Some((Path::new(at).join(below), below == Path::new("")))
}

fn has_word(text: &str, word: &str) -> bool {
    text.split_whitespace().any(|it| it == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
38 31 0:35 / /sys/fs/cgroup/blkio rw - cgroup cgroup rw,blkio
42 31 0:39 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";
    const UNIFIED: &str = "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
    const CONTAINER: &str = "30 23 0:26 /kube/pod1/c1 /sys/fs/cgroup rw - cgroup2 cgroup rw\n";

    fn found(controller: Controller, mounts: &str, own: &str, offered: &str) -> Option<(Version, String)> {
        let it = hierarchy(controller, mounts, own, &|_| Some(offered.into()))?;
        Some((it.version, it.base.display().to_string()))
    }

    #[test]
    fn own_group_is_found_in_both_versions() {
        let own = "7:blkio:/\n1:cpu,cpuacct:/a\n0::/\n";
        let at = |path: &str, version| Some((version, path.to_owned()));
        assert_eq!(found(Controller::Cpu, HYBRID, own, "hugetlb"), at("/sys/fs/cgroup/cpu,cpuacct/a", Version::One));
        assert_eq!(found(Controller::Io, HYBRID, own, ""), at("/sys/fs/cgroup/blkio/", Version::One));
        let own = "0::/system.slice/virtiofs.service\n";
        let slice = "/sys/fs/cgroup/system.slice/virtiofs.service";
        assert_eq!(found(Controller::Io, UNIFIED, own, "cpu io memory"), at(slice, Version::Two));
        assert_eq!(found(Controller::Io, UNIFIED, own, "cpu memory"), None);
        let own = "0::/kube/pod1/c1\n";
        assert_eq!(found(Controller::Cpu, CONTAINER, own, "cpu"), at("/sys/fs/cgroup/", Version::Two));
        assert_eq!(found(Controller::Cpu, "", "", "cpu"), None);
    }

    #[test]
    fn container_mount_begins_at_its_group() {
        let is_top = |mounts, own| hierarchy(Controller::Cpu, mounts, own, &|_| Some("cpu".into())).map(|it| it.is_top);
        assert_eq!(is_top(CONTAINER, "0::/kube/pod1/c1\n"), Some(true));
        assert_eq!(is_top(UNIFIED, "0::/\n"), Some(true));
        assert_eq!(is_top(UNIFIED, "0::/user.slice/session-1.scope\n"), Some(false));
    }

    #[test]
    fn others_are_moved_only_where_the_group_is_delegated() {
        const BROKER: u32 = 10;
        let parent_of = |pid| (pid < 20).then_some(BROKER);
        for (delegated, members, expected) in [
            (false, &[BROKER][..], true),
            (false, &[BROKER, 11, 12], true),
            (false, &[9, BROKER, 20], false),
            (true, &[9, BROKER, 20], true),
            (true, &[0, BROKER], false),
            (true, &[], true),
        ] {
            assert_eq!(may_empty(delegated, members, BROKER, parent_of), expected, "{delegated} {members:?}");
        }
    }

    #[test]
    fn processes_of_an_undelegated_group_are_moved_only_for_limits() {
        let base = tempfile::tempdir().unwrap();
        std::fs::write(base.path().join("cgroup.procs"), "").unwrap();
        let refused = move_members(base.path(), false, Need::Session).unwrap_err().to_string();
        assert!(refused.ends_with("is not delegated to the broker"), "{refused}");
        move_members(base.path(), false, Need::Limit).unwrap();
        move_members(base.path(), true, Need::Session).unwrap();
    }

    #[test]
    fn groups_of_an_earlier_broker_are_removed() {
        let base = tempfile::tempdir().unwrap();
        let session = base.path().join("virtiofs-session-1-2-3");
        let other = base.path().join("other");
        std::fs::create_dir_all(session.join("virtiofs-engine-1-0")).unwrap();
        std::fs::create_dir(&other).unwrap();
        sweep(base.path());
        assert!(!session.exists() && other.exists());
    }

    #[test]
    fn parent_process_is_found() {
        assert_eq!(parent_of(std::process::id()), Some(std::os::unix::process::parent_id()));
        assert_eq!(parent_of(0), None);
    }
}
