//! Encodes and decodes messages. Pure: `F` is the type of a descriptor, and no descriptor is used.

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtiofs_contract::engine::MAX_MEMORY_REGIONS;

/// Bytes of a header.
pub(crate) const HEADER_LEN: usize = 12;

/// Largest payload in bytes: a memory table with the accepted number of regions.
pub(crate) const MAX_PAYLOAD: usize = 8 + MAX_MEMORY_REGIONS * REGION_LEN;

/// Most descriptors of one message: one for each region of a memory table.
pub(crate) const MAX_FDS: usize = MAX_MEMORY_REGIONS;

const REGION_LEN: usize = 32;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 0x3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Set in a ring descriptor message that carries no descriptor.
const NO_FD: u64 = 1 << 8;

/// Numbers of the supported requests.
pub(crate) mod number {
    pub(crate) const GET_FEATURES: u32 = 1;
    pub(crate) const SET_FEATURES: u32 = 2;
    pub(crate) const SET_OWNER: u32 = 3;
    pub(crate) const RESET_OWNER: u32 = 4;
    pub(crate) const SET_MEM_TABLE: u32 = 5;
    pub(crate) const SET_VRING_NUM: u32 = 8;
    pub(crate) const SET_VRING_ADDR: u32 = 9;
    pub(crate) const SET_VRING_BASE: u32 = 10;
    pub(crate) const GET_VRING_BASE: u32 = 11;
    pub(crate) const SET_VRING_KICK: u32 = 12;
    pub(crate) const SET_VRING_CALL: u32 = 13;
    pub(crate) const SET_VRING_ERR: u32 = 14;
    pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(crate) const GET_QUEUE_NUM: u32 = 17;
    pub(crate) const SET_VRING_ENABLE: u32 = 18;
    pub(crate) const RESET_DEVICE: u32 = 34;
    pub(crate) const GET_MAX_MEM_SLOTS: u32 = 36;
    pub(crate) const ADD_MEM_REG: u32 = 37;
    pub(crate) const REM_MEM_REG: u32 = 38;
}

/// How a message violates the protocol.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum Malformed {
    #[error("header flags {0:#x}: version 1 without the reply flag is expected")]
    Flags(u32),
    #[error("request {0} is not one that was offered")]
    Unknown(u32),
    #[error("request {request} with {actual} bytes behind its header")]
    Size { request: u32, actual: usize },
    #[error("request {request} with {actual} descriptors; {expected} expected")]
    Fds { request: u32, actual: usize, expected: usize },
    #[error("a table of {0} memory regions; at most {MAX_MEMORY_REGIONS} are accepted")]
    Regions(u32),
    #[error("request {request} with the value {value:#x}")]
    Value { request: u32, value: u64 },
}

/// Header of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) request: u32,
    pub(crate) flags: u32,
    pub(crate) size: u32,
}

impl Header {
    pub(crate) fn decode(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut fields = Fields(bytes);
        Header { request: fields.u32(), flags: fields.u32(), size: fields.u32() }
    }

    fn encode(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_LEN + payload.len());
        for field in [request, VERSION | flags, payload.len() as u32] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        bytes.extend_from_slice(payload);
        bytes
    }

    /// Length of the payload, if this is a valid header of a request.
    pub(crate) fn payload_len(&self) -> Result<usize, Malformed> {
        if self.flags & !NEED_REPLY != VERSION {
            return Err(Malformed::Flags(self.flags));
        }
        self.bounded_len()
    }

    /// Length of the payload, if this is a valid header of a reply to `request`.
    pub(crate) fn reply_len(&self, request: u32) -> Result<usize, Malformed> {
        if self.flags & (VERSION_MASK | REPLY) != VERSION | REPLY {
            return Err(Malformed::Flags(self.flags));
        }
        if self.request != request {
            return Err(Malformed::Unknown(self.request));
        }
        self.bounded_len()
    }

    fn bounded_len(&self) -> Result<usize, Malformed> {
        let size = self.size as usize;
        if size > MAX_PAYLOAD { Err(self.wrong_size(size)) } else { Ok(size) }
    }

    /// True if this request carries descriptors.
    pub(crate) fn brings_fds(&self, payload: &[u8]) -> bool {
        match self.request {
            number::SET_MEM_TABLE | number::ADD_MEM_REG => true,
            number::SET_VRING_KICK | number::SET_VRING_CALL | number::SET_VRING_ERR => {
                Fields(payload).u64() & NO_FD == 0
            }
            _ => false,
        }
    }

    pub(crate) fn need_reply(&self) -> bool {
        self.flags & NEED_REPLY != 0
    }

    fn wrong_size(&self, actual: usize) -> Malformed {
        Malformed::Size { request: self.request, actual }
    }
}

