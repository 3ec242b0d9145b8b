//! Processes: fork, exec, death.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus, pidfd_open, pidfd_send_signal, waitid,
};
use virtiofs_contract::control::EngineBinary;
use virtiofs_contract::engine::Predecessor;

use super::fork::{Launch, Launched};
use super::limits::cgroup::EngineGroups;
use super::limits::session_group::SessionGroup;
use crate::control_group::Group;
use crate::poll::{Interest, wait_readable};

/// Flag of a thread that runs no more user code (`PF_EXITING` of linux/sched.h).
const PF_EXITING: u64 = 0x4;

const SIGKILL: u64 = libc::SIGKILL as u64;

/// Interval at which the threads of a killed engine are checked.
const EXIT_POLL: Duration = Duration::from_micros(100);

/// Numbers of engine processes by purpose, including killed ones that are not reaped yet.
#[derive(Debug, Default)]
pub(crate) struct ProcessTable {
    counts: Mutex<BTreeMap<Purpose, usize>>,
    changed: Condvar,
}

/// The purpose of an engine process.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Purpose {
    /// Sessions of the endpoint of this name.
    Endpoint(String),
    /// Preflights of this directory.
    Preflight(PathBuf),
}

impl ProcessTable {
    fn counts(&self) -> MutexGuard<'_, BTreeMap<Purpose, usize>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, purpose: Purpose) {
        *self.counts().entry(purpose).or_default() += 1;
    }

    fn leave(&self, purpose: &Purpose) {
        let mut counts = self.counts();
        if let Some(count) = counts.get_mut(purpose) {
            *count -= 1;
        }
        counts.retain(|_, count| *count > 0);
        self.changed.notify_all();
    }

    /// Waits until no process has any of these purposes, at most this long. Returns how many are left.
    pub(crate) fn wait_until_gone(&self, purposes: &[Purpose], longest: Duration) -> usize {
        let left = |counts: &BTreeMap<Purpose, usize>| purposes.iter().filter_map(|purpose| counts.get(purpose)).sum();
        let waited = self.changed.wait_timeout_while(self.counts(), longest, |counts| left(counts) > 0usize);
        left(&waited.unwrap_or_else(PoisonError::into_inner).0)
    }

    /// Waits until there is no process, at most this long. Returns how many are left.
    pub(crate) fn wait_until_all_are_gone(&self, longest: Duration) -> usize {
        let waited = self.changed.wait_timeout_while(self.counts(), longest, |counts| !counts.is_empty());
        waited.unwrap_or_else(PoisonError::into_inner).0.values().sum()
    }
}

struct SpawnRequest {
    purpose: Purpose,
    control: OwnedFd,
    output: OwnedFd,
    user_namespace: bool,
    reply: mpsc::Sender<io::Result<EngineProcess>>,
}

/// Forks engines from one thread that lives as long as the broker: a parent-death signal is sent when the
/// *thread* that forked ends.
#[derive(Clone, Debug)]
pub(crate) struct Spawner {
    requests: mpsc::Sender<SpawnRequest>,
}

impl Spawner {
    /// `outlive`: engines of sessions outlive the broker. They end when their control channel is closed everywhere.
    pub(crate) fn start(engine: PathBuf, processes: Arc<ProcessTable>, outlive: bool) -> io::Result<Self> {
        let (requests, queue) = mpsc::channel::<SpawnRequest>();
        let heritage = Heritage::new(engine)?;
        thread::Builder::new().name("spawner".into()).spawn(move || {
            for request in queue {
                // If the requester is gone, the process is dropped and thereby killed.
                let ends_with_broker = !outlive || matches!(request.purpose, Purpose::Preflight(_));
                let _ = request.reply.send(heritage.spawn(&request, &processes, ends_with_broker));
            }
        })?;
        Ok(Spawner { requests })
    }

    /// Spawns an engine process: `control` becomes its only descriptor above the standard ones, `output` its standard
    /// output and standard error. `user_namespace`: it makes a user namespace for itself anyway.
    pub(crate) fn spawn(
        &self,
        purpose: Purpose,
        control: OwnedFd,
        output: OwnedFd,
        user_namespace: bool,
    ) -> io::Result<EngineProcess> {
        let (reply, replied) = mpsc::channel();
        let gone = |_| io::Error::other("the spawner thread has ended");
        self.requests.send(SpawnRequest { purpose, control, output, user_namespace, reply }).map_err(|_| gone(()))?;
        replied.recv().map_err(|_| gone(()))?
    }
}

