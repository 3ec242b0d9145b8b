//! Servers under test as processes: from a command line to a listening socket.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::processes::{descendants, is_alive};

/// Time limit from the start of a server to its listening socket.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// Time limit for a server to end after SIGTERM.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Interval between two polls.
const POLL_INTERVAL: Duration = Duration::from_millis(1);
/// SO_ACCEPTCON in the flags column of /proc/net/unix: the socket is listening.
const ACCEPTS: u32 = 1 << 16;

/// A server that could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The path of stock virtiofsd is not set.
    #[error("nothing to compare with: set {STOCK_VARIABLE} to the path of stock virtiofsd 1.14 (make check does)")]
    StockUnnamed,
    /// Stock virtiofsd does not exist at the configured path.
    #[error("nothing to compare with: {STOCK_VARIABLE} or the command line names {0}, which does not exist")]
    NoStock(PathBuf),
    /// The program could not be executed.
    #[error("starting {program}: {source}")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// The program ended before its socket existed.
    #[error("{program} ended with {status} before it listened on {socket}")]
    Ended {
        /// The program.
        program: PathBuf,
        /// Its exit status.
        status: std::process::ExitStatus,
        /// The socket on which it should listen.
        socket: PathBuf,
    },
    /// The socket did not exist in time.
    #[error("{program} does not listen on {socket} after {START_TIMEOUT:?}")]
    Late {
        /// The program.
        program: PathBuf,
        /// The socket on which it should listen.
        socket: PathBuf,
    },
}

/// The environment variable with the path of stock virtiofsd 1.14.
pub const STOCK_VARIABLE: &str = "VIRTIOFSD_STOCK";

/// Path of stock virtiofsd: from the command line, otherwise from the environment. An error, not a skipped test, if it
/// does not exist.
pub fn stock_binary(given: Option<PathBuf>) -> Result<PathBuf, ServerError> {
    let path = given.or_else(|| std::env::var_os(STOCK_VARIABLE).map(PathBuf::from));
    match path {
        Some(path) if path.is_file() => Ok(path),
        Some(path) => Err(ServerError::NoStock(path)),
        None => Err(ServerError::StockUnnamed),
    }
}

/// Command of a server that listens on `socket`.
#[derive(Debug, Clone)]
pub struct ServerCommand {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// The socket on which it will listen.
    pub socket: PathBuf,
    /// File for its output, which is otherwise discarded.
    pub log: Option<PathBuf>,
    /// How to detect that it accepts connections.
    pub ready: Ready,
}

/// How to detect that a server accepts connections, without connecting: a server of one connection would take the test
/// connection for its guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    /// Its socket is listening at the path to which it was bound.
    Listens,
    /// Its socket exists: the server binds it under another name and renames it.
    Appears,
}

impl ServerCommand {
    /// Any program.
    pub fn new(program: impl Into<PathBuf>, socket: impl Into<PathBuf>) -> Self {
        Self { program: program.into(), arguments: Vec::new(), socket: socket.into(), log: None, ready: Ready::Listens }
    }

