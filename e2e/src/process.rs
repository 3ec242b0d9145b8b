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

/// Number of log lines that are shown with a failure.
const TAIL: usize = 100;

/// Process ids of all children that have not been waited for.
static RUNNING: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

/// A running child. On drop it receives SIGTERM, then its process group is killed.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
    /// Time limit to end after SIGTERM.
    stop_timeout: Duration,
}

impl Process {
    /// Starts `command` in a process group of its own with both outputs redirected to the file `log`.
    ///
    /// The kernel kills the child when the calling *thread* ends, so call it from a thread that outlives the child.
    ///
    /// # Errors
    /// If the log cannot be created or the program cannot be started.
    pub fn start(mut command: Command, log: &Path, stop_timeout: Duration) -> Result<Self> {
        let out = File::create(log).with_context(|| format!("creating {}", log.display()))?;
        let err = out.try_clone().context("duplicating a log's descriptor")?;
        command.stdin(Stdio::null()).stdout(out).stderr(err).process_group(0);
        let farewell = if stop_timeout.is_zero() { Signal::SIGKILL } else { Signal::SIGTERM };
        // SAFETY: runs between fork and exec; both are async-signal-safe and touch no memory of the parent.
        unsafe {
            command.pre_exec(move || {
                // The child inherits blocked signals, and it has to receive those that its parent blocks.
                SigSet::empty().thread_set_mask()?;
                Ok(nix::sys::prctl::set_pdeathsig(farewell)?)
            });
        }
        let child = command.spawn().with_context(|| format!("starting {}", command.get_program().display()))?;
        let started = Self { child, log: log.to_owned(), stop_timeout };
        running().insert(started.pid().as_raw());
        Ok(started)
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its exit status, if it has ended. It stays a zombie until it is dropped, so that its process id is not reused.
    ///
    /// # Errors
    /// If `waitid` fails.
    pub fn ended(&self) -> Result<Option<ExitStatus>> {
        let peek = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        Ok(match waitid(Id::Pid(self.pid()), peek).context("waiting for a child")? {
            WaitStatus::Exited(_, code) => Some(ExitStatus::from_raw(code << 8)),
            WaitStatus::Signaled(_, signal, _) => Some(ExitStatus::from_raw(signal as i32)),
            _ => None,
        })
    }

    /// Waits until it ends; `None` if it still runs after `limit`.
    ///
    /// # Errors
    /// If `waitid` fails, or the program was interrupted.
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

    /// Sends SIGTERM and waits for `stop_timeout`; `None` if it still runs then.
    ///
    /// # Errors
    /// If it cannot be signalled or waited for.
    pub fn stop(&self) -> Result<Option<ExitStatus>> {
        signal::kill(self.pid(), Signal::SIGTERM).context("sending SIGTERM to a child")?;
        self.wait_for(self.stop_timeout)
    }

    /// The end of its log, to explain a failure.
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
        if !self.stop_timeout.is_zero() {
            // The kill below also covers a failure here.
            let _ = self.stop();
        }
        // Kills the group: the child may have started other processes.
        let _ = signal::killpg(self.pid(), Signal::SIGKILL);
        running().remove(&self.pid().as_raw());
        let _ = self.child.wait();
    }
}

/// Sends SIGTERM to every child. Waits for children return an error, and the caller cleans up.
pub fn interrupt_all() {
    for pid in running().iter() {
        // A child that has already ended is fine.
        let _ = signal::kill(Pid::from_raw(*pid), Signal::SIGTERM);
    }
}

fn running() -> MutexGuard<'static, BTreeSet<i32>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The last lines of a log below a heading with its name.
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

    fn shell(script: &str, log: &Path, stop_timeout: Duration) -> Process {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Process::start(command, log, stop_timeout).unwrap()
    }

    fn alive(pid: &str) -> bool {
        // A zombie that init has not reaped yet counts as ended.
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
    fn drop_kills_the_process_group() {
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
    fn a_child_with_a_stop_timeout_ends_by_itself() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let child = shell("trap 'exit 7' TERM; echo up; while :; do sleep 0.01; done", &log, Duration::from_secs(10));
        assert!(eventually(|| fs::read_to_string(&log).unwrap() == "up\n"));
        assert_eq!(child.stop().unwrap().and_then(|status| status.code()), Some(7));
    }

    #[test]
    fn the_tail_of_a_log_has_its_last_lines() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("console.log");
        fs::write(&log, (0..200).map(|n| format!("line {n}\n")).collect::<String>()).unwrap();
        let tail = tail(&log);
        assert!(tail.starts_with("---- end of console.log:\nline 100\n") && tail.ends_with("line 199"), "{tail}");
    }
}
