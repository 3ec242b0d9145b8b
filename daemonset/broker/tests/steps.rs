//! The broker dies between any two effects while a VMM sets its device up and while an engine is replaced: at each place
//! once. The guest boots and works all the same.
//!
//! `make kills` runs it. `STEPS=FROM..TO` limits the places.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod common;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::{Broker, read_hello, until};
use testkit::guest::{Guest, GuestConfig};
use virtiofs_contract::channel::{ChannelError, FramedStream};
use virtiofs_contract::control::{Endpoint, Request, Response, SessionState};

/// More steps than there are.
const ENOUGH: u64 = 2000;

fn range() -> std::ops::Range<u64> {
    let given = std::env::var("STEPS").ok();
    let parsed = given.as_deref().and_then(|text| text.split_once(".."));
    parsed.map_or(1..ENOUGH, |(from, to)| from.parse().unwrap()..to.parse().unwrap())
}

/// A guest, and how many of its connections were closed: one that was accepted and not deposited yet is.
fn boot(endpoint: &Endpoint) -> (Guest, u32) {
    let mut closed = 0;
    loop {
        match Guest::boot(GuestConfig::new(&endpoint.socket.path).small()) {
            Ok(guest) => return (guest, closed),
            Err(error) => {
                closed += 1;
                assert!(closed < 3, "{error}");
                thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

/// Requests a hand-over; the broker may end before it replies.
fn hand_over(control: &Path) -> Result<(), ChannelError> {
    let mut stream = FramedStream::new(UnixStream::connect(control)?);
    stream.send(&Request::hello())?;
    stream.receive::<Response>()?;
    stream.send(&Request::HandOver { name: "data".into(), session: None })?;
    stream.receive::<Response>().map(drop)
}

/// Sets a guest up and replaces its engine, under a broker that dies at this step. Returns true if it died, and how many
/// connections were closed.
fn die_at(step: u64) -> (bool, u32) {
    let mut broker = Broker::start_with_keeper();
    let endpoint = broker.share("data");
    let control = broker.control_path();
    broker.crash();
    broker.restart_until_step(step);
    let done = AtomicBool::new(false);
    let (guest, closed, died) = thread::scope(|scope| {
        let supervised = scope.spawn(|| {
            let mut died = false;
            while !done.load(Ordering::Relaxed) {
                if broker.has_ended() {
                    died = true;
                    broker.restart();
                }
                thread::sleep(Duration::from_millis(5));
            }
            died
        });
        let (guest, closed) = boot(&endpoint);
        assert_eq!(read_hello(&guest), "from the host\n");
        // Twice: the standby of the first engine is ready for the second request.
        for _ in 0..2 {
            until("a hand-over is requested", || hand_over(&control).is_ok());
            thread::sleep(Duration::from_millis(150));
            assert_eq!(read_hello(&guest), "from the host\n");
        }
        done.store(true, Ordering::Relaxed);
        (guest, closed, supervised.join().unwrap())
    });
    broker.until_state("data", SessionState::Serving);
    assert_eq!(read_hello(&guest), "from the host\n");
    assert_eq!(guest.violations(), []);
    assert_eq!(broker.status_of("data").sessions_lost, 0);
    (died, closed)
}

#[test]
fn guest_survives_a_broker_that_dies_at_any_step() {
    let mut closed = 0;
    for step in range() {
        let (died, rejected) = die_at(step);
        closed += rejected;
        if rejected > 0 {
            println!("step {step}: a connection was closed");
        }
        if !died {
            println!("{} steps; {closed} connections were closed before they were sessions", step - 1);
            assert!(step > 50, "the broker must have died");
            return;
        }
    }
}
