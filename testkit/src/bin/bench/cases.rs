//! What is measured: one function per figure, each a slice of work on one contestant.

use std::collections::HashMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use testkit::fuse::call::{Call, CallError, Pending};
use testkit::fuse::client::{Fuse, read_in, write_in};
use testkit::fuse::dirent::parse_plus;
use testkit::fuse::wire::{
    AttrOut, CreateIn, CreateOut, EntryOut, ForgetIn, ForgetOne, GetattrIn, Opcode, OpenIn, OpenOut, ReleaseIn,
    WriteOut,
};
use zerocopy::IntoBytes;

use crate::contestant::Contestant;
use crate::drive::{Measured, Next, Turn, drive};
use crate::material::LONG;
use crate::options::Options;

/// Bytes of directory per READDIRPLUS: what Linux asks for at first.
const LISTING: u32 = 4096;

/// The ratio that figures are to reach: what a guest may pay for being tracked.
const AIM: f64 = 0.97;
/// The same where the ledger takes note of a new inode.
const AIM_FIRST: f64 = 0.90;

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Operations.
    Operations,
    /// Names.
    Names,
    /// Bytes, shown as MiB.
    Bytes,
}

/// A figure.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) unit: Unit,
    /// Times as many rounds: the host's journal and writeback make these figures scatter.
    pub(crate) rounds: usize,
    /// The ratio to stock that it is to reach.
    pub(crate) aim: f64,
    pub(crate) slice: fn(&mut Contestant, &Options) -> Result<Measured, CallError>,
}

/// All figures.
pub(crate) const ALL: [Case; 12] = [
    Case { name: "lookup", unit: Unit::Operations, rounds: 1, aim: AIM, slice: lookup_again },
    Case { name: "lookup-first", unit: Unit::Operations, rounds: 1, aim: AIM_FIRST, slice: lookup_first },
    Case { name: "getattr", unit: Unit::Operations, rounds: 1, aim: AIM, slice: getattr },
    Case { name: "open-release", unit: Unit::Operations, rounds: 1, aim: AIM, slice: open_release },
    Case { name: "create-unlink", unit: Unit::Operations, rounds: 2, aim: AIM, slice: create_unlink },
    Case { name: "readdirplus", unit: Unit::Names, rounds: 1, aim: AIM, slice: readdirplus },
    Case {
        name: "read-4k-random",
        unit: Unit::Operations,
        rounds: 1,
        aim: AIM,
        slice: |c, o| read(c, o, 4 << 10, Order::Random),
    },
    Case {
        name: "write-4k-random",
        unit: Unit::Operations,
        rounds: 2,
        aim: AIM,
        slice: |c, o| write(c, o, 4 << 10, Order::Random),
    },
    Case {
        name: "read-128k",
        unit: Unit::Bytes,
        rounds: 1,
        aim: AIM,
        slice: |c, o| read(c, o, 128 << 10, Order::Sequential),
    },
    Case {
        name: "write-128k",
        unit: Unit::Bytes,
        rounds: 2,
        aim: AIM,
        slice: |c, o| write(c, o, 128 << 10, Order::Sequential),
    },
    Case {
        name: "read-1m",
        unit: Unit::Bytes,
        rounds: 1,
        aim: AIM,
        slice: |c, o| read(c, o, 1 << 20, Order::Sequential),
    },
    Case {
        name: "write-1m",
        unit: Unit::Bytes,
        rounds: 2,
        aim: AIM,
        slice: |c, o| write(c, o, 1 << 20, Order::Sequential),
    },
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Random,
    Sequential,
}

/// Names the guest holds already.
fn lookup_again(contestant: &mut Contestant, options: &Options) -> Result<Measured, CallError> {
    let (fuse, parent) = (contestant.fuse().clone(), contestant.few);
    let count = contestant.nodes.len();
    let mut looked_up = vec![0_u64; count];
    let mut cursor = contestant.cursor;
    let measured = drive(options.depth, options.slice, |turn| {
        let done = done(&turn);
        if turn.closing {
            return Ok(Next::end(done));
        }
        cursor = (cursor + 1) % count;
        looked_up[cursor] += 1;
        Ok(Next::go(start_lookup(&fuse, parent, &contestant.names[cursor])?, done))
    })?;
    contestant.cursor = cursor;
    let owed = contestant.nodes.iter().zip(looked_up).filter(|(_, count)| *count > 0);
    contestant.owed = owed.map(|(node, nlookup)| ForgetOne { nodeid: *node, nlookup }).collect();
    Ok(measured)
}

/// Names whose nodes the server does not know: all are forgotten after each slice.
fn lookup_first(contestant: &mut Contestant, options: &Options) -> Result<Measured, CallError> {
    let (fuse, parent) = (contestant.fuse().clone(), contestant.many);
    let mut next = contestant.names.iter();
    let mut owed = Vec::with_capacity(contestant.names.len());
    let measured = drive(options.depth, options.slice, |turn| {
        let done = done(&turn);
        if let Some(reply) = turn.reply {
            owed.push(ForgetOne { nodeid: reply.body::<EntryOut>()?.nodeid, nlookup: 1 });
        }
        match next.next() {
            Some(name) if !turn.closing => Ok(Next::go(start_lookup(&fuse, parent, name)?, done)),
            _ => Ok(Next::end(done)),
        }
    })?;
    contestant.owed = owed;
    Ok(measured)
}

