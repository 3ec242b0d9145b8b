//! `--syslog`: what this process and its children write to standard error becomes messages of the system's log.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::unistd::dup2_stderr;

const SOCKET: &str = "/dev/log";

/// Facility `user`, as stock virtiofsd.
const FACILITY: u8 = 1;

/// Time for the last messages. A child that does not end keeps its end of the pipe.
const LAST_MESSAGES: Duration = Duration::from_secs(1);

/// Standard error on its way to the system's log.
#[derive(Debug)]
pub(crate) struct Syslog {
    before: OwnedFd,
    thread: JoinHandle<()>,
}

impl Syslog {
    /// Redirects standard error of this process and of those that it starts.
    ///
    /// # Errors
    /// There is no system log.
    pub(crate) fn redirect() -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.connect(SOCKET)?;
        socket.set_nonblocking(true)?;
        let (lines, end) = io::pipe()?;
        let before = io::stderr().as_fd().try_clone_to_owned()?;
        dup2_stderr(&end)?;
        let lines = BufReader::new(File::from(OwnedFd::from(lines)));
        let forward = move || {
            for line in lines.split(b'\n').map_while(Result::ok) {
                // A log that is full or gone must not stop anything.
                let _ = socket.send(message(&String::from_utf8_lossy(&line), std::process::id()).as_bytes());
            }
        };
        let thread = thread::Builder::new().name("syslog".into()).spawn(forward)?;
        Ok(Syslog { before, thread })
    }

    /// Sends what is left.
    pub(crate) fn finish(self) {
        if dup2_stderr(&self.before).is_err() {
            return;
        }
        let end = Instant::now() + LAST_MESSAGES;
        while !self.thread.is_finished() && Instant::now() < end {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A message in the form that local programs send.
fn message(line: &str, pid: u32) -> String {
    let severity = line.split_whitespace().find_map(severity).unwrap_or(5);
    format!("<{}>virtiofsd[{pid}]: {line}", FACILITY * 8 + severity)
}

fn severity(word: &str) -> Option<u8> {
    match word {
        "ERROR" => Some(3),
        "WARN" => Some(4),
        "INFO" => Some(6),
        "DEBUG" | "TRACE" => Some(7),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn level_becomes_the_severity() {
        assert_eq!(message("2026 ERROR virtiofs: broken", 7), "<11>virtiofsd[7]: 2026 ERROR virtiofs: broken");
        assert_eq!(message("2026  INFO x: ERROR", 7), "<14>virtiofsd[7]: 2026  INFO x: ERROR");
        assert_eq!(message("panicked", 7), "<13>virtiofsd[7]: panicked");
    }
}
