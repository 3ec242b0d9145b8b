//! The throughput cases: one function per figure, which runs a slice of work on one system.

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

use crate::drive::{Measured, Next, Step, drive};
use crate::material::LONG;
use crate::options::Options;
use crate::system::System;

/// Size of a READDIRPLUS reply in bytes: Linux's first request.
const LISTING: u32 = 4096;

/// Target ratio: the permitted cost of tracking.
const TARGET: f64 = 0.97;
/// Target ratio if the ledger records a new inode.
const TARGET_FIRST: f64 = 0.90;

/// Unit of a figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Operations.
    Operations,
    /// Names.
    Names,
    /// Bytes, printed as MiB.
    Bytes,
}

/// A case.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) unit: Unit,
    /// Multiple of the number of rounds: the host's journal and writeback make these figures vary.
    pub(crate) rounds: usize,
    /// Target ratio to stock virtiofsd.
    pub(crate) target: f64,
    pub(crate) slice: fn(&mut System, &Options) -> Result<Measured, CallError>,
}

/// All cases.
pub(crate) const ALL: [Case; 13] = [
    Case { name: "lookup", unit: Unit::Operations, rounds: 1, target: TARGET, slice: lookup_again },
    Case { name: "lookup-first", unit: Unit::Operations, rounds: 1, target: TARGET_FIRST, slice: lookup_first },
    Case { name: "getattr", unit: Unit::Operations, rounds: 1, target: TARGET, slice: getattr },
    Case { name: "open-release", unit: Unit::Operations, rounds: 1, target: TARGET, slice: open_release },
    Case { name: "lookup-open-release", unit: Unit::Operations, rounds: 1, target: TARGET, slice: lookup_open_release },
    Case { name: "create-unlink", unit: Unit::Operations, rounds: 2, target: TARGET, slice: create_unlink },
    Case { name: "readdirplus", unit: Unit::Names, rounds: 1, target: TARGET, slice: readdirplus },
    Case {
        name: "read-4k-random",
        unit: Unit::Operations,
        rounds: 1,
        target: TARGET,
        slice: |c, o| read(c, o, 4 << 10, Order::Random),
    },
    Case {
        name: "write-4k-random",
        unit: Unit::Operations,
        rounds: 2,
        target: TARGET,
        slice: |c, o| write(c, o, 4 << 10, Order::Random),
    },
    Case {
        name: "read-128k",
        unit: Unit::Bytes,
        rounds: 1,
        target: TARGET,
        slice: |c, o| read(c, o, 128 << 10, Order::Sequential),
    },
    Case {
        name: "write-128k",
        unit: Unit::Bytes,
        rounds: 2,
        target: TARGET,
        slice: |c, o| write(c, o, 128 << 10, Order::Sequential),
    },
    Case {
        name: "read-1m",
        unit: Unit::Bytes,
        rounds: 1,
        target: TARGET,
        slice: |c, o| read(c, o, 1 << 20, Order::Sequential),
    },
    Case {
        name: "write-1m",
        unit: Unit::Bytes,
        rounds: 2,
        target: TARGET,
        slice: |c, o| write(c, o, 1 << 20, Order::Sequential),
    },
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Random,
    Sequential,
}

/// Names that the guest already holds.
fn lookup_again(system: &mut System, options: &Options) -> Result<Measured, CallError> {
    let (fuse, parent) = (system.fuse().clone(), system.few);
    let count = system.nodes.len();
    let mut looked_up = vec![0_u64; count];
    let mut cursor = system.cursor;
    let measured = drive(options.depth, options.slice, |step| {
        let done = done(&step);
        if step.closing {
            return Ok(Next::end(done));
        }
        cursor = (cursor + 1) % count;
        looked_up[cursor] += 1;
        Ok(Next::request(start_lookup(&fuse, parent, &system.names[cursor])?, done))
    })?;
    system.cursor = cursor;
    system.to_forget = lookups(system, looked_up);
    Ok(measured)
}

/// The lookups of the nodes in `few`, by their numbers.
fn lookups(system: &System, counts: Vec<u64>) -> Vec<ForgetOne> {
    let looked_up = system.nodes.iter().zip(counts).filter(|(_, count)| *count > 0);
    looked_up.map(|(node, nlookup)| ForgetOne { nodeid: *node, nlookup }).collect()
}

