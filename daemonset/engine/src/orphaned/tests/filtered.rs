//! Runs all operations under the engine's system call filter: a call that is not listed kills this process.

use std::thread;

use virtiofsd::passthrough::PassthroughFs;
use virtiofsd::passthrough::read_only::PassthroughFsRo;

use super::pair::{Pair, Share, Start};
use super::settings::SETTINGS;
use super::tables::operations;
use crate::orphaned::{kernel_file_handle, open_by_kernel_handle};
use crate::seccomp;

#[test]
fn a_writable_engine_passes_the_filter() {
    run_behind_the_filter::<PassthroughFs>(libc::O_RDWR);
}

#[test]
fn a_read_only_engine_passes_the_filter() {
    run_behind_the_filter::<PassthroughFsRo>(libc::O_RDONLY);
}

fn run_behind_the_filter<F: Share + Send>(flags: i32) {
    let mut pairs: Vec<_> =
        SETTINGS.iter().map(|setting| Pair::<F>::new(setting.1, Start { flags, ..Start::default() })).collect();
    // The filter applies to one thread; another one removes the files.
    thread::scope(|scope| {
        scope.spawn(|| {
            seccomp::install(F::WRITABLE).unwrap();
            for pair in &mut pairs {
                for operation in operations() {
                    let _answer = pair.through_ours(&operation);
                }
                let handle = kernel_file_handle(pair.file.file()).unwrap().unwrap();
                open_by_kernel_handle(&pair.our_other, handle.kind, &handle.bytes, libc::O_RDONLY).unwrap();
            }
        });
    });
}