/// What all engines inherit.
struct Heritage {
    engine: PathBuf,
    /// Standard input.
    null: OwnedFd,
    /// A pidfd of this process.
    broker: OwnedFd,
}

impl Heritage {
    fn new(engine: PathBuf) -> io::Result<Self> {
        let null = OwnedFd::from(std::fs::File::open("/dev/null")?);
        let broker = pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
        Ok(Heritage { engine, null, broker })
    }

    fn spawn(
        &self,
        request: &SpawnRequest,
        processes: &Arc<ProcessTable>,
        ends_with_broker: bool,
    ) -> io::Result<EngineProcess> {
        let launch = Launch {
            program: &self.engine,
            broker: self.broker.as_fd(),
            input: self.null.as_fd(),
            output: request.output.as_fd(),
            control: request.control.as_fd(),
            user_namespace: request.user_namespace,
            ends_with_broker,
        };
        let Launched { pid, pidfd } = launch.start()?;
        processes.enter(request.purpose.clone());
        Ok(EngineProcess {
            pid,
            is_child: true,
            pidfd: Some(pidfd),
            binary: binary_of(pid),
            threads: Default::default(),
            purpose: request.purpose.clone(),
            groups: EngineGroups::default(),
            processes: processes.clone(),
        })
    }
}

/// The file that a process was started from.
fn binary_of(pid: u32) -> Option<EngineBinary> {
    let metadata = std::fs::metadata(format!("/proc/{pid}/exe")).ok()?;
    let modified = u64::try_from(metadata.mtime()).unwrap_or(0);
    Some(EngineBinary { inode: metadata.ino(), size: metadata.size(), modified })
}

/// An engine process. Dropping it kills it; a thread reaps it.
#[derive(Debug)]
pub(crate) struct EngineProcess {
    /// 0: it is in another PID namespace.
    pid: u32,
    /// False: an earlier broker started it, and this one cannot learn its exit status.
    is_child: bool,
    /// None once the reaper thread has it.
    pidfd: Option<OwnedFd>,
    /// The file it was started from. Read at once: an engine hides its own entries in /proc later.
    binary: Option<EngineBinary>,
    /// Pidfds of two of its threads.
    threads: [Option<OwnedFd>; 2],
    purpose: Purpose,
    groups: EngineGroups,
    processes: Arc<ProcessTable>,
}

impl EngineProcess {
    /// An engine that an earlier broker started.
    pub(crate) fn restored(
        pidfd: OwnedFd,
        purpose: Purpose,
        groups: Vec<Group>,
        session: Option<Arc<SessionGroup>>,
        processes: &Arc<ProcessTable>,
    ) -> io::Result<Self> {
        let pid = pid_of(pidfd.as_fd())?;
        // Paths of groups of another container name other groups here.
        let groups = if pid == 0 { Vec::new() } else { groups };
        processes.enter(purpose.clone());
        Ok(EngineProcess {
            pid,
            is_child: false,
            pidfd: Some(pidfd),
            binary: None,
            threads: Default::default(),
            purpose,
            groups: EngineGroups::restored(groups, session),
            processes: processes.clone(),
        })
    }

    /// Its control groups.
    pub(crate) fn groups(&self) -> &EngineGroups {
        &self.groups
    }

    /// True if it can be seen and signalled. An engine of a broker in another container cannot, and ends with that container.
    pub(crate) fn is_within_reach(&self) -> bool {
        self.pid != 0
    }

    /// True if the whole process has ended.
    fn has_ended(&self) -> bool {
        let ended = |pidfd| wait_readable(&[Interest::of(&pidfd)], Some(Instant::now())).is_ok_and(|[ended]| ended);
        self.pidfd().is_none_or(ended)
    }

