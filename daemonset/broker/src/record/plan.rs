//! Plans the messages that bring an engine in sync with the record. Pure.
//!
//! First start, a change by the VMM, hand-over and recovery are the same computation: the difference between the state
//! that was sent to this engine and the record. Nothing was sent to a new engine.

use serde::{Deserialize, Serialize};
use virtiofs_contract::engine::QUEUES;

use super::{Ring, SessionRecord};
use crate::vhost_user::codec::{Region, RingAddress};

/// The state that was sent to one engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SentState<F> {
    negotiated: bool,
    features: Option<u64>,
    regions: Vec<Region<F>>,
    rings: [SentRing<F>; QUEUES],
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SentRing<F> {
    running: Option<RingStart<F>>,
    enabled: bool,
}

impl<F> Default for SentState<F> {
    fn default() -> Self {
        SentState { negotiated: false, features: None, regions: Vec::new(), rings: Default::default() }
    }
}

impl<F> Default for SentRing<F> {
    fn default() -> Self {
        SentRing { running: None, enabled: false }
    }
}

#[cfg(test)]
impl SentState<u32> {
    /// The state of an engine that serves one ring.
    pub(crate) fn sample() -> Self {
        let layout = crate::vhost_user::codec::Layout { guest_addr: 1, size: 2, user_addr: 3, offset: 4 };
        let address = RingAddress { descriptors: 5, used: 6, available: 7 };
        let running = Some(RingStart { size: 8, address, kick: 2, call: Some(3), err: Some(4) });
        let rings = [SentRing { running, enabled: true }, SentRing::default()];
        SentState { negotiated: true, features: Some(9), regions: vec![Region { layout, file: 1 }], rings }
    }
}

/// Everything about a ring that an engine needs to serve it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

/// One message, or one sequence of messages, to an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step<F> {
    /// Set the owner and negotiate protocol features.
    Negotiate,
    /// Stop a ring at a request boundary and get its position.
    Stop(usize),
    /// Reset the device.
    Reset,
    /// Device features.
    Features(u64),
    /// Set all memory regions.
    Memory(Vec<Region<F>>),
    /// Add a memory region.
    AddRegion(Region<F>),
    /// Remove a memory region.
    RemoveRegion(Region<F>),
    /// Set another event descriptor of a running ring.
    Event { ring: usize, event: RingEvent, fd: Option<F> },
    /// Set a ring up. ADDR must not be sent earlier, because the engine reads the used index at that moment.
    Start { ring: usize, start: RingStart<F> },
    /// Enable or disable a ring.
    Enable { ring: usize, enable: bool },
}

/// The steps that bring an engine in sync, in order.
pub(crate) fn plan<F: Clone + PartialEq>(sent: &SentState<F>, record: &SessionRecord<F>) -> Vec<Step<F>> {
    let mut steps = Vec::new();
    if !sent.negotiated {
        steps.push(Step::Negotiate);
    }
    stop_rings(sent, record, &mut steps);
    if record.reset_owed {
        steps.push(Step::Reset);
    }
    if let Some(features) = record.features.filter(|features| record.reset_owed || sent.features != Some(*features)) {
        steps.push(Step::Features(features));
    }
    change_memory(&sent.regions, &record.regions, &mut steps);
    start_rings(sent, record, &mut steps);
    steps
}

/// True if a standby engine can take this step while another engine serves the rings.
pub(crate) fn is_before_rings<F>(step: &Step<F>) -> bool {
    matches!(step, Step::Negotiate | Step::Features(_) | Step::Memory(_) | Step::AddRegion(_) | Step::RemoveRegion(_))
}

/// True if the engine may have consumed a kick without serving it: with other memory or another position it finds
/// other requests in the ring.
pub(crate) fn may_lose_a_kick<F>(step: &Step<F>) -> bool {
    matches!(step, Step::Memory(_) | Step::AddRegion(_) | Step::RemoveRegion(_) | Step::Start { .. })
}

fn desired<F: Clone>(record: &SessionRecord<F>, ring: usize) -> Option<RingStart<F>> {
    let Ring { size, address, kick, call, err, .. } = &record.rings[ring];
    if !record.servable(ring) {
        return None;
    }
    Some(RingStart { size: *size, address: (*address)?, kick: kick.clone()?, call: call.clone(), err: err.clone() })
}

/// True if the running ring differs only in what may change while it runs.
fn same_ring<F: PartialEq>(running: &RingStart<F>, desired: &RingStart<F>) -> bool {
    running.size == desired.size && running.address == desired.address && running.kick == desired.kick
}

