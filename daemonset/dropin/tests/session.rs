//! virtiofsd-live with a guest: what is killed is replaced, and nothing is left at the end.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use common::{Copies, Place, Virtiofsd, as_user, live, read_hello, shown, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::guest::Guest;
use testkit::processes::is_alive;
use testkit::server::stock_binary;
use testkit::skip::require_that;
use testkit::workload::{Config, Limit, Workload};

fn start(place: &Place, arguments: &[&str]) -> Virtiofsd {
    let mut started = place.start(live(), arguments);
    started.ready().unwrap();
    started
}

fn kill_all(pids: &[i32]) {
    for pid in pids {
        // It may have ended by itself.
        let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
    }
}

/// Runs random work that verifies every byte, with a disturbance meanwhile. The guest must see no error.
fn work_through(place: &Place, guest: &Guest, disturb: impl FnOnce() + Send) {
    let mut workload = Workload::start(Config::new(19).lanes(2).host(place.path("share")), &[guest.fuse()]);
    let stop = AtomicBool::new(false);
    scope(|scope| {
        let disturbed = scope.spawn(|| {
            disturb();
            stop.store(true, Relaxed);
        });
        workload.run(Limit::until(&stop));
        disturbed.join().unwrap();
    });
    let report = workload.finish();
    assert!(report.is_clean(), "{report}");
}

/// Waits for the end of these processes and of the runtime directory.
fn nothing_is_left(processes: &[i32], runtime_dir: &Path) {
    until("no process is left", || !processes.iter().any(|pid| is_alive(*pid)));
    assert!(!runtime_dir.exists());
}

#[test]
fn guest_survives_engines_and_brokers_and_leaves_nothing() {
    let place = Place::new();
    let mut served = start(&place, &["--xattr"]);
    let (runtime_dir, guest) = (served.runtime_dir(), place.boot());
    work_through(&place, &guest, || {
        for round in 0..10 {
            until("an engine serves", || !served.processes("virtiofs-engine").is_empty());
            kill_all(&served.processes("virtiofs-engine"));
            if round % 4 == 1 {
                kill_all(&served.processes("virtiofs-broker"));
            }
            sleep(Duration::from_millis(150));
        }
    });
    assert_eq!(read_hello(&guest), "from the host\n");
    until("keeper, broker and engine run", || served.all_processes().len() >= 3);
    let processes = served.all_processes();
    drop(guest);
    assert_eq!(shown(served.wait()), 0, "{}", served.log());
    assert!(!processes.iter().any(|pid| is_alive(*pid)), "all have ended before it did");
    nothing_is_left(&processes, &runtime_dir);
    assert_eq!(place.files(), ["k.pid"], "stock leaves its pid file, too");
}

#[test]
fn sighup_exchanges_the_engine() {
    let (place, programs) = (Place::new(), Copies::ours());
    let mut served = place.start(&programs.path("virtiofsd-live"), &["--xattr"]);
    served.ready().unwrap();
    let guest = place.boot();
    assert_eq!(read_hello(&guest), "from the host\n");
    let engine = programs.path("virtiofs-engine");
    work_through(&place, &guest, || {
        for _ in 0..3 {
            until("an engine serves", || !served.processes("virtiofs-engine").is_empty());
            let before = served.processes("virtiofs-engine");
            // As a package manager does. Processes of the old file then have another link in /proc.
            fs::copy(live().with_file_name("virtiofs-engine"), programs.path("new")).unwrap();
            fs::rename(programs.path("new"), &engine).unwrap();
            served.signal(Signal::SIGHUP);
            until("engines of the new file serve", || !served.processes("virtiofs-engine").is_empty());
            until("engines of the old file have ended", || !before.iter().any(|pid| is_alive(*pid)));
        }
    });
}

#[test]
fn ordinary_user_survives_engines_and_leaves_nothing() {
    if !require_that("root", nix::unistd::geteuid().is_root()) {
        return;
    }
    let (place, programs) = (Place::new(), Copies::ours());
    let arguments = ["--shared-dir=share", "--socket-path=k", "--sandbox=none"];
    let mut command = place.command(&programs.path("virtiofsd-live"), &arguments);
    as_user(&place, &mut command);
    let mut served = place.run(command);
    served.ready().unwrap_or_else(|status| panic!("{status}: {}", served.log()));
    let (runtime_dir, guest) = (served.runtime_dir(), place.boot());
    for _ in 0..5 {
        assert_eq!(read_hello(&guest), "from the host\n");
        kill_all(&served.processes("virtiofs-engine"));
    }
    kill_all(&served.processes("virtiofs-broker"));
    assert_eq!(read_hello(&guest), "from the host\n");
    let processes = served.all_processes();
    drop(guest);
    assert_eq!(shown(served.wait()), 0, "{}", served.log());
    nothing_is_left(&processes, &runtime_dir);
    assert_eq!(place.files(), ["k.pid"]);
}

