//! A child process that does not outlive its parent. Its output is kept to explain a failure.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{self, SigSet, Signal};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

/// Lines of a log that are shown with a failure.
const TAIL: usize = 100;

/// Process ids of all children that have not been waited for.
static RUNNING: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

/// A running child. On drop it receives SIGTERM, then it is killed with all that it started.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
    /// How long it may take to end by itself when asked.
    patience: Duration,
}

impl Process {
    /// Starts `command` in a process group of its own with both outputs going to the file `log`.
    ///
    /// It is ended when the calling *thread* ends without dropping this, so start it from a thread that
    /// lasts.
    ///
    /// # Errors
    /// When the log cannot be created or the program not be started.
    pub fn start(mut command: Command, log: &Path, patience: Duration) -> Result<Self> {
        let out = File::create(log).with_context(|| format!("creating {}", log.display()))?;
        let err = out.try_clone().context("duplicating a log's descriptor")?;
        command.stdin(Stdio::null()).stdout(out).stderr(err).process_group(0);
        let farewell = if patience.is_zero() { Signal::SIGKILL } else { Signal::SIGTERM };
        // SAFETY: runs between fork and exec; both are async-signal-safe and touch no memory of the parent.
        unsafe {
            command.pre_exec(move || {
                // A blocked signal is inherited, and this child has to hear those that its parent waits for.
                SigSet::empty().thread_set_mask()?;
                Ok(nix::sys::prctl::set_pdeathsig(farewell)?)
            });
        }
        let child = command.spawn().with_context(|| format!("starting {}", command.get_program().display()))?;
        let started = Self { child, log: log.to_owned(), patience };
        running().insert(started.pid().as_raw());
        Ok(started)
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has. It stays a zombie, so that its process id stays its own until it is dropped.
    ///
    /// # Errors
    /// When the system does not report it.
    pub fn ended(&self) -> Result<Option<ExitStatus>> {
        let peek = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        Ok(match waitid(Id::Pid(self.pid()), peek).context("asking after a child")? {
            WaitStatus::Exited(_, code) => Some(ExitStatus::from_raw(code << 8)),
            WaitStatus::Signaled(_, signal, _) => Some(ExitStatus::from_raw(signal as i32)),
            _ => None,
        })
    }

    /// Waits for its end; nothing when it is still running after `limit`.
    ///
    /// # Errors
    /// When the system does not report it.
    pub fn wait_for(&self, limit: Duration) -> Result<Option<ExitStatus>> {
        let until = Instant::now() + limit;
        loop {
            let ended = self.ended()?;
            if ended.is_some() || Instant::now() >= until {
                return Ok(ended);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks it to end and waits as long as its patience says; nothing when it did not end.
    ///
    /// # Errors
    /// When it cannot be signalled or asked after.
    pub fn stop(&self) -> Result<Option<ExitStatus>> {
        signal::kill(self.pid(), Signal::SIGTERM).context("asking a child to end")?;
        self.wait_for(self.patience)
    }

    /// The end of its log, to be shown with a failure.
    pub fn log_tail(&self) -> String {
        tail(&self.log)
    }

    fn pid(&self) -> Pid {
        // Linux pids fit into 22 bits.
        Pid::from_raw(self.child.id().cast_signed())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.patience.is_zero() {
            // Whatever goes wrong in being polite is mended by the kill below.
            let _ = self.stop();
        }
        // The group, as it may have started others.
        let _ = signal::killpg(self.pid(), Signal::SIGKILL);
        running().remove(&self.pid().as_raw());
        let _ = self.child.wait();
    }
}

/// Sends SIGTERM to every child. Waiting for one of them returns an error, and the caller cleans up.
pub fn interrupt_all() {
    for pid in running().iter() {
        // A child that is already gone is what was wanted.
        let _ = signal::kill(Pid::from_raw(*pid), Signal::SIGTERM);
    }
}

fn running() -> MutexGuard<'static, BTreeSet<i32>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The last lines of a log under a heading that names it.
pub(crate) fn tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    let name = log.file_name().unwrap_or(OsStr::new("log")).display();
    format!("---- end of {name}:\n{}", lines[lines.len().saturating_sub(TAIL)..].join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, log: &Path, patience: Duration) -> Process {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Process::start(command, log, patience).unwrap()
    }

    fn alive(pid: &str) -> bool {
        // A zombie that init has not collected yet is as good as gone.
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
        stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(" Z"))
    }

    fn eventually(what: impl Fn() -> bool) -> bool {
        (0..1000).any(|_| {
            thread::sleep(Duration::from_millis(5));
            what()
        })
    }

    #[test]
    fn a_dropped_child_takes_with_it_what_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let child = shell("trap '' TERM; sleep 600 & echo $!; wait; wait", &log, Duration::ZERO);
        assert!(eventually(|| fs::read_to_string(&log).unwrap().ends_with('\n')));
        let (own, grandchild) = (child.id().to_string(), fs::read_to_string(&log).unwrap());
        assert!(alive(&own) && alive(&grandchild));
        drop(child);
        assert!(eventually(|| !alive(&own) && !alive(&grandchild)));
    }

    #[test]
    fn a_child_with_patience_ends_by_itself() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let child = shell("trap 'exit 7' TERM; echo up; while :; do sleep 0.01; done", &log, Duration::from_secs(10));
        assert!(eventually(|| fs::read_to_string(&log).unwrap() == "up\n"));
        assert_eq!(child.stop().unwrap().and_then(|status| status.code()), Some(7));
    }

    #[test]
    fn the_tail_of_a_log_is_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("console.log");
        fs::write(&log, (0..200).map(|n| format!("line {n}\n")).collect::<String>()).unwrap();
        let tail = tail(&log);
        assert!(tail.starts_with("---- end of console.log:\nline 100\n") && tail.ends_with("line 199"), "{tail}");
    }
}
