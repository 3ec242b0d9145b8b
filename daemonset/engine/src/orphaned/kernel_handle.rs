//! Kernel file handles, which identify a file independently of its names.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

use virtiofsd::passthrough::file_handle::{FileHandle, SerializableFileHandle};

use super::errno;

/// Most bytes of a kernel file handle: the kernel's `MAX_HANDLE_SZ`.
pub(crate) const MAX_FILE_HANDLE: usize = 128;

/// `struct file_handle` with room for the longest one.
#[repr(C)]
struct RawHandle {
    length: libc::c_uint,
    kind: libc::c_int,
    bytes: [u8; MAX_FILE_HANDLE],
}

/// The file handle of an open file, as type and bytes; `None` if the file system has none, or only longer ones. Needs
/// no capability.
pub(crate) fn kernel_file_handle(file: &File) -> io::Result<Option<(i32, Vec<u8>)>> {
    let handle = FileHandle::from_fd(file)?.map(SerializableFileHandle::from);
    Ok(handle.map(|handle| (handle.handle_type(), handle.as_bytes().to_vec())))
}

/// Opens the file of a file handle on the file system of `mount`, which must not be an `O_PATH` descriptor. Needs
/// `CAP_DAC_READ_SEARCH`, checks permission for `flags`, and can open every file of that file system: the caller checks
/// that it is the right one.
///
/// # Errors
/// `ESTALE` if there is no such file any more, `EINVAL` if it cannot be a file handle.
pub(crate) fn open_by_kernel_handle(mount: &File, kind: i32, bytes: &[u8], flags: i32) -> io::Result<File> {
    let mut handle = RawHandle { length: bytes.len() as libc::c_uint, kind, bytes: [0; MAX_FILE_HANDLE] };
    handle.bytes.get_mut(..bytes.len()).ok_or_else(|| errno(libc::EINVAL))?.copy_from_slice(bytes);
    // SAFETY: `handle` has the layout of `struct file_handle` and as many bytes as it states; the call reads nothing
    // else. Nothing else owns the descriptor that it returns.
    unsafe {
        match libc::open_by_handle_at(mount.as_raw_fd(), (&raw mut handle).cast(), flags | libc::O_CLOEXEC) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(File::from_raw_fd(fd)),
        }
    }
}
