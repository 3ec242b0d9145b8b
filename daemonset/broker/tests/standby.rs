//! A broker that stands by takes over from one that ends: guests see no error.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Broker, Place, StandbyBroker, boot, read_hello, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::guest::Guest;
use testkit::skip::require_that;
use testkit::workload::{Config, Limit, Workload};
use virtiofs_contract::control::{Endpoint, SessionState};

fn may_make_containers() -> bool {
    let tried = std::process::Command::new("unshare").args(["--pid", "--fork", "--mount-proc", "true"]).status();
    require_that("the right to create PID namespaces", tried.is_ok_and(|status| status.success()))
}

/// A broker in this place, a share, and a guest on it.
fn set_up(place: Place) -> (Broker, Endpoint, Guest) {
    let mut broker = Broker::start_with_keeper();
    if place == Place::Container {
        broker.crash();
        broker.restart_in_container();
    }
    let mut endpoint = broker.endpoint("data");
    endpoint.engine.xattr = true;
    broker.control().apply(&endpoint).unwrap();
    let guest = boot(&endpoint);
    broker.until_state("data", SessionState::Serving);
    (broker, endpoint, guest)
}

fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid.cast_signed()), signal).unwrap();
}

/// The process of the broker itself: in a container, the child of the process that made it.
fn broker_in(process: u32, place: Place) -> u32 {
    if place == Place::Host {
        return process;
    }
    let parent = format!("PPid:\t{process}");
    let is_child = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|status| status.lines().any(|line| line == parent))
    };
    let numbers = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    numbers.into_iter().find(is_child).unwrap()
}

/// Ends the broker as a service manager or a kubelet does, and waits until the one that stood by serves.
fn replace(broker: &mut Broker, standby: StandbyBroker, place: Place) -> Child {
    signal(broker_in(broker.pid(), place), Signal::SIGTERM);
    succeed(broker, standby)
}

/// Waits until the broker that stood by serves. Returns the process of the one before.
fn succeed(broker: &mut Broker, standby: StandbyBroker) -> Child {
    standby.until("serving");
    broker.succeeded_by(standby)
}

/// Sets a flag, also in a panic.
struct AtEnd<'a>(&'a AtomicBool);

impl Drop for AtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs random work that verifies every byte, with a disturbance meanwhile. The guest must see no error.
fn work_through(endpoint: &Endpoint, guest: &Guest, disturb: impl FnOnce() + Send) {
    let mut workload = Workload::start(Config::new(17).lanes(2).host(&endpoint.source), &[guest.fuse()]);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let disturbed = scope.spawn(|| {
            let _stop = AtEnd(&stop);
            disturb();
        });
        workload.run(Limit::until(&stop));
        disturbed.join().unwrap();
    });
    let report = workload.finish();
    assert!(report.is_clean(), "{report}");
    assert_eq!(guest.violations(), []);
}

#[test]
fn engines_of_a_container_are_handed_over_before_it_ends() {
    const ROUNDS: u64 = 4;
    if !may_make_containers() {
        return;
    }
    let (mut broker, endpoint, guest) = set_up(Place::Container);
    work_through(&endpoint, &guest, || {
        for round in 1..=ROUNDS {
            let standby = broker.stand_by(Place::Container, None).until_ready();
            let mut old = replace(&mut broker, standby, Place::Container);
            until("the session is handed over", || {
                broker.status_of("data").totals.replacements.hand_overs.count == round
            });
            until("the container ends", || old.try_wait().unwrap().is_some());
        }
    });
    let status = broker.status_of("data");
    let replacements = &status.totals.replacements;
    assert_eq!((replacements.recoveries.count, replacements.aborted, status.sessions_lost), (0, 0, 0));
    assert_eq!(broker.log().matches("all engines are replaced").count() as u64, ROUNDS, "{}", broker.log());
}

#[test]
fn engines_that_survive_their_broker_serve_on() {
    let (mut broker, endpoint, guest) = set_up(Place::Host);
    let before = broker.session_of("data");
    work_through(&endpoint, &guest, || {
        for round in 0..6 {
            let standby = broker.stand_by(Place::Host, None).until_ready();
            if round % 2 == 0 {
                assert!(replace(&mut broker, standby, Place::Host).wait().unwrap().success());
            } else {
                broker.crash();
                succeed(&mut broker, standby).wait().unwrap();
            }
        }
    });
    let after = broker.until_state("data", SessionState::Serving);
    assert_eq!((after.id, after.engine_pid), (before.id, before.engine_pid));
    assert_eq!(after.totals.replacements, before.totals.replacements);
}

#[test]
fn session_is_recovered_at_once_when_a_container_is_killed() {
    if !may_make_containers() {
        return;
    }
    let (mut broker, endpoint, guest) = set_up(Place::Container);
    work_through(&endpoint, &guest, || {
        for round in 1..=3 {
            let standby = broker.stand_by(Place::Container, None).until_ready();
            broker.crash();
            succeed(&mut broker, standby).wait().unwrap();
            until("it is recovered", || broker.status_of("data").totals.replacements.recoveries.count >= round);
        }
    });
    assert_eq!(broker.status_of("data").sessions_lost, 0);
}

