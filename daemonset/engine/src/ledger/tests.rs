//! Tests of the ledger: against a model, and killed at every store.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use virtiofs_contract::counters::Held;

use super::harness::{killed_after, taken_back};
use super::*;

/// The ring of the requests in these tests.
const RING: usize = 0;

pub(super) fn memory() -> OwnedFd {
    memory_of(16 << 20)
}

fn memory_of(bytes: u64) -> OwnedFd {
    let fd = memfd_create(c"ledger", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    let file = File::from(fd);
    file.set_len(bytes).unwrap();
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK)).unwrap();
    file.into()
}

pub(super) fn attach(fd: &OwnedFd) -> Ledger {
    let mut ledger = Ledger::map(fd, 1_000_000).unwrap();
    ledger.take_over(Predecessor::Killed);
    ledger
}

pub(super) fn fresh() -> (OwnedFd, Ledger) {
    let fd = memory();
    let ledger = attach(&fd);
    (fd, ledger)
}

pub(super) fn ticket(unique: u64) -> RequestId {
    RequestId { position: unique as u16, unique }
}

pub(super) fn ident(ino: u64) -> Identity {
    Identity { ino, domain: 7 }
}

/// References, identity, names.
type Seen = (u64, u64, BTreeSet<(u64, Vec<u8>)>);

/// The content of a ledger, as far as a guest can notice.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Picture {
    /// By node id.
    nodes: BTreeMap<u64, Seen>,
    handles: BTreeMap<u64, (u64, u32)>,
}

/// Reads the content, and checks every structure against the others.
pub(super) fn picture(ledger: &Ledger) -> Picture {
    let change = Change::new(&ledger.words);
    let mut picture = Picture::default();
    let mut children: BTreeMap<Slot, u32> = BTreeMap::new();
    let mut open: BTreeMap<Slot, u32> = BTreeMap::new();
    let (mut nodes, mut names, mut handles) = (0, 0, 0);
    for slot in 1..ledger.words.get(header::HANDLES_HIGH) as u32 {
        let handle = Handle::at(&ledger.geometry, slot).unwrap();
        if handle.kind(&change).is_some() {
            handles += 1;
            *open.entry(handle.node(&change)).or_default() += 1;
            let fh = change::pair(handle.generation(&change), slot);
            picture.handles.insert(fh, (ledger.id(handle.node(&change)), handle.flags(&change)));
        }
    }
    for slot in 1..ledger.words.get(header::NODES_HIGH) as u32 {
        let node = Node::at(&ledger.geometry, slot).unwrap();
        if !node.is_used(&change) {
            assert_eq!(node.names(&change), 0, "a free node has no names");
            continue;
        }
        if slot != ROOT {
            nodes += 1;
            let found = ledger.nodes_with_identity(node.identity(&change)).iter().filter(|s| **s == slot).count();
            assert_eq!(found, 1, "node {slot} is once in the identity index");
        }
        let mut known = BTreeSet::new();
        for cell in ledger.name_cells(&change, slot) {
            let name = Name::at(&ledger.geometry, cell).unwrap();
            let (parent, bytes) = (name.parent(&change), name.bytes(&change, &ledger.words));
            assert_eq!(ledger.find_cell(&change, parent, &bytes), Some(cell), "a name is found by its index");
            assert!(Node::at(&ledger.geometry, parent).unwrap().is_used(&change), "a parent is never free");
            *children.entry(parent).or_default() += 1;
            names += 1;
            known.insert((ledger.id(parent), bytes));
        }
        let identity = node.identity(&change).ino;
        picture.nodes.insert(ledger.id(slot), (node.refs(&change), identity, known));
    }
    for slot in 1..ledger.words.get(header::NODES_HIGH) as u32 {
        let node = Node::at(&ledger.geometry, slot).unwrap();
        if node.is_used(&change) {
            assert_eq!(node.children(&change), children.get(&slot).copied().unwrap_or(0), "children of {slot}");
            let count = open.get(&slot).copied().unwrap_or(0);
            assert_eq!(node.handles(&change), count, "handles of {slot}");
            let chained: BTreeSet<_> = ledger.handles_of(slot).iter().map(|opened| opened.slot).collect();
            assert_eq!(chained.len(), count as usize, "handles of {slot} in a chain");
        }
    }
    assert_eq!(used_cells(ledger), names, "every used cell is some node's name");
    assert_eq!(ledger.completion_log().held(), Held { inodes: nodes, handles });
    assert_eq!(ledger.words.get(header::NAMES), names);
    picture
}

