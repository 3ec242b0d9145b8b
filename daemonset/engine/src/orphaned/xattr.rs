//! Extended attributes.

use std::ffi::CStr;
use std::fs::File;
use std::io;

use rustix::fs::{XattrFlags, fgetxattr, fgetxattr_query, flistxattr, flistxattr_query, fremovexattr, fsetxattr};
use virtiofsd::filesystem::{GetxattrReply, ListxattrReply, SetxattrFlags};
use virtiofsd::oslib;
use virtiofsd::passthrough::stat::statx;

use super::{OrphanedFile, OrphanedFileServer, errno};

/// Longest value and longest list of names of the kernel; it treats a larger buffer as one of this size.
const MAX_LENGTH: usize = 65536;

impl OrphanedFileServer {
    pub(crate) fn setxattr(
        &self,
        orphan: &OrphanedFile,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra_flags: SetxattrFlags,
    ) -> io::Result<()> {
        self.may_change()?;
        self.names.enabled()?;
        let name = self.names.to_host(name)?;
        let file = self.reopen_for_xattr(orphan)?;
        self.clear_file_capabilities(orphan, &file)?;
        if self.acl_clears_sgid(&name, extra_flags) {
            clear_sgid(&file)?;
        }
        Ok(fsetxattr(&file, name.as_ref(), value, XattrFlags::from_bits_retain(flags))?)
    }

    pub(crate) fn getxattr(&self, orphan: &OrphanedFile, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        self.names.enabled()?;
        let name = self.names.to_host(name).map_err(denied_is_absent)?;
        let file = self.reopen_for_xattr(orphan)?;
        if size == 0 {
            return Ok(GetxattrReply::Count(fgetxattr_query(&file, name.as_ref())? as u32));
        }
        let mut value = buffer(size);
        let length = fgetxattr(&file, name.as_ref(), &mut value[..])?;
        value.truncate(length);
        Ok(GetxattrReply::Value(value))
    }

    pub(crate) fn listxattr(&self, orphan: &OrphanedFile, size: u32) -> io::Result<ListxattrReply> {
        self.names.enabled()?;
        let file = self.reopen_for_xattr(orphan)?;
        if size == 0 {
            return Ok(ListxattrReply::Count(flistxattr_query(&file)? as u32));
        }
        let mut list = buffer(size);
        let length = flistxattr(&file, &mut list[..])?;
        list.truncate(length);
        Ok(ListxattrReply::Names(self.names.to_guest(list)?))
    }

    pub(crate) fn removexattr(&self, orphan: &OrphanedFile, name: &CStr) -> io::Result<()> {
        self.may_change()?;
        self.names.enabled()?;
        let name = self.names.to_host(name)?;
        let file = self.reopen_for_xattr(orphan)?;
        Ok(fremovexattr(&file, name.as_ref())?)
    }

    /// These requests have a node and no handle, so the library opens the node for reading, which may fail.
    fn reopen_for_xattr(&self, orphan: &OrphanedFile) -> io::Result<File> {
        self.reopen(orphan, libc::O_RDONLY | libc::O_NONBLOCK)
    }

    fn acl_clears_sgid(&self, name: &CStr, extra_flags: SetxattrFlags) -> bool {
        self.names.posix_acls()
            && extra_flags.contains(SetxattrFlags::SETXATTR_ACL_KILL_SGID)
            && name == c"system.posix_acl_access"
    }
}

fn clear_sgid(file: &File) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let mode = statx(file, None)?.st.st_mode;
    oslib::fchmod(file.as_raw_fd(), mode & 0o7777 & !libc::S_ISGID)
}

/// A denied name is reported as absent.
fn denied_is_absent(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::PermissionDenied { errno(libc::ENODATA) } else { error }
}

fn buffer(size: u32) -> Vec<u8> {
    vec![0; (size as usize).min(MAX_LENGTH)]
}