/// Addresses of a region of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Layout {
    /// Guest-physical address.
    pub(crate) guest_addr: u64,
    /// Bytes.
    pub(crate) size: u64,
    /// Address in the VMM, which ring addresses refer to.
    pub(crate) user_addr: u64,
    /// Offset of the region in its file.
    pub(crate) offset: u64,
}

/// A region of guest memory and the file that holds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Region<F> {
    pub(crate) layout: Layout,
    pub(crate) file: F,
}

/// Addresses in the VMM of the three parts of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RingAddress {
    pub(crate) descriptors: u64,
    pub(crate) used: u64,
    pub(crate) available: u64,
}

/// A request of a front-end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Request<F> {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<Region<F>>),
    SetVringNum { ring: u32, num: u32 },
    SetVringAddr { ring: u32, address: RingAddress },
    SetVringBase { ring: u32, base: u32 },
    GetVringBase { ring: u32 },
    SetVringKick { ring: u32, fd: Option<F> },
    SetVringCall { ring: u32, fd: Option<F> },
    SetVringErr { ring: u32, fd: Option<F> },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable { ring: u32, enable: bool },
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(Region<F>),
    RemMemReg(Layout),
}

impl<F> Request<F> {
    pub(crate) fn number(&self) -> u32 {
        match self {
            Request::GetFeatures => number::GET_FEATURES,
            Request::SetFeatures(_) => number::SET_FEATURES,
            Request::SetOwner => number::SET_OWNER,
            Request::ResetOwner => number::RESET_OWNER,
            Request::SetMemTable(_) => number::SET_MEM_TABLE,
            Request::SetVringNum { .. } => number::SET_VRING_NUM,
            Request::SetVringAddr { .. } => number::SET_VRING_ADDR,
            Request::SetVringBase { .. } => number::SET_VRING_BASE,
            Request::GetVringBase { .. } => number::GET_VRING_BASE,
            Request::SetVringKick { .. } => number::SET_VRING_KICK,
            Request::SetVringCall { .. } => number::SET_VRING_CALL,
            Request::SetVringErr { .. } => number::SET_VRING_ERR,
            Request::GetProtocolFeatures => number::GET_PROTOCOL_FEATURES,
            Request::SetProtocolFeatures(_) => number::SET_PROTOCOL_FEATURES,
            Request::GetQueueNum => number::GET_QUEUE_NUM,
            Request::SetVringEnable { .. } => number::SET_VRING_ENABLE,
            Request::ResetDevice => number::RESET_DEVICE,
            Request::GetMaxMemSlots => number::GET_MAX_MEM_SLOTS,
            Request::AddMemReg(_) => number::ADD_MEM_REG,
            Request::RemMemReg(_) => number::REM_MEM_REG,
        }
    }

    /// Decodes a request from its payload and descriptors.
    pub(crate) fn decode(header: &Header, payload: &[u8], fds: Vec<F>) -> Result<Self, Malformed> {
        let mut body = Body { header, fields: Fields(payload), fds: fds.into_iter() };
        let request = body.request()?;
        body.exhausted()?;
        Ok(request)
    }

    /// The encoded message and its descriptors.
    pub(crate) fn encode(&self, need_reply: bool) -> (Vec<u8>, Vec<&F>) {
        let (payload, fds) = self.payload();
        (Header::encode(self.number(), if need_reply { NEED_REPLY } else { 0 }, &payload), fds)
    }

    fn payload(&self) -> (Vec<u8>, Vec<&F>) {
        match self {
            Request::SetFeatures(value) | Request::SetProtocolFeatures(value) => (value.to_le_bytes().into(), vec![]),
            Request::SetMemTable(regions) => table_bytes(regions),
            Request::SetVringNum { ring, num: value } | Request::SetVringBase { ring, base: value } => {
                (state_bytes(*ring, *value), vec![])
            }
            Request::SetVringEnable { ring, enable } => (state_bytes(*ring, u32::from(*enable)), vec![]),
            Request::GetVringBase { ring } => (state_bytes(*ring, 0), vec![]),
            Request::SetVringAddr { ring, address } => (address_bytes(*ring, address), vec![]),
            Request::SetVringKick { ring, fd }
            | Request::SetVringCall { ring, fd }
            | Request::SetVringErr { ring, fd } => ring_fd_bytes(*ring, fd.as_ref()),
            Request::AddMemReg(region) => (single_region_bytes(&region.layout), vec![&region.file]),
            Request::RemMemReg(layout) => (single_region_bytes(layout), vec![]),
            Request::GetFeatures
            | Request::SetOwner
            | Request::ResetOwner
            | Request::GetProtocolFeatures
            | Request::GetQueueNum
            | Request::ResetDevice
            | Request::GetMaxMemSlots => (vec![], vec![]),
        }
    }
}

