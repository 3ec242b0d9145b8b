//! For any history: remedies stay within the budget, one at a time, each ends, and the history stays bounded.

#![allow(clippy::unwrap_used)]

mod host;

use std::time::Duration;

use host::{Host, Vm, policy};
use proptest::prelude::*;
use virtiofs_config::{CachePolicy, InodeFileHandles};
use virtiofs_contract::preflight::HandleOutcome;
use virtiofs_remedy::policy::BUDGET_SPAN;
use virtiofs_remedy::*;

/// An event of a share.
#[derive(Clone, Debug)]
enum Event {
    Stale(Cause, u64),
    Gone(bool),
    Hung(bool),
    Full(bool),
    Root(Root),
    Obeys(bool),
    Answers(bool),
    Handles(HandleOutcome),
    HardLimit(u64),
    Content(Content),
    DeclaredHandles(InodeFileHandles),
    DeclaredFiles(Option<u64>),
    DeclaredCache(CachePolicy),
    Mode(Mode),
    Broker,
    VmCame,
    VmLeft,
    Engine,
    Backwards,
}

fn cause() -> impl Strategy<Value = Cause> {
    prop::sample::select(vec![
        Cause::FdExhausted,
        Cause::SourceReplaced,
        Cause::SourceRemoved,
        Cause::HandleStale,
        Cause::SourceGone,
        Cause::Fenced,
    ])
}

fn event() -> impl Strategy<Value = Event> {
    use InodeFileHandles::{Mandatory, Never, Prefer};
    let outcome =
        prop::sample::select(vec![HandleOutcome::Works, HandleOutcome::NotPermitted, HandleOutcome::Unsupported]);
    prop_oneof![
        8 => (cause(), 0..1000_u64).prop_map(|(cause, events)| Event::Stale(cause, events)),
        2 => any::<bool>().prop_map(Event::Gone),
        1 => any::<bool>().prop_map(Event::Hung),
        1 => any::<bool>().prop_map(Event::Full),
        1 => prop::sample::select(vec![Root::Present, Root::Bare, Root::Missing]).prop_map(Event::Root),
        1 => any::<bool>().prop_map(Event::Obeys),
        1 => any::<bool>().prop_map(Event::Answers),
        1 => outcome.prop_map(Event::Handles),
        1 => (1024..100_000_u64).prop_map(Event::HardLimit),
        1 => prop::sample::select(vec![Content::Immutable, Content::Exclusive, Content::Shared]).prop_map(Event::Content),
        1 => prop::sample::select(vec![Never, Prefer, Mandatory]).prop_map(Event::DeclaredHandles),
        1 => prop::option::of(1024..100_000_u64).prop_map(Event::DeclaredFiles),
        1 => prop::sample::select(vec![CachePolicy::Never, CachePolicy::Auto]).prop_map(Event::DeclaredCache),
        1 => prop::sample::select(vec![Mode::Heal, Mode::Heal, Mode::Report]).prop_map(Event::Mode),
        1 => Just(Event::Broker),
        1 => Just(Event::VmCame),
        1 => Just(Event::VmLeft),
        1 => Just(Event::Engine),
        1 => Just(Event::Backwards),
    ]
}

fn happen(host: &mut Host, event: Event) {
    match event {
        Event::Stale(cause, events) => host.events(cause, events),
        Event::Gone(gone) => host.vms.iter_mut().for_each(|vm| vm.gone = gone),
        Event::Hung(hung) => host.vms.iter_mut().for_each(|vm| vm.hung = hung),
        Event::Full(full) => host.vms.iter_mut().for_each(|vm| vm.full = full),
        Event::Root(root) => host.root = root,
        Event::Obeys(obeys) => host.obeys = obeys,
        Event::Answers(answers) => host.answers = answers,
        Event::Handles(outcome) => host.handles = outcome,
        Event::HardLimit(limit) => host.hard_limit = limit,
        Event::Content(content) => host.content = content,
        Event::DeclaredHandles(handles) => host.declared.inode_file_handles = handles,
        Event::DeclaredFiles(files) => host.declared.open_files = files,
        Event::DeclaredCache(cache) => host.declared.cache = cache,
        Event::Mode(mode) => host.policy.mode = mode,
        Event::Broker => (host.broker, host.counts) = (host.broker + 1, Default::default()),
        Event::VmCame => {
            let id = format!("a-{}", host.now.millis());
            let engine = host.declared.clone();
            host.vms.push(Vm { id, generation: 1, engine, gone: false, hung: false, full: false });
        }
        Event::VmLeft => host.vms.truncate(host.vms.len().saturating_sub(1).max(1)),
        // An engine died, and another serves.
        Event::Engine => host.vms.iter_mut().for_each(|vm| vm.generation += 1),
        Event::Backwards => host.now = Moment::from_millis(host.now.millis().saturating_sub(5000)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn budget_single_remedy_and_end_hold_for_any_history(
        (budget, threshold, window) in (1..8_u32, 1..50_u32, 10..600_u64),
        events in prop::collection::vec((event(), 0..400_u64), 1..150),
    ) {
        let mut host = Host::new(policy(threshold, window, budget));
        let longest = Duration::from_secs(window.max(60) + window);
        for (event, seconds) in events {
            happen(&mut host, event);
            let before = host.history.attempt().cloned();
            let decision = host.seconds(seconds);
            let began = decision.transitions.iter().filter(|it| matches!(it, Transition::Started { .. } | Transition::Applying { .. }));
            let ended = decision.transitions.iter().any(|it| matches!(it, Transition::Ended { .. }));
            let began = began.count();
            prop_assert!(began <= 1, "two at once: {:?}", decision.transitions);
            prop_assert!(began == 0 || before.is_none() || ended, "one over another: {:?}", decision.transitions);
            prop_assert!(began == 0 || host.policy.mode == Mode::Heal);
            prop_assert!(host.policy.mode == Mode::Heal || host.history.amended(&host.declared) == host.declared);
            prop_assert!(host.history.amendments().len() <= 4);
            prop_assert!(serde_json::to_string(&host.history).unwrap().len() < 32 << 10);
        }
        for (first, _, _) in &host.started {
            let hour = host.started.iter().filter(|(at, ..)| at >= first && at.since(*first) < BUDGET_SPAN).count();
            prop_assert!(hour <= budget as usize, "{hour} remedies within an hour: {:?}", host.started);
        }
        // Without further events, the current remedy ends.
        host.vms.iter_mut().for_each(|vm| vm.gone = false);
        host.for_seconds(longest.as_secs() + 4);
        prop_assert!(host.history.attempt().is_none(), "{:?}", host.history.attempt());
    }
}
