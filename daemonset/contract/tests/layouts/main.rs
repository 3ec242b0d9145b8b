//! The layouts of messages and shared pages, compared with fixtures: another release must read what this one writes, and the
//! reverse.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod pages;
mod samples;

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;
use testkit::layouts::Layouts;
use virtiofs_contract::{OLDEST, VERSION};

fn layouts(name: &str) -> Layouts {
    Layouts::of(env!("CARGO_MANIFEST_DIR"), name)
}

/// Compares messages, one a line, with the fixture of their version. Messages of older versions must be readable.
fn check<M: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, messages: &[M]) {
    let lines: Vec<String> = messages.iter().map(|message| serde_json::to_string(message).unwrap()).collect();
    let present = lines.join("\n") + "\n";
    let older = layouts(name).check(OLDEST.into(), VERSION.into(), present.as_bytes());
    for (line, message) in lines.iter().zip(messages) {
        assert_eq!(serde_json::from_str::<M>(line).unwrap(), *message);
    }
    for (version, text) in older {
        for line in String::from_utf8(text).unwrap().lines() {
            serde_json::from_str::<M>(line)
                .unwrap_or_else(|error| panic!("{name}, version {version}: {error}\n{line}"));
        }
    }
}

#[test]
fn requests_to_the_broker_are_those_of_their_version() {
    check("requests", &samples::requests());
}

#[test]
fn responses_of_the_broker_are_those_of_their_version() {
    check("responses", &samples::responses());
}

#[test]
fn messages_to_engines_are_those_of_their_version() {
    check("to-engine", &samples::to_engine());
}

#[test]
fn messages_of_engines_are_those_of_their_version() {
    check("from-engine", &samples::from_engine());
}

#[test]
fn messages_about_stashed_files_are_those_of_their_version() {
    check("stash-requests", &samples::stash_requests());
    check("stash-replies", &samples::stash_replies());
}
