//! Processes that broker and keeper leave behind: engines whose broker has died. They become children of this process, which
//! reaps them, and ends only when none is left.

use std::io;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

/// Time after which orphans are killed. Engines end by themselves when nobody holds their control channel.
const KILL_AFTER: Duration = Duration::from_secs(2);

/// Time after which even killed ones are left: a request is stuck in the kernel.
const LEAVE_AFTER: Duration = Duration::from_secs(5);

const STEP: Duration = Duration::from_millis(1);

/// Makes orphans of this process's descendants its children.
pub(crate) fn become_subreaper() -> io::Result<()> {
    Ok(set_child_subreaper(true)?)
}

/// Reaps children that have ended, except these.
pub(crate) fn reap(except: &[Option<Pid>]) {
    let ended = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    while let Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..)) = waitid(Id::All, ended) {
        if except.contains(&Some(pid)) || waitpid(pid, Some(WaitPidFlag::WNOHANG)).is_err() {
            return;
        }
    }
}

/// Waits until no child is left.
pub(crate) fn wait_for_all() {
    let begin = Instant::now();
    loop {
        reap(&[]);
        let left = children();
        if left.is_empty() {
            return;
        }
        if begin.elapsed() > KILL_AFTER {
            for pid in &left {
                let _ = kill(*pid, Signal::SIGKILL);
            }
        }
        if begin.elapsed() > LEAVE_AFTER {
            tracing::error!(?left, "processes are stuck in the shared directory and are left behind");
            return;
        }
        sleep(STEP);
    }
}

fn children() -> Vec<Pid> {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let pids = |list: String| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<i32>>();
    lists.flat_map(pids).map(Pid::from_raw).collect()
}
