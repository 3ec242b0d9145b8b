//! The servers under test as processes: a command line in, a listening socket out.

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

/// How long a server may take from its start to its listening socket.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a server may take to end when asked to.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// How often is looked.
const STEP: Duration = Duration::from_millis(5);
/// SO_ACCEPTCON in the flags column of /proc/net/unix: the socket listens.
const ACCEPTS: u32 = 1 << 16;

/// Why a server is not there.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Nobody said where stock virtiofsd is.
    #[error("nothing to compare with: set {STOCK_VARIABLE} to the path of stock virtiofsd 1.14 (make check does)")]
    StockUnnamed,
    /// Stock virtiofsd is not where it was said to be.
    #[error("nothing to compare with: {STOCK_VARIABLE} or the command line says {0}, and no file is there")]
    NoStock(PathBuf),
    /// The program could not be run.
    #[error("starting {program}: {source}")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The program ended before its socket was there.
    #[error("{program} ended with {status} before it listened on {socket}")]
    Ended {
        /// The program.
        program: PathBuf,
        /// How it ended.
        status: std::process::ExitStatus,
        /// Where it should listen.
        socket: PathBuf,
    },
    /// The socket did not come in time.
    #[error("{program} does not listen on {socket} after {START_TIMEOUT:?}")]
    Late {
        /// The program.
        program: PathBuf,
        /// Where it should listen.
        socket: PathBuf,
    },
}

/// The environment variable that names stock virtiofsd 1.14.
pub const STOCK_VARIABLE: &str = "VIRTIOFSD_STOCK";

/// The path of stock virtiofsd: what was given on the command line, else what the environment
/// says. An error, not a skipped test, where it is missing.
pub fn stock_binary(given: Option<PathBuf>) -> Result<PathBuf, ServerError> {
    let path = given.or_else(|| std::env::var_os(STOCK_VARIABLE).map(PathBuf::from));
    match path {
        Some(path) if path.is_file() => Ok(path),
        Some(path) => Err(ServerError::NoStock(path)),
        None => Err(ServerError::StockUnnamed),
    }
}

/// How to start a server that listens on `socket`.
#[derive(Debug, Clone)]
pub struct ServerCommand {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Where it will listen.
    pub socket: PathBuf,
    /// Where its output goes; nowhere if not given.
    pub log: Option<PathBuf>,
    /// What says that it may be connected to.
    pub ready: Ready,
}

/// What says that a server may be connected to. Trying would not do: a server of one connection takes
/// the attempt for its guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    /// Its socket listens, by the path it was bound to.
    Listens,
    /// Its socket is there: it binds under another name and moves the socket into place.
    Appears,
}

impl ServerCommand {
    /// Any program.
    pub fn new(program: impl Into<PathBuf>, socket: impl Into<PathBuf>) -> Self {
        Self { program: program.into(), arguments: Vec::new(), socket: socket.into(), log: None, ready: Ready::Listens }
    }

    /// With another argument.
    pub fn arg(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// With its output in a file.
    pub fn log(mut self, path: impl Into<PathBuf>) -> Self {
        self.log = Some(path.into());
        self
    }

    /// Stock virtiofsd with its own defaults, except that extended attributes are on. It serves
    /// one connection and ends.
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

    /// Our own agent with a broker of its own, serving the shares of a manifest directory.
    pub fn agent(binary: &Path, shares: &Path, runtime: &Path, share: &str) -> Self {
        let socket = runtime.join("shares").join(format!("{share}.sock"));
        let mut command = Self::new(binary, socket).arg("up").arg("--shares").arg(shares);
        command.ready = Ready::Appears;
        command.arg("--runtime-dir").arg(runtime)
    }
}

/// A running server; killed when dropped or when the thread that started it ends.
#[derive(Debug)]
pub struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    /// Starts a server and waits until it listens.
    pub fn start(command: &ServerCommand) -> Result<Self, ServerError> {
        // What an earlier run left behind must not be taken for the new socket.
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

    /// Where to connect.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The process that was started (with a sandbox, not the one that serves:
    /// see [`crate::processes::descendants`]).
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Whether the process has ended.
    pub fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// Waits for the process to end by itself, as stock virtiofsd does when its guest is gone.
    pub fn wait_ended(&mut self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if self.has_ended() {
                return true;
            }
            std::thread::sleep(STEP);
        }
        false
    }

    /// Asks the process to end, then makes it.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if self.has_ended() {
            return;
        }
        // A sandboxing parent is not the one that serves, and ends before it.
        let serving = descendants(self.pid()).unwrap_or_default();
        // It passes SIGTERM on, it cannot pass SIGKILL on.
        let _ = kill(Pid::from_raw(self.pid()), Signal::SIGTERM);
        if !self.wait_ended(STOP_TIMEOUT) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let deadline = Instant::now() + STOP_TIMEOUT;
        for pid in serving {
            while is_alive(pid) && Instant::now() < deadline {
                std::thread::sleep(STEP);
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
            std::thread::sleep(STEP);
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
    // SAFETY: the closure makes one async-signal-safe system call and touches no memory of ours.
    unsafe {
        process.pre_exec(|| set_pdeathsig(Signal::SIGTERM).map_err(io::Error::from));
    }
    process.spawn()
}

/// Whether someone listens on a path, without connecting: a server of one connection would take
/// the attempt for its guest.
fn listens(path: &Path) -> bool {
    let Ok(table) = std::fs::read_to_string("/proc/net/unix") else {
        return path.exists();
    };
    table.lines().any(|line| is_listener(line, path))
}

/// `Num RefCount Protocol Flags Type St Inode Path`, the path being the one that was bound.
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
