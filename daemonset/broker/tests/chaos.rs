//! A random workload against a model, while engines are killed and handed over at random times.
//!
//! `CHAOS_EVENTS` makes it longer, `TESTKIT_SEED` different.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Broker, boot, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use testkit::guest::Guest;
use testkit::processes::Holdings;
use testkit::workload::{Config, Limit, Workload};
use virtiofs_contract::control::HolderState;

/// Which events engines get, and how often.
struct Chaos {
    kills: bool,
    hand_overs: bool,
    every_ms: std::ops::Range<u64>,
}

fn seed() -> u64 {
    std::env::var("TESTKIT_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20)
}

fn events() -> u64 {
    std::env::var("CHAOS_EVENTS").ok().and_then(|events| events.parse().ok()).unwrap_or(60)
}

/// Causes that many events. Returns the numbers of kills and hand-overs.
fn disrupt(broker: &Broker, chaos: &Chaos) -> (u64, u64) {
    let mut random = StdRng::seed_from_u64(seed());
    let mut control = broker.control();
    let (mut kills, mut hand_overs) = (0, 0);
    while kills + hand_overs < events() {
        thread::sleep(Duration::from_millis(random.random_range(chaos.every_ms.clone())));
        if chaos.kills && (!chaos.hand_overs || random.random()) {
            let sessions = control.status().endpoints.remove(0).sessions;
            let engines: Vec<u32> = sessions.iter().filter_map(|session| session.engine_pid).collect();
            if !engines.is_empty() {
                let engine = engines[random.random_range(0..engines.len())];
                // It may have been replaced meanwhile.
                kills += u64::from(kill(Pid::from_raw(engine as i32), Signal::SIGKILL).is_ok());
            }
        } else {
            control.hand_over("data");
            hand_overs += 1;
        }
    }
    (kills, hand_overs)
}

fn survive(guests: usize, chaos: &Chaos) {
    let broker = Broker::start();
    let mut endpoint = broker.endpoint("data");
    endpoint.engine.xattr = true;
    broker.control().apply(&endpoint).unwrap();
    let before = Holdings::of_tree(broker.pid() as i32).unwrap();
    let guests: Vec<Guest> = (0..guests).map(|_| boot(&endpoint)).collect();
    let fuses: Vec<_> = guests.iter().map(Guest::fuse).collect();
    let mut workload = Workload::start(Config::new(seed()).lanes(2).host(&endpoint.source), &fuses);
    let stop = AtomicBool::new(false);
    let begin = Instant::now();
    let (kills, hand_overs) = thread::scope(|scope| {
        let disruptions = scope.spawn(|| {
            let counts = disrupt(&broker, chaos);
            stop.store(true, Ordering::Relaxed);
            counts
        });
        workload.run(Limit::until(&stop));
        disruptions.join().unwrap()
    });
    let report = workload.finish();
    let totals = broker.status_of("data").totals;
    println!(
        "{:?}: {} requests, {kills} kills, {hand_overs} hand_overs; {:?}",
        begin.elapsed(),
        totals.requests(),
        totals.replacements
    );
    assert!(report.is_clean(), "{report}");
    let done = &totals.replacements;
    assert!(!chaos.kills || done.recoveries.count > 0, "no engine was replaced: {done:?}");
    assert!(!chaos.hand_overs || done.hand_overs.count > 0, "nothing was handed over: {done:?}");
    for guest in &guests {
        assert_eq!(guest.violations(), []);
    }
    drop(fuses);
    drop(guests);
    until("nothing is left", || Holdings::of_tree(broker.pid() as i32).unwrap().leaked_since(&before).is_empty());
}

/// Kills brokers, keepers and engines, never a broker and a keeper together.
fn disrupt_all(broker: &mut Broker, random: &mut StdRng) {
    for _ in 0..events() {
        thread::sleep(Duration::from_millis(random.random_range(5..60)));
        let sessions = broker.control().status().endpoints.remove(0).sessions;
        let engine = sessions.iter().find_map(|session| session.engine_pid);
        let kill_engine = || _ = engine.map(|pid| kill(Pid::from_raw(pid as i32), Signal::SIGKILL));
        match random.random_range(0..7) {
            0 => kill_engine(),
            1 => _ = broker.control().hand_over("data"),
            2 => {
                broker.crash();
                if random.random() {
                    kill_engine();
                }
                broker.restart();
            }
            3 => {
                broker.control().hand_over("data");
                thread::sleep(Duration::from_millis(random.random_range(0..40)));
                broker.crash();
                broker.restart();
            }
            4 => {
                broker.signal(Signal::SIGTERM);
                assert!(broker.wait().success());
                broker.restart();
            }
            with_engine => {
                broker.kill_keeper();
                if with_engine == 5 {
                    kill_engine();
                }
                // Otherwise the broker could be killed before it has given the next keeper everything.
                until("the broker notices", || broker.control().status().holder == HolderState::Missing);
                broker.start_keeper();
                until("the keeper has everything", || broker.control().status().holder == HolderState::Connected);
            }
        }
    }
}

#[test]
fn guest_survives_kills_of_all_processes() {
    let mut broker = Broker::start_with_keeper();
    let mut endpoint = broker.endpoint("data");
    endpoint.engine.xattr = true;
    broker.control().apply(&endpoint).unwrap();
    let guest = boot(&endpoint);
    let fuses = [guest.fuse()];
    let mut workload = Workload::start(Config::new(seed()).lanes(2).host(&endpoint.source), &fuses);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            disrupt_all(&mut broker, &mut StdRng::seed_from_u64(seed()));
            stop.store(true, Ordering::Relaxed);
        });
        workload.run(Limit::until(&stop));
    });
    let report = workload.finish();
    let status = broker.status_of("data");
    println!("{} requests, {:?}", status.totals.requests(), status.totals.replacements);
    assert!(report.is_clean(), "{report}");
    assert_eq!((status.sessions_lost, status.sessions_started), (0, 1));
    assert_eq!(guest.violations(), []);
    drop(guest);
    until("the session has ended", || broker.status_of("data").sessions.is_empty());
    // What a session had is with nobody any more.
    let memfds = |pid: u32| Holdings::of(pid as i32).unwrap().memfds;
    // Left are the states of broker and endpoint and the agent's values, which the broker has open twice: its own, and
    // the copy that it gives to the next keeper.
    until("the memory is freed", || (memfds(broker.pid()), memfds(broker.keeper_pid())) == (6, 3));
}

#[test]
fn guest_survives_kills() {
    survive(1, &Chaos { kills: true, hand_overs: false, every_ms: 5..60 });
}

#[test]
fn guest_survives_hand_overs() {
    survive(1, &Chaos { kills: false, hand_overs: true, every_ms: 5..60 });
}

#[test]
fn two_guests_survive_kills_and_hand_overs() {
    survive(2, &Chaos { kills: true, hand_overs: true, every_ms: 5..60 });
}
