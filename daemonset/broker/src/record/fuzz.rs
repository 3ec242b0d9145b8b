//! Hostile sequences of messages: bytes -> request -> record -> plan. Whatever arrives, nothing panics, an invalid request
//! changes nothing, and what an engine would be sent is consistent.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use virtiofs_contract::engine::{MAX_MEMORY_REGIONS, MAX_QUEUE_SIZE, QUEUES};

use super::SessionRecord;
use super::plan::{SentState, Step, plan};
use super::transition::{apply, check};
use crate::vhost_user::codec::{HEADER_LEN, Header, MAX_PAYLOAD, Request};
use crate::vhost_user::features;

/// Sequences in one run; a few seconds on a busy machine. `HOSTILE_SEQUENCES` sets another number.
const SEQUENCES: u32 = 400;

/// A number near a limit, or any.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0..4u64,
        3 => prop::sample::select(vec![16, 64, 128, 0x1000, 1 << 20, 1 << 40, (1 << 40) + 0x4000, 1 << 32]),
        2 => prop::sample::select(vec![features::FEATURES, features::PROTOCOL, features::VERSION_1, 1 << 26, 1 << 8]),
        1 => prop::sample::select(vec![u64::MAX, u64::MAX - 1, 1 << 63, u64::from(u32::MAX), 0x8000, 0xffff, 0x1_0000]),
        1 => any::<u64>(),
    ]
}

fn encode(number: u32, flags: u32, size: Option<u32>, words: &[u64]) -> Vec<u8> {
    let payload: Vec<u8> = words.iter().flat_map(|it| it.to_le_bytes()).collect();
    let size = size.unwrap_or(payload.len() as u32);
    [number, flags, size].into_iter().flat_map(u32::to_le_bytes).chain(payload).collect()
}

/// A message of the right length, with any values.
fn well_formed() -> impl Strategy<Value = Vec<u8>> {
    (1..39u32, 0..3u64, word(), prop::collection::vec(word(), 12)).prop_map(|(number, ring, value, more)| {
        let regions = ring as usize;
        let words = match number {
            1 | 3 | 4 | 15 | 17 | 34 | 36 => vec![],
            2 | 12..=14 | 16 => vec![if (12..=14).contains(&number) { ring | value & (1 << 8) } else { value }],
            8 | 10 | 11 | 18 => vec![ring | value << 32],
            9 => [&[ring], &more[..4]].concat(),
            37 | 38 => [&[0], &more[..4]].concat(),
            5 => [&[ring], &more[..4 * regions]].concat(),
            _ => more,
        };
        encode(number, 1 | u32::from(value & 8 != 0) << 3, None, &words)
    })
}

/// One message: mostly well-formed; sometimes anything.
fn message() -> impl Strategy<Value = Vec<u8>> {
    let words = prop::collection::vec(word(), 0..12);
    let anything =
        (any::<u32>(), prop_oneof![Just(1u32), any::<u32>()], prop::option::weighted(0.3, any::<u32>()), words)
            .prop_map(|(number, flags, size, words)| encode(number % 48, flags, size, &words));
    prop_oneof![8 => well_formed(), 1 => anything, 1 => prop::collection::vec(any::<u8>(), 0..64)]
}

/// Decodes bytes as the socket does. `fds`: how many descriptors come with them.
fn decode(bytes: &[u8], fds: usize) -> Option<Request<u32>> {
    let (head, rest) = bytes.split_first_chunk::<HEADER_LEN>()?;
    let header = Header::decode(head);
    let length = header.payload_len().ok()?;
    assert!(length <= MAX_PAYLOAD);
    let payload = rest.get(..length)?;
    let fds = if header.brings_fds(payload) { (0..fds as u32).collect() } else { Vec::new() };
    Request::decode(&header, payload, fds).ok()
}

fn is_consistent(record: &SessionRecord<u32>) {
    check(record).unwrap();
    assert!(record.regions.len() <= MAX_MEMORY_REGIONS);
    for (ring, it) in record.rings.iter().enumerate() {
        assert!(it.size <= MAX_QUEUE_SIZE && (it.size == 0 || it.size.is_power_of_two()));
        if record.servable(ring) {
            let address = it.address.unwrap();
            assert!(record.region_of(address.used, 6 + 8 * u64::from(it.size)).is_some());
        }
    }
}

/// A session with these messages and the descriptors that come with each. Returns how many messages are valid.
fn session(negotiated: bool, messages: impl IntoIterator<Item = (Vec<u8>, usize)>) -> u64 {
    let (mut record, mut sent) = (SessionRecord::<u32>::default(), SentState::default());
    if negotiated {
        apply(&mut record, Request::SetProtocolFeatures(features::PROTOCOL)).unwrap();
        apply(&mut record, Request::SetFeatures(features::FEATURES)).unwrap();
    }
    let mut accepted = 0;
    for (bytes, fds) in messages {
        let Some(request) = decode(&bytes, fds) else { continue };
        let before = record.clone();
        match apply(&mut record, request) {
            Ok(_) => accepted += 1,
            Err(_) => assert_eq!(record, before, "an invalid request has no effect"),
        }
        is_consistent(&record);
        for step in plan(&sent, &record) {
            if let Step::Start { ring, .. } = &step {
                assert!(*ring < QUEUES && record.servable(*ring));
            }
            sent.record(&step);
        }
        record.reset_owed = false;
        assert!(plan(&sent, &record).is_empty(), "an engine in sync needs nothing");
    }
    accepted
}

/// Messages behind each other, the number of descriptors before each.
fn split(mut input: &[u8]) -> Vec<(Vec<u8>, usize)> {
    let mut messages = Vec::new();
    while let [fds, rest @ ..] = input {
        let length = rest.first_chunk::<HEADER_LEN>().and_then(|head| Header::decode(head).payload_len().ok());
        let (message, after) = rest.split_at((HEADER_LEN + length.unwrap_or(0)).min(rest.len()));
        messages.push((message.to_vec(), usize::from(*fds % 9)));
        input = after;
    }
    messages
}

#[test]
fn fuzz_vhost_user_messages() {
    fuzz::run("vhost-user", &[], |input| session(false, split(input)) > 0);
}

#[test]
fn hostile_sequences_neither_panic_nor_leave_an_inconsistent_state() {
    let sequences = std::env::var("HOSTILE_SEQUENCES").ok().and_then(|it| it.parse().ok()).unwrap_or(SEQUENCES);
    let mut runner = TestRunner::new(Config { cases: sequences, failure_persistence: None, ..Config::default() });
    let negotiated = any::<bool>();
    let fds = prop_oneof![2 => Just(1usize), 1 => 0..4usize];
    let messages = prop::collection::vec((message(), fds), 1..64);
    let accepted = std::cell::Cell::new(0u64);
    runner
        .run(&(negotiated, messages), |(negotiated, messages)| {
            accepted.set(accepted.get() + session(negotiated, messages));
            Ok(())
        })
        .unwrap();
    println!("{} messages were valid", accepted.get());
    assert!(accepted.get() > u64::from(sequences), "only {} messages were valid", accepted.get());
}