fn used_cells(ledger: &Ledger) -> u64 {
    let mut used = 0;
    for page in 1..ledger.words.get(header::PAGES_HIGH) as u32 {
        let units = ledger.words.get(ledger.geometry.page_classes + page - 1) as u32;
        for unit in (0..256 - units + 1).step_by(units as usize) {
            let word = cells::word_of(&ledger.geometry, page * 256 + unit).unwrap();
            used += u64::from(ledger.words.get(word) != 0);
        }
    }
    used
}

/// An operation of a request on the ledger.
#[derive(Clone, Debug)]
enum Act {
    New(usize, Vec<u8>, u64),
    SetName(usize, Vec<u8>, usize),
    Forget(usize, u64),
    Remove(usize, Vec<u8>),
    Rename(usize, Vec<u8>, usize, Vec<u8>, bool),
    Open(usize),
    Close(usize),
}

/// Ids that a guest holds.
#[derive(Clone, Default)]
struct Holds {
    nodes: Vec<u64>,
    handles: Vec<u64>,
}

impl Holds {
    fn slot(&self, ledger: &Ledger, index: usize) -> Slot {
        let all = self.nodes.len() + 1;
        match index % all {
            0 => ROOT,
            held => ledger.slot(self.nodes[held - 1]).unwrap_or(ROOT),
        }
    }
}

fn carry(ledger: &mut Ledger, holds: &mut Holds, act: &Act) {
    match act {
        Act::New(parent, name, ino) => {
            let parent = holds.slot(ledger, *parent);
            let slot = ledger.add_node(RING, parent, name, ident(*ino)).unwrap().0;
            holds.nodes.push(ledger.id(slot));
        }
        Act::SetName(parent, name, node) => {
            let (parent, slot) = (holds.slot(ledger, *parent), holds.slot(ledger, *node));
            if slot != ROOT && slot != parent {
                ledger.add_lookup(RING, parent, name, slot).unwrap();
            }
        }
        Act::Forget(node, count) => ledger.forget(RING, holds.slot(ledger, *node), *count, 1),
        Act::Remove(parent, name) => drop(ledger.remove(holds.slot(ledger, *parent), name)),
        Act::Rename(from, old, to, new, exchange) => {
            let (from, to) = (holds.slot(ledger, *from), holds.slot(ledger, *to));
            ledger.rename((from, old), (to, new), *exchange);
        }
        Act::Open(node) => {
            let slot = holds.slot(ledger, *node);
            let handle = FileHandle { kind: 1, bytes: vec![9; 13].into(), file_system: 8 };
            holds.handles.push(ledger.open(RING, slot, OpenKind::File, 2, &handle).unwrap());
        }
        Act::Close(handle) => {
            if let Some(opened) = holds.handles.get(*handle).and_then(|fh| ledger.opened(*fh)) {
                ledger.close(RING, opened.slot);
            }
        }
    }
    holds.nodes.retain(|id| ledger.slot(*id).is_some());
    holds.handles.retain(|fh| ledger.opened(*fh).is_some());
}

fn random_act(rng: &mut StdRng) -> Act {
    let name = |rng: &mut StdRng| {
        let long = rng.random_range(0..10) == 0;
        let length = if long { rng.random_range(1..=255) } else { rng.random_range(1..12) };
        vec![b'a' + rng.random_range(0..6u8); length]
    };
    let node = |rng: &mut StdRng| rng.random_range(0..1000usize);
    match rng.random_range(0..20) {
        0..=6 => Act::New(node(rng), name(rng), rng.random_range(1..40)),
        7..=9 => Act::SetName(node(rng), name(rng), node(rng)),
        10..=12 => Act::Forget(node(rng), rng.random_range(1..4)),
        13..=14 => Act::Remove(node(rng), name(rng)),
        15..=16 => Act::Rename(node(rng), name(rng), node(rng), name(rng), rng.random_range(0..3) == 0),
        17..=18 => Act::Open(node(rng)),
        _ => Act::Close(rng.random_range(0..8)),
    }
}