/// Names whose nodes the server does not hold: all are forgotten after each slice.
fn lookup_first(system: &mut System, options: &Options) -> Result<Measured, CallError> {
    let (fuse, parent) = (system.fuse().clone(), system.many);
    let mut next = system.names.iter();
    let mut to_forget = Vec::with_capacity(system.names.len());
    let measured = drive(options.depth, options.slice, |step| {
        let done = done(&step);
        if let Some(reply) = step.reply {
            to_forget.push(ForgetOne { nodeid: reply.body::<EntryOut>()?.nodeid, nlookup: 1 });
        }
        match next.next() {
            Some(name) if !step.closing => Ok(Next::request(start_lookup(&fuse, parent, name)?, done)),
            _ => Ok(Next::end(done)),
        }
    })?;
    system.to_forget = to_forget;
    Ok(measured)
}

fn getattr(system: &mut System, options: &Options) -> Result<Measured, CallError> {
    let fuse = system.fuse();
    let mut nodes = system.nodes.iter().cycle();
    drive(options.depth, options.slice, |step| {
        let done = done(&step);
        let node = nodes.next().filter(|_| !step.closing);
        let Some(node) = node else { return Ok(Next::end(done)) };
        let body = GetattrIn::default();
        let arguments = [body.as_bytes()];
        let request = fuse.start(&Call::new(Opcode::Getattr, *node, &arguments).expecting::<AttrOut>())?;
        Ok(Next::request(request, done))
    })
}

fn open_release(system: &mut System, options: &Options) -> Result<Measured, CallError> {
    let fuse = system.fuse();
    let mut nodes = system.nodes.iter().copied().cycle();
    // The node that each chain is opening; none while it releases.
    let mut opening: Vec<Option<u64>> = vec![None; options.depth];
    drive(options.depth, options.slice, |step| {
        if let (Some(reply), Some(node)) = (&step.reply, opening[step.chain].take()) {
            let fh = reply.body::<OpenOut>()?.fh;
            return Ok(Next::request(start_release(fuse, node, fh, libc::O_RDONLY)?, 0.0));
        }
        let done = done(&step);
        if step.closing {
            return Ok(Next::end(done));
        }
        let node = nodes.next().unwrap_or_default();
        opening[step.chain] = Some(node);
        Ok(Next::request(start_open(fuse, node)?, done))
    })
}

/// State of a chain of [`lookup_open_release`]: what it waits for, and of which file.
#[derive(Debug, Clone, Copy)]
enum Walk {
    LookingUp(usize),
    Opening(usize),
    Releasing,
}

/// LOOKUP, OPEN, RELEASE, as for a file whose name is not in the guest's cache any more.
fn lookup_open_release(system: &mut System, options: &Options) -> Result<Measured, CallError> {
    let (fuse, parent) = (system.fuse().clone(), system.few);
    let count = system.nodes.len();
    let mut looked_up = vec![0_u64; count];
    let mut walks = vec![Walk::Releasing; options.depth];
    let mut cursor = system.cursor;
    let measured = drive(options.depth, options.slice, |step| {
        let walk = &mut walks[step.chain];
        match (*walk, &step.reply) {
            (Walk::LookingUp(file), Some(_)) => {
                *walk = Walk::Opening(file);
                Ok(Next::request(start_open(&fuse, system.nodes[file])?, 0.0))
            }
            (Walk::Opening(file), Some(reply)) => {
                *walk = Walk::Releasing;
                let fh = reply.body::<OpenOut>()?.fh;
                Ok(Next::request(start_release(&fuse, system.nodes[file], fh, libc::O_RDONLY)?, 0.0))
            }
            _ if step.closing => Ok(Next::end(done(&step))),
            _ => {
                cursor = (cursor + 1) % count;
                looked_up[cursor] += 1;
                *walk = Walk::LookingUp(cursor);
                Ok(Next::request(start_lookup(&fuse, parent, &system.names[cursor])?, done(&step)))
            }
        }
    })?;
    system.cursor = cursor;
    system.to_forget = lookups(system, looked_up);
    Ok(measured)
}

/// State of a chain of [`create_unlink`].
#[derive(Debug, Clone, Copy)]
enum Stage {
    Creating,
    Releasing(u64),
    Unlinking(u64),
    Forgetting,
}

/// CREATE, RELEASE, UNLINK, FORGET, as for a temporary file.
fn create_unlink(system: &mut System, options: &Options) -> Result<Measured, CallError> {
    let (fuse, parent) = (system.fuse(), system.made);
    let mut stages = vec![Stage::Forgetting; options.depth];
    drive(options.depth, options.slice, |step| {
        let name = format!("temporary-{}", step.chain);
        let stage = &mut stages[step.chain];
        let (next, request) = match (*stage, &step.reply) {
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
            _ if step.closing => return Ok(Next::end(done(&step))),
            _ => {
                *stage = Stage::Creating;
                return Ok(Next::request(start_create(fuse, parent, &name)?, done(&step)));
            }
        };
        *stage = next;
        Ok(Next::request(request, 0.0))
    })
}

