//! Kernel file handles, which identify a file independently of its names.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

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

/// The file handle of an open file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KernelFileHandle {
    /// Type, which means something to the file system.
    pub(crate) kind: i32,
    /// The handle itself.
    pub(crate) bytes: Vec<u8>,
    /// Number of the mount on which the file is open.
    pub(crate) mount_id: u64,
}

/// The file handle of an open file; `None` if the file system has none, or only longer ones. Needs no capability.
pub(crate) fn kernel_file_handle(file: &File) -> io::Result<Option<KernelFileHandle>> {
    let mut handle = RawHandle { length: MAX_FILE_HANDLE as libc::c_uint, kind: 0, bytes: [0; MAX_FILE_HANDLE] };
    let mut mount_id: libc::c_int = 0;
    // SAFETY: `handle` has the layout of `struct file_handle` and as many bytes as it states; the call writes those and
    // `mount_id`, and reads the empty path.
    let result = unsafe {
        let (handle, path) = ((&raw mut handle).cast(), c"".as_ptr());
        libc::name_to_handle_at(file.as_raw_fd(), path, handle, &raw mut mount_id, libc::AT_EMPTY_PATH)
    };
    if result != 0 {
        let failed = io::Error::last_os_error();
        let none = [libc::EOPNOTSUPP, libc::EOVERFLOW].map(Some).contains(&failed.raw_os_error());
        return if none { Ok(None) } else { Err(failed) };
    }
    let bytes = handle.bytes.get(..handle.length as usize).ok_or_else(|| errno(libc::EOVERFLOW))?.to_vec();
    Ok(Some(KernelFileHandle { kind: handle.kind, bytes, mount_id: mount_id as u64 }))
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
