//! Names of extended attributes, between guest and host.

use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use virtiofsd::passthrough::Config;
use virtiofsd::passthrough::xattrmap::{AppliedRule, XattrMap};

use super::errno;

const FILE_CAPABILITIES: &CStr = c"security.capability";
const ACLS: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];

/// Translation of names, as the library does it: the map is the library's, the rest is private there.
pub(super) struct XattrNames {
    enabled: bool,
    map: Option<XattrMap>,
    posix_acls: AtomicBool,
    file_capabilities: Option<CString>,
}

impl XattrNames {
    pub(super) fn new(library: &Config) -> Self {
        let mut names = XattrNames {
            enabled: library.xattr,
            map: library.xattrmap.clone(),
            posix_acls: AtomicBool::new(false),
            file_capabilities: None,
        };
        names.file_capabilities = names.renamed(FILE_CAPABILITIES);
        names
    }

    fn renamed(&self, name: &CStr) -> Option<CString> {
        self.to_host(name).ok().filter(|host| host.as_ref() != name).map(Cow::into_owned)
    }

    pub(super) fn allow_posix_acls(&self, allowed: bool) {
        self.posix_acls.store(allowed, Ordering::Relaxed);
    }

    /// True if POSIX ACLs were agreed with the guest.
    pub(super) fn posix_acls(&self) -> bool {
        self.posix_acls.load(Ordering::Relaxed)
    }

    /// # Errors
    /// `ENOSYS` if the share has no extended attributes.
    pub(super) fn enabled(&self) -> io::Result<()> {
        if self.enabled { Ok(()) } else { Err(errno(libc::ENOSYS)) }
    }

    /// The host's name of the guest's file capabilities, if it is another one.
    pub(super) fn file_capabilities(&self) -> Option<&CStr> {
        self.file_capabilities.as_deref()
    }

    /// The host's name for the guest's `name`.
    ///
    /// # Errors
    /// `EPERM` or `ENOTSUP`, as the rules say; `ENOTSUP` for ACLs that were not agreed, and for a name that no rule
    /// matches (the library panics).
    pub(super) fn to_host<'a>(&self, name: &'a CStr) -> io::Result<Cow<'a, CStr>> {
        if self.hidden(name.to_bytes()) {
            return Err(errno(libc::ENOTSUP));
        }
        let Some(map) = &self.map else { return Ok(Cow::Borrowed(name)) };
        match map.map_client_xattr(name) {
            Ok(AppliedRule::Pass(host)) => Ok(host),
            Ok(AppliedRule::Deny) => Err(errno(libc::EPERM)),
            Ok(AppliedRule::Unsupported) | Err(_) => Err(errno(libc::ENOTSUP)),
        }
    }

    /// The guest's names for a list that the kernel returned.
    ///
    /// # Errors
    /// `ENOTSUP` if no rule matches a name (the library panics).
    pub(super) fn to_guest(&self, list: Vec<u8>) -> io::Result<Vec<u8>> {
        let list = match &self.map {
            Some(map) => map.map_server_xattrlist(list).map_err(|_| errno(libc::ENOTSUP))?,
            None => list,
        };
        let shown = list.split(|byte| *byte == 0).filter(|name| !name.is_empty() && !self.hidden(name));
        Ok(shown.flat_map(|name| name.iter().copied().chain([0])).collect())
    }

    /// True for ACLs that were not agreed. Like the library, this matches every prefix of their names, the empty one
    /// included.
    fn hidden(&self, name: &[u8]) -> bool {
        !self.posix_acls() && ACLS.iter().any(|acl| acl.starts_with(name))
    }
}
