//! What an engine must be told so that it is in line with the record. Pure.
//!
//! First start, a VMM's change, hand-over and recovery are the same question: what has this engine been
//! told, and what does the record say? A new engine has been told nothing.

use virtiofs_contract::engine::QUEUES;

use super::{Ring, SessionRecord};
use crate::vhost_user::codec::{Region, RingAddress};

/// What one engine has been told so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Told<F> {
    introduced: bool,
    features: Option<u64>,
    regions: Vec<Region<F>>,
    rings: [ToldRing<F>; QUEUES],
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct ToldRing<F> {
    running: Option<RingStart<F>>,
    enabled: bool,
}

impl<F> Default for Told<F> {
    fn default() -> Self {
        Told { introduced: false, features: None, regions: Vec::new(), rings: Default::default() }
    }
}

impl<F> Default for ToldRing<F> {
    fn default() -> Self {
        ToldRing { running: None, enabled: false }
    }
}

/// Everything about a ring that an engine needs to serve it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RingStart<F> {
    pub(crate) size: u16,
    pub(crate) address: RingAddress,
    pub(crate) kick: F,
    pub(crate) call: Option<F>,
    pub(crate) err: Option<F>,
}

/// An event descriptor that may change while its ring runs. The kick is not one: an engine's poller keeps
/// the one it began with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RingEvent {
    Call,
    Err,
}

/// One thing to tell an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step<F> {
    /// Ownership and protocol features.
    Introduce,
    /// Stop a ring at a request boundary; its position is asked for.
    Stop(usize),
    /// Reset the device.
    Reset,
    /// Device features.
    Features(u64),
    /// All of guest memory.
    Memory(Vec<Region<F>>),
    /// One region more.
    AddRegion(Region<F>),
    /// One region less.
    RemoveRegion(Region<F>),
    /// Another event descriptor for a running ring.
    Event { ring: usize, event: RingEvent, fd: Option<F> },
    /// Set a ring up, ADDR as late as here: the engine reads the used index at that moment.
    Start { ring: usize, start: RingStart<F> },
    /// Let a ring be served, or not.
    Enable { ring: usize, enable: bool },
}

/// What to tell an engine next, in order.
pub(crate) fn plan<F: Clone + PartialEq>(told: &Told<F>, record: &SessionRecord<F>) -> Vec<Step<F>> {
    let mut steps = Vec::new();
    if !told.introduced {
        steps.push(Step::Introduce);
    }
    stop_rings(told, record, &mut steps);
    if record.reset_owed {
        steps.push(Step::Reset);
    }
    if let Some(features) = record.features.filter(|features| record.reset_owed || told.features != Some(*features)) {
        steps.push(Step::Features(features));
    }
    change_memory(&told.regions, &record.regions, &mut steps);
    start_rings(told, record, &mut steps);
    steps
}

/// Can a new engine be told this while another one still serves the rings?
pub(crate) fn is_before_rings<F>(step: &Step<F>) -> bool {
    matches!(step, Step::Introduce | Step::Features(_) | Step::Memory(_) | Step::AddRegion(_) | Step::RemoveRegion(_))
}

/// May an engine that serves have heard the guest's kick in vain just before? With other memory or another
/// position it finds something else in the ring.
pub(crate) fn may_cost_a_kick<F>(step: &Step<F>) -> bool {
    matches!(step, Step::Memory(_) | Step::AddRegion(_) | Step::RemoveRegion(_) | Step::Start { .. })
}

fn wanted<F: Clone>(record: &SessionRecord<F>, ring: usize) -> Option<RingStart<F>> {
    let Ring { size, address, kick, call, err, .. } = &record.rings[ring];
    if !record.servable(ring) {
        return None;
    }
    Some(RingStart { size: *size, address: (*address)?, kick: kick.clone()?, call: call.clone(), err: err.clone() })
}

/// Is the ring still the one that runs, apart from what may change while it does?
fn same_ring<F: PartialEq>(running: &RingStart<F>, wanted: &RingStart<F>) -> bool {
    running.size == wanted.size && running.address == wanted.address && running.kick == wanted.kick
}

fn goes_on<F: Clone + PartialEq>(told: &ToldRing<F>, record: &SessionRecord<F>, ring: usize) -> bool {
    match (&told.running, wanted(record, ring)) {
        (Some(running), Some(wanted)) => same_ring(running, &wanted),
        _ => false,
    }
}

