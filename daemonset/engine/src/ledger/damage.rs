//! A ledger as a compromised engine may leave it: any word may have any value.
//!
//! A successor must neither panic nor loop: the work of each operation is bounded by the size of the ledger.

use std::os::fd::OwnedFd;

use proptest::collection::vec;
use proptest::prelude::*;

use super::harness::within_loads;
use super::layout::{FLIGHT_REFS, REDO};
use super::names::MAX_NAME;
use super::tests::{attach, fresh, ident, ticket};
use super::*;

/// Most words that one operation may load, for each word of the ledger.
const LOADS_PER_WORD: u64 = 4;

/// Where a word is damaged.
#[derive(Clone, Debug)]
enum Damage {
    Header(u32),
    Redo(u32),
    Flight(u32),
    FlightRefs(u32),
    NameBucket(u32),
    IdentityBucket(u32),
    Node(u32),
    Handle(u32),
    PageClass(u32),
    Cell(u32),
    Anywhere(u32),
}

impl Damage {
    /// A kind of place by its number.
    fn of(kind: u8, n: u32) -> Self {
        let kinds = [
            Damage::Header,
            Damage::Redo,
            Damage::Flight,
            Damage::FlightRefs,
            Damage::NameBucket,
            Damage::IdentityBucket,
            Damage::Node,
            Damage::Handle,
            Damage::PageClass,
            Damage::Cell,
            Damage::Anywhere,
        ];
        kinds[usize::from(kind) % kinds.len()](n)
    }

    fn word(&self, ledger: &Ledger) -> u32 {
        let table = ledger.geometry;
        match *self {
            // Signature and version are checked when it is mapped.
            Damage::Header(n) => 2 + n % 30,
            Damage::Redo(n) => REDO + n % 32,
            Damage::Flight(n) => Geometry::flight(0) + n % 12,
            Damage::FlightRefs(n) => Geometry::flight(0) + FLIGHT_REFS + n % 8,
            Damage::NameBucket(n) => table.name_buckets + n % 32,
            Damage::IdentityBucket(n) => table.identity_buckets + n % 32,
            Damage::Node(n) => table.nodes + n % (6 * 24),
            Damage::Handle(n) => table.handles + n % (24 * 6),
            Damage::PageClass(n) => table.page_classes + n % 4,
            Damage::Cell(n) => table.pages + n % 256,
            Damage::Anywhere(n) => 2 + n % (ledger.words.count() - 2),
        }
    }
}

fn damage() -> impl Strategy<Value = Damage> {
    let word = any::<u32>;
    prop_oneof![
        word().prop_map(Damage::Header),
        word().prop_map(Damage::Redo),
        word().prop_map(Damage::Flight),
        word().prop_map(Damage::FlightRefs),
        word().prop_map(Damage::NameBucket),
        word().prop_map(Damage::IdentityBucket),
        word().prop_map(Damage::Node),
        word().prop_map(Damage::Handle),
        word().prop_map(Damage::PageClass),
        word().prop_map(Damage::Cell),
        word().prop_map(Damage::Anywhere),
    ]
}

/// Values that are small numbers (slots, cells, counts), pairs of them, limits, or anything.
fn value() -> impl Strategy<Value = u64> {
    let small = || 0..1100u32;
    prop_oneof![
        small().prop_map(u64::from),
        (small(), small()).prop_map(|(high, low)| change::pair(high, low)),
        prop_oneof![Just(u64::MAX), Just(u64::from(u32::MAX)), Just(u64::from(u32::MAX) << 32), Just(1 << 63)],
        any::<u64>(),
    ]
}

/// A ledger with nodes below each other, hard links, handles, and a request that was begun.
fn used() -> (OwnedFd, Ledger) {
    let (fd, mut ledger) = fresh();
    ledger.begin(0, &ticket(1));
    let mut parent = ROOT;
    for ino in 2..12 {
        let slot = ledger.add_node(0, parent, format!("name{ino}").as_bytes(), ident(ino)).unwrap().0;
        for link in 0..ino % 4 {
            ledger.add_lookup(0, parent, format!("link{ino}.{link}").as_bytes(), slot).unwrap();
        }
        if ino % 3 == 0 {
            ledger
                .open(0, slot, OpenKind::File, 0, &FileHandle { kind: 1, bytes: vec![1; 20].into(), file_system: 1 })
                .unwrap();
        } else {
            parent = slot;
        }
    }
    (fd, ledger)
}

