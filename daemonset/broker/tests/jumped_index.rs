//! A guest that moves the index of its ring past the ring's end.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod common;

use common::{Broker, boot, read_hello, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::guest::Guest;
use virtiofs_contract::control::SessionState;

/// Processor time of a process, in ticks.
fn ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    // Fields 14 and 15 of proc_pid_stat(5); the first one here is field 3.
    fields[11..=12].iter().map(|field| field.parse::<u64>().unwrap()).sum()
}

fn jump(guest: &Guest) {
    let queue = &guest.queues()[1];
    let jumped = |ring: &mut testkit::virtio::ring::Ring| {
        let far = ring.next_available().wrapping_add(5000);
        ring.set_available_index(far).unwrap();
    };
    queue.with_ring(|ring, _| jumped(ring));
    queue.kick().unwrap();
}

fn serving_engine(broker: &Broker) -> u32 {
    broker.until_state("data", SessionState::Serving).engine_pid.unwrap()
}

/// The session continues, no engine spins, and the guest works again once it has reset its driver.
fn expect_no_harm(broker: &Broker, guest: &Guest) {
    let engine = serving_engine(broker);
    let before = ticks(engine);
    std::thread::sleep(std::time::Duration::from_millis(500));
    let used = ticks(engine) - before;
    assert!(used < 20, "the engine spins: {used} ticks in half a second");
    guest.reboot().unwrap();
    assert_eq!(read_hello(guest), "from the host\n");
}

#[test]
fn engine_waits_for_a_reset() {
    let broker = Broker::start();
    let guest = boot(&broker.share("data"));
    assert_eq!(read_hello(&guest), "from the host\n");
    jump(&guest);
    expect_no_harm(&broker, &guest);
}

#[test]
fn hand_over_after_it_succeeds() {
    let broker = Broker::start();
    let guest = boot(&broker.share("data"));
    assert_eq!(read_hello(&guest), "from the host\n");
    let engine = serving_engine(&broker);
    jump(&guest);
    assert_eq!(broker.control().hand_over("data").len(), 1);
    until("another engine serves", || broker.session_of("data").engine_pid.is_some_and(|pid| pid != engine));
    expect_no_harm(&broker, &guest);
}

#[test]
fn recovery_after_it_succeeds() {
    let broker = Broker::start();
    let guest = boot(&broker.share("data"));
    assert_eq!(read_hello(&guest), "from the host\n");
    let engine = serving_engine(&broker);
    jump(&guest);
    kill(Pid::from_raw(engine as i32), Signal::SIGKILL).unwrap();
    until("another engine serves", || broker.session_of("data").engine_pid.is_some_and(|pid| pid != engine));
    expect_no_harm(&broker, &guest);
}

#[test]
fn jump_while_engines_are_replaced_is_harmless() {
    let broker = Broker::start();
    let guest = boot(&broker.share("data"));
    assert_eq!(read_hello(&guest), "from the host\n");
    let engine = serving_engine(&broker);
    assert_eq!(broker.control().hand_over("data").len(), 1);
    jump(&guest);
    until("another engine serves", || broker.session_of("data").engine_pid.is_some_and(|pid| pid != engine));
    expect_no_harm(&broker, &guest);
}
