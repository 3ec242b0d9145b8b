//! Requests that end engines: the guest gets an error for them, and nothing else of the mount is lost.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.
#![cfg(target_arch = "x86_64")] // The faults are injected into registers.

mod common;

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::thread;

use common::{Broker, boot, read_hello, until};
use nix::sys::signal::{SigHandler, Signal, kill, signal};
use nix::unistd::Pid;
use testkit::fuse::call::CallError;
use testkit::guest::Guest;
use virtiofs_contract::control::SessionState;

/// How an engine ends.
#[derive(Clone, Copy, Debug)]
enum End {
    /// By an invalid address.
    Segv,
    /// By a system call that its filter does not allow.
    Sys,
    /// By `abort`, as after a panic.
    Abrt,
    /// From outside.
    Kill,
}

/// A lease of the file that guests open: whoever opens it waits for the lease's end, for at most 45 s, and can be killed.
struct Lease(File);

impl Lease {
    fn on(file: &std::path::Path) -> Self {
        // SAFETY: the signal that announces a broken lease is ignored, and no handler runs.
        unsafe { signal(Signal::SIGIO, SigHandler::SigIgn) }.unwrap();
        let file = File::options().write(true).open(file).unwrap();
        // SAFETY: the descriptor is open, and the command takes a number.
        let leased = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) };
        assert_eq!(leased, 0, "{}", std::io::Error::last_os_error());
        Lease(file)
    }

    /// Lets those who wait continue.
    fn end(self) {
        drop(self.0);
    }
}

/// Waits until an engine other than `before` is stuck in a request.
fn stuck_engine(broker: &Broker, before: Option<u32>) -> u32 {
    let mut found = None;
    until("an engine carries out the request", || {
        let session = broker.session_of("data");
        let stuck = session.oldest_request.is_some_and(|request| request.age_ms >= 20);
        found = session.engine_pid.filter(|engine| stuck && Some(*engine) != before);
        found.is_some()
    });
    found.unwrap()
}

fn end_engine(engine: u32, end: End) {
    match end {
        End::Kill => kill(Pid::from_raw(engine as i32), Signal::SIGKILL).unwrap(),
        End::Segv => change_registers(engine, |registers, _| registers.rip = 16),
        End::Sys => change_registers(engine, |registers, _| {
            // The interrupted system call is made again, with another number.
            registers.rip -= 2;
            registers.rax = libc::SYS_ptrace as u64;
        }),
        End::Abrt => change_registers(engine, |registers, abort| {
            registers.rip = abort;
            registers.rsp = ((registers.rsp - 256) & !15) - 8;
        }),
    }
}

/// Changes the registers of the engine's first thread, which waits in a system call. The second argument of `change` is the
/// address of `abort` in the engine.
fn change_registers(engine: u32, change: impl FnOnce(&mut libc::user_regs_struct, u64)) {
    let abort = address_of_abort(engine);
    let thread = engine as i32;
    // SAFETY: the structure has the layout that ptrace fills, and all its values are valid; the thread is stopped from the
    // second call to the last.
    unsafe {
        let mut registers: libc::user_regs_struct = std::mem::zeroed();
        let trace = |request: libc::c_uint, data: *mut libc::c_void| {
            assert_eq!(libc::ptrace(request, thread, 0, data), 0, "{}", std::io::Error::last_os_error());
        };
        trace(libc::PTRACE_SEIZE, std::ptr::null_mut());
        trace(libc::PTRACE_INTERRUPT, std::ptr::null_mut());
        assert_eq!(libc::waitpid(thread, std::ptr::null_mut(), libc::__WALL), thread);
        trace(libc::PTRACE_GETREGS, (&raw mut registers).cast());
        // Not in a system call any more: the kernel must not restart it.
        registers.orig_rax = u64::MAX;
        change(&mut registers, abort);
        trace(libc::PTRACE_SETREGS, (&raw mut registers).cast());
        trace(libc::PTRACE_DETACH, std::ptr::null_mut());
    }
}

