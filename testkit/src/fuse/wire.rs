//! Structs of the FUSE wire format (protocol 7.41, `include/uapi/linux/fuse.h`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Node id of the root (FUSE_ROOT_ID).
pub const ROOT: u64 = 1;

/// Request codes (`enum fuse_opcode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
#[allow(missing_docs)] // The names are those of the protocol.
pub enum Opcode {
    Lookup = 1,
    Forget = 2,
    Getattr = 3,
    Setattr = 4,
    Readlink = 5,
    Symlink = 6,
    Mknod = 8,
    Mkdir = 9,
    Unlink = 10,
    Rmdir = 11,
    Rename = 12,
    Link = 13,
    Open = 14,
    Read = 15,
    Write = 16,
    Statfs = 17,
    Release = 18,
    Fsync = 20,
    Setxattr = 21,
    Getxattr = 22,
    Listxattr = 23,
    Removexattr = 24,
    Flush = 25,
    Init = 26,
    Opendir = 27,
    Readdir = 28,
    Releasedir = 29,
    Fsyncdir = 30,
    Access = 34,
    Create = 35,
    Destroy = 38,
    BatchForget = 42,
    Fallocate = 43,
    Readdirplus = 44,
    Rename2 = 45,
    Lseek = 46,
    CopyFileRange = 47,
    Syncfs = 50,
    Tmpfile = 51,
}

/// Defines a struct that is copied byte by byte to and from guest memory.
macro_rules! wire {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $kind:ty),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        #[allow(missing_docs)] // The names are those of the protocol.
        pub struct $name { $(pub $field: $kind),* }
    };
}

wire! {
    /// `struct fuse_in_header`: before each request.
    InHeader { len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32,
        total_extlen: u16, padding: u16 }
}
wire! {
    /// `struct fuse_out_header`: before each reply; `error` is a negative errno.
    OutHeader { len: u32, error: i32, unique: u64 }
}
wire! {
    /// `struct fuse_attr`.
    Attr { ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atimensec: u32,
        mtimensec: u32, ctimensec: u32, mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32,
        blksize: u32, flags: u32 }
}
wire! {
    /// `struct fuse_entry_out`: an existing or new name.
    EntryOut { nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64,
        entry_valid_nsec: u32, attr_valid_nsec: u32, attr: Attr }
}
wire! {
    /// `struct fuse_forget_in`.
    ForgetIn { nlookup: u64 }
}
wire! {
    /// `struct fuse_forget_one`.
    ForgetOne { nodeid: u64, nlookup: u64 }
}
wire! {
    /// `struct fuse_batch_forget_in`.
    BatchForgetIn { count: u32, dummy: u32 }
}
wire! {
    /// `struct fuse_getattr_in`.
    GetattrIn { flags: u32, dummy: u32, fh: u64 }
}
wire! {
    /// `struct fuse_attr_out`.
    AttrOut { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr }
}
wire! {
    /// `struct fuse_setattr_in`.
    SetattrIn { valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64, atime: u64,
        mtime: u64, ctime: u64, atimensec: u32, mtimensec: u32, ctimensec: u32, mode: u32,
        unused4: u32, uid: u32, gid: u32, unused5: u32 }
}
wire! {
    /// `struct fuse_mknod_in`.
    MknodIn { mode: u32, rdev: u32, umask: u32, padding: u32 }
}
wire! {
    /// `struct fuse_mkdir_in`.
    MkdirIn { mode: u32, umask: u32 }
}
wire! {
    /// `struct fuse_rename_in`.
    RenameIn { newdir: u64 }
}
wire! {
    /// `struct fuse_rename2_in`.
    Rename2In { newdir: u64, flags: u32, padding: u32 }
}
wire! {
    /// `struct fuse_link_in`.
    LinkIn { oldnodeid: u64 }
}
wire! {
    /// `struct fuse_open_in`.
    OpenIn { flags: u32, open_flags: u32 }
}
wire! {
    /// `struct fuse_create_in`.
    CreateIn { flags: u32, mode: u32, umask: u32, open_flags: u32 }
}
wire! {
    /// `struct fuse_open_out`.
    OpenOut { fh: u64, open_flags: u32, backing_id: i32 }
}
wire! {
    /// Reply to CREATE and TMPFILE: an entry and an open file.
    CreateOut { entry: EntryOut, open: OpenOut }
}
wire! {
    /// `struct fuse_release_in`.
    ReleaseIn { fh: u64, flags: u32, release_flags: u32, lock_owner: u64 }
}
wire! {
    /// `struct fuse_flush_in`.
    FlushIn { fh: u64, unused: u32, padding: u32, lock_owner: u64 }
}
wire! {
    /// `struct fuse_read_in`.
    ReadIn { fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32,
        padding: u32 }
}
wire! {
    /// `struct fuse_write_in`.
    WriteIn { fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32,
        padding: u32 }
}
wire! {
    /// `struct fuse_write_out`.
    WriteOut { size: u32, padding: u32 }
}
wire! {
    /// `struct fuse_kstatfs`.
    Kstatfs { blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64, bsize: u32,
        namelen: u32, frsize: u32, padding: u32, spare: [u32; 6] }
}
wire! {
    /// `struct fuse_fsync_in`.
    FsyncIn { fh: u64, fsync_flags: u32, padding: u32 }
}
wire! {
    /// The fields of `struct fuse_setxattr_in` without SETXATTR_EXT.
    SetxattrIn { size: u32, flags: u32 }
}
wire! {
    /// The additional fields with SETXATTR_EXT.
    SetxattrExt { setxattr_flags: u32, padding: u32 }
}
wire! {
    /// `struct fuse_getxattr_in`.
    GetxattrIn { size: u32, padding: u32 }
}
wire! {
    /// `struct fuse_getxattr_out`.
    GetxattrOut { size: u32, padding: u32 }
}
wire! {
    /// `struct fuse_access_in`.
    AccessIn { mask: u32, padding: u32 }
}
wire! {
    /// `struct fuse_init_in`, extended (INIT_EXT).
    InitIn { major: u32, minor: u32, max_readahead: u32, flags: u32, flags2: u32,
        unused: [u32; 11] }
}
wire! {
    /// `struct fuse_init_out`.
    InitOut { major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16,
        congestion_threshold: u16, max_write: u32, time_gran: u32, max_pages: u16,
        map_alignment: u16, flags2: u32, max_stack_depth: u32, request_timeout: u16,
        unused: [u16; 11] }
}
wire! {
    /// `struct fuse_fallocate_in`.
    FallocateIn { fh: u64, offset: u64, length: u64, mode: u32, padding: u32 }
}
wire! {
    /// `struct fuse_lseek_in`.
    LseekIn { fh: u64, offset: u64, whence: u32, padding: u32 }
}
wire! {
    /// `struct fuse_lseek_out`.
    LseekOut { offset: u64 }
}
wire! {
    /// `struct fuse_copy_file_range_in`.
    CopyFileRangeIn { fh_in: u64, off_in: u64, nodeid_out: u64, fh_out: u64, off_out: u64,
        len: u64, flags: u64 }
}
wire! {
    /// `struct fuse_syncfs_in`.
    SyncfsIn { padding: u64 }
}
wire! {
    /// `struct fuse_dirent`, followed by the name.
    Dirent { ino: u64, off: u64, namelen: u32, kind: u32 }
}
wire! {
    /// `struct fuse_direntplus`, followed by the name.
    DirentPlus { entry: EntryOut, dirent: Dirent }
}
wire! {
    /// `struct fuse_ext_header`: an extension after a request's arguments.
    ExtHeader { size: u32, kind: u32 }
}