#[test]
fn a_new_ledger_has_only_the_root() {
    let (_fd, ledger) = fresh();
    assert_eq!(ledger.slot(1), Some(ROOT));
    assert_eq!(ledger.id(ROOT), 1);
    for id in [0, 2, 1 << 32, u64::MAX, (1 << 32) | 1] {
        assert_eq!(ledger.slot(id), None, "{id}");
    }
    assert_eq!(ledger.completion_log().held(), Held::default());
}

#[test]
fn an_id_is_known_until_it_is_forgotten() {
    let (_fd, mut ledger) = fresh();
    ledger.begin(0, &ticket(1));
    let slot = ledger.add_node(RING, ROOT, b"a", ident(5)).unwrap().0;
    let id = ledger.id(slot);
    ledger.add_lookup(RING, ROOT, b"a", slot).unwrap();
    ledger.forget(RING, slot, 1, 1);
    assert!(ledger.take_ended().is_empty());
    ledger.forget(RING, slot, 1, 1);
    assert_eq!(ledger.take_ended(), [slot]);
    assert_eq!(ledger.slot(id), None);
    assert_eq!(ledger.find(ROOT, b"a"), None);
    let again = ledger.add_node(RING, ROOT, b"a", ident(5)).unwrap().0;
    assert_eq!(again, slot, "the slot is used again");
    assert_ne!(ledger.id(again), id, "its id is another");
}

#[test]
fn children_and_handles_keep_a_node() {
    let (_fd, mut ledger) = fresh();
    ledger.begin(0, &ticket(1));
    let directory = ledger.add_node(RING, ROOT, b"d", ident(2)).unwrap().0;
    let file = ledger.add_node(RING, directory, b"f", ident(3)).unwrap().0;
    let fh = ledger.open(RING, file, OpenKind::File, 0, &FileHandle::default()).unwrap();
    ledger.forget(RING, directory, 1, 1);
    ledger.forget(RING, file, 1, 1);
    assert!(ledger.take_ended().is_empty());
    let opened = ledger.opened(fh).unwrap();
    assert_eq!(ledger.names(file), [(directory, b"f".to_vec())]);
    ledger.close(RING, opened.slot);
    let mut released = ledger.take_ended();
    released.sort();
    assert_eq!(released, [directory, file]);
    picture(&ledger);
}

#[test]
fn a_handle_keeps_its_kernel_file_handle() {
    let (fd, mut ledger) = fresh();
    ledger.begin(0, &ticket(1));
    let node = ledger.add_node(RING, ROOT, b"f", ident(3)).unwrap().0;
    let handle = |n| FileHandle { kind: 7, bytes: vec![n; 128].into(), file_system: u64::MAX - u64::from(n) };
    let fhs = [1, 2, 3].map(|n| ledger.open(RING, node, OpenKind::File, n.into(), &handle(n)).unwrap());
    let ledger = attach(&fd);
    for (n, fh) in (1..).zip(fhs) {
        assert_eq!(ledger.file_handle(ledger.opened(fh).unwrap().slot), handle(n));
    }
    assert_eq!(ledger.handles_of(node).iter().map(|opened| opened.flags).collect::<Vec<_>>(), [3, 2, 1]);
}

#[test]
fn the_number_of_nodes_is_limited() {
    let fd = memory();
    let mut ledger = Ledger::map(&fd, 2).unwrap();
    ledger.take_over(Predecessor::Quiesced);
    ledger.begin(0, &ticket(1));
    let first = ledger.add_node(RING, ROOT, b"a", ident(1)).unwrap().0;
    ledger.add_node(RING, ROOT, b"b", ident(2)).unwrap();
    assert_eq!(ledger.add_node(RING, ROOT, b"c", ident(3)), Err(Full));
    ledger.forget(RING, first, 1, 1);
    ledger.add_node(RING, ROOT, b"c", ident(3)).unwrap();
}