fn getattr(contestant: &mut Contestant, options: &Options) -> Result<Measured, CallError> {
    let fuse = contestant.fuse();
    let mut nodes = contestant.nodes.iter().cycle();
    drive(options.depth, options.slice, |turn| {
        let done = done(&turn);
        let node = nodes.next().filter(|_| !turn.closing);
        let Some(node) = node else { return Ok(Next::end(done)) };
        let body = GetattrIn::default();
        let arguments = [body.as_bytes()];
        let request = fuse.start(&Call::new(Opcode::Getattr, *node, &arguments).expecting::<AttrOut>())?;
        Ok(Next::go(request, done))
    })
}

fn open_release(contestant: &mut Contestant, options: &Options) -> Result<Measured, CallError> {
    let fuse = contestant.fuse();
    let mut nodes = contestant.nodes.iter().copied().cycle();
    // The node each chain is opening; none while it is releasing.
    let mut opening: Vec<Option<u64>> = vec![None; options.depth];
    drive(options.depth, options.slice, |turn| {
        if let (Some(reply), Some(node)) = (&turn.reply, opening[turn.chain].take()) {
            let fh = reply.body::<OpenOut>()?.fh;
            return Ok(Next::go(start_release(fuse, node, fh, libc::O_RDONLY)?, 0.0));
        }
        let done = done(&turn);
        if turn.closing {
            return Ok(Next::end(done));
        }
        let node = nodes.next().unwrap_or_default();
        opening[turn.chain] = Some(node);
        let body = OpenIn { flags: libc::O_RDONLY as u32, open_flags: 0 };
        let arguments = [body.as_bytes()];
        let request = fuse.start(&Call::new(Opcode::Open, node, &arguments).expecting::<OpenOut>())?;
        Ok(Next::go(request, done))
    })
}

/// Where a chain of [`create_unlink`] stands.
#[derive(Debug, Clone, Copy)]
enum Stage {
    Creating,
    Releasing(u64),
    Unlinking(u64),
    Forgetting,
}

/// CREATE, RELEASE, UNLINK, FORGET: the life of a temporary file.
fn create_unlink(contestant: &mut Contestant, options: &Options) -> Result<Measured, CallError> {
    let (fuse, parent) = (contestant.fuse(), contestant.made);
    let mut stages = vec![Stage::Forgetting; options.depth];
    drive(options.depth, options.slice, |turn| {
        let name = format!("temporary-{}", turn.chain);
        let stage = &mut stages[turn.chain];
        let (next, request) = match (*stage, &turn.reply) {
            (Stage::Creating, Some(reply)) => {
                let made = reply.body::<CreateOut>()?;
                let node = made.entry.nodeid;
                (Stage::Releasing(node), start_release(fuse, node, made.open.fh, libc::O_RDWR)?)
            }
            (Stage::Releasing(node), Some(_)) => {
                let arguments = [name.as_bytes(), b"\0"];
                (Stage::Unlinking(node), fuse.start(&Call::new(Opcode::Unlink, parent, &arguments))?)
            }
            (Stage::Unlinking(node), Some(_)) => {
                let body = ForgetIn { nlookup: 1 };
                let arguments = [body.as_bytes()];
                let call = Call::new(Opcode::Forget, node, &arguments).unanswered();
                (Stage::Forgetting, fuse.start(&call)?)
            }
            _ if turn.closing => return Ok(Next::end(done(&turn))),
            _ => {
                *stage = Stage::Creating;
                return Ok(Next::go(start_create(fuse, parent, &name)?, done(&turn)));
            }
        };
        *stage = next;
        Ok(Next::go(request, 0.0))
    })
}

/// Whole listings, each chain with a directory stream of its own.
fn readdirplus(contestant: &mut Contestant, options: &Options) -> Result<Measured, CallError> {
    let (fuse, node) = (contestant.fuse().clone(), contestant.few);
    let streams = (0..options.depth).map(|_| fuse.opendir(node).map(|open| open.fh)).collect::<Result<Vec<_>, _>>()?;
    let mut seen: HashMap<u64, u64> = HashMap::new();
    let measured = drive(options.depth, options.slice, |turn| {
        let mut position = 0;
        let mut names = 0;
        if let Some(reply) = &turn.reply {
            let entries = parse_plus(&reply.payload()?).map_err(|error| reply.broken(error))?;
            names = entries.len();
            position = entries.last().map_or(0, |entry| entry.next);
            for found in entries.iter().filter_map(|entry| entry.found).filter(|found| found.nodeid != 0) {
                *seen.entry(found.nodeid).or_default() += 1;
            }
        }
        if turn.closing {
            return Ok(Next::end(names as f64));
        }
        let body = read_in(streams[turn.chain], position, LISTING);
        let arguments = [body.as_bytes()];
        let call = Call::new(Opcode::Readdirplus, node, &arguments).receiving(LISTING);
        Ok(Next::go(fuse.start(&call)?, names as f64))
    })?;
    for fh in streams {
        fuse.releasedir(node, fh)?;
    }
    contestant.owed = seen.into_iter().map(|(nodeid, nlookup)| ForgetOne { nodeid, nlookup }).collect();
    Ok(measured)
}

