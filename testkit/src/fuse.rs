//! A FUSE client like that of a Linux guest's kernel, on virtqueues.

pub mod call;
pub mod client;
pub mod dirent;
pub mod init;
pub mod paths;
pub mod wire;
