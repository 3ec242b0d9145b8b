//! Datagrams of any content: bytes -> messages -> store.

use crate::message::{Message, parse};
use crate::store::{Bounds, Insertion, Store, Token};

const BOUNDS: Bounds = Bounds { descriptors: 8, groups: 4 };

/// Datagrams, each followed by a zero byte. An invalid one hangs up the oldest polled descriptor.
fn datagrams(input: &[u8]) -> bool {
    let mut store = Store::new(BOUNDS);
    let mut polled: Vec<Token> = Vec::new();
    let mut valid = true;
    for (fd, datagram) in input.split(|byte| *byte == 0).enumerate() {
        match parse(datagram) {
            Ok(Message::Store { name, poll }) => match store.insert(&name, fd, |a, b| a == b) {
                Insertion::Stored(token) if poll => polled.push(token),
                Insertion::Stored(_) | Insertion::Known(_) => {}
                Insertion::Full(..) => assert!(store.len().0 == BOUNDS.descriptors || store.len().1 == BOUNDS.groups),
            },
            Ok(Message::Remove { name }) => {
                store.remove(&name);
                assert!(store.all().all(|(other, _)| other != name));
            }
            Ok(Message::Other) if !polled.is_empty() => {
                if let Some((group, fds)) = store.hang_up(polled.remove(0)) {
                    assert!(!fds.is_empty() && store.hung_up().any(|it| it == group));
                }
            }
            Ok(Message::Other) => {}
            Err(_) => valid = false,
        }
        let (descriptors, groups) = store.len();
        assert!(
            descriptors <= BOUNDS.descriptors && groups <= BOUNDS.groups && store.hung_up().count() <= BOUNDS.groups
        );
        assert_eq!((store.all().count(), descriptors == 0), (descriptors, groups == 0));
    }
    valid
}

#[test]
fn fuzz_keeper_messages() {
    let words: [&[u8]; 6] = [b"FDSTORE=1\n", b"FDSTOREREMOVE=1\n", b"FDNAME=s-1.vmm\n", b"FDPOLL=0\n", b"\0", b"."];
    fuzz::run("keeper", &words, datagrams);
}
