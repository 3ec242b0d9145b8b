//! Replies in a form that is equal for two files with different inode numbers and times.

use std::fmt::{self, Debug, Formatter};
use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use virtiofsd::filesystem::{GetxattrReply, ListxattrReply};
use virtiofsd::fuse::Attr;

/// A reply, or the error number for the guest.
pub(super) type Reply = Result<(String, Bytes), i32>;

/// The content of a file or reply; too long to be printed.
#[derive(PartialEq, Eq)]
pub(super) struct Bytes(pub(super) Vec<u8>);

impl Debug for Bytes {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let shown = &self.0[..self.0.len().min(300)];
        write!(f, "{} bytes that begin with {}", self.0.len(), shown.escape_ascii())
    }
}

pub(super) fn reply<T: Debug>(result: io::Result<T>) -> Reply {
    reply_with(result.map(|value| (value, Vec::new())))
}

pub(super) fn reply_with<T: Debug>(result: io::Result<(T, Vec<u8>)>) -> Reply {
    let text = |(value, bytes)| (format!("{value:?}"), Bytes(bytes));
    result.map(text).map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))
}

/// Inode numbers differ, and file systems allocate blocks at different times.
pub(super) fn attr_reply(result: io::Result<(Attr, Duration)>, since: SystemTime) -> Reply {
    reply(result.map(|(attr, timeout)| {
        let time = |seconds, nanoseconds| described_time(seconds, nanoseconds, since);
        let times = [time(attr.atime, attr.atimensec), time(attr.mtime, attr.mtimensec)];
        let Attr { size, mode, nlink, uid, gid, rdev, blksize, flags, .. } = attr;
        (times, size, mode, nlink, uid, gid, rdev, blksize, flags, timeout)
    }))
}

pub(super) fn value_reply(result: io::Result<GetxattrReply>) -> Reply {
    reply_with(result.map(|reply| match reply {
        GetxattrReply::Value(value) => (None, value),
        GetxattrReply::Count(count) => (Some(count), Vec::new()),
    }))
}

pub(super) fn names_reply(result: io::Result<ListxattrReply>) -> Reply {
    reply_with(result.map(|reply| match reply {
        ListxattrReply::Names(names) => (None, names),
        ListxattrReply::Count(count) => (Some(count), Vec::new()),
    }))
}

/// Other processes change the free space.
pub(super) fn statfs_reply(result: io::Result<libc::statvfs64>) -> Reply {
    reply(result.map(|fs| (fs.f_bsize, fs.f_frsize, fs.f_blocks, fs.f_files, fs.f_fsid, fs.f_flag, fs.f_namemax)))
}

/// A time that was set, or "now" for a time since the comparison began.
pub(super) fn described_time(seconds: u64, nanoseconds: u32, since: SystemTime) -> String {
    let slack = Duration::from_secs(2);
    let at = UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
    match at {
        Some(at) if at + slack >= since && at <= SystemTime::now() + slack => "now".into(),
        _ => format!("{seconds}.{nanoseconds}"),
    }
}