/// A program that is no engine.
fn broken_engine(broker: &Broker) -> PathBuf {
    let path = broker.source("tools").join("broken-engine");
    fs::write(&path, "#!/bin/sh\necho no such library >&2\nexit 127\n").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn broker_with_a_broken_engine_stays_unready_and_touches_nothing() {
    let (mut broker, endpoint, guest) = set_up(Place::Host);
    let inodes = |broker: &Broker| {
        [broker.control_path(), endpoint.socket.path.clone()].map(|path| fs::metadata(path).unwrap().ino())
    };
    let (before, sockets) = (broker.session_of("data"), inodes(&broker));
    let standby = broker.stand_by(Place::Host, Some(&broken_engine(&broker)));
    standby.until("trial engine for");
    let (text, ready) = standby.probe();
    assert!(!ready && text.contains("not ready: trial engine for") && text.contains("no such library"), "{text}");
    signal(standby.pid(), Signal::SIGTERM);
    assert!(standby.wait().success());
    assert_eq!(inodes(&broker), sockets);
    assert_eq!(read_hello(&guest), "from the host\n");
    assert_eq!(broker.session_of("data").engine_pid, before.engine_pid);

    // A good one beside it takes over.
    let broken = broker.stand_by(Place::Host, Some(&broken_engine(&broker)));
    let good = broker.stand_by(Place::Host, None).until_ready();
    assert!(replace(&mut broker, good, Place::Host).wait().unwrap().success());
    assert_eq!(read_hello(&guest), "from the host\n");
    assert!(!broken.probe().1);
}

#[test]
fn of_two_brokers_that_stand_by_one_takes_over_and_the_other_waits() {
    let (mut broker, _, guest) = set_up(Place::Host);
    let before = broker.session_of("data");
    let pair = [(); 2].map(|()| broker.stand_by(Place::Host, None).until_ready());
    signal(broker.pid(), Signal::SIGTERM);
    assert!(broker.wait().success());
    until("one serves", || pair.iter().any(|it| it.probe().0.contains("serving")));
    assert_eq!(read_hello(&guest), "from the host\n");
    let (serving, waiting): (Vec<_>, Vec<_>) = pair.into_iter().partition(|it| it.probe().0.contains("serving"));
    assert!(waiting[0].probe().0.contains("standing by"));
    for standby in [serving, waiting].into_iter().flatten() {
        succeed(&mut broker, standby).wait().unwrap();
        assert_eq!(broker.until_state("data", SessionState::Serving).engine_pid, before.engine_pid);
        broker.crash();
    }
}

#[test]
fn broker_without_working_engines_takes_over_if_nobody_else_does() {
    let (mut broker, _, guest) = set_up(Place::Host);
    let standby = broker.stand_by(Place::Host, Some(&broken_engine(&broker)));
    standby.until("trial engine for");
    broker.crash();
    let listens = || UnixStream::connect(broker.control_path()).is_ok();
    thread::sleep(Duration::from_secs(3));
    assert!(!listens(), "it leaves time to start the earlier one again");
    assert_eq!(read_hello(&guest), "from the host\n");
    until("it listens", listens);
    assert!(!standby.probe().1, "a roll-out stops here");
    drop(broker.succeeded_by(standby));
    assert_eq!(read_hello(&guest), "from the host\n");
}

/// Prints figures: `cargo test -p virtiofs-broker --test standby -- --ignored --show-output`.
#[test]
#[ignore = "prints figures and shows nothing that the other tests do not show"]
fn figures_of_planned_replacements() {
    for sessions in [1, 20] {
        for (name, event) in [
            ("undisturbed for a second", Event::Nothing),
            ("planned replacement", Event::Replacement),
            ("container killed, another stands by", Event::Kill),
        ] {
            let longest = figures(sessions, event);
            let median = longest[longest.len() / 2];
            println!("{name}, {sessions} sessions: longest wait of a request median {median:?}, all {longest:?}");
        }
    }
}

/// What happens to a broker.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Event {
    Nothing,
    Replacement,
    Kill,
}

/// The longest wait of a request in each of 20 events, in order. All sessions are busy.
fn figures(sessions: usize, event: Event) -> Vec<Duration> {
    let (mut broker, endpoint, guest) = set_up(Place::Container);
    let others: Vec<Guest> = (1..sessions).map(|_| boot(&endpoint)).collect();
    let stop = AtomicBool::new(false);
    let mut all = Vec::new();
    thread::scope(|scope| {
        let _stop = AtEnd(&stop);
        for other in &others {
            let (fuse, stop) = (other.fuse(), &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    fuse.getattr(1, None).unwrap();
                    thread::sleep(Duration::from_millis(2));
                }
            });
        }
        for _ in 0..20 {
            if event == Event::Nothing {
                all.push(longest_wait(&guest, || thread::sleep(Duration::from_secs(1))));
                continue;
            }
            let standby = broker.stand_by(Place::Container, None).until_ready();
            let replaced = |broker: &Broker| {
                let it = &broker.status_of("data").totals.replacements;
                it.hand_overs.count + it.recoveries.count
            };
            let before = replaced(&broker);
            all.push(longest_wait(&guest, || {
                let mut old = if event == Event::Kill {
                    broker.crash();
                    succeed(&mut broker, standby)
                } else {
                    replace(&mut broker, standby, Place::Container)
                };
                until("all are replaced", || replaced(&broker) >= before + sessions as u64);
                until("the container ends", || old.try_wait().unwrap().is_some());
            }));
        }
    });
    all.sort();
    all
}

/// The longest wait of a request meanwhile.
fn longest_wait(guest: &Guest, meanwhile: impl FnOnce() + Send) -> Duration {
    let done = AtomicBool::new(false);
    let fuse = guest.fuse();
    thread::scope(|scope| {
        scope.spawn(|| {
            let _done = AtEnd(&done);
            meanwhile();
        });
        let mut longest = Duration::ZERO;
        while !done.load(Ordering::Relaxed) {
            let begin = Instant::now();
            fuse.getattr(1, None).unwrap();
            longest = longest.max(begin.elapsed());
        }
        longest
    })
}
