//! The layout of the ledger, compared with its fixture.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use testkit::layouts::{Layouts, parse_words, words};

use super::tests::{attach, ident, memory, picture, ticket};
use super::*;

/// A guest with a directory, a file of two names, an open file and a request in flight.
fn example() -> (OwnedFd, Ledger) {
    let fd = memory();
    // The key of the hash is random.
    let drawn = attach(&fd);
    drawn.words.set(header::KEY, 1);
    drawn.words.set(header::KEY + 1, 2);
    let mut ledger = attach(&fd);
    ledger.record_init(&[1; 40], &[2; 64]);
    ledger.begin(0, &ticket(1));
    let directory = ledger.add_node(0, ROOT, b"directory", ident(10)).unwrap().0;
    let file = ledger.add_node(0, directory, b"file", ident(11)).unwrap().0;
    ledger.add_lookup(0, directory, &[b'n'; 200], file).unwrap();
    let handle = FileHandle { kind: 1, bytes: vec![9; 13].into(), file_system: 8 };
    ledger.open(0, file, OpenKind::File, 2, &handle).unwrap();
    ledger.completion_log().finish(0, 24);
    ledger.completion_log().published(0);
    ledger.begin(1, &ticket(7));
    ledger.open(1, directory, OpenKind::Directory, 0, &FileHandle::default()).unwrap();
    (fd, ledger)
}

fn words_of(fd: &OwnedFd) -> String {
    let file = File::from(fd.as_fd().try_clone_to_owned().unwrap());
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    words(&bytes)
}

#[test]
fn ledger_is_that_of_its_version() {
    let (fd, ledger) = example();
    let present = words_of(&fd);
    Layouts::of(env!("CARGO_MANIFEST_DIR"), "ledger").check(VERSION, VERSION, present.as_bytes());

    // A ledger that another engine has written.
    let copy = memory();
    let file = File::from(copy.as_fd().try_clone_to_owned().unwrap());
    for (offset, value) in parse_words(present.as_bytes()) {
        file.write_all_at(&value.to_le_bytes(), offset).unwrap();
    }
    let read = Ledger::map(&copy, 1_000_000).unwrap();
    assert_eq!(read.init(), ledger.init());
    assert!(!read.has_unfinished(0) && read.has_unfinished(1));
    assert_eq!(picture(&attach(&copy)), picture(&ledger));
}

#[test]
fn ledger_of_another_version_is_refused_with_both_numbers() {
    let (fd, ledger) = example();
    for version in [VERSION - 1, VERSION + 1] {
        ledger.words.set(header::VERSION, version);
        let before = words_of(&fd);
        let error = Ledger::map(&fd, 1_000_000).err().unwrap().to_string();
        assert!(error.contains(&version.to_string()) && error.contains(&VERSION.to_string()), "{error}");
        assert_eq!(words_of(&fd), before, "nothing is written");
    }
}
