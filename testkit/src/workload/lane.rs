//! One thread of a workload: a directory of its own, a model of it, and what the guest holds.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::File;
use std::io::Write;
use std::path;
use std::sync::Arc;

use nix::errno::Errno;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::op::{Access, Op, Path, Slot};
use super::report::{Failure, Fault, Kind, Report};
use super::shared::SharedPart;
use super::view::View;
use crate::fuse::call::CallError;
use crate::fuse::client::{Caller, Fuse};
use crate::fuse::wire::{Attr, EntryOut, ForgetOne, ROOT};
use crate::model::{Body, Change, Id, Name, TOP, Tree};

/// New files do not get these bits.
const UMASK: u32 = 0o022;
/// A lane that found this many failures only follows from the first.
const MAX_FAILURES: u64 = 16;

/// What a lane may use; what the file system below cannot do is left out.
#[derive(Debug, Clone, Copy)]
pub struct Features {
    /// Extended attributes.
    pub xattrs: bool,
    /// Directory streams read in steps: needs positions that stay valid.
    pub streams: bool,
    /// Changes of the owner.
    pub chown: bool,
    /// Files at most this long.
    pub longest_file: u64,
    /// Nodes in a lane, about.
    pub nodes: usize,
}

impl Default for Features {
    fn default() -> Self {
        Self { xattrs: true, streams: true, chown: true, longest_file: 256 << 10, nodes: 60 }
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct OpenFile {
    pub(super) id: Id,
    pub(super) fh: u64,
    pub(super) access: Access,
}

/// A directory being read in steps.
#[derive(Debug, Clone)]
pub(super) struct Stream {
    pub(super) id: Id,
    pub(super) fh: u64,
    pub(super) position: u64,
    /// There since the stream was opened: to be seen exactly once.
    pub(super) must: BTreeSet<Name>,
    /// Came or went since: may be seen.
    pub(super) may: BTreeSet<Name>,
    pub(super) seen: BTreeSet<Name>,
    pub(super) ended: bool,
}

#[derive(Debug, Default)]
pub(super) struct SharedView {
    pub(super) directory: Option<(u64, u64)>,
    pub(super) files: BTreeMap<usize, (u64, u64)>,
}

/// A lane.
#[derive(Debug)]
pub struct Lane {
    pub(super) name: String,
    pub(super) seed: u64,
    pub(super) random: ChaCha8Rng,
    pub(super) features: Features,
    pub(super) fuse: Fuse,
    pub(super) tree: Tree,
    pub(super) view: View,
    pub(super) files: BTreeMap<Slot, OpenFile>,
    pub(super) streams: BTreeMap<Slot, Stream>,
    pub(super) shared: Option<Arc<SharedPart>>,
    pub(super) shared_view: SharedView,
    /// FALLOCATE modes the file system does not know.
    pub(super) unsupported: HashSet<i32>,
    pub(super) report: Report,
    trace: Option<File>,
    step: u64,
    stopped: bool,
}

/// What became of a request that was to succeed or to fail in a certain way.
pub(super) type Outcome<T> = Result<Option<T>, Fault>;

impl Lane {
    /// A lane in a new directory of the share's root. A failure to make it is in the report.
    pub fn new(name: String, seed: u64, features: Features, fuse: &Fuse, shared: Option<Arc<SharedPart>>) -> Self {
        let caller = Caller { umask: UMASK, ..Caller::default() };
        let mut lane = Self {
            fuse: fuse.as_caller(caller),
            random: ChaCha8Rng::seed_from_u64(seed),
            tree: Tree::new(),
            view: View::default(),
            files: BTreeMap::new(),
            streams: BTreeMap::new(),
            shared_view: SharedView::default(),
            unsupported: HashSet::new(),
            report: Report::default(),
            trace: None,
            step: 0,
            stopped: false,
            name,
            seed,
            features,
            shared,
        };
        let made = lane.fuse.mkdir(ROOT, &lane.name, 0o755);
        let learned = made.map_err(Fault::from).and_then(|entry| lane.view.learn(TOP, &entry));
        // In a directory that another run has left behind, everything would be wrong.
        lane.stopped = learned.is_err();
        lane.note("mkdir of the lane's directory", learned);
        lane
    }

    /// Writes each further step to a file. A failure to do so is in the report.
    pub fn trace_to(&mut self, path: Option<&path::Path>) {
        match path.map(File::create).transpose() {
            Ok(trace) => self.trace = trace,
            Err(error) => self.note("opening the trace", Err(script(&error.to_string()))),
        }
    }

    /// What the lane did and found so far.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Whether the lane gave up.
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Does a step and checks it.
    pub fn run(&mut self, op: &Op) {
        self.step += 1;
        if let Some(trace) = &mut self.trace
            && let Err(error) = writeln!(trace, "{} {op:?}", self.step)
        {
            self.trace = None;
            self.note(op, Err(script(&format!("the trace: {error}"))));
        }
        let done = self.execute(op);
        self.report.count(op.name());
        self.note(op, done);
    }

    /// Does the next step the seed gives.
    pub fn run_random(&mut self) {
        let op = self.next_op();
        self.run(&op);
    }

    /// The guest was rebooted: what it held and had open is gone, the files are not.
    pub fn remount(&mut self) {
        self.view = View::default();
        self.shared_view = SharedView::default();
        let files = std::mem::take(&mut self.files).into_values().map(|file| file.id);
        let streams = std::mem::take(&mut self.streams).into_values().map(|stream| stream.id);
        for id in files.chain(streams) {
            self.tree.close(id);
        }
    }

    pub(super) fn note(&mut self, op: impl std::fmt::Debug, result: Result<(), Fault>) {
        let Err(fault) = result else { return };
        self.stopped |= fault.is_fatal();
        let failure = Failure {
            lane: self.name.clone(),
            seed: self.seed,
            step: self.step,
            op: format!("{op:?}"),
            kind: fault.kind,
            what: fault.what,
        };
        self.report.record(failure, fault.wrong_bytes);
        self.stopped |= self.report.errors() >= MAX_FAILURES;
    }

    /// The result is to be as the model says: both succeed, or both fail with the same errno.
    pub(super) fn agree<P, T>(&mut self, planned: Result<P, Errno>, answer: Result<T, CallError>) -> Outcome<(P, T)> {
        match (planned, answer) {
            (Ok(plan), Ok(answer)) => Ok(Some((plan, answer))),
            (Ok(_), Err(error)) => Err(error.into()),
            (Err(due), Ok(_)) => Err(Fault::new(Kind::MissingError, format!("success where {due} was due"))),
            (Err(due), Err(error)) => match error.errno() {
                Some(errno) if errno == due => {
                    self.report.refused += 1;
                    Ok(None)
                }
                Some(errno) => Err(Fault::new(Kind::WrongError, format!("{errno} where {due} was due"))),
                None => Err(error.into()),
            },
        }
    }

    /// Makes a change in the model, now that the server has made it, and in what the guest holds.
    pub(super) fn commit(&mut self, change: Change) {
        let touched: Vec<(Id, Name)> = change.touched().map(|(parent, name)| (parent, name.clone())).collect();
        self.tree.commit(change);
        let mut left = Vec::new();
        for (parent, name) in touched {
            for stream in self.streams.values_mut().filter(|stream| stream.id == parent) {
                stream.must.remove(&name);
                stream.may.insert(name.clone());
            }
            left.extend(self.view.leave(parent, &name));
            if let Ok(id) = self.tree.child(parent, &name) {
                self.view.enter(parent, &name, id);
            }
        }
        for id in left {
            self.evict_unless_used(id);
        }
    }

    /// A kernel evicts a node once no name leads to it and nobody has it open.
    pub(super) fn evict_unless_used(&mut self, id: Id) {
        let open = self.tree.get(id).is_some_and(|node| node.opens > 0);
        if id != TOP && !open && !self.view.has_name(id) {
            self.view.remove_dead(id);
        }
    }

    /// The model's node at a path that must exist.
    pub(super) fn resolve(&self, path: &Path) -> Result<Id, Fault> {
        self.tree.resolve(&path.0).map_err(|errno| script(&format!("{path:?}: {errno}")))
    }

    /// The node at a path that must exist, with LOOKUPs for the names the guest has not looked up.
    pub(super) fn reach(&mut self, path: &Path) -> Result<(Id, u64), Fault> {
        self.walk(&path.0)
    }

    /// Looks a name up that is about to be removed or replaced, as a kernel does first; one that is
    /// missing it would not ask to remove, but a server must know what to say.
    pub(super) fn visit(&mut self, path: &Path) -> Result<(), Fault> {
        match self.tree.resolve(&path.0) {
            Ok(_) => self.reach(path).map(drop),
            Err(_) => Ok(()),
        }
    }

    /// The node id of a node that is held: one that was just reached, or is open.
    pub(super) fn node(&self, id: Id) -> Result<u64, Fault> {
        self.view.node(id).ok_or_else(|| script("a node the guest does not hold"))
    }

    fn walk(&mut self, names: &[Name]) -> Result<(Id, u64), Fault> {
        let mut at = (TOP, self.top()?);
        for name in names {
            let id =
                self.tree.child(at.0, name).map_err(|errno| script(&format!("{}: {errno}", name.escape_ascii())))?;
            let node = match self.view.find(at.0, name) {
                Some(node) => node,
                None => {
                    let entry = self.fuse.lookup(at.1, name)?;
                    self.view.enter(at.0, name, id);
                    self.learn(id, &entry)?;
                    entry.nodeid
                }
            };
            at = (id, node);
        }
        Ok(at)
    }

    fn top(&mut self) -> Result<u64, Fault> {
        if let Some(node) = self.view.node(TOP) {
            return Ok(node);
        }
        let entry = self.fuse.lookup(ROOT, &self.name)?;
        self.learn(TOP, &entry)?;
        Ok(entry.nodeid)
    }

    /// The parent's node id and the name at the end of a path.
    pub(super) fn parent_node<'p>(&mut self, path: &'p Path) -> Result<(Id, u64, &'p Name), Fault> {
        let Some((name, parents)) = path.0.split_last() else {
            return Err(script("the lane's own directory has no name here"));
        };
        let (parent, node) = self.walk(parents)?;
        Ok((parent, node, name))
    }

    /// Takes note of an entry the server gave, and checks it.
    pub(super) fn learn(&mut self, id: Id, entry: &EntryOut) -> Result<(), Fault> {
        self.view.learn(id, entry)?;
        self.check_attr(id, &entry.attr)
    }

    pub(super) fn file(&self, slot: Slot) -> Result<OpenFile, Fault> {
        self.files.get(&slot).copied().ok_or_else(|| script(&format!("file {slot} is not open")))
    }

    /// An open file and the node id it goes with.
    pub(super) fn file_node(&mut self, slot: Slot) -> Result<(OpenFile, u64), Fault> {
        let file = self.file(slot)?;
        Ok((file, self.node(file.id)?))
    }

    /// Attributes against the model.
    pub(super) fn check_attr(&self, id: Id, attr: &Attr) -> Result<(), Fault> {
        let Some(node) = self.tree.get(id) else {
            return Ok(());
        };
        let mut wrong = Vec::new();
        let mut compare = |what: &str, due: u64, is: u64| {
            if due != is {
                wrong.push(format!("{what} {is:#o} instead of {due:#o}"));
            }
        };
        compare("type", node.file_type().into(), (attr.mode & libc::S_IFMT).into());
        if let Some(size) = node.size() {
            compare("size", size, attr.size);
        }
        if !node.is_directory() {
            compare("links", node.names.len() as u64, attr.nlink.into());
        }
        if id != TOP && !matches!(node.body, Body::Symlink(_)) {
            compare("mode", node.mode.into(), (attr.mode & 0o7777).into());
        }
        if id != TOP {
            compare("uid", node.owner.0.into(), attr.uid.into());
            compare("gid", node.owner.1.into(), attr.gid.into());
        }
        if let Some((seconds, nanoseconds)) = node.mtime {
            compare("mtime", seconds, attr.mtime);
            compare("mtime's nanoseconds", nanoseconds.into(), attr.mtimensec.into());
        }
        if wrong.is_empty() {
            return Ok(());
        }
        Err(Fault::new(Kind::WrongAttributes, format!("{id:?}: {}", wrong.join(", "))))
    }

    /// Sends FORGETs.
    pub(super) fn send_forgets(&mut self, nodes: &[ForgetOne], batch: bool) -> Result<(), Fault> {
        if batch {
            // As many as fit a request comfortably.
            for some in nodes.chunks(1000) {
                self.fuse.batch_forget(some)?;
            }
            return Ok(());
        }
        for one in nodes {
            self.fuse.forget(one.nodeid, one.nlookup)?;
        }
        Ok(())
    }
}

/// Bits a new file really gets.
pub(super) fn masked(mode: u32) -> u32 {
    mode & !UMASK
}

pub(super) fn script(what: &str) -> Fault {
    Fault::new(Kind::Script, what)
}