fn table_bytes<F>(regions: &[Region<F>]) -> (Vec<u8>, Vec<&F>) {
    let mut bytes = u64::from(regions.len() as u32).to_le_bytes().to_vec();
    for region in regions {
        bytes.extend_from_slice(&layout_bytes(&region.layout));
    }
    (bytes, regions.iter().map(|region| &region.file).collect())
}

fn layout_bytes(layout: &Layout) -> Vec<u8> {
    [layout.guest_addr, layout.size, layout.user_addr, layout.offset].iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn single_region_bytes(layout: &Layout) -> Vec<u8> {
    let padding = [0u8; 8];
    [&padding[..], &layout_bytes(layout)].concat()
}

fn state_bytes(ring: u32, value: u32) -> Vec<u8> {
    [ring.to_le_bytes(), value.to_le_bytes()].concat()
}

fn address_bytes(ring: u32, address: &RingAddress) -> Vec<u8> {
    let flags = 0;
    let log = 0;
    let mut bytes = state_bytes(ring, flags);
    for value in [address.descriptors, address.used, address.available, log] {
        bytes.extend_from_slice(&value.to_le_bytes());
    }
    bytes
}

fn ring_fd_bytes<F>(ring: u32, fd: Option<&F>) -> (Vec<u8>, Vec<&F>) {
    let value = u64::from(ring & 0xff) | if fd.is_none() { NO_FD } else { 0 };
    (value.to_le_bytes().into(), fd.into_iter().collect())
}

/// Little-endian fields of a buffer whose length has been checked; beyond its end they read as 0.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, rest) = self.0.split_at(N.min(self.0.len()));
        self.0 = rest;
        let mut bytes = [0u8; N];
        bytes[..head.len()].copy_from_slice(head);
        bytes
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    fn layout(&mut self) -> Layout {
        Layout { guest_addr: self.u64(), size: self.u64(), user_addr: self.u64(), offset: self.u64() }
    }
}

struct Body<'a, F> {
    header: &'a Header,
    fields: Fields<'a>,
    fds: std::vec::IntoIter<F>,
}