#[test]
fn a_repeated_request_drops_what_it_took() {
    let (fd, mut ledger) = fresh();
    ledger.begin(0, &ticket(1));
    let kept = ledger.add_node(RING, ROOT, b"kept", ident(1)).unwrap().0;
    ledger.completion_log().finish(0, 16);
    ledger.completion_log().published(0);
    let before = picture(&ledger);
    ledger.begin(0, &ticket(2));
    ledger.add_lookup(RING, ROOT, b"kept", kept).unwrap();
    for ino in 10..200 {
        ledger.add_node(RING, ROOT, format!("n{ino}").as_bytes(), ident(ino)).unwrap();
    }
    ledger.open(RING, kept, OpenKind::Directory, 0, &FileHandle::default()).unwrap();
    let mut next = attach(&fd);
    assert_eq!(next.status(0, &ticket(2)), RequestStatus::Interrupted { faults: 0, kills: 1 });
    next.restart(0);
    assert_eq!(next.take_ended().len(), 190);
    assert_eq!(picture(&next), before);
}

#[test]
fn the_record_has_the_status_of_a_request() {
    let (fd, mut ledger) = fresh();
    let first = ticket(7);
    assert_eq!(ledger.status(1, &first), RequestStatus::New);
    ledger.begin(1, &first);
    assert_eq!(ledger.status(1, &first), RequestStatus::Interrupted { faults: 0, kills: 0 });
    assert_eq!(ledger.status(1, &RequestId { unique: 8, ..first }), RequestStatus::New);
    let before = PriorState { known: true, existed: true, first: 4, second: 5, size: 6 };
    ledger.set_prior_state(1, &before);
    assert_eq!(ledger.prior_state(1), before);
    ledger.completion_log().finish(1, 99);
    let next = attach(&fd);
    assert_eq!(next.status(1, &first), RequestStatus::Answered { bytes: 99 });
    next.completion_log().published(1);
    assert_eq!(next.status(1, &first), RequestStatus::New);
}

#[test]
fn deaths_are_counted_by_kind_for_unfinished_requests() {
    let fd = memory();
    let mut ledger = attach(&fd);
    ledger.begin(0, &ticket(1));
    for predecessor in [Predecessor::Faulted, Predecessor::Killed, Predecessor::Faulted, Predecessor::Quiesced] {
        ledger = Ledger::map(&fd, 10).unwrap();
        ledger.take_over(predecessor);
    }
    assert_eq!(ledger.status(0, &ticket(1)), RequestStatus::Interrupted { faults: 2, kills: 1 });
    ledger.completion_log().finish(0, 0);
    ledger.completion_log().published(0);
    ledger = Ledger::map(&fd, 10).unwrap();
    ledger.take_over(Predecessor::Faulted);
    assert_eq!(ledger.status(0, &ticket(1)), RequestStatus::New);
}

#[test]
fn a_new_mount_clears_the_previous_one() {
    let (fd, mut ledger) = fresh();
    assert_eq!(ledger.init(), None);
    ledger.begin(0, &ticket(1));
    let slot = ledger.add_node(RING, ROOT, b"a", ident(1)).unwrap().0;
    let id = ledger.id(slot);
    ledger.record_init(b"request", b"reply!");
    let mut next = attach(&fd);
    assert_eq!(next.init(), Some((b"request".to_vec(), b"reply!".to_vec())));
    next.clear();
    assert_eq!((next.init(), next.slot(id), next.find(ROOT, b"a")), (None, None, None));
    next.begin(0, &ticket(2));
    let again = next.add_node(RING, ROOT, b"a", ident(1)).unwrap().0;
    assert_ne!(next.id(again), id);
    picture(&next);
}