/// Whole listings. Each chain has a directory stream of its own.
fn readdirplus(system: &mut System, options: &Options) -> Result<Measured, CallError> {
    let (fuse, node) = (system.fuse().clone(), system.few);
    let streams = (0..options.depth).map(|_| fuse.opendir(node).map(|open| open.fh)).collect::<Result<Vec<_>, _>>()?;
    let mut seen: HashMap<u64, u64> = HashMap::new();
    let measured = drive(options.depth, options.slice, |step| {
        let mut position = 0;
        let mut names = 0;
        if let Some(reply) = &step.reply {
            let entries = parse_plus(&reply.payload()?).map_err(|error| reply.broken(error))?;
            names = entries.len();
            position = entries.last().map_or(0, |entry| entry.next);
            for found in entries.iter().filter_map(|entry| entry.found).filter(|found| found.nodeid != 0) {
                *seen.entry(found.nodeid).or_default() += 1;
            }
        }
        if step.closing {
            return Ok(Next::end(names as f64));
        }
        let body = read_in(streams[step.chain], position, LISTING);
        let arguments = [body.as_bytes()];
        let call = Call::new(Opcode::Readdirplus, node, &arguments).receiving(LISTING);
        Ok(Next::request(fuse.start(&call)?, names as f64))
    })?;
    for fh in streams {
        fuse.releasedir(node, fh)?;
    }
    system.to_forget = seen.into_iter().map(|(nodeid, nlookup)| ForgetOne { nodeid, nlookup }).collect();
    Ok(measured)
}

fn read(system: &mut System, options: &Options, size: u32, order: Order) -> Result<Measured, CallError> {
    let (fuse, node) = (system.fuse().clone(), system.read);
    let fh = fuse.open(node, libc::O_RDONLY)?.fh;
    let mut offsets = Offsets::new(system.cursor, size, order);
    let measured = drive(options.depth, options.slice, |step| {
        // The data stays in guest memory: copying it would measure this program.
        if let Some(reply) = step.reply.as_ref().filter(|reply| reply.payload_len() != size) {
            return Err(reply.broken(format!("{} of {size} bytes read", reply.payload_len())));
        }
        let done = transferred(&step, size, order);
        if step.closing {
            return Ok(Next::end(done));
        }
        let body = read_in(fh, offsets.next(), size);
        let arguments = [body.as_bytes()];
        let call = Call::new(Opcode::Read, node, &arguments).receiving(size);
        Ok(Next::request(fuse.start(&call)?, done))
    })?;
    system.cursor += 1;
    fuse.release(node, fh, libc::O_RDONLY)?;
    Ok(measured)
}

fn write(system: &mut System, options: &Options, size: u32, order: Order) -> Result<Measured, CallError> {
    let (fuse, node) = (system.fuse().clone(), system.written);
    let fh = fuse.open(node, libc::O_RDWR)?.fh;
    let data = vec![0x5a; size as usize];
    let mut offsets = Offsets::new(system.cursor, size, order);
    let measured = drive(options.depth, options.slice, |step| {
        if let Some(reply) = &step.reply {
            let written = reply.body::<WriteOut>()?.size;
            if written != size {
                return Err(reply.broken(format!("{written} of {size} bytes written")));
            }
        }
        let done = transferred(&step, size, order);
        if step.closing {
            return Ok(Next::end(done));
        }
        let body = write_in(fh, offsets.next(), size, libc::O_RDWR);
        let arguments = [body.as_bytes()];
        let call = Call::new(Opcode::Write, node, &arguments).sending(&data).expecting::<WriteOut>();
        Ok(Next::request(fuse.start(&call)?, done))
    })?;
    system.cursor += 1;
    fuse.release(node, fh, libc::O_RDWR)?;
    Ok(measured)
}

/// One operation per reply.
fn done(step: &Step) -> f64 {
    if step.reply.is_some() { 1.0 } else { 0.0 }
}

/// Random transfers count as operations, sequential ones as bytes.
fn transferred(step: &Step, size: u32, order: Order) -> f64 {
    match order {
        Order::Random => done(step),
        Order::Sequential => done(step) * f64::from(size),
    }
}

/// Offsets in a long file.
struct Offsets {
    size: u64,
    at: u64,
    random: Option<ChaCha8Rng>,
}

impl Offsets {
    /// Both systems use the same offsets in the same round.
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

fn start_open(fuse: &Fuse, node: u64) -> Result<Pending, CallError> {
    let body = OpenIn { flags: libc::O_RDONLY as u32, open_flags: 0 };
    let arguments = [body.as_bytes()];
    fuse.start(&Call::new(Opcode::Open, node, &arguments).expecting::<OpenOut>())
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
