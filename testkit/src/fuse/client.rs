//! The file operations of a guest, by node id and file handle.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use libc::{O_CREAT, O_EXCL, O_NOCTTY, O_TRUNC};
use zerocopy::IntoBytes;

use super::call::{Call, CallError, Pending, Reply};
use super::dirent::{self, Entry};
use super::init::{Agreement, InitFlags, InitRequest};
use super::wire::{
    AccessIn, Attr, AttrOut, BatchForgetIn, CopyFileRangeIn, CreateIn, CreateOut, EXT_GROUPS, EntryOut, ExtHeader,
    FSYNC_FDATASYNC, FallocateIn, FlushIn, ForgetIn, ForgetOne, FsyncIn, GETATTR_FH, GetattrIn, GetxattrIn,
    GetxattrOut, InHeader, InitOut, Kstatfs, LinkIn, LseekIn, LseekOut, MkdirIn, MknodIn, Opcode, OpenIn, OpenOut,
    ReadIn, ReleaseIn, Rename2In, RenameIn, SetattrIn, SetxattrExt, SetxattrIn, SyncfsIn, WriteIn, WriteOut, fattr,
};
use crate::virtio::queue::Queue;

/// Step between the numbers of two requests, as in the kernel (FUSE_REQ_ID_STEP).
const UNIQUE_STEP: u64 = 2;
/// Maximum length of an extended attribute and of a list of names (XATTR_SIZE_MAX, XATTR_LIST_MAX).
const XATTR_MAX: u32 = 65536;

/// The process on whose behalf requests are sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups; sent with CREATE_SUPP_GROUP.
    pub groups: Vec<u32>,
    /// File mode bits that are cleared in new files.
    pub umask: u32,
    /// Process id, for the server's logs.
    pub pid: u32,
    /// Security label of new files, as name and value; sent with SECURITY_CTX.
    pub label: Option<(String, Vec<u8>)>,
}

impl Default for Caller {
    /// Root of the guest.
    fn default() -> Self {
        Self { uid: 0, gid: 0, groups: Vec::new(), umask: 0o022, pid: 1, label: None }
    }
}

/// Changes of SETATTR.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SetAttr {
    /// Mode bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Length.
    pub size: Option<u64>,
    /// Access time: seconds, nanoseconds.
    pub atime: Option<(u64, u32)>,
    /// Modification time: seconds, nanoseconds.
    pub mtime: Option<(u64, u32)>,
    /// Handle of the open file through which the change is made.
    pub fh: Option<u64>,
}

#[derive(Debug)]
struct Shared {
    requests: Arc<Queue>,
    hiprio: Arc<Queue>,
    unique: AtomicU64,
    agreement: RwLock<Option<Agreement>>,
}

/// A FUSE client. Clones share the connection.
#[derive(Debug, Clone)]
pub struct Fuse {
    shared: Arc<Shared>,
    caller: Caller,
}

type CallResult<T> = Result<T, CallError>;

impl Fuse {
    /// Creates a client on a request queue and a high-priority queue.
    pub fn new(requests: Arc<Queue>, hiprio: Arc<Queue>) -> Self {
        Self {
            shared: Arc::new(Shared { requests, hiprio, unique: AtomicU64::new(0), agreement: RwLock::new(None) }),
            caller: Caller::default(),
        }
    }

    /// A client on the same connection for another caller.
    pub fn as_caller(&self, caller: Caller) -> Self {
        Self { shared: Arc::clone(&self.shared), caller }
    }