fn read(contestant: &mut Contestant, options: &Options, size: u32, order: Order) -> Result<Measured, CallError> {
    let (fuse, node) = (contestant.fuse().clone(), contestant.read);
    let fh = fuse.open(node, libc::O_RDONLY)?.fh;
    let mut offsets = Offsets::new(contestant.cursor, size, order);
    let measured = drive(options.depth, options.slice, |turn| {
        // The data stays in guest memory: copying it out would measure this program.
        if let Some(reply) = turn.reply.as_ref().filter(|reply| reply.payload_len() != size) {
            return Err(reply.broken(format!("{} of {size} bytes read", reply.payload_len())));
        }
        let done = transferred(&turn, size, order);
        if turn.closing {
            return Ok(Next::end(done));
        }
        let body = read_in(fh, offsets.next(), size);
        let arguments = [body.as_bytes()];
        let call = Call::new(Opcode::Read, node, &arguments).receiving(size);
        Ok(Next::go(fuse.start(&call)?, done))
    })?;
    contestant.cursor += 1;
    fuse.release(node, fh, libc::O_RDONLY)?;
    Ok(measured)
}

fn write(contestant: &mut Contestant, options: &Options, size: u32, order: Order) -> Result<Measured, CallError> {
    let (fuse, node) = (contestant.fuse().clone(), contestant.written);
    let fh = fuse.open(node, libc::O_RDWR)?.fh;
    let data = vec![0x5a; size as usize];
    let mut offsets = Offsets::new(contestant.cursor, size, order);
    let measured = drive(options.depth, options.slice, |turn| {
        if let Some(reply) = &turn.reply {
            let written = reply.body::<WriteOut>()?.size;
            if written != size {
                return Err(reply.broken(format!("{written} of {size} bytes written")));
            }
        }
        let done = transferred(&turn, size, order);
        if turn.closing {
            return Ok(Next::end(done));
        }
        let body = write_in(fh, offsets.next(), size, libc::O_RDWR);
        let arguments = [body.as_bytes()];
        let call = Call::new(Opcode::Write, node, &arguments).sending(&data).expecting::<WriteOut>();
        Ok(Next::go(fuse.start(&call)?, done))
    })?;
    contestant.cursor += 1;
    fuse.release(node, fh, libc::O_RDWR)?;
    Ok(measured)
}

/// One operation per reply.
fn done(turn: &Turn) -> f64 {
    if turn.reply.is_some() { 1.0 } else { 0.0 }
}

/// Random transfers count as operations, sequential ones by their bytes.
fn transferred(turn: &Turn, size: u32, order: Order) -> f64 {
    match order {
        Order::Random => done(turn),
        Order::Sequential => done(turn) * f64::from(size),
    }
}

/// Where in a long file to go.
struct Offsets {
    size: u64,
    at: u64,
    random: Option<ChaCha8Rng>,
}

impl Offsets {
    /// Both contestants go the same way in the same round.
    fn new(round: usize, size: u32, order: Order) -> Self {
        let random = (order == Order::Random).then(|| ChaCha8Rng::seed_from_u64(round as u64));
        Self { size: size.into(), at: 0, random }
    }

    fn next(&mut self) -> u64 {
        let blocks = LONG / self.size;
        let block = match &mut self.random {
            Some(random) => random.random_range(0..blocks),
            None => self.at % blocks,
        };
        self.at += 1;
        block * self.size
    }
}

fn start_lookup(fuse: &Fuse, parent: u64, name: &str) -> Result<Pending, CallError> {
    let arguments = [name.as_bytes(), b"\0"];
    fuse.start(&Call::new(Opcode::Lookup, parent, &arguments).expecting::<EntryOut>())
}

fn start_release(fuse: &Fuse, node: u64, fh: u64, flags: i32) -> Result<Pending, CallError> {
    let body = ReleaseIn { fh, flags: flags as u32, ..ReleaseIn::default() };
    let arguments = [body.as_bytes()];
    fuse.start(&Call::new(Opcode::Release, node, &arguments))
}

fn start_create(fuse: &Fuse, parent: u64, name: &str) -> Result<Pending, CallError> {
    let body = CreateIn {
        flags: (libc::O_CREAT | libc::O_EXCL | libc::O_RDWR) as u32,
        mode: libc::S_IFREG | 0o644,
        umask: 0o022,
        open_flags: 0,
    };
    let arguments = [body.as_bytes(), name.as_bytes(), b"\0"];
    fuse.start(&Call::new(Opcode::Create, parent, &arguments).expecting::<CreateOut>())
}
