//! Applies a VMM's request to the record and returns the answer. Pure.

use thiserror::Error;
use virtiofs_contract::engine::{MAX_MEMORY_REGIONS, MAX_QUEUE_SIZE, QUEUES};

use super::{Ring, SessionRecord};
use crate::vhost_user::codec::{Layout, Region, ReplyValue, Request, RingAddress};
use crate::vhost_user::features;

/// The answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// A value.
    Value(ReplyValue),
    /// An acknowledgement, if the VMM requests one, after the engine has the change.
    Acknowledge,
    /// The position at which this ring stopped, after it has stopped.
    Base(usize),
}

/// A request that violates the protocol. It ends the session, as with any other back-end.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum Violation {
    #[error("features {0:#x} were not offered")]
    Features(u64),
    #[error("protocol features {0:#x} were not offered")]
    ProtocolFeatures(u64),
    #[error("there is no ring {0}; there are {QUEUES}")]
    Ring(u32),
    #[error("ring size {0}: a power of two up to {MAX_QUEUE_SIZE} is expected")]
    RingSize(u32),
    #[error("ring position {0} is above 65535")]
    RingBase(u32),
    #[error("ring addresses {0:x?} are not aligned")]
    RingAlignment(RingAddress),
    #[error("memory region {0:x?} is empty or wraps around")]
    Region(Layout),
    #[error("memory region {0:x?} overlaps another one")]
    Overlap(Layout),
    #[error("memory region {0:x?} is not known")]
    NoSuchRegion(Layout),
    #[error("more than {MAX_MEMORY_REGIONS} memory regions")]
    TooManyRegions,
    #[error("the request needs protocol feature {0:#x}, which was not accepted")]
    NotNegotiated(u64),
}

/// Applies a request to the record.
///
/// # Errors
/// The request is invalid and the record unchanged.
pub(crate) fn apply<F: PartialEq>(record: &mut SessionRecord<F>, request: Request<F>) -> Result<Answer, Violation> {
    match request {
        Request::GetFeatures => return Ok(number(features::FEATURES)),
        Request::GetProtocolFeatures => return Ok(number(features::PROTOCOL)),
        Request::GetQueueNum => return Ok(number(QUEUES as u64)),
        Request::GetMaxMemSlots => return Ok(number(MAX_MEMORY_REGIONS as u64)),
        Request::GetVringBase { ring } => return stop(record, ring),
        // The connection owns the session. RESET_OWNER is deprecated and has no effect.
        Request::SetOwner | Request::ResetOwner => {}
        Request::SetFeatures(features) => set_features(record, features)?,
        Request::SetProtocolFeatures(features) => set_protocol_features(record, features)?,
        Request::SetMemTable(regions) => set_mem_table(record, regions)?,
        Request::AddMemReg(region) => add_region(record, region)?,
        Request::RemMemReg(layout) => remove_region(record, &layout)?,
        Request::SetVringNum { ring, num } => set_size(at(record, ring)?, num)?,
        Request::SetVringAddr { ring, address } => set_address(at(record, ring)?, address)?,
        Request::SetVringBase { ring, base } => set_base(at(record, ring)?, base)?,
        Request::SetVringKick { ring, fd } => set_kick(at(record, ring)?, fd),
        Request::SetVringCall { ring, fd } => at(record, ring)?.call = fd,
        Request::SetVringErr { ring, fd } => at(record, ring)?.err = fd,
        Request::SetVringEnable { ring, enable } => at(record, ring)?.enabled = enable,
        Request::ResetDevice => reset(record)?,
    }
    Ok(Answer::Acknowledge)
}

/// Checks a restored record: the requests of a VMM must be able to lead to it.
pub(crate) fn check<F: Clone + PartialEq>(record: &SessionRecord<F>) -> Result<(), Violation> {
    if record.regions.len() > MAX_MEMORY_REGIONS {
        return Err(Violation::TooManyRegions);
    }
    let mut fresh = SessionRecord::default();
    let mut requests = vec![Request::SetProtocolFeatures(record.protocol_features)];
    requests.extend(record.features.map(Request::SetFeatures));
    requests.push(Request::SetMemTable(record.regions.clone()));
    for (ring, it) in record.rings.iter().enumerate() {
        let ring = ring as u32;
        if it.size != 0 {
            requests.push(Request::SetVringNum { ring, num: u32::from(it.size) });
        }
        requests.extend(it.address.map(|address| Request::SetVringAddr { ring, address }));
    }
    requests.into_iter().try_for_each(|request| apply(&mut fresh, request).map(drop))
}

fn number(value: u64) -> Answer {
    Answer::Value(ReplyValue::U64(value))
}

fn at<F>(record: &mut SessionRecord<F>, ring: u32) -> Result<&mut Ring<F>, Violation> {
    record.rings.get_mut(ring as usize).ok_or(Violation::Ring(ring))
}