    /// Sets its control groups, which are removed once it is reaped.
    pub(crate) fn set_groups(&mut self, groups: EngineGroups) {
        self.groups = groups;
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// The file it was started from.
    pub(crate) fn binary(&self) -> Option<EngineBinary> {
        self.binary.clone()
    }

    pub(crate) fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.pidfd.as_ref().map(AsFd::as_fd)
    }

    /// Watches two of its threads. The pidfd of the process becomes readable only after the teardown of guest memory,
    /// which the last thread does (80 ms at 4 GiB); of two threads, one is not the last. Kernels before 6.9 have no
    /// thread pidfds: the death is detected later there.
    pub(crate) fn watch_threads(&mut self) {
        let Ok(entries) = std::fs::read_dir(format!("/proc/{}/task", self.pid)) else { return };
        let numbers = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let others = numbers.filter(|thread| *thread != self.pid).filter_map(thread_fd);
        for (slot, fd) in self.threads.iter_mut().zip(others) {
            *slot = Some(fd);
        }
    }

    /// Descriptors of the process and of its watched threads, of which one becomes readable when it dies.
    pub(crate) fn exit_fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.pidfd().into_iter().chain(self.threads.iter().flatten().map(AsFd::as_fd))
    }

    /// How it ended. Call it only once no thread runs any more.
    pub(crate) fn fate(&self) -> Predecessor {
        let stat = || std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok();
        for _ in 0..10 {
            // Somebody else has reaped it, and its number may be in use again. Of an unknown cause, a kill is assumed: if
            // a request kills engines, the next one shows it.
            if !self.is_child && self.has_ended() {
                return Predecessor::Killed;
            }
            match stat().as_deref().and_then(exit_code_of) {
                Some(code) if code & 0x7f == SIGKILL => return Predecessor::Killed,
                // The kernel writes the exit code just after the flag PF_EXITING.
                Some(0) => thread::sleep(EXIT_POLL),
                _ => break,
            }
        }
        Predecessor::Faulted
    }

    /// Sends SIGKILL and waits until no thread of the process can run user code or begin a system call. It does not wait
    /// for the teardown of its mappings, which takes longer the more memory the guest has.
    ///
    /// # Errors
    /// The time waited, if a thread is stuck in a system call (a hung file system).
    pub(crate) fn stop_for_good(&self, longest: Duration) -> Result<(), Duration> {
        self.kill();
        let end = Instant::now() + longest;
        while !self.is_over() {
            if Instant::now() >= end {
                return Err(longest);
            }
            thread::sleep(EXIT_POLL);
        }
        Ok(())
    }

    /// True if no thread runs user code any more. If /proc cannot be read (no descriptor left), true once the whole
    /// process has ended.
    pub(crate) fn is_over(&self) -> bool {
        if !self.is_child && (self.has_ended() || !self.is_within_reach()) {
            return self.has_ended();
        }
        all_threads_exiting(self.pid).unwrap_or_else(|_| self.ended_within(Duration::ZERO).is_some())
    }

    /// How it ended, if it ends within this time.
    pub(crate) fn ended_within(&self, longest: Duration) -> Option<String> {
        let pidfd = self.pidfd()?;
        wait_readable(&[Interest::of(&pidfd)], Some(Instant::now() + longest)).ok()?[0].then_some(())?;
        if !self.is_child {
            return Some("it ended".into());
        }
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        waitid(WaitId::PidFd(pidfd), options).ok()?.map(|status| describe(&status))
    }

    /// Sends SIGKILL.
    pub(crate) fn kill(&self) {
        if let Some(pidfd) = self.pidfd() {
            // It fails only if the process is reaped already.
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
    }
}

impl Drop for EngineProcess {
    /// Reaping waits for the teardown, and for ever if a thread is stuck, so a thread of its own does it.
    fn drop(&mut self) {
        self.kill();
        let Some(pidfd) = self.pidfd.take() else { return };
        let groups = std::mem::take(&mut self.groups);
        let (processes, purpose) = (self.processes.clone(), self.purpose.clone());
        let is_child = self.is_child;
        let reaper = thread::Builder::new().name("reaper".into()).spawn(move || {
            if is_child {
                while let Err(rustix::io::Errno::INTR) = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED) {}
            } else if let Err(error) = wait_readable(&[Interest::of(&pidfd)], None) {
                tracing::error!(%error, "end of an engine not awaited");
            }
            drop(groups);
            processes.leave(&purpose);
        });
        if let Err(error) = reaper {
            tracing::error!(engine_pid = self.pid, %error, "no thread to reap the engine");
        }
    }
}