#[test]
fn all_of_thousands_of_names_are_found() {
    let (fd, mut ledger) = fresh();
    ledger.begin(0, &ticket(1));
    for ino in 1..20_000u64 {
        ledger.add_node(RING, ROOT, format!("file number {ino}").as_bytes(), ident(ino)).unwrap();
    }
    let ledger = attach(&fd);
    for ino in 1..20_000u64 {
        let slot = ledger.find(ROOT, format!("file number {ino}").as_bytes()).unwrap();
        assert_eq!(ledger.identity(slot), ident(ino));
        assert_eq!(ledger.nodes_with_identity(ident(ino)), [slot]);
    }
    assert_eq!(ledger.find(ROOT, b"file number 0"), None);
}

#[test]
fn freed_room_is_reused() {
    let (fd, mut ledger) = fresh();
    let mut pages = 0;
    for round in 0..20u64 {
        ledger.begin(0, &ticket(round));
        let slots: Vec<Slot> =
            (0..500).map(|n| ledger.add_node(RING, ROOT, format!("{n}").as_bytes(), ident(n)).unwrap().0).collect();
        for slot in slots {
            ledger.forget(RING, slot, 1, 1);
        }
        let now = ledger.words.get(header::PAGES_HIGH);
        assert!(round < 3 || now <= pages + 1, "round {round}: {pages} -> {now}");
        pages = now;
        if round % 2 == 0 {
            ledger = attach(&fd);
        }
    }
    assert!(ledger.words.get(header::NODES_HIGH) < 2000);
}

/// Adds names of this length until there is no room.
fn fill(ledger: &mut Ledger, length: usize) -> Vec<Slot> {
    let name = |n: u64| format!("{n:0length$}").into_bytes();
    (0..100_000).map_while(|n| ledger.add_node(RING, ROOT, &name(n), ident(n)).ok()).map(|(slot, _)| slot).collect()
}

#[test]
fn a_slot_is_used_once_after_a_failed_insert() {
    let fd = memory_of(1 << 20);
    let mut ledger = attach(&fd);
    ledger.begin(0, &ticket(1));
    let slots = fill(&mut ledger, 255);
    assert!(slots.len() < ledger.geometry.node_capacity as usize - 2, "there is room for nodes");
    // The guest unlinks what it still holds: that frees room for names, not for nodes.
    for n in 0..2 {
        ledger.remove(ROOT, format!("{n:0255}").as_bytes());
    }
    let [a, b] = [b"a", b"b"].map(|name| ledger.add_node(RING, ROOT, name, ident(7)).unwrap().0);
    assert_ne!(a, b);
    for slot in [a, b] {
        assert_eq!(ledger.slot(ledger.id(slot)), Some(slot), "its id is known");
    }
    picture(&ledger);
}

#[test]
fn pages_are_reused_for_other_sizes() {
    let fd = memory_of(1 << 20);
    let mut ledger = attach(&fd);
    let mut room = BTreeMap::<usize, usize>::new();
    for (round, length) in [255, 1, 40, 255, 1, 40].into_iter().enumerate() {
        ledger.begin(0, &ticket(round as u64));
        let short = ledger.add_node(RING, ROOT, b"x", ident(1)).unwrap().0;
        ledger.forget(RING, short, 1, 1);
        let slots = fill(&mut ledger, length);
        assert!(slots.len() >= room.insert(length, slots.len()).unwrap_or(1), "round {round}: {}", slots.len());
        picture(&ledger);
        for slot in slots {
            ledger.forget(RING, slot, 1, 1);
        }
        if round % 2 == 0 {
            ledger = attach(&fd);
        }
    }
}

#[test]
fn memory_of_removed_names_is_returned() {
    let (fd, mut ledger) = fresh();
    let resident = || std::os::unix::fs::MetadataExt::blocks(&File::from(fd.try_clone().unwrap()).metadata().unwrap());
    ledger.begin(0, &ticket(1));
    let slots: Vec<Slot> =
        (0..20_000).map(|n| ledger.add_node(RING, ROOT, format!("{n:0200}").as_bytes(), ident(n)).unwrap().0).collect();
    let full = resident();
    for slot in slots {
        ledger.forget(RING, slot, 1, 1);
    }
    assert!(resident() < full / 3, "{full} -> {}", resident());
}