fn set_features<F>(record: &mut SessionRecord<F>, features: u64) -> Result<(), Violation> {
    match features & !features::FEATURES {
        0 => record.features = Some(features),
        more => return Err(Violation::Features(more)),
    }
    Ok(())
}

fn set_protocol_features<F>(record: &mut SessionRecord<F>, features: u64) -> Result<(), Violation> {
    match features & !features::PROTOCOL {
        0 => record.protocol_features = features,
        more => return Err(Violation::ProtocolFeatures(more)),
    }
    Ok(())
}

fn needs<F>(record: &SessionRecord<F>, feature: u64) -> Result<(), Violation> {
    if record.protocol_features & feature != 0 { Ok(()) } else { Err(Violation::NotNegotiated(feature)) }
}

fn set_mem_table<F>(record: &mut SessionRecord<F>, regions: Vec<Region<F>>) -> Result<(), Violation> {
    for (index, region) in regions.iter().enumerate() {
        check_region(&region.layout, &regions[..index])?;
    }
    record.regions = regions;
    Ok(())
}

fn add_region<F>(record: &mut SessionRecord<F>, region: Region<F>) -> Result<(), Violation> {
    needs(record, features::CONFIGURE_MEM_SLOTS)?;
    if record.regions.len() >= MAX_MEMORY_REGIONS {
        return Err(Violation::TooManyRegions);
    }
    check_region(&region.layout, &record.regions)?;
    record.regions.push(region);
    Ok(())
}

/// Ignores the offset: QEMU does not send it.
fn remove_region<F>(record: &mut SessionRecord<F>, layout: &Layout) -> Result<(), Violation> {
    needs(record, features::CONFIGURE_MEM_SLOTS)?;
    let same = |region: &Region<F>| {
        let known = &region.layout;
        (known.guest_addr, known.user_addr, known.size) == (layout.guest_addr, layout.user_addr, layout.size)
    };
    let index = record.regions.iter().position(same).ok_or(Violation::NoSuchRegion(*layout))?;
    record.regions.remove(index);
    Ok(())
}

fn check_region<F>(layout: &Layout, others: &[Region<F>]) -> Result<(), Violation> {
    let ends = [layout.guest_addr, layout.user_addr, layout.offset].map(|start| start.checked_add(layout.size));
    if layout.size == 0 || ends.contains(&None) {
        return Err(Violation::Region(*layout));
    }
    let overlaps = |a: u64, b: u64, len: u64| a < b.saturating_add(len) && b < a.saturating_add(layout.size);
    let clash = others.iter().map(|other| &other.layout).any(|other| {
        overlaps(layout.guest_addr, other.guest_addr, other.size)
            || overlaps(layout.user_addr, other.user_addr, other.size)
    });
    if clash { Err(Violation::Overlap(*layout)) } else { Ok(()) }
}

/// A ring whose layout changes while it runs is stopped until SET_VRING_KICK: after a reboot of the guest,
/// cloud-hypervisor sets rings up again without stopping them.
fn set_size<F>(ring: &mut Ring<F>, size: u32) -> Result<(), Violation> {
    let valid = u16::try_from(size).ok().filter(|size| size.is_power_of_two() && *size <= MAX_QUEUE_SIZE);
    let size = valid.ok_or(Violation::RingSize(size))?;
    ring.started &= ring.size == size;
    ring.size = size;
    Ok(())
}

fn set_address<F>(ring: &mut Ring<F>, address: RingAddress) -> Result<(), Violation> {
    let aligned =
        address.descriptors.is_multiple_of(16) && address.used.is_multiple_of(4) && address.available.is_multiple_of(2);
    if !aligned {
        return Err(Violation::RingAlignment(address));
    }
    ring.started &= ring.address == Some(address);
    ring.address = Some(address);
    Ok(())
}

fn set_base<F>(ring: &mut Ring<F>, base: u32) -> Result<(), Violation> {
    ring.base = u16::try_from(base).map_err(|_| Violation::RingBase(base))?;
    ring.started = false;
    ring.served = false;
    Ok(())
}

fn set_kick<F>(ring: &mut Ring<F>, kick: Option<F>) {
    ring.started = kick.is_some();
    ring.kick = kick;
}

fn stop<F>(record: &mut SessionRecord<F>, ring: u32) -> Result<Answer, Violation> {
    let it = at(record, ring)?;
    it.started = false;
    it.kick = None;
    Ok(Answer::Base(ring as usize))
}