    /// Adds an argument.
    pub fn arg(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Writes the output to a file.
    pub fn log(mut self, path: impl Into<PathBuf>) -> Self {
        self.log = Some(path.into());
        self
    }

    /// Stock virtiofsd with its defaults and extended attributes. It serves one connection and ends.
    pub fn stock(binary: &Path, shared: &Path, socket: impl Into<PathBuf>) -> Self {
        let socket = socket.into();
        Self::new(binary, &socket)
            .arg("--shared-dir")
            .arg(shared)
            .arg("--socket-path")
            .arg(&socket)
            .arg("--xattr")
            .arg("--log-level")
            .arg("error")
    }

    /// This project's agent with its own broker, which serves the shares of a manifest directory.
    pub fn agent(binary: &Path, shares: &Path, runtime: &Path, share: &str) -> Self {
        let socket = runtime.join("shares").join(format!("{share}.sock"));
        let mut command = Self::new(binary, socket).arg("up").arg("--shares").arg(shares);
        command.ready = Ready::Appears;
        command.arg("--runtime-dir").arg(runtime)
    }
}

/// A running server. Killed on drop, or when the thread that started it ends.
#[derive(Debug)]
pub struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    /// Starts a server and waits until it listens.
    pub fn start(command: &ServerCommand) -> Result<Self, ServerError> {
        // A socket of an earlier run must not be mistaken for the new one.
        match std::fs::remove_file(&command.socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(spawn_error(command, error));
            }
            _ => {}
        }
        let child = spawn(command).map_err(|source| spawn_error(command, source))?;
        let mut server = Self { child, socket: command.socket.clone() };
        server.wait_listening(command)?;
        Ok(server)
    }

    /// Path of the socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The started process. With a sandbox it is not the serving process: see [`crate::processes::descendants`].
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// True if the process has ended.
    pub fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// Waits until the process ends by itself, as stock virtiofsd does after its guest has disconnected.
    pub fn wait_ended(&mut self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        while Instant::now() < deadline {
            if self.has_ended() {
                return true;
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        false
    }

    /// Sends SIGTERM to the process, then SIGKILL.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if self.has_ended() {
            return;
        }
        // The parent of a sandbox does not serve, and ends before the serving process.
        let serving = descendants(self.pid()).unwrap_or_default();
        // The parent forwards SIGTERM but cannot forward SIGKILL.
        let _ = kill(Pid::from_raw(self.pid()), Signal::SIGTERM);
        if !self.wait_ended(STOP_TIMEOUT) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let deadline = Instant::now() + STOP_TIMEOUT;
        for pid in serving {
            while is_alive(pid) && Instant::now() < deadline {
                std::thread::sleep(POLL_INTERVAL);
            }
            if is_alive(pid) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }

    fn wait_listening(&mut self, command: &ServerCommand) -> Result<(), ServerError> {
        let deadline = Instant::now() + START_TIMEOUT;
        while Instant::now() < deadline {
            let ready = match command.ready {
                Ready::Listens => listens(&self.socket),
                Ready::Appears => self.socket.exists(),
            };
            if ready {
                return Ok(());
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(ServerError::Ended {
                    program: command.program.clone(),
                    status,
                    socket: self.socket.clone(),
                });
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        Err(ServerError::Late { program: command.program.clone(), socket: self.socket.clone() })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

fn spawn_error(command: &ServerCommand, source: io::Error) -> ServerError {
    ServerError::Spawn { program: command.program.clone(), source }
}

fn spawn(command: &ServerCommand) -> io::Result<Child> {
    let (out, err) = match &command.log {
        None => (Stdio::null(), Stdio::inherit()),
        Some(path) => {
            let file = std::fs::File::create(path)?;
            (file.try_clone()?.into(), file.into())
        }
    };
    let mut process = Command::new(&command.program);
    process.args(&command.arguments).stdin(Stdio::null()).stdout(out).stderr(err);
    // SAFETY: the closure makes one async-signal-safe system call and accesses no memory of this process.
    unsafe {
        process.pre_exec(|| set_pdeathsig(Signal::SIGTERM).map_err(io::Error::from));
    }
    process.spawn()
}

/// True if a process listens on a path. Does not connect: a server of one connection would take the connection for its
/// guest.
fn listens(path: &Path) -> bool {
    let Ok(table) = std::fs::read_to_string("/proc/net/unix") else {
        return path.exists();
    };
    table.lines().any(|line| is_listener(line, path))
}

/// Matches `Num RefCount Protocol Flags Type St Inode Path`; the path is the one to which the socket was bound.
fn is_listener(line: &str, path: &Path) -> bool {
    let mut columns = line.split_whitespace();
    let flags = columns.nth(3).and_then(|f| u32::from_str_radix(f, 16).ok());
    flags.is_some_and(|flags| flags & ACCEPTS != 0) && columns.nth(3).is_some_and(|bound| Path::new(bound) == path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_distinguished_from_a_connection() {
        let listener = "0000: 00000002 00000000 00010000 0001 01 3141 /run/a.sock";
        let connected = "0000: 00000003 00000000 00000000 0001 03 3142 /run/a.sock";
        assert!(is_listener(listener, Path::new("/run/a.sock")));
        assert!(!is_listener(listener, Path::new("/run/b.sock")));
        assert!(!is_listener(connected, Path::new("/run/a.sock")));
    }
}