#[test]
fn random_operations_keep_the_structures_consistent() {
    for seed in 0..30 {
        let mut rng = StdRng::seed_from_u64(seed);
        let (fd, mut ledger) = fresh();
        let mut holds = Holds::default();
        for step in 0..400u64 {
            ledger.begin(0, &ticket(step));
            carry(&mut ledger, &mut holds, &random_act(&mut rng));
            if rng.random_range(0..50) == 0 {
                ledger = attach(&fd);
            }
        }
        picture(&ledger);
    }
}

/// Each operation is killed before each of its stores, and the ledger is attached again. It must be consistent, with the
/// content from before or after, or an intermediate one of an operation of several changes.
#[test]
fn an_operation_killed_at_any_store_leaves_a_consistent_ledger() {
    let mut cuts = 0;
    for seed in 0..24 {
        let mut rng = StdRng::seed_from_u64(1000 + seed);
        let (fd, mut ledger) = fresh();
        let mut holds = Holds::default();
        for step in 0..40u64 {
            ledger.begin(0, &ticket(step));
            let act = random_act(&mut rng);
            for store in 0.. {
                let cut = taken_back(&ledger.words.clone(), || {
                    let mut tried = attach(&fd);
                    let mut tried_holds = holds.clone();
                    let cut = killed_after(store, || carry(&mut tried, &mut tried_holds, &act));
                    let mut next = attach(&fd);
                    next.restart(0);
                    release_ended(&mut next);
                    picture(&next);
                    cut
                });
                if !cut {
                    break;
                }
                cuts += 1;
            }
            carry(&mut ledger, &mut holds, &act);
        }
    }
    assert!(cuts > 8_000, "{cuts}");
}

/// Lets the ledger find nodes that its last engine had begun to end.
fn release_ended(ledger: &mut Ledger) {
    for _ in 0..1000 {
        ledger.scan_nodes();
    }
}

#[test]
fn a_damaged_ledger_gives_wrong_answers_but_no_panic() {
    for seed in 0..60 {
        let mut rng = StdRng::seed_from_u64(2000 + seed);
        let (fd, mut ledger) = fresh();
        let mut holds = Holds::default();
        for step in 0..100u64 {
            ledger.begin(0, &ticket(step));
            carry(&mut ledger, &mut holds, &random_act(&mut rng));
        }
        let interesting = ledger.words.get(header::NODES_HIGH) as u32;
        for _ in 0..40 {
            let at = match rng.random_range(0..4) {
                0 => rng.random_range(4..layout::REDO + 9),
                1 => ledger.geometry.nodes + rng.random_range(0..interesting * layout::NODE_WORDS),
                2 => ledger.geometry.pages + rng.random_range(0..2048),
                _ => ledger.geometry.name_buckets + rng.random_range(0..64),
            };
            ledger.words.set(at, if rng.random() { rng.random() } else { rng.random_range(0..300) });
        }
        let mut next = attach(&fd);
        for step in 0..100u64 {
            next.begin(0, &ticket(step));
            let act = random_act(&mut rng);
            if matches!(act, Act::New(..) | Act::SetName(..) | Act::Open(..)) {
                continue;
            }
            carry(&mut next, &mut holds, &act);
            for slot in 0..interesting {
                next.names(slot);
                next.find(slot, b"aaa");
            }
        }
    }
}

#[test]
fn a_change_reads_its_own_stores_and_other_words_from_the_ledger() {
    let (fd, _ledger) = fresh();
    let words = Words::map(&fd).unwrap();
    let mut change = Change::new(&words);
    // Words whose numbers differ by a multiple of 256 share a bit of what the change remembers.
    let stored: Vec<u32> = (1..5).map(|n| 300_000 + 256 * n).collect();
    for at in &stored {
        assert_eq!(change.get(*at), 0);
        change.set(*at, 1);
        change.add(*at, u64::from(*at));
    }
    assert!(stored.iter().all(|at| change.get(*at) == u64::from(*at) + 1 && words.get(*at) == 0));
    assert_eq!(change.get(300_000), 0);
    change.commit();
    assert!(stored.iter().all(|at| words.get(*at) == u64::from(*at) + 1));
}