/// The number of a process; 0: it is in another PID namespace, or reaped.
fn pid_of(pidfd: BorrowedFd<'_>) -> io::Result<u32> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    let number = text.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse::<i64>().ok());
    let number = number.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a pidfd"))?;
    Ok(u32::try_from(number).unwrap_or(0))
}

/// Describes how a process ended.
fn describe(status: &WaitIdStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("it ended with exit status {code}"),
        (None, Some(signal)) => format!("it was killed by {}", signal_name(signal)),
        (None, None) => "it ended".into(),
    }
}

fn signal_name(signal: i32) -> String {
    nix::sys::signal::Signal::try_from(signal).map_or_else(|_| format!("signal {signal}"), |name| name.to_string())
}

/// True if no thread runs user code any more. Also true if the process is gone.
fn all_threads_exiting(pid: u32) -> io::Result<bool> {
    let threads = match std::fs::read_dir(format!("/proc/{pid}/task")) {
        Err(error) if is_gone(&error) => return Ok(true),
        threads => threads?,
    };
    for thread in threads {
        let exiting = match thread.and_then(|thread| std::fs::read_to_string(thread.path().join("stat"))) {
            // The thread ended between the two reads.
            Err(error) if is_gone(&error) => true,
            stat => flags_of(&stat?).is_some_and(|flags| flags & PF_EXITING != 0),
        };
        if !exiting {
            return Ok(false);
        }
    }
    Ok(true)
}

/// True if an error of /proc means that the thread does not exist. Other errors say nothing about it.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

/// `PIDFD_THREAD` of linux/pidfd.h, which is `O_EXCL`.
fn thread_fd(thread: u32) -> Option<OwnedFd> {
    let flags = PidfdFlags::from_bits_retain(OFlags::EXCL.bits());
    pidfd_open(Pid::from_raw(i32::try_from(thread).ok()?)?, flags).ok()
}

/// Field 9 of proc_pid_stat(5).
fn flags_of(stat: &str) -> Option<u64> {
    stat_field(stat, 9)
}

/// Field 52 of proc_pid_stat(5), as waitpid(2) would give it.
fn exit_code_of(stat: &str) -> Option<u64> {
    stat_field(stat, 52)
}