/// Resets rings and device; memory, protocol features and the connection stay.
fn reset<F>(record: &mut SessionRecord<F>) -> Result<(), Violation> {
    needs(record, features::RESET_DEVICE)?;
    for ring in &mut record.rings {
        let (call, err) = (ring.call.take(), ring.err.take());
        *ring = Ring { call, err, ..Ring::default() };
    }
    record.features = None;
    record.reset_owed = true;
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn negotiated() -> SessionRecord<u32> {
        let mut record = SessionRecord::default();
        apply(&mut record, Request::SetProtocolFeatures(features::PROTOCOL)).unwrap();
        apply(&mut record, Request::SetFeatures(features::FEATURES)).unwrap();
        record
    }

    #[test]
    fn restored_record_is_checked_as_requests_are() {
        let mut record = negotiated();
        apply(&mut record, Request::SetMemTable(vec![region(0, 4096), region(8192, 4096)])).unwrap();
        apply(&mut record, Request::SetVringNum { ring: 1, num: 128 }).unwrap();
        assert_eq!(check(&record), Ok(()));
        let spoiled = |spoil: &dyn Fn(&mut SessionRecord<u32>)| {
            let mut record = record.clone();
            spoil(&mut record);
            check(&record)
        };
        assert_eq!(spoiled(&|record| record.features = Some(1)), Err(Violation::Features(1)));
        assert_eq!(spoiled(&|record| record.rings[0].size = 3), Err(Violation::RingSize(3)));
        let again = |record: &mut SessionRecord<u32>| record.regions.push(region(4095, 4096));
        assert!(matches!(spoiled(&again), Err(Violation::Overlap(_))));
        let many = |record: &mut SessionRecord<u32>| {
            record.regions = (0..=MAX_MEMORY_REGIONS as u64).map(|at| region(at << 20, 4096)).collect();
        };
        assert_eq!(spoiled(&many), Err(Violation::TooManyRegions));
    }

    fn layout(guest_addr: u64, size: u64) -> Layout {
        Layout { guest_addr, size, user_addr: guest_addr + (1 << 40), offset: 0 }
    }

    fn region(guest_addr: u64, size: u64) -> Region<u32> {
        Region { layout: layout(guest_addr, size), file: 9 }
    }

    fn address(start: u64) -> RingAddress {
        RingAddress { descriptors: start, used: start + 0x1000, available: start + 0x2000 }
    }

    #[test]
    fn queries_are_answered_from_the_offered_features() {
        let mut record = SessionRecord::<u32>::default();
        let table = [
            (Request::GetFeatures, features::FEATURES),
            (Request::GetProtocolFeatures, features::PROTOCOL),
            (Request::GetQueueNum, QUEUES as u64),
            (Request::GetMaxMemSlots, MAX_MEMORY_REGIONS as u64),
        ];
        for (request, value) in table {
            assert_eq!(apply(&mut record, request), Ok(number(value)));
        }
        assert_eq!(record, SessionRecord::default());
    }

    #[test]
    fn features_not_offered_are_refused() {
        let mut record = SessionRecord::<u32>::default();
        let log_all = 1 << 26;
        let device_state = 1 << 19;
        let table = [
            (Request::SetFeatures(features::VERSION_1 | log_all), Violation::Features(log_all)),
            (Request::SetProtocolFeatures(device_state), Violation::ProtocolFeatures(device_state)),
            (Request::AddMemReg(region(0, 1)), Violation::NotNegotiated(features::CONFIGURE_MEM_SLOTS)),
            (Request::RemMemReg(layout(0, 1)), Violation::NotNegotiated(features::CONFIGURE_MEM_SLOTS)),
            (Request::ResetDevice, Violation::NotNegotiated(features::RESET_DEVICE)),
        ];
        for (request, violation) in table {
            assert_eq!(apply(&mut record, request), Err(violation));
        }
        assert_eq!(record, SessionRecord::default());
    }

    #[test]
    fn invalid_rings_are_refused() {
        let ring = QUEUES as u32;
        let table = [
            (Request::SetVringNum { ring, num: 128 }, Violation::Ring(ring)),
            (Request::GetVringBase { ring: 255 }, Violation::Ring(255)),
            (Request::SetVringNum { ring: 0, num: 0 }, Violation::RingSize(0)),
            (Request::SetVringNum { ring: 0, num: 100 }, Violation::RingSize(100)),
            (Request::SetVringNum { ring: 0, num: 65536 }, Violation::RingSize(65536)),
            (Request::SetVringBase { ring: 0, base: 65536 }, Violation::RingBase(65536)),
            (Request::SetVringAddr { ring: 0, address: address(8) }, Violation::RingAlignment(address(8))),
        ];
        for (request, violation) in table {
            assert_eq!(apply(&mut negotiated(), request), Err(violation));
        }
    }

    #[test]
    fn invalid_memory_is_refused() {
        let wraps = Region { layout: Layout { offset: u64::MAX, ..layout(0, 2) }, file: 1 };
        let table = [
            (vec![region(0, 0)], Violation::Region(layout(0, 0))),
            (vec![wraps.clone()], Violation::Region(wraps.layout)),
            (vec![region(0, 10), region(9, 1)], Violation::Overlap(layout(9, 1))),
        ];
        for (regions, violation) in table {
            assert_eq!(apply(&mut negotiated(), Request::SetMemTable(regions)), Err(violation));
        }
    }

    #[test]
    fn regions_are_added_and_removed_up_to_the_limit() {
        let mut record = negotiated();
        for index in 0..MAX_MEMORY_REGIONS as u64 {
            apply(&mut record, Request::AddMemReg(region(index << 20, 1 << 20))).unwrap();
        }
        let one_more = Request::AddMemReg(region(1 << 40, 1));
        assert_eq!(apply(&mut record, one_more), Err(Violation::TooManyRegions));
        let without_offset = Layout { offset: 77, ..layout(3 << 20, 1 << 20) };
        apply(&mut record, Request::RemMemReg(without_offset)).unwrap();
        assert_eq!(record.regions.len(), MAX_MEMORY_REGIONS - 1);
        assert_eq!(
            apply(&mut record, Request::RemMemReg(layout(3 << 20, 1 << 20))),
            Err(Violation::NoSuchRegion(layout(3 << 20, 1 << 20)))
        );
    }

    fn running() -> SessionRecord<u32> {
        let mut record = negotiated();
        let start = 1 << 40;
        for request in [
            Request::SetMemTable(vec![region(0, 1 << 20)]),
            Request::SetVringNum { ring: 1, num: 128 },
            Request::SetVringBase { ring: 1, base: 5 },
            Request::SetVringAddr { ring: 1, address: address(start) },
            Request::SetVringKick { ring: 1, fd: Some(3) },
            Request::SetVringEnable { ring: 1, enable: true },
        ] {
            assert_eq!(apply(&mut record, request), Ok(Answer::Acknowledge));
        }
        record
    }

    #[test]
    fn ring_is_servable_from_kick_to_stop() {
        let mut record = running();
        assert!(record.servable(1) && record.enabled(1));
        assert!(!record.servable(0));
        assert_eq!(apply(&mut record, Request::GetVringBase { ring: 1 }), Ok(Answer::Base(1)));
        assert!(!record.servable(1));
        assert_eq!(record.rings[1].base, 5);
    }

    #[test]
    fn ring_that_is_set_up_again_waits_for_its_kick() {
        let unchanged =
            [Request::SetVringNum { ring: 1, num: 128 }, Request::SetVringAddr { ring: 1, address: address(1 << 40) }];
        for request in unchanged {
            let mut record = running();
            apply(&mut record, request).unwrap();
            assert!(record.servable(1));
        }
        let changed = [
            Request::SetVringNum { ring: 1, num: 64 },
            Request::SetVringAddr { ring: 1, address: address((1 << 40) + 0x4000) },
            Request::SetVringBase { ring: 1, base: 5 },
            Request::SetVringKick { ring: 1, fd: None },
        ];
        for request in changed {
            let mut record = running();
            apply(&mut record, request).unwrap();
            assert!(!record.servable(1));
            apply(&mut record, Request::SetVringKick { ring: 1, fd: Some(4) }).unwrap();
            assert!(record.servable(1));
        }
    }

    #[test]
    fn ring_outside_of_guest_memory_is_not_servable() {
        let mut record = running();
        apply(&mut record, Request::SetMemTable(vec![region(0, 0x1000)])).unwrap();
        assert!(!record.servable(1));
    }

    #[test]
    fn rings_are_enabled_without_protocol_features() {
        let mut record = SessionRecord::<u32>::default();
        apply(&mut record, Request::SetFeatures(features::VERSION_1)).unwrap();
        assert!(record.enabled(0));
        apply(&mut record, Request::SetFeatures(features::VERSION_1 | features::PROTOCOL_FEATURES)).unwrap();
        assert!(!record.enabled(0));
    }

    #[test]
    fn reset_keeps_memory_and_is_owed_to_the_engine() {
        let mut record = running();
        apply(&mut record, Request::ResetDevice).unwrap();
        assert!(record.reset_owed && record.features.is_none() && !record.regions.is_empty());
        assert!(record.rings.iter().all(|ring| !ring.started && !ring.enabled && ring.address.is_none()));
    }

    proptest! {
        #[test]
        fn regions_never_overlap_whatever_is_asked(
            steps in proptest::collection::vec((any::<bool>(), 0..16u64, 0..4u64), 0..64),
        ) {
            let mut record = negotiated();
            for (add, start, size) in steps {
                let request =
                    if add { Request::AddMemReg(region(start, size)) } else { Request::RemMemReg(layout(start, size)) };
                let _ = apply(&mut record, request);
                for (index, one) in record.regions.iter().enumerate() {
                    prop_assert!(check_region(&one.layout, &record.regions[..index]).is_ok());
                }
            }
        }
    }
}