fn stop_rings<F: Clone + PartialEq>(told: &Told<F>, record: &SessionRecord<F>, steps: &mut Vec<Step<F>>) {
    for (ring, it) in told.rings.iter().enumerate() {
        if it.running.is_some() && !goes_on(it, record, ring) {
            steps.push(Step::Stop(ring));
        }
    }
}

/// What is replaced is replaced in one step: between a removal and an addition an engine that serves would find
/// rings and buffers gone.
fn change_memory<F: Clone + PartialEq>(told: &[Region<F>], wanted: &[Region<F>], steps: &mut Vec<Step<F>>) {
    let without = |these: &[Region<F>], those: &[Region<F>]| -> Vec<Region<F>> {
        these.iter().filter(|region| !those.contains(region)).cloned().collect()
    };
    let (gone, new) = (without(told, wanted), without(wanted, told));
    if !new.is_empty() && (told.is_empty() || !gone.is_empty()) {
        steps.push(Step::Memory(ascending(wanted)));
        return;
    }
    steps.extend(gone.into_iter().map(Step::RemoveRegion));
    steps.extend(new.into_iter().map(Step::AddRegion));
}

/// An engine takes a whole table in this order only, and a VMM may name its regions in any: memory that is
/// unplugged and plugged in again comes last.
fn ascending<F: Clone>(regions: &[Region<F>]) -> Vec<Region<F>> {
    let mut table = regions.to_vec();
    table.sort_by_key(|region| region.layout.guest_addr);
    table
}

fn start_rings<F: Clone + PartialEq>(told: &Told<F>, record: &SessionRecord<F>, steps: &mut Vec<Step<F>>) {
    let mut enables = Vec::new();
    for (ring, it) in told.rings.iter().enumerate() {
        let Some(wanted) = wanted(record, ring) else { continue };
        let enable = record.enabled(ring);
        match &it.running {
            Some(running) if same_ring(running, &wanted) => {
                change_events(ring, running, &wanted, steps);
                if it.enabled != enable {
                    enables.push(Step::Enable { ring, enable });
                }
            }
            _ => {
                steps.push(Step::Start { ring, start: wanted });
                enables.push(Step::Enable { ring, enable });
            }
        }
    }
    steps.append(&mut enables);
}

fn change_events<F: Clone + PartialEq>(
    ring: usize,
    running: &RingStart<F>,
    wanted: &RingStart<F>,
    steps: &mut Vec<Step<F>>,
) {
    if running.call != wanted.call {
        steps.push(Step::Event { ring, event: RingEvent::Call, fd: wanted.call.clone() });
    }
    if running.err != wanted.err {
        steps.push(Step::Event { ring, event: RingEvent::Err, fd: wanted.err.clone() });
    }
}

impl<F: Clone + PartialEq> Told<F> {
    /// Notes a step that the engine has been told.
    pub(crate) fn note(&mut self, step: &Step<F>) {
        match step {
            Step::Introduce => self.introduced = true,
            Step::Stop(ring) => self.rings[*ring] = ToldRing::default(),
            Step::Reset => {
                self.features = None;
                self.rings = Default::default();
            }
            Step::Features(features) => self.features = Some(*features),
            Step::Memory(regions) => self.regions.clone_from(regions),
            Step::AddRegion(region) => self.regions.push(region.clone()),
            Step::RemoveRegion(region) => self.regions.retain(|known| known != region),
            Step::Event { ring, event, fd } => self.note_event(*ring, *event, fd),
            Step::Start { ring, start } => self.rings[*ring].running = Some(start.clone()),
            Step::Enable { ring, enable } => self.rings[*ring].enabled = *enable,
        }
    }

    fn note_event(&mut self, ring: usize, event: RingEvent, fd: &Option<F>) {
        let Some(running) = &mut self.rings[ring].running else { return };
        match event {
            RingEvent::Call => running.call.clone_from(fd),
            RingEvent::Err => running.err.clone_from(fd),
        }
    }

