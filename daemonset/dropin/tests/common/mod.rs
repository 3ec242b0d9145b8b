//! A virtiofsd, ours or stock, as tools start it.

#![allow(dead_code)] // Not every test uses all of it.

use std::fs;
use std::mem::ManuallyDrop;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction};
use nix::unistd::Pid;
use tempfile::TempDir;
use testkit::guest::{Guest, GuestConfig};
use testkit::processes::descendants;

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What both log when a VMM may connect.
const READY: &str = "Waiting for vhost-user socket connection";

/// The program and those that it starts.
pub(crate) const PROGRAMS: [&str; 4] = ["virtiofsd-live", "virtiofs-broker", "virtiofs-keeper", "virtiofs-engine"];

/// virtiofsd-live, with the programs that it starts next to it.
pub(crate) fn live() -> &'static Path {
    let live = Path::new(env!("CARGO_BIN_EXE_virtiofsd-live"));
    assert_eq!(testkit::host::broker().parent(), live.parent(), "the other programs are built next to it");
    live
}

/// Copies of programs, in a directory that every user can enter.
pub(crate) struct Copies(TempDir);

impl Copies {
    pub(crate) fn new(programs: &[PathBuf]) -> Self {
        let directory = tempfile::Builder::new().prefix("bin-").tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for program in programs {
            fs::copy(program, directory.path().join(program.file_name().unwrap())).unwrap();
        }
        Copies(directory)
    }

    /// Copies of our programs.
    pub(crate) fn ours() -> Self {
        Self::new(&PROGRAMS.map(|name| live().with_file_name(name)))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// An ordinary user, who owns nothing else.
pub(crate) const USER: u32 = 4712;

/// Starts the command as an ordinary user, who owns the place.
pub(crate) fn as_user(place: &Place, command: &mut Command) {
    command.uid(USER).gid(USER);
    std::os::unix::fs::chown(place.path(""), Some(USER), Some(USER)).unwrap();
}

pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "still not so after {PATIENCE:?}: {what}");
        sleep(Duration::from_millis(5));
    }
}

/// A directory with a share in it, where a socket may be.
pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        let place = tempfile::Builder::new().prefix("live-").tempdir().unwrap();
        fs::create_dir(place.path().join("share")).unwrap();
        fs::write(place.path().join("share/hello"), "from the host\n").unwrap();
        Place(place)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// What is in it besides the share, sorted.
    pub(crate) fn files(&self) -> Vec<String> {
        let names = fs::read_dir(self.0.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).filter(|it| it != "share").collect();
        names.sort();
        names
    }

    /// The program with these arguments, in this directory.
    pub(crate) fn command(&self, program: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(self.0.path()).env_remove("RUST_LOG").stdin(Stdio::null());
        // Whoever runs the tests may ignore it.
        set_sigint(&mut command, SigHandler::SigDfl);
        command
    }

    /// Starts it on the share and the socket `k`.
    pub(crate) fn start(&self, program: &Path, arguments: &[&str]) -> Virtiofsd {
        let usual = ["--shared-dir=share", "--socket-path=k"];
        self.run(self.command(program, &[&usual, arguments].concat()))
    }

    pub(crate) fn run(&self, mut command: Command) -> Virtiofsd {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let log = self.0.path().with_extension(format!("{}.log", STARTED.fetch_add(1, Relaxed)));
        command.stdout(Stdio::null()).stderr(fs::File::create(&log).unwrap());
        Virtiofsd { child: command.spawn().unwrap(), log }
    }

    pub(crate) fn boot(&self) -> Guest {
        Guest::boot(GuestConfig::new(self.path("k")).small()).unwrap()
    }
}

/// A running virtiofsd. Dropped, it is ended, and killed if it does not end.
pub(crate) struct Virtiofsd {
    child: Child,
    log: PathBuf,
}

impl Virtiofsd {
    pub(crate) fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Waits until a VMM may connect. The exit status if it ends instead.
    pub(crate) fn ready(&mut self) -> Result<(), ExitStatus> {
        let end = Instant::now() + PATIENCE;
        loop {
            if self.log().contains(READY) {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait().unwrap() {
                return Err(status);
            }
            assert!(Instant::now() < end, "neither ready nor ended:\n{}", self.log());
            sleep(Duration::from_millis(2));
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.try_wait().unwrap_or_else(|| panic!("it does not end:\n{}", self.log()))
    }

    fn try_wait(&mut self) -> Option<ExitStatus> {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Some(status);
            }
            sleep(Duration::from_millis(2));
        }
        None
    }

    /// Processes of this program below it.
    pub(crate) fn processes(&self, program: &str) -> Vec<i32> {
        let all = descendants(self.pid()).unwrap_or_default();
        let is = |pid: &i32| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ends_with(program));
        all.into_iter().filter(is).collect()
    }

    pub(crate) fn all_processes(&self) -> Vec<i32> {
        descendants(self.pid()).unwrap_or_default()
    }

    /// Directory of the sockets of broker and keeper.
    pub(crate) fn runtime_dir(&self) -> PathBuf {
        let broker = self.processes("virtiofs-broker")[0];
        let line = fs::read_to_string(format!("/proc/{broker}/cmdline")).unwrap();
        let words: Vec<_> = line.split('\0').collect();
        let option = words.iter().position(|word| *word == "--runtime-dir").unwrap();
        Path::new(words[option + 1]).parent().unwrap().to_path_buf()
    }
}

impl Drop for Virtiofsd {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.signal(Signal::SIGTERM);
            if self.try_wait().is_none() {
                self.signal(Signal::SIGKILL);
                let _ = self.child.wait();
            }
        }
        let _ = fs::remove_file(&self.log);
    }
}

/// As shells show it.
pub(crate) fn shown(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap()
}

pub(crate) fn read_hello(guest: &Guest) -> String {
    let fuse = guest.fuse();
    let entry = fuse.lookup(1, "hello").unwrap();
    let open = fuse.open(entry.nodeid, 0).unwrap();
    let text = fuse.read(entry.nodeid, open.fh, 0, 4096).unwrap();
    fuse.release(entry.nodeid, open.fh, 0).unwrap();
    String::from_utf8(text).unwrap()
}

/// How the program starts out with SIGINT.
pub(crate) fn set_sigint(command: &mut Command, handler: SigHandler) {
    let action = SigAction::new(handler, SaFlags::empty(), SigSet::empty());
    // SAFETY: sigaction is async-signal-safe, and no function of this process is set.
    unsafe { command.pre_exec(move || Ok(sigaction(Signal::SIGINT, &action).map(drop)?)) };
}

/// Passes a descriptor to the program, as number 100: low numbers are used by `Command` itself.
pub(crate) fn inherit(command: &mut Command, fd: OwnedFd) {
    let copy = move || {
        // SAFETY: the number is free in a child process, and the descriptor is not closed here.
        let mut target = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(100) });
        Ok(nix::unistd::dup2(&fd, &mut target)?)
    };
    // SAFETY: dup2 is async-signal-safe, and the descriptor lives as long as the closure.
    unsafe { command.pre_exec(copy) };
}
