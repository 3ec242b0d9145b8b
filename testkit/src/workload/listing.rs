//! Steps that read directories.

use std::collections::BTreeSet;

use nix::errno::Errno;

use super::lane::{Lane, Stream, script};
use super::op::{Path, Slot};
use super::report::{Fault, Kind};
use crate::fuse::dirent::Entry;
use crate::model::{Id, Name};

/// Size of a reply to READDIR.
const CHUNK: u32 = 4096;
/// Maximum number of replies of a listing. A longer one does not end.
const MAX_CHUNKS: usize = 10_000;

type Done = Result<(), Fault>;

impl Lane {
    pub(super) fn list(&mut self, path: &Path, plus: bool) -> Done {
        let (id, node) = self.reach(path)?;
        let mut stream = self.start_stream(id, node)?;
        let mut result = Ok(());
        for _ in 0..MAX_CHUNKS {
            result = self.read_on(&mut stream, CHUNK, plus);
            if result.is_err() || stream.ended {
                break;
            }
        }
        if !stream.ended && result.is_ok() {
            result = Err(Fault::new(Kind::WrongListing, "the listing does not end"));
        }
        self.fuse.releasedir(node, stream.fh)?;
        result
    }

    pub(super) fn open_stream(&mut self, path: &Path, slot: Slot) -> Done {
        let (id, node) = self.reach(path)?;
        let stream = self.start_stream(id, node)?;
        self.tree.open(id);
        self.streams.insert(slot, stream);
        Ok(())
    }

    pub(super) fn read_stream(&mut self, slot: Slot, size: u32, plus: bool) -> Done {
        let mut stream = self.take_stream(slot)?;
        let result = self.read_on(&mut stream, size, plus);
        self.streams.insert(slot, stream);
        result
    }

    pub(super) fn close_stream(&mut self, slot: Slot) -> Done {
        let stream = self.take_stream(slot)?;
        let node = self.node(stream.id)?;
        let released = self.fuse.releasedir(node, stream.fh);
        self.tree.close(stream.id);
        self.evict_unless_used(stream.id);
        Ok(released?)
    }

    fn take_stream(&mut self, slot: Slot) -> Result<Stream, Fault> {
        self.streams.remove(&slot).ok_or_else(|| script(&format!("stream {slot} is not open")))
    }

    fn start_stream(&mut self, id: Id, node: u64) -> Result<Stream, Fault> {
        let fh = self.fuse.opendir(node)?.fh;
        let must = self.tree.get(id).map(|node| node.children().map(|(name, _)| name.clone()).collect());
        Ok(Stream {
            id,
            fh,
            position: 0,
            must: must.unwrap_or_default(),
            may: BTreeSet::new(),
            seen: BTreeSet::new(),
            ended: false,
        })
    }

    /// One request at the stream's position.
    fn read_on(&mut self, stream: &mut Stream, size: u32, plus: bool) -> Done {
        let node = self.node(stream.id)?;
        let answer = match plus {
            true => self.fuse.readdirplus(node, stream.fh, stream.position, size),
            false => self.fuse.readdir(node, stream.fh, stream.position, size),
        };
        let entries = match answer {
            Ok(entries) => entries,
            // The host's kernel may return a name that was removed meanwhile. It cannot be looked up.
            Err(error) if plus && error.errno() == Some(Errno::ENOENT) && !stream.may.is_empty() => {
                stream.ended = true;
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        let Some(last) = entries.last() else {
            stream.ended = true;
            return complete(stream);
        };
        stream.position = last.next;
        let mut result = Ok(());
        for entry in &entries {
            // All lookups are counted, also after the first fault.
            result = result.and(self.take_entry(stream, entry));
        }
        result
    }

    fn take_entry(&mut self, stream: &mut Stream, entry: &Entry) -> Done {
        let name = &entry.name;
        let found = entry.found.filter(|found| found.nodeid != 0);
        let child = self.tree.child(stream.id, name).ok();
        let learned = match (found, child) {
            (Some(found), Some(child)) => {
                self.view.enter(stream.id, name, child);
                self.learn(child, &found)
            }
            (Some(found), None) => {
                self.view.disown(found.nodeid);
                Ok(())
            }
            (None, _) => Ok(()),
        };
        if name == b"." || name == b".." {
            return learned;
        }
        learned.and(admit(stream, name)).and_then(|()| match child {
            Some(child) if !stream.may.contains(name) => self.check_kind(child, entry),
            _ => Ok(()),
        })
    }

    fn check_kind(&self, child: Id, entry: &Entry) -> Done {
        let due = self.tree.get(child).map_or(0, |node| node.file_type() >> 12);
        if entry.kind == due || entry.kind == u32::from(libc::DT_UNKNOWN) {
            return Ok(());
        }
        let what = format!("{} has type {} instead of {due}", entry.name.escape_ascii(), entry.kind);
        Err(Fault::new(Kind::WrongListing, what))
    }
}

/// Checks a name of the listing: it must be known, and may be repeated only if it was added or removed meanwhile.
fn admit(stream: &mut Stream, name: &Name) -> Done {
    let fault = |what: &str| Err(Fault::new(Kind::WrongListing, format!("{} {what}", name.escape_ascii())));
    if stream.may.contains(name) {
        return Ok(());
    }
    if !stream.must.contains(name) {
        return fault("never existed");
    }
    if !stream.seen.insert(name.clone()) {
        return fault("was listed twice");
    }
    Ok(())
}

/// Checks at the end that all names that existed all the time were listed.
fn complete(stream: &Stream) -> Done {
    let missing: Vec<String> = stream.must.difference(&stream.seen).map(|n| n.escape_ascii().to_string()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Fault::new(Kind::WrongListing, format!("missing: {}", missing.join(", "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(must: &[&str], may: &[&str]) -> Stream {
        let names = |list: &[&str]| list.iter().map(|name| name.as_bytes().to_vec()).collect();
        Stream {
            id: crate::model::TOP,
            fh: 0,
            position: 0,
            must: names(must),
            may: names(may),
            seen: BTreeSet::new(),
            ended: false,
        }
    }

    #[test]
    fn a_stream_sees_each_lasting_name_once() {
        let mut stream = stream(&["a", "b"], &["c"]);
        assert!(admit(&mut stream, &b"a".to_vec()).is_ok());
        assert!(admit(&mut stream, &b"a".to_vec()).is_err());
        assert!(admit(&mut stream, &b"x".to_vec()).is_err());
        assert!(admit(&mut stream, &b"c".to_vec()).is_ok());
        assert!(admit(&mut stream, &b"c".to_vec()).is_ok());
        assert!(complete(&stream).is_err());
        assert!(admit(&mut stream, &b"b".to_vec()).is_ok());
        assert!(complete(&stream).is_ok());
    }
}