    /// Rings that the engine has been told to serve.
    pub(crate) fn running(&self) -> impl Iterator<Item = usize> {
        self.rings.iter().enumerate().filter(|(_, ring)| ring.running.is_some()).map(|(index, _)| index)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::transition::apply;
    use super::*;
    use crate::vhost_user::codec::{Layout, Request};
    use crate::vhost_user::offer;

    const MEMORY: u64 = 1 << 40;

    fn region(index: u64) -> Region<u32> {
        let start = index << 20;
        Region {
            layout: Layout { guest_addr: start, size: 1 << 20, user_addr: MEMORY + start, offset: 0 },
            file: 100 + index as u32,
        }
    }

    fn ring_requests(ring: u32) -> Vec<Request<u32>> {
        let start = MEMORY + u64::from(ring) * 0x10000;
        let address = RingAddress { descriptors: start, used: start + 0x8000, available: start + 0x4000 };
        vec![
            Request::SetVringNum { ring, num: 128 },
            Request::SetVringBase { ring, base: 0 },
            Request::SetVringAddr { ring, address },
            Request::SetVringKick { ring, fd: Some(10 + ring) },
            Request::SetVringCall { ring, fd: Some(20 + ring) },
        ]
    }

    fn set_up() -> Vec<Request<u32>> {
        let mut requests = vec![
            Request::SetProtocolFeatures(offer::PROTOCOL),
            Request::SetFeatures(offer::FEATURES),
            Request::SetMemTable(vec![region(0)]),
        ];
        requests.extend((0..2).flat_map(ring_requests));
        requests.extend((0..2).map(|ring| Request::SetVringEnable { ring, enable: true }));
        requests
    }

    fn record_after(requests: Vec<Request<u32>>) -> SessionRecord<u32> {
        let mut record = SessionRecord::default();
        for request in requests {
            apply(&mut record, request).unwrap();
        }
        record
    }

    fn names(steps: &[Step<u32>]) -> Vec<String> {
        let name = |step: &Step<u32>| match step {
            Step::Start { ring, .. } => format!("Start {ring}"),
            Step::Enable { ring, enable } => format!("Enable {ring} {enable}"),
            Step::Event { ring, event, fd } => format!("{event:?} {ring} {fd:?}"),
            Step::Memory(regions) => format!("Memory {}", regions.len()),
            Step::AddRegion(region) => format!("Add {}", region.file),
            Step::RemoveRegion(region) => format!("Remove {}", region.file),
            other => format!("{other:?}").split('(').next().unwrap_or_default().to_owned(),
        };
        steps.iter().map(name).collect()
    }

    fn bring_into_line(told: &mut Told<u32>, record: &mut SessionRecord<u32>) -> Vec<Step<u32>> {
        let steps = plan(told, record);
        for step in &steps {
            told.note(step);
        }
        record.reset_owed = false;
        steps
    }

    #[test]
    fn a_new_engine_is_told_everything_and_enabled_last() {
        let record = record_after(set_up());
        let steps = plan(&Told::default(), &record);
        assert_eq!(
            names(&steps),
            ["Introduce", "Features", "Memory 1", "Start 0", "Start 1", "Enable 0 true", "Enable 1 true"]
        );
        let before = steps.iter().take_while(|step| is_before_rings(step)).count();
        assert_eq!(before, 3);
    }

    #[test]
    fn a_new_engine_is_told_of_memory_in_ascending_order_whatever_order_it_came_in() {
        let mut requests = set_up();
        requests.extend([Request::AddMemReg(region(2)), Request::AddMemReg(region(1))]);
        requests.extend([Request::RemMemReg(region(0).layout), Request::AddMemReg(region(0))]);
        let steps = plan(&Told::default(), &record_after(requests));
        let tables = steps.iter().filter_map(|step| match step {
            Step::Memory(regions) => Some(regions.iter().map(|region| region.file).collect::<Vec<_>>()),
            _ => None,
        });
        assert_eq!(tables.collect::<Vec<_>>(), [[100, 101, 102]]);
    }

    #[test]
    fn a_change_is_told_as_a_change() {
        let stop = Request::GetVringBase { ring: 1 };
        let call = Request::SetVringCall { ring: 0, fd: Some(30) };
        let grown = Region { layout: Layout { size: 2 << 20, ..region(0).layout }, file: 7 };
        let table: [(Vec<Request<u32>>, &[&str]); 9] = [
            (vec![call.clone()], &["Call 0 Some(30)"]),
            (vec![Request::SetVringKick { ring: 0, fd: Some(31) }], &["Stop", "Start 0", "Enable 0 true"]),
            (vec![stop.clone()], &["Stop"]),
            (vec![Request::AddMemReg(region(1))], &["Add 101"]),
            (vec![Request::SetMemTable(vec![region(0), region(2)])], &["Add 102"]),
            (vec![Request::SetMemTable(vec![grown])], &["Memory 1"]),
            (vec![Request::SetMemTable(vec![])], &["Stop", "Stop", "Remove 100"]),
            (vec![Request::SetVringEnable { ring: 1, enable: false }], &["Enable 1 false"]),
            (vec![call, stop], &["Stop", "Call 0 Some(30)"]),
        ];
        for (requests, expected) in table {
            let mut record = record_after(set_up());
            let mut told = Told::default();
            bring_into_line(&mut told, &mut record);
            for request in requests {
                apply(&mut record, request).unwrap();
            }
            assert_eq!(names(&plan(&told, &record)), expected);
        }
    }

    #[test]
    fn rings_are_stopped_before_the_device_is_reset() {
        let mut record = record_after(set_up());
        let mut told = Told::default();
        bring_into_line(&mut told, &mut record);
        apply(&mut record, Request::ResetDevice).unwrap();
        assert_eq!(names(&bring_into_line(&mut told, &mut record)), ["Stop", "Stop", "Reset"]);
        assert_eq!(plan(&told, &record), []);
    }

    #[test]
    fn a_stopped_ring_starts_again() {
        let mut record = record_after(set_up());
        let mut told = Told::default();
        bring_into_line(&mut told, &mut record);
        apply(&mut record, Request::GetVringBase { ring: 1 }).unwrap();
        bring_into_line(&mut told, &mut record);
        assert_eq!(told.running().collect::<Vec<_>>(), [0]);
        for request in ring_requests(1) {
            apply(&mut record, request).unwrap();
        }
        assert_eq!(names(&plan(&told, &record)), ["Start 1", "Enable 1 true"]);
    }

    fn any_request() -> impl Strategy<Value = Request<u32>> {
        let ring = 0..2u32;
        prop_oneof![
            Just(Request::SetFeatures(offer::FEATURES)),
            Just(Request::SetFeatures(offer::VERSION_1)),
            Just(Request::ResetDevice),
            ring.clone().prop_map(|ring| Request::GetVringBase { ring }),
            (ring.clone(), any::<bool>()).prop_map(|(ring, enable)| Request::SetVringEnable { ring, enable }),
            (ring.clone(), 6..9u32).prop_map(|(ring, log)| Request::SetVringNum { ring, num: 1 << log }),
            (ring.clone(), 0..3u32).prop_map(|(ring, base)| Request::SetVringBase { ring, base }),
            (ring.clone(), proptest::option::of(40..50u32)).prop_map(|(ring, fd)| Request::SetVringKick { ring, fd }),
            (ring.clone(), proptest::option::of(50..60u32)).prop_map(|(ring, fd)| Request::SetVringCall { ring, fd }),
            (0..4u64).prop_map(|index| Request::AddMemReg(region(index))),
            (0..4u64).prop_map(|index| Request::RemMemReg(region(index).layout)),
            (0..2u32, 0..5usize).prop_map(|(ring, index)| ring_requests(ring).remove(index)),
        ]
    }

    proptest! {
        /// An engine that followed every change is where an engine is that is told only the end.
        #[test]
        fn following_and_starting_late_lead_to_the_same(requests in proptest::collection::vec(any_request(), 0..80)) {
            let mut record = record_after(set_up());
            let mut follower = Told::default();
            bring_into_line(&mut follower, &mut record);
            for request in requests {
                let _ = apply(&mut record, request);
                bring_into_line(&mut follower, &mut record);
                prop_assert_eq!(plan(&follower, &record), []);
            }
            let mut late = Told::default();
            bring_into_line(&mut late, &mut record);
            prop_assert_eq!(&late.rings, &follower.rings);
            prop_assert_eq!(late.regions.len(), follower.regions.len());
            prop_assert!(late.regions.iter().all(|region| follower.regions.contains(region)));
        }
    }
}