fn continues<F: Clone + PartialEq>(sent: &SentRing<F>, record: &SessionRecord<F>, ring: usize) -> bool {
    match (&sent.running, desired(record, ring)) {
        (Some(running), Some(desired)) => same_ring(running, &desired),
        _ => false,
    }
}

fn stop_rings<F: Clone + PartialEq>(sent: &SentState<F>, record: &SessionRecord<F>, steps: &mut Vec<Step<F>>) {
    for (ring, it) in sent.rings.iter().enumerate() {
        if it.running.is_some() && !continues(it, record, ring) {
            steps.push(Step::Stop(ring));
        }
    }
}

/// A replaced region is replaced in one step: between a removal and an addition, rings and buffers would be missing in a
/// serving engine.
fn change_memory<F: Clone + PartialEq>(sent: &[Region<F>], desired: &[Region<F>], steps: &mut Vec<Step<F>>) {
    let without = |these: &[Region<F>], those: &[Region<F>]| -> Vec<Region<F>> {
        these.iter().filter(|region| !those.contains(region)).cloned().collect()
    };
    let (gone, new) = (without(sent, desired), without(desired, sent));
    if !new.is_empty() && (sent.is_empty() || !gone.is_empty()) {
        steps.push(Step::Memory(ascending(desired)));
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

fn start_rings<F: Clone + PartialEq>(sent: &SentState<F>, record: &SessionRecord<F>, steps: &mut Vec<Step<F>>) {
    let mut enables = Vec::new();
    for (ring, it) in sent.rings.iter().enumerate() {
        let Some(desired) = desired(record, ring) else { continue };
        let enable = record.enabled(ring);
        match &it.running {
            Some(running) if same_ring(running, &desired) => {
                change_events(ring, running, &desired, steps);
                if it.enabled != enable {
                    enables.push(Step::Enable { ring, enable });
                }
            }
            _ => {
                steps.push(Step::Start { ring, start: desired });
                enables.push(Step::Enable { ring, enable });
            }
        }
    }
    steps.append(&mut enables);
}

fn change_events<F: Clone + PartialEq>(
    ring: usize,
    running: &RingStart<F>,
    desired: &RingStart<F>,
    steps: &mut Vec<Step<F>>,
) {
    if running.call != desired.call {
        steps.push(Step::Event { ring, event: RingEvent::Call, fd: desired.call.clone() });
    }
    if running.err != desired.err {
        steps.push(Step::Event { ring, event: RingEvent::Err, fd: desired.err.clone() });
    }
}

impl<F> SentState<F> {
    /// Maps each file descriptor.
    pub(crate) fn try_map<G, E>(&self, mut map: impl FnMut(&F) -> Result<G, E>) -> Result<SentState<G>, E> {
        let mut regions = Vec::with_capacity(self.regions.len());
        for region in &self.regions {
            regions.push(Region { layout: region.layout, file: map(&region.file)? });
        }
        let mut rings: [SentRing<G>; QUEUES] = Default::default();
        for (target, ring) in rings.iter_mut().zip(&self.rings) {
            let running = ring.running.as_ref().map(|running| running.try_map(&mut map)).transpose()?;
            *target = SentRing { running, enabled: ring.enabled };
        }
        Ok(SentState { negotiated: self.negotiated, features: self.features, regions, rings })
    }
}

impl<F> RingStart<F> {
    fn try_map<G, E>(&self, map: &mut impl FnMut(&F) -> Result<G, E>) -> Result<RingStart<G>, E> {
        Ok(RingStart {
            size: self.size,
            address: self.address,
            kick: map(&self.kick)?,
            call: self.call.as_ref().map(&mut *map).transpose()?,
            err: self.err.as_ref().map(&mut *map).transpose()?,
        })
    }
}

impl<F: Clone + PartialEq> SentState<F> {
    /// Records that a step was sent.
    pub(crate) fn record(&mut self, step: &Step<F>) {
        match step {
            Step::Negotiate => self.negotiated = true,
            Step::Stop(ring) => self.rings[*ring] = SentRing::default(),
            Step::Reset => {
                self.features = None;
                self.rings = Default::default();
            }
            Step::Features(features) => self.features = Some(*features),
            Step::Memory(regions) => self.regions.clone_from(regions),
            Step::AddRegion(region) => self.regions.push(region.clone()),
            Step::RemoveRegion(region) => self.regions.retain(|known| known != region),
            Step::Event { ring, event, fd } => self.record_event(*ring, *event, fd),
            Step::Start { ring, start } => self.rings[*ring].running = Some(start.clone()),
            Step::Enable { ring, enable } => self.rings[*ring].enabled = *enable,
        }
    }

    fn record_event(&mut self, ring: usize, event: RingEvent, fd: &Option<F>) {
        let Some(running) = &mut self.rings[ring].running else { return };
        match event {
            RingEvent::Call => running.call.clone_from(fd),
            RingEvent::Err => running.err.clone_from(fd),
        }
    }

    /// Rings that were started on the engine.
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
    use crate::vhost_user::features;

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
            Request::SetProtocolFeatures(features::PROTOCOL),
            Request::SetFeatures(features::FEATURES),
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

    fn sync(sent: &mut SentState<u32>, record: &mut SessionRecord<u32>) -> Vec<Step<u32>> {
        let steps = plan(sent, record);
        for step in &steps {
            sent.record(step);
        }
        record.reset_owed = false;
        steps
    }

    #[test]
    fn new_engine_gets_everything_and_is_enabled_last() {
        let record = record_after(set_up());
        let steps = plan(&SentState::default(), &record);
        assert_eq!(
            names(&steps),
            ["Negotiate", "Features", "Memory 1", "Start 0", "Start 1", "Enable 0 true", "Enable 1 true"]
        );
        let before = steps.iter().take_while(|step| is_before_rings(step)).count();
        assert_eq!(before, 3);
    }

    #[test]
    fn new_engine_gets_memory_in_ascending_order() {
        let mut requests = set_up();
        requests.extend([Request::AddMemReg(region(2)), Request::AddMemReg(region(1))]);
        requests.extend([Request::RemMemReg(region(0).layout), Request::AddMemReg(region(0))]);
        let steps = plan(&SentState::default(), &record_after(requests));
        let tables = steps.iter().filter_map(|step| match step {
            Step::Memory(regions) => Some(regions.iter().map(|region| region.file).collect::<Vec<_>>()),
            _ => None,
        });
        assert_eq!(tables.collect::<Vec<_>>(), [[100, 101, 102]]);
    }

    #[test]
    fn only_changes_are_sent() {
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
            let mut sent = SentState::default();
            sync(&mut sent, &mut record);
            for request in requests {
                apply(&mut record, request).unwrap();
            }
            assert_eq!(names(&plan(&sent, &record)), expected);
        }
    }

    #[test]
    fn rings_stop_before_a_reset() {
        let mut record = record_after(set_up());
        let mut sent = SentState::default();
        sync(&mut sent, &mut record);
        apply(&mut record, Request::ResetDevice).unwrap();
        assert_eq!(names(&sync(&mut sent, &mut record)), ["Stop", "Stop", "Reset"]);
        assert_eq!(plan(&sent, &record), []);
    }

    #[test]
    fn stopped_ring_starts_again() {
        let mut record = record_after(set_up());
        let mut sent = SentState::default();
        sync(&mut sent, &mut record);
        apply(&mut record, Request::GetVringBase { ring: 1 }).unwrap();
        sync(&mut sent, &mut record);
        assert_eq!(sent.running().collect::<Vec<_>>(), [0]);
        for request in ring_requests(1) {
            apply(&mut record, request).unwrap();
        }
        assert_eq!(names(&plan(&sent, &record)), ["Start 1", "Enable 1 true"]);
    }

    fn any_request() -> impl Strategy<Value = Request<u32>> {
        let ring = 0..2u32;
        prop_oneof![
            Just(Request::SetFeatures(features::FEATURES)),
            Just(Request::SetFeatures(features::VERSION_1)),
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
        /// An engine that followed every change is where an engine is that is sent only the end.
        #[test]
        fn incremental_and_full_sync_agree(requests in proptest::collection::vec(any_request(), 0..80)) {
            let mut record = record_after(set_up());
            let mut follower = SentState::default();
            sync(&mut follower, &mut record);
            for request in requests {
                let _ = apply(&mut record, request);
                sync(&mut follower, &mut record);
                prop_assert_eq!(plan(&follower, &record), []);
            }
            let mut late = SentState::default();
            sync(&mut late, &mut record);
            prop_assert_eq!(&late.rings, &follower.rings);
            prop_assert_eq!(late.regions.len(), follower.regions.len());
            prop_assert!(late.regions.iter().all(|region| follower.regions.contains(region)));
        }
    }
}