#[test]
fn signals_end_it_and_leave_nothing() {
    for (signal, status) in [(Signal::SIGTERM, 1), (Signal::SIGINT, 128 + 2), (Signal::SIGKILL, 128 + 9)] {
        let place = Place::new();
        let mut served = start(&place, &[]);
        let (runtime_dir, guest) = (served.runtime_dir(), place.boot());
        assert_eq!(read_hello(&guest), "from the host\n");
        let processes = served.all_processes();
        served.signal(signal);
        assert_eq!(shown(served.wait()), status, "{signal}");
        if signal == Signal::SIGKILL {
            until("no process is left", || !processes.iter().any(|pid| is_alive(*pid)));
            // The next one removes what a killed one had no time for.
            let next = start(&Place::new(), &[]);
            drop(next);
        }
        nothing_is_left(&processes, &runtime_dir);
    }
}

#[test]
fn program_that_is_missing_is_reported() {
    // The programs are looked for next to this one.
    let (place, alone) = (Place::new(), Copies::new(&[live().to_path_buf()]));
    let mut command = place.command(&alone.path("virtiofsd-live"), &["--shared-dir=share", "--socket-path=k"]);
    let output = command.env("PATH", "/nowhere").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("virtiofs-keeper is neither next to"), "{said}");
}

#[test]
fn root_directory_can_be_shared() {
    let place = Place::new();
    let mut served = place.run(place.command(live(), &["--shared-dir=/", "--socket-path=k", "--readonly"]));
    served.ready().unwrap_or_else(|status| panic!("{status}: {}", served.log()));
    let guest = place.boot();
    guest.fuse().lookup(1, "etc").unwrap();
}

fn page(address: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    page
}

#[test]
fn metrics_are_served_and_written() {
    let place = Place::new();
    let collected = place.path("");
    let directory = format!("--metrics-dir={}", collected.display());
    let mut served = start(&place, &["--metrics=127.0.0.1:0", &directory, "--name=vm-7"]);
    let log = served.log();
    let address = log.split("address=").nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
    let guest = place.boot();
    assert_eq!(read_hello(&guest), "from the host\n");
    let lookups = |page: &str| {
        let line =
            page.lines().find(|line| line.starts_with("virtiofs_requests_total{") && line.contains("\"lookup\""));
        line.is_some_and(|line| line.contains("share=\"vm-7\"") && !line.ends_with(" 0"))
    };
    until("lookups are counted", || lookups(&page(&address)));
    assert!(page(&address).contains("virtiofs_broker_up 1"), "{}", page(&address));
    let file = place.path("virtiofsd-live-vm-7.prom");
    until("the file has them", || fs::read_to_string(&file).is_ok_and(|page| lookups(&page)));
    let written = fs::read_to_string(&file).unwrap();
    let samples = written.lines().filter(|line| !line.starts_with('#'));
    assert!(samples.clone().all(|line| line.contains("share=\"vm-7\"")), "{written}");
    drop(guest);
    assert_eq!(shown(served.wait()), 0);
    assert!(!file.exists());
}

/// Prints start-up time and memory beside stock's: `-- --ignored --show-output`, on a quiet machine, with --release.
#[test]
#[ignore = "figures"]
fn figures() {
    for (name, program) in [("stock", stock_binary(None).unwrap()), ("live", live().to_path_buf())] {
        let (mut socket, mut first, mut memory) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..9 {
            let place = Place::new();
            let begin = Instant::now();
            let served = place.start(&program, &[]);
            until("the socket is there", || place.path("k").exists());
            socket.push(begin.elapsed());
            let guest = place.boot();
            assert_eq!(read_hello(&guest), "from the host\n");
            first.push(begin.elapsed());
            sleep(Duration::from_millis(700));
            let processes = [vec![served.pid()], served.all_processes()].concat();
            memory.push(processes.iter().map(|pid| private_kib(*pid)).sum::<u64>());
        }
        socket.sort();
        first.sort();
        memory.sort();
        println!(
            "{name}: socket {:?}, first file read {:?}, private memory {} KiB (medians of 9)",
            socket[4], first[4], memory[4]
        );
    }
}

/// Memory that this process alone has.
fn private_kib(pid: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let private = text.lines().filter(|line| line.starts_with("Private_"));
    private.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum()
}
