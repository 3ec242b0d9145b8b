//! The descriptors of one request.

use crate::virtio::ring::{Descriptor, NEXT};

/// Descriptors of a request before they are linked.
pub(super) struct Segments {
    pub(super) piece: u64,
    pub(super) list: Vec<Descriptor>,
}

impl Segments {
    pub(super) fn new(piece: u64) -> Self {
        Self { piece, list: Vec::with_capacity(8) }
    }

    pub(super) fn add(&mut self, address: u64, len: u64, flags: u16) {
        if len > 0 {
            self.list.push(Descriptor { address, len: len as u32, flags, next: 0 });
        }
    }

    pub(super) fn add_pieces(&mut self, address: u64, len: u64, flags: u16) {
        for offset in (0..len).step_by(self.piece as usize) {
            self.add(address + offset, self.piece.min(len - offset), flags);
        }
    }
}

/// The segments as a chain in which `next(i)` follows segment `i`.
pub(super) fn linked(segments: &[Descriptor], next: impl Fn(usize) -> u16) -> impl Iterator<Item = Descriptor> {
    let last = segments.len().saturating_sub(1);
    segments.iter().enumerate().map(move |(i, segment)| {
        let mut segment = *segment;
        if i < last {
            segment.flags |= NEXT;
            segment.next = next(i);
        }
        segment
    })
}
