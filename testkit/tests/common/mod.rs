//! A share that stock virtiofsd serves, and a guest on it.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use testkit::guest::{Guest, GuestConfig};
use testkit::server::{Server, ServerCommand, stock_binary};

/// Stock virtiofsd on a temporary directory.
pub(crate) struct Stock {
    _directory: TempDir,
    share: PathBuf,
    server: Server,
}

impl Stock {
    /// Starts it with these arguments in addition to its defaults.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let directory = TempDir::new().unwrap();
        let share = directory.path().join("share");
        std::fs::create_dir(&share).unwrap();
        Self::serve(directory, share, arguments)
    }

    /// A second server on the same directory.
    #[allow(dead_code)] // Not every test uses two guests.
    pub(crate) fn beside(other: &Self) -> Self {
        Self::serve(TempDir::new().unwrap(), other.share(), &[])
    }

    fn serve(directory: TempDir, share: PathBuf, arguments: &[&str]) -> Self {
        let binary = stock_binary(None).unwrap_or_else(|error| panic!("{error}"));
        let socket = directory.path().join("fs.sock");
        let mut command = ServerCommand::stock(&binary, &share, socket);
        for argument in arguments {
            command = command.arg(argument);
        }
        let server = Server::start(&command).unwrap_or_else(|error| panic!("{error}"));
        Self { _directory: directory, share, server }
    }

    /// The shared directory on the host.
    pub(crate) fn share(&self) -> PathBuf {
        self.share.clone()
    }

    /// The vhost-user socket.
    pub(crate) fn socket(&self) -> &Path {
        self.server.socket()
    }

    /// The server's process.
    #[allow(dead_code)] // Not every test uses it.
    pub(crate) fn server(&mut self) -> &mut Server {
        &mut self.server
    }

    /// A mounted guest.
    #[allow(dead_code)] // Not every test uses the default guest.
    pub(crate) fn guest(&self) -> Guest {
        Guest::boot(GuestConfig::new(self.socket()).small()).unwrap()
    }
}
