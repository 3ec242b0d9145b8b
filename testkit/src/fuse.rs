//! A FUSE client as a Linux guest's kernel is one, on top of the virtqueues.

pub mod call;
pub mod client;
pub mod dirent;
pub mod init;
pub mod paths;
pub mod wire;
