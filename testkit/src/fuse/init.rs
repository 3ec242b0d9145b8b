//! Negotiation of client and server in FUSE_INIT.

use bitflags::bitflags;

use super::wire::{InitIn, InitOut};

bitflags! {
    /// `FUSE_*` of `fuse_init_in.flags` and, above bit 31, of `flags2`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct InitFlags: u64 {
        /// `FUSE_ASYNC_READ`.
        const ASYNC_READ = 1 << 0;
        /// `FUSE_POSIX_LOCKS`.
        const POSIX_LOCKS = 1 << 1;
        /// `FUSE_ATOMIC_O_TRUNC`.
        const ATOMIC_O_TRUNC = 1 << 3;
        /// `FUSE_EXPORT_SUPPORT`.
        const EXPORT_SUPPORT = 1 << 4;
        /// `FUSE_BIG_WRITES`.
        const BIG_WRITES = 1 << 5;
        /// `FUSE_DONT_MASK`.
        const DONT_MASK = 1 << 6;
        /// `FUSE_SPLICE_WRITE`.
        const SPLICE_WRITE = 1 << 7;
        /// `FUSE_SPLICE_MOVE`.
        const SPLICE_MOVE = 1 << 8;
        /// `FUSE_SPLICE_READ`.
        const SPLICE_READ = 1 << 9;
        /// `FUSE_FLOCK_LOCKS`.
        const FLOCK_LOCKS = 1 << 10;
        /// `FUSE_HAS_IOCTL_DIR`.
        const HAS_IOCTL_DIR = 1 << 11;
        /// `FUSE_AUTO_INVAL_DATA`.
        const AUTO_INVAL_DATA = 1 << 12;
        /// `FUSE_DO_READDIRPLUS`.
        const DO_READDIRPLUS = 1 << 13;
        /// `FUSE_READDIRPLUS_AUTO`.
        const READDIRPLUS_AUTO = 1 << 14;
        /// `FUSE_ASYNC_DIO`.
        const ASYNC_DIO = 1 << 15;
        /// `FUSE_WRITEBACK_CACHE`.
        const WRITEBACK_CACHE = 1 << 16;
        /// `FUSE_NO_OPEN_SUPPORT`.
        const NO_OPEN_SUPPORT = 1 << 17;
        /// `FUSE_PARALLEL_DIROPS`.
        const PARALLEL_DIROPS = 1 << 18;
        /// `FUSE_HANDLE_KILLPRIV`.
        const HANDLE_KILLPRIV = 1 << 19;
        /// `FUSE_POSIX_ACL`.
        const POSIX_ACL = 1 << 20;
        /// `FUSE_ABORT_ERROR`.
        const ABORT_ERROR = 1 << 21;
        /// `FUSE_MAX_PAGES`.
        const MAX_PAGES = 1 << 22;
        /// `FUSE_CACHE_SYMLINKS`.
        const CACHE_SYMLINKS = 1 << 23;
        /// `FUSE_NO_OPENDIR_SUPPORT`.
        const NO_OPENDIR_SUPPORT = 1 << 24;
        /// `FUSE_EXPLICIT_INVAL_DATA`.
        const EXPLICIT_INVAL_DATA = 1 << 25;
        /// `FUSE_SUBMOUNTS`.
        const SUBMOUNTS = 1 << 27;
        /// `FUSE_HANDLE_KILLPRIV_V2`.
        const HANDLE_KILLPRIV_V2 = 1 << 28;
        /// `FUSE_SETXATTR_EXT`.
        const SETXATTR_EXT = 1 << 29;
        /// `FUSE_INIT_EXT`.
        const INIT_EXT = 1 << 30;
        /// `FUSE_SECURITY_CTX`.
        const SECURITY_CTX = 1 << 32;
        /// `FUSE_CREATE_SUPP_GROUP`.
        const CREATE_SUPP_GROUP = 1 << 34;
        /// `FUSE_HAS_EXPIRE_ONLY`.
        const HAS_EXPIRE_ONLY = 1 << 35;
        /// `FUSE_DIRECT_IO_ALLOW_MMAP`.
        const DIRECT_IO_ALLOW_MMAP = 1 << 36;
        /// `FUSE_NO_EXPORT_SUPPORT`.
        const NO_EXPORT_SUPPORT = 1 << 38;
        /// `FUSE_HAS_RESEND`.
        const HAS_RESEND = 1 << 39;
        /// `FUSE_ALLOW_IDMAP`.
        const ALLOW_IDMAP = 1 << 40;
    }
}

impl InitFlags {
    /// The features that Linux 6.12 offers on a virtiofs mount without DAX (`fuse_send_init`; virtiofs sets
    /// `auto_submounts`): all flags above.
    pub fn linux_6_12() -> Self {
        Self::all()
    }
}

/// Content of the FUSE_INIT request.
#[derive(Debug, Clone, Copy)]
pub struct InitRequest {
    /// Protocol minor version, below major 7.
    pub minor: u32,
    /// Read-ahead in bytes.
    pub max_readahead: u32,
    /// Offered features.
    pub flags: InitFlags,
}

impl Default for InitRequest {
    fn default() -> Self {
        Self { minor: 41, max_readahead: 128 << 10, flags: InitFlags::linux_6_12() }
    }
}

impl InitRequest {
    /// The request in wire format.
    pub fn encode(&self) -> InitIn {
        InitIn {
            major: 7,
            minor: self.minor,
            max_readahead: self.max_readahead,
            flags: self.flags.bits() as u32,
            flags2: (self.flags.bits() >> 32) as u32,
            unused: [0; 11],
        }
    }
}

/// Result of the negotiation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agreement {
    /// The server's protocol minor version.
    pub minor: u32,
    /// Negotiated features.
    pub flags: InitFlags,
    /// Longest write in bytes.
    pub max_write: u32,
    /// Maximum number of pages in one request.
    pub max_pages: u16,
}

impl Agreement {
    /// Decodes the server's reply. A server must not accept features that the client did not offer.
    pub fn decode(request: &InitRequest, reply: &InitOut) -> Result<Self, String> {
        if reply.major != 7 {
            return Err(format!("FUSE major version {}", reply.major));
        }
        let bits = u64::from(reply.flags) | u64::from(reply.flags2) << 32;
        let unasked = bits & !request.flags.bits();
        if unasked != 0 {
            return Err(format!("the reply sets flags {unasked:#x}, which were not offered"));
        }
        Ok(Self {
            minor: reply.minor,
            flags: InitFlags::from_bits_truncate(bits),
            max_write: reply.max_write,
            max_pages: reply.max_pages,
        })
    }

    /// True if a feature was negotiated.
    pub fn has(&self, flag: InitFlags) -> bool {
        self.flags.contains(flag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_above_bit_31_are_in_the_second_word() {
        let request =
            InitRequest { flags: InitFlags::INIT_EXT | InitFlags::CREATE_SUPP_GROUP, ..InitRequest::default() };
        let wire = request.encode();
        assert_eq!((wire.flags, wire.flags2), (1 << 30, 1 << 2));
    }

    #[test]
    fn a_feature_that_was_not_offered_is_a_violation() {
        let request = InitRequest { flags: InitFlags::ASYNC_READ, ..InitRequest::default() };
        let reply = InitOut { major: 7, minor: 38, flags: 1 | 1 << 5, ..InitOut::default() };
        assert!(Agreement::decode(&request, &reply).is_err());
    }
}