    /// Result of FUSE_INIT, if it was sent.
    pub fn agreement(&self) -> Option<Agreement> {
        *self.shared.agreement.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Submits a request without waiting for the reply, to have many in flight from one thread.
    pub fn start(&self, call: &Call<'_>) -> CallResult<Pending> {
        let unique = self.next_unique();
        let header = call.header(self.seed(unique));
        // FORGET has a queue of its own (`virtio_fs_send_forget`).
        let queue = match call.op {
            Opcode::Forget | Opcode::BatchForget => &self.shared.hiprio,
            _ => &self.shared.requests,
        };
        let ticket = queue.submit(&call.message(header.as_bytes())).map_err(|source| CallError::Queue {
            op: call.op,
            node: call.node,
            unique,
            source,
        })?;
        Ok(Pending {
            ticket,
            op: call.op,
            node: call.node,
            unique,
            reply: call.reply,
            reply_payload: call.reply_payload,
            answered: call.answered,
        })
    }

    /// Sends a request and waits for the reply.
    pub fn call(&self, call: &Call<'_>) -> CallResult<Reply> {
        self.start(call)?.wait()
    }

    /// FUSE_INIT: negotiates features.
    pub fn init(&self, request: &InitRequest) -> CallResult<Agreement> {
        let body = request.encode();
        let arguments = [body.as_bytes()];
        let reply = self.call(&Call::new(Opcode::Init, 0, &arguments).expecting::<InitOut>())?;
        let agreement = Agreement::decode(request, &reply.body()?).map_err(|what| reply.broken(what))?;
        *self.shared.agreement.write().unwrap_or_else(PoisonError::into_inner) = Some(agreement);
        Ok(agreement)
    }

    /// FUSE_DESTROY: the guest unmounts. The server returns the buffer without a reply.
    pub fn destroy(&self) -> CallResult<()> {
        self.call(&Call::new(Opcode::Destroy, 0, &[]).unanswered()).map(drop)
    }

    /// LOOKUP. Node id 0 in the reply: the name does not exist (a negative entry).
    pub fn lookup(&self, parent: u64, name: impl AsRef<[u8]>) -> CallResult<EntryOut> {
        let arguments = [name.as_ref(), b"\0"];
        self.request(Call::new(Opcode::Lookup, parent, &arguments))
    }

    /// FORGET: drops `count` lookups, and waits until the server has processed the request.
    pub fn forget(&self, node: u64, count: u64) -> CallResult<()> {
        let body = ForgetIn { nlookup: count };
        let arguments = [body.as_bytes()];
        self.call(&Call::new(Opcode::Forget, node, &arguments).unanswered()).map(drop)
    }

    /// BATCH_FORGET: drops lookups of many nodes.
    pub fn batch_forget(&self, nodes: &[ForgetOne]) -> CallResult<()> {
        let body = BatchForgetIn { count: nodes.len() as u32, dummy: 0 };
        let arguments = [body.as_bytes(), nodes.as_bytes()];
        self.call(&Call::new(Opcode::BatchForget, 0, &arguments).unanswered()).map(drop)
    }

    /// GETATTR by node, or through an open file.
    pub fn getattr(&self, node: u64, fh: Option<u64>) -> CallResult<Attr> {
        let body = GetattrIn { flags: if fh.is_some() { GETATTR_FH } else { 0 }, dummy: 0, fh: fh.unwrap_or(0) };
        let arguments = [body.as_bytes()];
        let answer: AttrOut = self.request(Call::new(Opcode::Getattr, node, &arguments))?;
        Ok(answer.attr)
    }

    /// SETATTR.
    pub fn setattr(&self, node: u64, set: &SetAttr) -> CallResult<Attr> {
        let body = set.encode();
        let arguments = [body.as_bytes()];
        let answer: AttrOut = self.request(Call::new(Opcode::Setattr, node, &arguments))?;
        Ok(answer.attr)
    }

    /// READLINK.
    pub fn readlink(&self, node: u64) -> CallResult<Vec<u8>> {
        let call = Call::new(Opcode::Readlink, node, &[]).receiving(libc::PATH_MAX as u32);
        self.call(&call)?.payload()
    }

    /// SYMLINK: creates the symbolic link `name` to `target`.
    pub fn symlink(&self, parent: u64, name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> CallResult<EntryOut> {
        let extensions = self.extensions();
        let arguments = [name.as_ref(), b"\0", target.as_ref(), b"\0", extensions.as_slice()];
        self.request(Call::new(Opcode::Symlink, parent, &arguments).extended(extensions.len()))
    }

    /// MKNOD: creates a file, FIFO, socket or device.
    pub fn mknod(&self, parent: u64, name: impl AsRef<[u8]>, mode: u32, rdev: u32) -> CallResult<EntryOut> {
        let body = MknodIn { mode: self.masked(mode), rdev, umask: self.caller.umask, padding: 0 };
        let extensions = self.extensions();
        let arguments = [body.as_bytes(), name.as_ref(), b"\0", &extensions];
        self.request(Call::new(Opcode::Mknod, parent, &arguments).extended(extensions.len()))
    }

    /// MKDIR.
    pub fn mkdir(&self, parent: u64, name: impl AsRef<[u8]>, mode: u32) -> CallResult<EntryOut> {
        let body = MkdirIn { mode: self.masked(mode), umask: self.caller.umask };
        let extensions = self.extensions();
        let arguments = [body.as_bytes(), name.as_ref(), b"\0", &extensions];
        self.request(Call::new(Opcode::Mkdir, parent, &arguments).extended(extensions.len()))
    }

    /// UNLINK.
    pub fn unlink(&self, parent: u64, name: impl AsRef<[u8]>) -> CallResult<()> {
        self.send(&Call::new(Opcode::Unlink, parent, &[name.as_ref(), b"\0"]))
    }

    /// RMDIR.
    pub fn rmdir(&self, parent: u64, name: impl AsRef<[u8]>) -> CallResult<()> {
        self.send(&Call::new(Opcode::Rmdir, parent, &[name.as_ref(), b"\0"]))
    }

    /// RENAME, or RENAME2 if there are flags (`RENAME_NOREPLACE`, `RENAME_EXCHANGE`), as the kernel does.
    pub fn rename(
        &self,
        parent: u64,
        name: impl AsRef<[u8]>,
        new_parent: u64,
        new_name: impl AsRef<[u8]>,
        flags: u32,
    ) -> CallResult<()> {
        let plain = RenameIn { newdir: new_parent };
        let flagged = Rename2In { newdir: new_parent, flags, padding: 0 };
        let (op, body) = match flags {
            0 => (Opcode::Rename, plain.as_bytes()),
            _ => (Opcode::Rename2, flagged.as_bytes()),
        };
        let arguments = [body, name.as_ref(), b"\0", new_name.as_ref(), b"\0"];
        self.send(&Call::new(op, parent, &arguments))
    }

    /// LINK: adds a name of `node`.
    pub fn link(&self, node: u64, parent: u64, name: impl AsRef<[u8]>) -> CallResult<EntryOut> {
        let body = LinkIn { oldnodeid: node };
        let arguments = [body.as_bytes(), name.as_ref(), b"\0"];
        self.request(Call::new(Opcode::Link, parent, &arguments))
    }

    /// OPEN.
    pub fn open(&self, node: u64, flags: i32) -> CallResult<OpenOut> {
        self.open_as(Opcode::Open, node, flags)
    }

    /// OPENDIR.
    pub fn opendir(&self, node: u64) -> CallResult<OpenOut> {
        self.open_as(Opcode::Opendir, node, libc::O_DIRECTORY)
    }

    /// CREATE: creates and opens a file.
    pub fn create(&self, parent: u64, name: impl AsRef<[u8]>, flags: i32, mode: u32) -> CallResult<CreateOut> {
        let body = CreateIn {
            flags: ((flags | O_CREAT) & !O_NOCTTY) as u32,
            mode: libc::S_IFREG | self.masked(mode),
            umask: self.caller.umask,
            open_flags: 0,
        };
        let extensions = self.extensions();
        let arguments = [body.as_bytes(), name.as_ref(), b"\0", &extensions];
        self.request(Call::new(Opcode::Create, parent, &arguments).extended(extensions.len()))
    }

    /// TMPFILE: creates and opens a file without a name.
    pub fn tmpfile(&self, parent: u64, flags: i32, mode: u32) -> CallResult<CreateOut> {
        let body = CreateIn {
            flags: flags as u32,
            mode: libc::S_IFREG | self.masked(mode),
            umask: self.caller.umask,
            open_flags: 0,
        };
        let arguments: [&[u8]; 2] = [body.as_bytes(), b"/\0"];
        self.request(Call::new(Opcode::Tmpfile, parent, &arguments))
    }

    /// READ. The result is shorter than `size` only at the end of the file.
    pub fn read(&self, node: u64, fh: u64, offset: u64, size: u32) -> CallResult<Vec<u8>> {
        let body = read_in(fh, offset, size);
        let arguments = [body.as_bytes()];
        self.call(&Call::new(Opcode::Read, node, &arguments).receiving(size))?.payload()
    }

    /// WRITE; `flags` are the flags that the file was opened with.
    pub fn write(&self, node: u64, fh: u64, offset: u64, data: &[u8], flags: i32) -> CallResult<u32> {
        let body = write_in(fh, offset, data.len() as u32, flags);
        let arguments = [body.as_bytes()];
        let call = Call::new(Opcode::Write, node, &arguments).sending(data);
        let reply = self.call(&call.expecting::<WriteOut>())?;
        let written = reply.body::<WriteOut>()?.size;
        if written as usize > data.len() {
            return Err(reply.broken(format!("{written} of {} bytes written", data.len())));
        }
        Ok(written)
    }

    /// STATFS.
    pub fn statfs(&self, node: u64) -> CallResult<Kstatfs> {
        self.request(Call::new(Opcode::Statfs, node, &[]))
    }

    /// RELEASE: the last close.
    pub fn release(&self, node: u64, fh: u64, flags: i32) -> CallResult<()> {
        self.release_as(Opcode::Release, node, fh, flags)
    }

    /// RELEASEDIR.
    pub fn releasedir(&self, node: u64, fh: u64) -> CallResult<()> {
        self.release_as(Opcode::Releasedir, node, fh, libc::O_DIRECTORY)
    }

    /// FLUSH: any close.
    pub fn flush(&self, node: u64, fh: u64) -> CallResult<()> {
        let body = FlushIn { fh, lock_owner: u64::from(self.caller.pid), ..FlushIn::default() };
        self.send(&Call::new(Opcode::Flush, node, &[body.as_bytes()]))
    }

    /// FSYNC.
    pub fn fsync(&self, node: u64, fh: u64, data_only: bool) -> CallResult<()> {
        self.fsync_as(Opcode::Fsync, node, fh, data_only)
    }

    /// FSYNCDIR.
    pub fn fsyncdir(&self, node: u64, fh: u64, data_only: bool) -> CallResult<()> {
        self.fsync_as(Opcode::Fsyncdir, node, fh, data_only)
    }

    /// SYNCFS.
    pub fn syncfs(&self, node: u64) -> CallResult<()> {
        let body = SyncfsIn::default();
        self.send(&Call::new(Opcode::Syncfs, node, &[body.as_bytes()]))
    }

    /// FALLOCATE; `mode` is FALLOC_FL_*.
    pub fn fallocate(&self, node: u64, fh: u64, mode: i32, offset: u64, length: u64) -> CallResult<()> {
        let body = FallocateIn { fh, offset, length, mode: mode as u32, padding: 0 };
        self.send(&Call::new(Opcode::Fallocate, node, &[body.as_bytes()]))
    }

    /// LSEEK. The kernel sends only SEEK_DATA and SEEK_HOLE.
    pub fn lseek(&self, node: u64, fh: u64, offset: u64, whence: i32) -> CallResult<u64> {
        let body = LseekIn { fh, offset, whence: whence as u32, padding: 0 };
        let arguments = [body.as_bytes()];
        let answer: LseekOut = self.request(Call::new(Opcode::Lseek, node, &arguments))?;
        Ok(answer.offset)
    }

    /// COPY_FILE_RANGE from `(node, fh, offset)` to `(node, fh, offset)`.
    pub fn copy_file_range(&self, from: (u64, u64, u64), to: (u64, u64, u64), len: u64) -> CallResult<u32> {
        let body = CopyFileRangeIn {
            fh_in: from.1,
            off_in: from.2,
            nodeid_out: to.0,
            fh_out: to.1,
            off_out: to.2,
            len,
            flags: 0,
        };
        let arguments = [body.as_bytes()];
        let answer: WriteOut = self.request(Call::new(Opcode::CopyFileRange, from.0, &arguments))?;
        Ok(answer.size)
    }

    /// READDIR at a position: 0 or an entry's `next`. Empty at the end.
    pub fn readdir(&self, node: u64, fh: u64, position: u64, size: u32) -> CallResult<Vec<Entry>> {
        let reply = self.list(Opcode::Readdir, node, fh, position, size)?;
        dirent::parse(&reply.payload()?).map_err(|error| reply.broken(error))
    }

    /// READDIRPLUS. Each entry with a node id other than 0 adds a lookup.
    pub fn readdirplus(&self, node: u64, fh: u64, position: u64, size: u32) -> CallResult<Vec<Entry>> {
        let reply = self.list(Opcode::Readdirplus, node, fh, position, size)?;
        dirent::parse_plus(&reply.payload()?).map_err(|error| reply.broken(error))
    }

    /// GETXATTR.
    pub fn getxattr(&self, node: u64, name: impl AsRef<[u8]>) -> CallResult<Vec<u8>> {
        let body = GetxattrIn { size: XATTR_MAX, padding: 0 };
        let arguments = [body.as_bytes(), name.as_ref(), b"\0"];
        let call = Call::new(Opcode::Getxattr, node, &arguments).receiving(body.size);
        self.call(&call)?.payload()
    }

    /// GETXATTR for the length only.
    pub fn getxattr_len(&self, node: u64, name: impl AsRef<[u8]>) -> CallResult<u32> {
        let body = GetxattrIn::default();
        let arguments = [body.as_bytes(), name.as_ref(), b"\0"];
        let answer: GetxattrOut = self.request(Call::new(Opcode::Getxattr, node, &arguments))?;
        Ok(answer.size)
    }

    /// LISTXATTR.
    pub fn listxattr(&self, node: u64) -> CallResult<Vec<Vec<u8>>> {
        let body = GetxattrIn { size: XATTR_MAX, padding: 0 };
        let arguments = [body.as_bytes()];
        let call = Call::new(Opcode::Listxattr, node, &arguments).receiving(body.size);
        let reply = self.call(&call)?;
        let list = reply.payload()?;
        match list.split_last() {
            None => Ok(Vec::new()),
            Some((0, names)) => Ok(names.split(|b| *b == 0).map(<[u8]>::to_vec).collect()),
            Some(_) => Err(reply.broken("the last name of the list is not terminated")),
        }
    }

    /// SETXATTR; `flags` are XATTR_CREATE and XATTR_REPLACE.
    pub fn setxattr(&self, node: u64, name: impl AsRef<[u8]>, value: &[u8], flags: i32) -> CallResult<()> {
        let body = SetxattrIn { size: value.len() as u32, flags: flags as u32 };
        let more = SetxattrExt::default();
        let more = match self.has(InitFlags::SETXATTR_EXT) {
            true => more.as_bytes(),
            false => &[],
        };
        let arguments = [body.as_bytes(), more, name.as_ref(), b"\0", value];
        self.send(&Call::new(Opcode::Setxattr, node, &arguments))
    }

    /// REMOVEXATTR.
    pub fn removexattr(&self, node: u64, name: impl AsRef<[u8]>) -> CallResult<()> {
        self.send(&Call::new(Opcode::Removexattr, node, &[name.as_ref(), b"\0"]))
    }

    /// ACCESS. The kernel sends it only without `default_permissions`, which virtiofs sets.
    pub fn access(&self, node: u64, mask: u32) -> CallResult<()> {
        let body = AccessIn { mask, padding: 0 };
        self.send(&Call::new(Opcode::Access, node, &[body.as_bytes()]))
    }

    /// True if a feature was negotiated.
    pub fn has(&self, flag: InitFlags) -> bool {
        self.agreement().is_some_and(|agreement| agreement.has(flag))
    }

    fn next_unique(&self) -> u64 {
        let before = self.shared.unique.fetch_add(UNIQUE_STEP, Ordering::Relaxed);
        before + UNIQUE_STEP
    }

    fn seed(&self, unique: u64) -> InHeader {
        InHeader { unique, uid: self.caller.uid, gid: self.caller.gid, pid: self.caller.pid, ..InHeader::default() }
    }

    fn request<T>(&self, call: Call<'_>) -> CallResult<T>
    where
        T: zerocopy::FromBytes + IntoBytes,
    {
        self.call(&call.expecting::<T>())?.body()
    }

    fn send(&self, call: &Call<'_>) -> CallResult<()> {
        self.call(call).map(drop)
    }

    fn open_as(&self, op: Opcode, node: u64, flags: i32) -> CallResult<OpenOut> {
        let mut kept = flags & !(O_CREAT | O_EXCL | O_NOCTTY);
        if !self.has(InitFlags::ATOMIC_O_TRUNC) {
            kept &= !O_TRUNC;
        }
        let body = OpenIn { flags: kept as u32, open_flags: 0 };
        self.request(Call::new(op, node, &[body.as_bytes()]))
    }

    fn release_as(&self, op: Opcode, node: u64, fh: u64, flags: i32) -> CallResult<()> {
        let body = ReleaseIn { fh, flags: flags as u32, ..ReleaseIn::default() };
        self.send(&Call::new(op, node, &[body.as_bytes()]))
    }

    fn fsync_as(&self, op: Opcode, node: u64, fh: u64, data_only: bool) -> CallResult<()> {
        let body = FsyncIn { fh, fsync_flags: if data_only { FSYNC_FDATASYNC } else { 0 }, padding: 0 };
        self.send(&Call::new(op, node, &[body.as_bytes()]))
    }

    fn list(&self, op: Opcode, node: u64, fh: u64, position: u64, size: u32) -> CallResult<Reply> {
        let body = read_in(fh, position, size);
        let arguments = [body.as_bytes()];
        self.call(&Call::new(op, node, &arguments).receiving(size))
    }

    /// Applies the umask. Without DONT_MASK the client applies it, with DONT_MASK the server.
    fn masked(&self, mode: u32) -> u32 {
        match self.has(InitFlags::DONT_MASK) {
            true => mode,
            false => mode & !self.caller.umask,
        }
    }

    /// Extensions of requests that create a file (`get_create_ext`): a security context if negotiated, possibly empty,
    /// and the supplementary groups if there are any.
    fn extensions(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if self.has(InitFlags::SECURITY_CTX) {
            bytes.extend(label_extension(self.caller.label.as_ref()));
        }
        if self.has(InitFlags::CREATE_SUPP_GROUP) && !self.caller.groups.is_empty() {
            bytes.extend(group_extension(&self.caller.groups));
        }
        bytes
    }
}

/// Arguments of READ, READDIR and READDIRPLUS.
pub fn read_in(fh: u64, offset: u64, size: u32) -> ReadIn {
    ReadIn { fh, offset, size, ..ReadIn::default() }
}

/// Arguments of WRITE.
pub fn write_in(fh: u64, offset: u64, size: u32, flags: i32) -> WriteIn {
    WriteIn { fh, offset, size, flags: flags as u32, ..WriteIn::default() }
}

/// `struct fuse_secctx_header`, followed by `struct fuse_secctx`, name and value if there is a label.
fn label_extension(label: Option<&(String, Vec<u8>)>) -> Vec<u8> {
    let mut contexts = Vec::new();
    if let Some((name, value)) = label {
        contexts.extend((value.len() as u32).to_le_bytes());
        contexts.extend(0u32.to_le_bytes());
        contexts.extend(name.as_bytes());
        contexts.push(0);
        contexts.extend(value);
        contexts.resize(contexts.len().next_multiple_of(8), 0);
    }
    let size = (size_of::<ExtHeader>() + contexts.len()) as u32;
    let header = ExtHeader { size, kind: u32::from(label.is_some()) };
    [header.as_bytes(), &contexts].concat()
}

/// `struct fuse_supp_groups` with its header, padded to 8 bytes.
fn group_extension(groups: &[u32]) -> Vec<u8> {
    let len = size_of::<ExtHeader>() + 4 + 4 * groups.len();
    let size = len.next_multiple_of(8);
    let header = ExtHeader { size: size as u32, kind: EXT_GROUPS };
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(&(groups.len() as u32).to_le_bytes());
    bytes.extend(groups.iter().flat_map(|group| group.to_le_bytes()));
    bytes.resize(size, 0);
    bytes
}

impl SetAttr {
    fn encode(&self) -> SetattrIn {
        let mut wire = SetattrIn::default();
        let mut set = |bit: u32, present: bool| {
            if present {
                wire.valid |= bit;
            }
        };
        set(fattr::MODE, self.mode.is_some());
        set(fattr::UID, self.uid.is_some());
        set(fattr::GID, self.gid.is_some());
        set(fattr::SIZE, self.size.is_some());
        set(fattr::ATIME, self.atime.is_some());
        set(fattr::MTIME, self.mtime.is_some());
        set(fattr::FH, self.fh.is_some());
        let (atime, atimensec) = self.atime.unwrap_or_default();
        let (mtime, mtimensec) = self.mtime.unwrap_or_default();
        SetattrIn {
            fh: self.fh.unwrap_or(0),
            size: self.size.unwrap_or(0),
            mode: self.mode.unwrap_or(0),
            uid: self.uid.unwrap_or(0),
            gid: self.gid.unwrap_or(0),
            atime,
            atimensec,
            mtime,
            mtimensec,
            ..wire
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_padded_to_eight_bytes() {
        let bytes = group_extension(&[1000, 1001]);
        assert_eq!(bytes.len(), 24);
        assert_eq!(&bytes[..4], &24_u32.to_le_bytes());
        assert_eq!(&bytes[8..12], &2_u32.to_le_bytes());
        assert_eq!(group_extension(&[7]).len(), 16);
    }

    #[test]
    fn setattr_has_only_given_fields() {
        let wire = SetAttr { size: Some(5), fh: Some(3), ..SetAttr::default() }.encode();
        assert_eq!(wire.valid, fattr::SIZE | fattr::FH);
        assert_eq!((wire.size, wire.fh), (5, 3));
    }
}
