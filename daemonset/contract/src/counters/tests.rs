use super::*;

#[test]
fn second_mapping_continues_the_counts() {
    let (fd, first) = Counters::create().unwrap();
    first.count_request(1, 0, 1_500);
    first.count_request(1, 2, 3_000_000_000);
    drop(first);
    let second = Counters::map(&fd).unwrap();
    second.count_request(1, 2, 10);
    second.count_read(4096);
    let totals = second.totals();
    assert_eq!(totals.requests(), 3);
    assert_eq!(totals.errnos, [ErrnoTotal { errno: 2, replies: 2 }]);
    assert_eq!(totals.bytes_read, 4096);
    assert_eq!(totals.operations[0].latency[0], 2);
    assert_eq!(totals.operations[0].latency[14], 1);
}

#[test]
fn stale_events_are_counted_and_recorded() {
    let (fd, first) = Counters::create().unwrap();
    first.count_stale(Cause::SourceRemoved, b"etc/passwd");
    drop(first);
    let second = Counters::map(&fd).unwrap();
    second.count_stale(Cause::SourceRemoved, b"etc/group");
    second.count_stale(Cause::FdExhausted, b"");
    let totals = second.totals();
    let counts = [Cause::FdExhausted, Cause::SourceRemoved, Cause::Fenced].map(|cause| totals.stale(cause));
    assert_eq!(counts, [1, 2, 0]);
    let paths: Vec<_> = second.stale_events().into_iter().map(|event| event.path).collect();
    assert_eq!(paths, ["etc/passwd", "etc/group", ""]);
    let mut sum = Totals::default();
    sum.add(&totals);
    sum.add(&totals);
    assert_eq!(sum.stale.iter().map(|total| total.events).collect::<Vec<_>>(), [2, 4]);
}

#[test]
fn unreachable_memory_is_one_range() {
    let (fd, first) = Counters::create().unwrap();
    assert_eq!(first.unreachable_memory(), None);
    first.count_unreachable(0x5000, 0x6000);
    first.count_unreachable(0x3000, 0x4000);
    first.set_waiting_for_memory(1, true);
    first.set_waiting_for_memory(usize::MAX, true);
    drop(first);
    let second = Counters::map(&fd).unwrap();
    let memory = UnreachableMemory { start: 0x3000, end: 0x6000, requests: 2, waiting: true };
    assert_eq!(second.unreachable_memory(), Some(memory));
    second.set_waiting_for_memory(1, false);
    assert_eq!(second.unreachable_memory(), Some(UnreachableMemory { waiting: false, ..memory }));
    assert_eq!(second.totals().unreachable, 2);
}

#[test]
fn unknown_numbers_count_as_other() {
    let (_fd, counters) = Counters::create().unwrap();
    counters.count_request(u32::MAX, -7, u64::MAX);
    counters.count_request(7, 4000, 0);
    let totals = counters.totals();
    assert_eq!([OPERATION_NAMES[INIT], OPERATION_NAMES[DESTROY]], ["init", "destroy"]);
    assert_eq!(totals.operations.len(), 1);
    assert_eq!((totals.operations[0].opcode, totals.operations[0].requests), (0, 2));
    assert_eq!(totals.errnos, [ErrnoTotal { errno: 0, replies: 2 }]);
}

#[test]
fn page_cannot_shrink() {
    let (fd, _counters) = Counters::create().unwrap();
    assert!(File::from(fd.try_clone().unwrap()).set_len(0).is_err());
    let short = memfd_create(c"short", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    assert!(Counters::map(&short).is_err());
}

#[test]
fn oldest_request_is_reported_until_it_finishes() {
    let (_fd, counters) = Counters::create().unwrap();
    let at = |since_ns, opcode| InProgress { since_ns, opcode, node: 7 };
    counters.set_in_progress(0, Some(at(20, 1)));
    counters.set_in_progress(1, Some(at(10, 2)));
    counters.set_in_progress(usize::MAX, Some(at(1, 3)));
    assert_eq!(counters.oldest_in_progress(), Some(at(10, 2)));
    counters.set_in_progress(1, None);
    assert_eq!(counters.oldest_in_progress(), Some(at(20, 1)));
    counters.set_in_progress(0, None);
    assert_eq!(counters.oldest_in_progress(), None);
}

#[test]
fn pauses_add_up_by_bucket() {
    let mut one = Totals::default();
    one.replacements.recoveries.record(1_500);
    let mut sum = Totals::default();
    sum.add(&one);
    one.replacements.recoveries.record(u64::from(u32::MAX));
    sum.add(&one);
    let pauses = &sum.replacements.recoveries;
    assert_eq!((pauses.count, pauses.latency[0], pauses.latency[14]), (3, 2, 1));
    assert_eq!(pauses.longest_below(), Some(10_000_000_000));
    assert_eq!(sum.replacements.hand_overs.longest_below(), None);
    assert_eq!(sum.replacements.hand_overs, Pauses::default());
}

#[test]
fn sums_merge_operations_in_order() {
    let (_fd, counters) = Counters::create().unwrap();
    counters.count_request(15, 0, 1);
    let mut sum = counters.totals();
    counters.count_request(1, 5, 1);
    sum.add(&counters.totals());
    let opcodes: Vec<_> = sum.operations.iter().map(|o| (o.opcode, o.requests)).collect();
    assert_eq!(opcodes, [(1, 1), (15, 2)]);
    assert_eq!(sum.errors(), 1);
}

#[test]
fn page_of_another_layout_is_not_readable() {
    let (fd, counters) = Counters::create().unwrap();
    counters.count_read(4096);
    let file = File::from(fd.try_clone().unwrap());
    // As a program without a layout word creates it.
    file.write_all_at(&[0; 8], LAYOUT_AT).unwrap();
    assert_eq!(Counters::map(&fd).unwrap().totals().bytes_read, 4096);
    // Of the same size, with the fields in another order.
    file.write_all_at(&(LAYOUT + 1).to_le_bytes(), LAYOUT_AT).unwrap();
    let error = Counters::map(&fd).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    assert!(error.to_string().contains("layout 2; this program reads layout 1"), "{error}");
}

#[test]
fn layout_is_not_counted_as_an_operation() {
    let (_fd, counters) = Counters::create().unwrap();
    assert_eq!(counters.totals(), Totals::default());
    counters.count_request(OPERATIONS as u32 - 1, 0, 1);
    assert_eq!(counters.totals().operations[0].opcode, 0);
    assert_eq!(counters.page().head.layout.load(Relaxed), LAYOUT);
}
