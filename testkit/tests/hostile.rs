//! Hostile guests and VMMs. The reaction of stock virtiofsd is known, so these tests show that the means of
//! misbehaviour work. The engine's own tests cover its reaction.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod common;

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use common::Stock;
use testkit::fuse::wire::{InHeader, Opcode, ROOT};
use testkit::guest::{Guest, GuestConfig, REQUESTS};
use testkit::vhost::connection::{Connection, NEED_REPLY, Request, VERSION, VhostError};
use testkit::virtio::queue::Message;
use testkit::virtio::ring::{Descriptor, WRITE};
use zerocopy::IntoBytes;

const TIMEOUT: Duration = Duration::from_secs(10);

fn guest_with_short_timeout(stock: &Stock) -> Guest {
    Guest::boot(GuestConfig::new(stock.socket()).small().timeout(Duration::from_secs(2))).unwrap()
}

#[test]
fn a_request_without_a_header_ends_stock() {
    let mut stock = Stock::start(&[]);
    let guest = guest_with_short_timeout(&stock);
    let requests = &guest.queues()[REQUESTS as usize];
    let message = Message { header: b"short", reply_header: 16, ..Message::default() };
    let error = requests.submit(&message).unwrap().wait().unwrap_err();
    assert!(error.to_string().contains("closed the connection"), "{error}");
    assert!(stock.server().wait_ended(TIMEOUT));
}

#[test]
fn a_chain_made_by_hand_is_served() {
    let stock = Stock::start(&[]);
    let guest = guest_with_short_timeout(&stock);
    let header = InHeader { len: 40, opcode: Opcode::Statfs as u32, unique: 77, nodeid: ROOT, ..InHeader::default() };
    let (at, reply) = (guest.scratch(), guest.scratch() + 4096);
    guest.memory().write(at, header.as_bytes()).unwrap();
    let requests = &guest.queues()[REQUESTS as usize];
    requests.with_ring(|ring, _| {
        let request = Descriptor { address: at, len: 40, flags: 1, next: 1 };
        ring.write_descriptor(0, request).unwrap();
        let answer = Descriptor { address: reply, len: 96, flags: WRITE, next: 0 };
        ring.write_descriptor(1, answer).unwrap();
        ring.publish(0).unwrap();
    });
    requests.kick().unwrap();
    let mut unique = [0; 8];
    for _ in 0..200 {
        guest.memory().read(reply + 8, &mut unique).unwrap();
        if u64::from_le_bytes(unique) == 77 {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("no reply");
}

#[test]
fn truncated_memory_ends_stock() {
    let mut stock = Stock::start(&[]);
    let guest = guest_with_short_timeout(&stock);
    // Far below the last buffer, above the rings and the first buffers.
    let requests = &guest.queues()[REQUESTS as usize];
    let end = guest.memory().size();
    requests.with_ring(|ring, memory| {
        let beyond = Descriptor { address: end - 4096, len: 40, flags: 0, next: 0 };
        ring.write_descriptor(0, beyond).unwrap();
        memory.truncate(end - 8192).unwrap();
        ring.publish(0).unwrap();
    });
    requests.kick().unwrap();
    assert!(stock.server().wait_ended(TIMEOUT));
}

#[test]
fn an_incomplete_header_times_out() {
    let stock = Stock::start(&[]);
    let connection = Connection::connect(stock.socket(), Duration::from_millis(200)).unwrap();
    let mut stream = connection.stream();
    stream.write_all(&[1, 0, 0, 0, 1, 0]).unwrap();
    let mut connection = connection;
    let error = connection.reply(Request::GET_FEATURES).unwrap_err();
    assert!(matches!(error, VhostError::Timeout { .. }), "{error}");
}

#[test]
fn a_pipe_can_be_sent_as_a_kick() {
    let stock = Stock::start(&[]);
    let guest = guest_with_short_timeout(&stock);
    let (reader, _writer) = std::io::pipe().unwrap();
    let mut front_end = guest.front_end();
    front_end.ring_fd(Request::SET_VRING_KICK, REQUESTS, reader.as_fd()).unwrap();
    // Whatever the server does with it, other messages can be sent.
    let body = u64::from(REQUESTS).to_le_bytes();
    let fds = [reader.as_raw_fd(); 3];
    let flags = VERSION | NEED_REPLY;
    let _ = front_end.connection().send(Request::SET_VRING_KICK, flags, &body, &fds);
}

#[test]
fn an_invalid_index_does_not_break_the_driver() {
    // Stock virtiofsd spins and logs forever.
    let stock = Stock::start(&["--log-level", "off"]);
    let guest = guest_with_short_timeout(&stock);
    let requests = &guest.queues()[REQUESTS as usize];
    let before = requests.ring_state().unwrap();
    requests.with_ring(|ring, _| ring.set_available_index(before.available.wrapping_add(5000))).unwrap();
    requests.kick().unwrap();
    let error = guest.fuse().statfs(ROOT).unwrap_err();
    assert!(error.is_hung() || error.is_disconnected(), "{error}");
}