/// Everything that an engine does with a ledger, each within its bound.
fn use_all(ledger: &mut Ledger) {
    let bound = LOADS_PER_WORD * u64::from(ledger.words.count());
    for step in 0..9 {
        within_loads(bound, || match step {
            0 => ledger.restart(0),
            1 => drop((ledger.init(), ledger.prior_state(0), ledger.taken_handle(0), ledger.progress(0))),
            2 => drop(ledger.update_root()),
            3 => look_at_all(ledger),
            4 => add(ledger),
            5 => drop((ledger.remove(ROOT, b"name2"), ledger.remove(2, b"name3"))),
            6 => ledger.rename((ROOT, b"name2"), (3, b"name4"), true),
            7 => forget_all(ledger),
            _ => ledger.clear(),
        });
    }
}

fn look_at_all(ledger: &mut Ledger) {
    let mut next = Some(0);
    let mut rounds = 0;
    while let Some(from) = next.filter(|_| rounds < 40) {
        let (held, after) = ledger.next_held(from, 16);
        if let Some(slot) = held {
            drop((ledger.path(slot), ledger.handles_of(slot), ledger.names(slot), ledger.identity(slot)));
        }
        (next, rounds) = (after, rounds + 1);
    }
    for slot in 0..16 {
        let names = ledger.names(slot);
        assert!(names.iter().all(|(_, name)| name.len() <= MAX_NAME));
        drop((ledger.slot(ledger.id(slot)), ledger.opened(ledger.fh(slot)), ledger.path(slot)));
        drop(ledger.file_handle(slot));
        drop((ledger.find(slot, b"name3"), ledger.nodes_with_identity(ident(slot.into()))));
    }
}

fn add(ledger: &mut Ledger) {
    ledger.begin(0, &ticket(2));
    // Refused only for lack of room.
    let _ = (ledger.room_for_node(), ledger.room_for_handle(), ledger.room_for_name(MAX_NAME));
    for n in 0..8 {
        if let Ok((slot, _)) = ledger.add_node(0, ROOT, format!("new{n}").as_bytes(), ident(100 + n)) {
            let _ = ledger.add_lookup(0, ROOT, b"name5", slot);
            let _ = ledger.open(0, slot, OpenKind::Directory, 0, &FileHandle::default());
            ledger.undo_lookup(0, slot);
        }
    }
}

fn forget_all(ledger: &mut Ledger) {
    for slot in 0..16 {
        for opened in ledger.handles_of(slot).into_iter().take(16) {
            ledger.close(0, opened.slot);
        }
        ledger.forget(0, slot, u64::MAX, 1);
    }
    ledger.take_ended();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn a_damaged_ledger_is_used_in_bounded_steps(damages in vec((damage(), value()), 1..12)) {
        use_damaged(&damages);
    }
}

/// What a successor does with a ledger that was damaged.
fn use_damaged(damages: &[(Damage, u64)]) {
    let (fd, ledger) = used();
    for (damage, value) in damages {
        ledger.words.set(damage.word(&ledger), *value);
    }
    let bound = LOADS_PER_WORD * u64::from(ledger.words.count());
    let mut next = within_loads(bound, || attach(&fd));
    use_all(&mut next);
}

#[test]
fn fuzz_damaged_ledger() {
    fuzz::run("ledger", &[], |input| {
        let damages: Vec<_> = input
            .chunks_exact(13)
            .map(|it| {
                let (place, value) = it.split_at(5);
                let n = u32::from_le_bytes(place[1..].try_into().unwrap());
                (Damage::of(place[0], n), u64::from_le_bytes(value.try_into().unwrap()))
            })
            .collect();
        use_damaged(&damages);
        !damages.is_empty()
    });
}

#[test]
fn counted_lookups_beyond_the_record_are_not_undone_one_by_one() {
    for count in [u64::from(u32::MAX), u64::MAX, 1 << 32, 20_000] {
        let (fd, ledger) = used();
        // The fifth word of the in-flight record.
        ledger.words.set(Geometry::flight(0) + 4, count);
        let bound = LOADS_PER_WORD * u64::from(ledger.words.count());
        let mut next = attach(&fd);
        within_loads(bound, || next.restart(0));
        assert_eq!(next.words.get(Geometry::flight(0) + 4), 0);
    }
}

#[test]
fn a_file_with_many_names_is_dropped_in_linear_time() {
    const NAMES: u32 = 20_000;
    let (_fd, mut ledger) = fresh();
    ledger.begin(0, &ticket(1));
    let slot = ledger.add_node(0, ROOT, b"first", ident(1)).unwrap().0;
    for n in 1..NAMES {
        ledger.add_lookup(0, ROOT, format!("name{n}").as_bytes(), slot).unwrap();
    }
    within_loads(400 * u64::from(NAMES), || ledger.forget(0, slot, u64::MAX, 1));
    assert_eq!(ledger.take_ended(), [slot]);
    assert_eq!(ledger.words.get(header::NAMES), 0);
}