/// `FATTR_*`: the valid fields of [`SetattrIn`].
#[allow(missing_docs)] // The names are those of the protocol.
pub mod fattr {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// FUSE_GETATTR_FH: `fh` is valid.
pub const GETATTR_FH: u32 = 1 << 0;
/// FUSE_ATTR_SUBMOUNT: the node is the root of a mount on the host.
pub const ATTR_SUBMOUNT: u32 = 1 << 0;
/// FUSE_FSYNC_FDATASYNC: synchronize data only.
pub const FSYNC_FDATASYNC: u32 = 1 << 0;
/// FUSE_WRITE_KILL_SUIDGID: clear suid and sgid.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// FUSE_OPEN_KILL_SUIDGID: clear suid and sgid at O_TRUNC.
pub const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// FUSE_EXT_GROUPS: supplementary groups as an extension.
pub const EXT_GROUPS: u32 = 32;

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes from the kernel's header: otherwise an additional field would not be detected.
    #[test]
    fn sizes_match_the_protocol() {
        assert_eq!(size_of::<InHeader>(), 40);
        assert_eq!(size_of::<OutHeader>(), 16);
        assert_eq!(size_of::<Attr>(), 88);
        assert_eq!(size_of::<EntryOut>(), 128);
        assert_eq!(size_of::<AttrOut>(), 104);
        assert_eq!(size_of::<SetattrIn>(), 88);
        assert_eq!(size_of::<CreateOut>(), 144);
        assert_eq!(size_of::<InitIn>(), 64);
        assert_eq!(size_of::<InitOut>(), 64);
        assert_eq!(size_of::<Kstatfs>(), 80);
        assert_eq!(size_of::<CopyFileRangeIn>(), 56);
        assert_eq!(size_of::<Dirent>(), 24);
        assert_eq!(size_of::<DirentPlus>(), 152);
    }
}