/// The engine and this test use the same C library, at different addresses.
fn address_of_abort(engine: u32) -> u64 {
    let base = |process: &str| {
        let maps = fs::read_to_string(format!("/proc/{process}/maps")).unwrap();
        let line = maps.lines().find(|line| line.contains("/libc.so.6")).unwrap();
        u64::from_str_radix(line.split('-').next().unwrap(), 16).unwrap()
    };
    // SAFETY: the name is NUL-terminated.
    let here = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"abort".as_ptr()) } as u64;
    here - base("self") + base(&engine.to_string())
}

fn children(parent: u32) -> Vec<u32> {
    let parent = format!("PPid:\t{parent}");
    let processes =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    processes
        .filter(|process: &u32| {
            let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
            status.lines().any(|line| line == parent)
        })
        .collect()
}

fn open_hello(guest: &Guest) -> Result<u64, CallError> {
    let entry = guest.fuse().lookup(1, "hello")?;
    guest.fuse().open(entry.nodeid, libc::O_RDONLY).map(|open| open.fh)
}

/// Ends every engine that carries out one request of the guest, in these ways. Returns what the guest gets for it.
fn poisoned(broker: &Broker, guest: &Guest, ends: &[End], mut after_each: impl FnMut(End, &[u32], u32)) -> Option<i32> {
    let lease = Lease::on(&broker.source("data").join("hello"));
    thread::scope(|scope| {
        let opening = scope.spawn(|| open_hello(guest));
        let mut before = None;
        for (number, end) in (1..).zip(ends) {
            let engine = stuck_engine(broker, before);
            until("there is a standby engine", || children(broker.pid()).len() >= 2);
            let known = children(broker.pid());
            end_engine(engine, *end);
            if number < ends.len() {
                after_each(*end, &known, stuck_engine(broker, Some(engine)));
            }
            before = Some(engine);
        }
        // Unless the request is answered by now, it waits for the lease.
        if ends.len() != deadly(ends) {
            stuck_engine(broker, before);
            lease.end();
        }
        opening.join().unwrap().err().map(|error| error.errno().unwrap() as i32)
    })
}

/// Deaths after which the request is answered `EIO`.
fn deadly(ends: &[End]) -> usize {
    if ends.iter().any(|end| !matches!(end, End::Kill)) { 2 } else { 5 }
}

fn broker_with_guest() -> (Broker, Guest) {
    let broker = Broker::start();
    let guest = boot(&broker.share("data"));
    assert_eq!(read_hello(&guest), "from the host\n");
    broker.until_state("data", SessionState::Serving);
    (broker, guest)
}

fn expect_the_mount_to_work(broker: &Broker, guest: &Guest) {
    assert_eq!(read_hello(guest), "from the host\n");
    broker.until_state("data", SessionState::Serving);
    assert_eq!(guest.violations(), []);
}

#[test]
fn request_that_faults_twice_is_answered_eio() {
    for end in [End::Segv, End::Sys, End::Abrt] {
        let (broker, guest) = broker_with_guest();
        let standby_is_discarded = |_: End, known: &[u32], successor: u32| {
            assert!(!known.contains(&successor), "{end:?}: a standby engine does not know that the request is deadly");
        };
        assert_eq!(poisoned(&broker, &guest, &[end, end], standby_is_discarded), Some(libc::EIO), "{end:?}");
        expect_the_mount_to_work(&broker, &guest);
    }
}

#[test]
fn request_that_faults_once_is_repeated() {
    let (broker, guest) = broker_with_guest();
    assert_eq!(poisoned(&broker, &guest, &[End::Segv], |_, _, _| {}), None);
    expect_the_mount_to_work(&broker, &guest);
}

#[test]
fn request_that_is_killed_five_times_is_answered_eio() {
    let (broker, guest) = broker_with_guest();
    let standby_takes_over = |_: End, known: &[u32], successor: u32| assert!(known.contains(&successor));
    assert_eq!(poisoned(&broker, &guest, &[End::Kill; 5], standby_takes_over), Some(libc::EIO));
    expect_the_mount_to_work(&broker, &guest);
}

#[test]
fn request_that_is_killed_four_times_is_repeated() {
    let (broker, guest) = broker_with_guest();
    assert_eq!(poisoned(&broker, &guest, &[End::Kill; 4], |_, _, _| {}), None);
    expect_the_mount_to_work(&broker, &guest);
}