/// Fields from 3 on; the command name, which is the second, may hold spaces and brackets.
fn stat_field(stat: &str, number: usize) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(number - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use rustix::process::geteuid;
    use testkit::skip::require_that;

    use super::*;

    fn spawner(engine: &str) -> (Spawner, Arc<ProcessTable>) {
        let processes = Arc::new(ProcessTable::default());
        (Spawner::start(engine.into(), processes.clone(), false).unwrap(), processes)
    }

    fn spawn_with(spawner: &Spawner) -> (io::Result<EngineProcess>, io::PipeReader) {
        let (output, input) = io::pipe().unwrap();
        let (control, _) = io::pipe().unwrap();
        (spawner.spawn(Purpose::Endpoint("test".into()), control.into(), input.into(), false), output)
    }

    #[test]
    fn missing_program_is_an_error() {
        let (spawner, processes) = spawner("/nonexistent/virtiofs-engine");
        let (result, _) = spawn_with(&spawner);
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(processes.wait_until_all_are_gone(Duration::ZERO), 0);
    }

    #[test]
    fn child_has_only_the_control_channel() {
        let scratch = tempfile::tempdir().unwrap();
        let script = scratch.path().join("engine");
        let list = "for n in 0 1 2 3 4 5 6 7 8 9; do [ -e /proc/self/fd/$n ] && printf '%s ' $n; done; echo";
        std::fs::write(&script, format!("#!/bin/sh\n{list}\nsleep 60\n")).unwrap();
        std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let (leaky, _other) = io::pipe().unwrap();
        let leaky = rustix::io::dup(&leaky).unwrap();
        rustix::io::fcntl_setfd(&leaky, rustix::io::FdFlags::empty()).unwrap();
        let (spawner, processes) = spawner(script.to_str().unwrap());
        let (process, mut output) = spawn_with(&spawner);
        let process = process.unwrap();
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            let mut byte = [0];
            output.read_exact(&mut byte).unwrap();
            line.push(byte[0]);
        }
        // From 10 on are the shell's own (its script).
        assert_eq!(String::from_utf8(line).unwrap().trim(), "0 1 2 3");
        assert_eq!(process.ended_within(Duration::ZERO), None);
        process.stop_for_good(Duration::from_secs(10)).unwrap();
        assert_eq!(process.ended_within(Duration::from_secs(10)).as_deref(), Some("it was killed by SIGKILL"));
        let ours = [Purpose::Endpoint("test".into())];
        assert_eq!(processes.wait_until_gone(&ours, Duration::ZERO), 1);
        assert_eq!(processes.wait_until_gone(&[Purpose::Endpoint("other".into())], Duration::ZERO), 0);
        drop(process);
        assert_eq!(processes.wait_until_gone(&ours, Duration::from_secs(10)), 0);
    }

    /// Closing copies would be enough to stop all engine starts: a VMM's descriptor may belong to a file system that hangs.
    #[test]
    fn descriptors_of_the_broker_are_not_copied() {
        let (spawner, _) = spawner("/bin/cat");
        let (ours, _theirs) = io::pipe().unwrap();
        let (_output, input) = io::pipe().unwrap();
        let held: Vec<_> = (0..1000).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
        let process = spawner.spawn(Purpose::Endpoint("test".into()), ours.into(), input.into(), false).unwrap();
        let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
        let size = status.lines().find_map(|line| line.strip_prefix("FDSize:")).unwrap();
        assert!(size.trim().parse::<usize>().unwrap() < held.len(), "{size}");
    }

    #[test]
    fn engine_is_the_first_process_of_its_pid_namespace() {
        if !require_that("the right to create PID namespaces", geteuid().is_root()) {
            return;
        }
        let (spawner, _) = spawner("/bin/cat");
        let (ours, theirs) = io::pipe().unwrap();
        let (_output, input) = io::pipe().unwrap();
        let process = spawner.spawn(Purpose::Endpoint("test".into()), ours.into(), input.into(), false).unwrap();
        let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
        let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap();
        let numbers: Vec<&str> = numbers.split_whitespace().collect();
        assert_eq!(numbers, [process.pid().to_string().as_str(), "1"]);
        drop(theirs);
    }

    #[test]
    fn engine_of_an_earlier_broker_is_watched_and_killed() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        let processes = Arc::new(ProcessTable::default());
        let purpose = Purpose::Endpoint("test".into());
        let restored = EngineProcess::restored(pidfd, purpose.clone(), Vec::new(), None, &processes).unwrap();
        assert_eq!(restored.pid(), child.id());
        assert!(!restored.is_over() && restored.ended_within(Duration::ZERO).is_none());
        restored.stop_for_good(Duration::from_secs(10)).unwrap();
        // As the first process of the system does with orphans.
        child.wait().unwrap();
        assert!(restored.is_over());
        assert_eq!(restored.fate(), Predecessor::Killed);
        assert_eq!(restored.ended_within(Duration::ZERO).as_deref(), Some("it ended"));
        drop(restored);
        assert_eq!(processes.wait_until_gone(std::slice::from_ref(&purpose), Duration::from_secs(10)), 0);
        let (pipe, _writer) = io::pipe().unwrap();
        assert!(EngineProcess::restored(pipe.into(), purpose, Vec::new(), None, &processes).is_err());
    }

    #[test]
    fn exit_status_is_reported() {
        let (spawner, _) = spawner("/bin/false");
        let (process, _output) = spawn_with(&spawner);
        let sent = process.unwrap().ended_within(Duration::from_secs(10));
        assert_eq!(sent.as_deref(), Some("it ended with exit status 1"));
    }

    #[test]
    fn flags_are_found_behind_any_command_name() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194564 100 0";
        assert_eq!(flags_of(stat), Some(4_194_564));
        assert_eq!(flags_of("42"), None);
    }
}
