//! The vhost-user state that a VMM has set up. It is authoritative; engines are kept in sync with it.
//!
//! | module | |
//! |---|---|
//! | this one | the record as plain data |
//! | [`transition`] | a VMM's request -> change of the record, reply |
//! | [`plan`] | state sent to an engine, record -> messages that the engine still needs |
//! | [`store`], [`journal`] | what the next broker needs to know, and when it is written |
//!
//! All of it is generic over `F`, the type of a file descriptor: an open file in a session, a number in the stored record
//! and in tests.

#[cfg(test)]
mod fuzz;
pub(crate) mod journal;
pub(crate) mod plan;
pub(crate) mod store;
pub(crate) mod transition;

use serde::{Deserialize, Serialize};
use virtiofs_contract::engine::QUEUES;

use crate::vhost_user::codec::{Region, Reply, RingAddress};
use crate::vhost_user::features;

/// The device as the VMM has set it up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SessionRecord<F> {
    /// Device features that the VMM has accepted; none before it did.
    pub(crate) features: Option<u64>,
    /// Protocol features that the VMM has accepted.
    pub(crate) protocol_features: u64,
    /// Guest memory.
    pub(crate) regions: Vec<Region<F>>,
    /// The rings.
    pub(crate) rings: [Ring<F>; QUEUES],
    /// A device reset that no engine has carried out yet.
    pub(crate) reset_owed: bool,
    /// A reply that the VMM waits for.
    pub(crate) reply_owed: Option<Reply>,
}

/// One ring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ring<F> {
    /// Number of descriptors; 0 before it is known.
    pub(crate) size: u16,
    /// Position at which it starts, as set by the VMM, or at which it was stopped.
    pub(crate) base: u16,
    /// Addresses of its parts.
    pub(crate) address: Option<RingAddress>,
    /// The guest writes it when there are requests. The broker never reads it.
    pub(crate) kick: Option<F>,
    /// Written when there are replies.
    pub(crate) call: Option<F>,
    /// Written when the ring is broken.
    pub(crate) err: Option<F>,
    /// True if the VMM has enabled it.
    pub(crate) enabled: bool,
    /// True if the VMM has started it and not stopped it since.
    pub(crate) started: bool,
    /// True if an engine has served it since it was started. Its position is then the used index, and `base` is outdated.
    pub(crate) served: bool,
}

impl<F> Default for Ring<F> {
    fn default() -> Self {
        Ring {
            size: 0,
            base: 0,
            address: None,
            kick: None,
            call: None,
            err: None,
            enabled: false,
            started: false,
            served: false,
        }
    }
}

impl<F> Default for SessionRecord<F> {
    fn default() -> Self {
        SessionRecord {
            features: None,
            protocol_features: 0,
            regions: Vec::new(),
            rings: Default::default(),
            reset_owed: false,
            reply_owed: None,
        }
    }
}

impl<F> SessionRecord<F> {
    /// True if the ring is enabled. Without protocol features a VMM cannot enable rings, so they are always enabled.
    pub(crate) fn enabled(&self, ring: usize) -> bool {
        let by_message = self.features.is_some_and(|features| features & features::PROTOCOL_FEATURES != 0);
        !by_message || self.rings[ring].enabled
    }

    /// True if the ring is started and the record has everything that an engine needs to serve it.
    pub(crate) fn servable(&self, ring: usize) -> bool {
        let it = &self.rings[ring];
        it.started && it.kick.is_some() && self.features.is_some() && self.mapped(it)
    }

    /// Bytes of guest memory.
    pub(crate) fn guest_memory(&self) -> u64 {
        self.regions.iter().map(|region| region.layout.size).fold(0, u64::saturating_add)
    }

    /// The region that contains these bytes, given as an address in the VMM.
    pub(crate) fn region_of(&self, user_addr: u64, len: u64) -> Option<&Region<F>> {
        self.regions.iter().find(|region| {
            let layout = &region.layout;
            user_addr >= layout.user_addr
                && user_addr.checked_add(len).is_some_and(|end| end <= layout.user_addr.saturating_add(layout.size))
        })
    }

    fn mapped(&self, ring: &Ring<F>) -> bool {
        let size = u64::from(ring.size);
        ring.size != 0
            && ring.address.is_some_and(|at| {
                self.region_of(at.descriptors, 16 * size).is_some()
                    && self.region_of(at.available, 6 + 2 * size).is_some()
                    && self.region_of(at.used, 6 + 8 * size).is_some()
            })
    }

    /// All descriptors of the record.
    pub(crate) fn descriptors(&self) -> Vec<F>
    where
        F: Clone,
    {
        self.regions.iter().map(|region| region.file.clone()).chain(self.events()).collect()
    }

    /// Its eventfds.
    pub(crate) fn events(&self) -> Vec<F>
    where
        F: Clone,
    {
        self.rings.iter().flat_map(|ring| [&ring.kick, &ring.call, &ring.err]).flatten().cloned().collect()
    }

    /// Maps each file descriptor of the record.
    pub(crate) fn try_map<G, E>(&self, mut map: impl FnMut(&F) -> Result<G, E>) -> Result<SessionRecord<G>, E> {
        let mut regions = Vec::with_capacity(self.regions.len());
        for region in &self.regions {
            regions.push(Region { layout: region.layout, file: map(&region.file)? });
        }
        let mut rings: [Ring<G>; QUEUES] = Default::default();
        for (target, ring) in rings.iter_mut().zip(&self.rings) {
            *target = ring.try_map(&mut map)?;
        }
        Ok(SessionRecord {
            features: self.features,
            protocol_features: self.protocol_features,
            regions,
            rings,
            reset_owed: self.reset_owed,
            reply_owed: self.reply_owed,
        })
    }
}

impl<F> Ring<F> {
    fn try_map<G, E>(&self, map: &mut impl FnMut(&F) -> Result<G, E>) -> Result<Ring<G>, E> {
        Ok(Ring {
            size: self.size,
            base: self.base,
            address: self.address,
            kick: self.kick.as_ref().map(&mut *map).transpose()?,
            call: self.call.as_ref().map(&mut *map).transpose()?,
            err: self.err.as_ref().map(&mut *map).transpose()?,
            enabled: self.enabled,
            started: self.started,
            served: self.served,
        })
    }
}