impl<F> Body<'_, F> {
    fn request(&mut self) -> Result<Request<F>, Malformed> {
        Ok(match self.header.request {
            number::GET_FEATURES => Request::GetFeatures,
            number::SET_FEATURES => Request::SetFeatures(self.value()?),
            number::SET_OWNER => Request::SetOwner,
            number::RESET_OWNER => Request::ResetOwner,
            number::SET_MEM_TABLE => Request::SetMemTable(self.table()?),
            number::SET_VRING_NUM => self.state().map(|(ring, num)| Request::SetVringNum { ring, num })?,
            number::SET_VRING_ADDR => self.address()?,
            number::SET_VRING_BASE => self.state().map(|(ring, base)| Request::SetVringBase { ring, base })?,
            number::GET_VRING_BASE => self.state().map(|(ring, _)| Request::GetVringBase { ring })?,
            number::SET_VRING_KICK => self.ring_fd().map(|(ring, fd)| Request::SetVringKick { ring, fd })?,
            number::SET_VRING_CALL => self.ring_fd().map(|(ring, fd)| Request::SetVringCall { ring, fd })?,
            number::SET_VRING_ERR => self.ring_fd().map(|(ring, fd)| Request::SetVringErr { ring, fd })?,
            number::GET_PROTOCOL_FEATURES => Request::GetProtocolFeatures,
            number::SET_PROTOCOL_FEATURES => Request::SetProtocolFeatures(self.value()?),
            number::GET_QUEUE_NUM => Request::GetQueueNum,
            number::SET_VRING_ENABLE => self.enable()?,
            number::RESET_DEVICE => Request::ResetDevice,
            number::GET_MAX_MEM_SLOTS => Request::GetMaxMemSlots,
            number::ADD_MEM_REG => Request::AddMemReg(self.region()?),
            number::REM_MEM_REG => Request::RemMemReg(self.single_layout()?),
            other => return Err(Malformed::Unknown(other)),
        })
    }

    fn exhausted(&self) -> Result<(), Malformed> {
        if !self.fields.0.is_empty() {
            return Err(self.header.wrong_size(self.header.size as usize));
        }
        if self.fds.len() != 0 {
            return Err(self.wrong_fds(self.fds.len(), 0));
        }
        Ok(())
    }

    fn value(&mut self) -> Result<u64, Malformed> {
        self.need(8)?;
        Ok(self.fields.u64())
    }

    fn state(&mut self) -> Result<(u32, u32), Malformed> {
        self.need(8)?;
        Ok((self.fields.u32(), self.fields.u32()))
    }

    fn enable(&mut self) -> Result<Request<F>, Malformed> {
        match self.state()? {
            (ring, value @ (0 | 1)) => Ok(Request::SetVringEnable { ring, enable: value == 1 }),
            (_, value) => Err(self.wrong_value(u64::from(value))),
        }
    }

    fn address(&mut self) -> Result<Request<F>, Malformed> {
        self.need(40)?;
        let ring = self.fields.u32();
        // Bit 0 requests dirty logging, which is not offered.
        let flags = self.fields.u32();
        if flags != 0 {
            return Err(self.wrong_value(u64::from(flags)));
        }
        let (descriptors, used, available) = (self.fields.u64(), self.fields.u64(), self.fields.u64());
        let _log = self.fields.u64();
        Ok(Request::SetVringAddr { ring, address: RingAddress { descriptors, used, available } })
    }

    fn ring_fd(&mut self) -> Result<(u32, Option<F>), Malformed> {
        let value = self.value()?;
        if value & !(NO_FD | 0xff) != 0 {
            return Err(self.wrong_value(value));
        }
        let expected = usize::from(value & NO_FD == 0);
        if self.fds.len() != expected {
            return Err(self.wrong_fds(self.fds.len(), expected));
        }
        Ok(((value & 0xff) as u32, self.fds.next()))
    }

    fn table(&mut self) -> Result<Vec<Region<F>>, Malformed> {
        self.need(8)?;
        let count = self.fields.u32();
        let _padding = self.fields.u32();
        if count as usize > MAX_MEMORY_REGIONS {
            return Err(Malformed::Regions(count));
        }
        let count = count as usize;
        self.need(count * REGION_LEN)?;
        if self.fds.len() != count {
            return Err(self.wrong_fds(self.fds.len(), count));
        }
        let files: Vec<F> = self.fds.by_ref().collect();
        Ok(files.into_iter().map(|file| Region { layout: self.fields.layout(), file }).collect())
    }

    fn region(&mut self) -> Result<Region<F>, Malformed> {
        let layout = self.single_layout()?;
        let found = self.fds.len();
        match (self.fds.next(), found) {
            (Some(file), 1) => Ok(Region { layout, file }),
            _ => Err(self.wrong_fds(found, 1)),
        }
    }

    fn single_layout(&mut self) -> Result<Layout, Malformed> {
        self.need(40)?;
        let _padding = self.fields.u64();
        Ok(self.fields.layout())
    }

    fn need(&self, bytes: usize) -> Result<(), Malformed> {
        if self.fields.0.len() < bytes { Err(self.header.wrong_size(self.header.size as usize)) } else { Ok(()) }
    }

    fn wrong_fds(&self, actual: usize, expected: usize) -> Malformed {
        Malformed::Fds { request: self.header.request, actual, expected }
    }

    fn wrong_value(&self, value: u64) -> Malformed {
        Malformed::Value { request: self.header.request, value }
    }
}

/// A reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Reply {
    pub(crate) request: u32,
    pub(crate) value: ReplyValue,
}

/// The value of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ReplyValue {
    /// A number; as an acknowledgement 0 is success.
    U64(u64),
    /// A ring and its position.
    Vring {
        /// Index of the ring.
        ring: u32,
        /// Its position.
        base: u32,
    },
}

impl Reply {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let payload = match self.value {
            ReplyValue::U64(value) => value.to_le_bytes().into(),
            ReplyValue::Vring { ring, base } => state_bytes(ring, base),
        };
        Header::encode(self.request, REPLY, &payload)
    }

    /// Decodes a reply from its payload.
    pub(crate) fn decode(header: &Header, payload: &[u8]) -> Result<Self, Malformed> {
        if payload.len() != 8 {
            return Err(header.wrong_size(payload.len()));
        }
        let mut fields = Fields(payload);
        let value = if header.request == number::GET_VRING_BASE {
            ReplyValue::Vring { ring: fields.u32(), base: fields.u32() }
        } else {
            ReplyValue::U64(fields.u64())
        };
        Ok(Reply { request: header.request, value })
    }
}

#[cfg(test)]
mod tests;
