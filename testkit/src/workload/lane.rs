//! A lane, one thread of a workload: its directory, the model of it, and what the guest holds.

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

/// Mode bits that are cleared in new files.
const UMASK: u32 = 0o022;
/// Number of failures after which a lane stops: the others follow from the first.
const MAX_FAILURES: u64 = 16;

/// Features that a lane may use. Disable those that the host's file system lacks.
#[derive(Debug, Clone, Copy)]
pub struct Features {
    /// Extended attributes.
    pub xattrs: bool,
    /// Directory streams that are read in steps. They need stable positions.
    pub streams: bool,
    /// Changes of the owner.
    pub chown: bool,
    /// Maximum length of files.
    pub longest_file: u64,
    /// Approximate number of nodes in a lane.
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

/// A directory that is read in steps.
#[derive(Debug, Clone)]
pub(super) struct Stream {
    pub(super) id: Id,
    pub(super) fh: u64,
    pub(super) position: u64,
    /// Names that exist since the stream was opened: they must be listed exactly once.
    pub(super) must: BTreeSet<Name>,
    /// Names that were added or removed since: they may be listed.
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
    /// FALLOCATE modes that the file system does not support.
    pub(super) unsupported: HashSet<i32>,
    pub(super) report: Report,
    trace: Option<File>,
    step: u64,
    stopped: bool,
}

/// Result of a request that has to succeed, or to fail with a certain errno.
pub(super) type Outcome<T> = Result<Option<T>, Fault>;

impl Lane {
    /// Creates a lane in a new directory below the share's root. A failure is in the report.
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
        // If the directory already exists from another run, every comparison would fail.
        lane.stopped = learned.is_err();
        lane.note("mkdir of the lane's directory", learned);
        lane
    }

    /// Writes each further step to a file. A failure is in the report.
    pub fn trace_to(&mut self, path: Option<&path::Path>) {
        match path.map(File::create).transpose() {
            Ok(trace) => self.trace = trace,
            Err(error) => self.note("opening the trace", Err(script(&error.to_string()))),
        }
    }

    /// Results of the lane so far.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// True if the lane has stopped.
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Runs a step and checks its result.
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

    /// Runs the next step of the seed.
    pub fn run_random(&mut self) {
        let op = self.next_op();
        self.run(&op);
    }

    /// Records that the guest was rebooted: its nodes and open files are lost, the files are not.
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

    /// Compares a result with the model: both succeed, or both fail with the same errno.
    pub(super) fn agree<P, T>(&mut self, planned: Result<P, Errno>, answer: Result<T, CallError>) -> Outcome<(P, T)> {
        match (planned, answer) {
            (Ok(plan), Ok(answer)) => Ok(Some((plan, answer))),
            (Ok(_), Err(error)) => Err(error.into()),
            (Err(due), Ok(_)) => Err(Fault::new(Kind::MissingError, format!("success instead of {due}"))),
            (Err(due), Err(error)) => match error.errno() {
                Some(errno) if errno == due => {
                    self.report.refused += 1;
                    Ok(None)
                }
                Some(errno) => Err(Fault::new(Kind::WrongError, format!("{errno} instead of {due}"))),
                None => Err(error.into()),
            },
        }
    }

    /// Applies a change, which the server has made, to the model and to what the guest holds.
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

    /// Evicts a node that has no name and is not open, as a kernel does.
    pub(super) fn evict_unless_used(&mut self, id: Id) {
        let open = self.tree.get(id).is_some_and(|node| node.opens > 0);
        if id != TOP && !open && !self.view.has_name(id) {
            self.view.remove_dead(id);
        }
    }

    /// The model's node at an existing path.
    pub(super) fn resolve(&self, path: &Path) -> Result<Id, Fault> {
        self.tree.resolve(&path.0).map_err(|errno| script(&format!("{path:?}: {errno}")))
    }

    /// The node at an existing path. Sends LOOKUP for names that the guest has not looked up.
    pub(super) fn reach(&mut self, path: &Path) -> Result<(Id, u64), Fault> {
        self.walk(&path.0)
    }

    /// Looks up a name before it is removed or replaced, as a kernel does. A kernel would not remove a missing name,
    /// but a server must reply to it.
    pub(super) fn visit(&mut self, path: &Path) -> Result<(), Fault> {
        match self.tree.resolve(&path.0) {
            Ok(_) => self.reach(path).map(drop),
            Err(_) => Ok(()),
        }
    }

    /// The node id of a held node: one that was just looked up, or is open.
    pub(super) fn node(&self, id: Id) -> Result<u64, Fault> {
        self.view.node(id).ok_or_else(|| script("a node that the guest does not hold"))
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

    /// The parent's node id, and the last name of a path.
    pub(super) fn parent_node<'p>(&mut self, path: &'p Path) -> Result<(Id, u64, &'p Name), Fault> {
        let Some((name, parents)) = path.0.split_last() else {
            return Err(script("the lane's own directory has no name here"));
        };
        let (parent, node) = self.walk(parents)?;
        Ok((parent, node, name))
    }

    /// Records an entry from the server, and checks it.
    pub(super) fn learn(&mut self, id: Id, entry: &EntryOut) -> Result<(), Fault> {
        self.view.learn(id, entry)?;
        self.check_attr(id, &entry.attr)
    }

    pub(super) fn file(&self, slot: Slot) -> Result<OpenFile, Fault> {
        self.files.get(&slot).copied().ok_or_else(|| script(&format!("file {slot} is not open")))
    }

    /// An open file and its node id.
    pub(super) fn file_node(&mut self, slot: Slot) -> Result<(OpenFile, u64), Fault> {
        let file = self.file(slot)?;
        Ok((file, self.node(file.id)?))
    }

    /// Compares attributes with the model.
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
            // As many as fit into a request.
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

/// Mode bits of a new file after the umask.
pub(super) fn masked(mode: u32) -> u32 {
    mode & !UMASK
}

pub(super) fn script(what: &str) -> Fault {
    Fault::new(Kind::Script, what)
}
