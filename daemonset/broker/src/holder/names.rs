//! Names of held descriptors: `GROUP.PART`. Pure.

use std::fmt;
use std::str::FromStr;

/// Descriptors that belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Group {
    /// The broker as a whole.
    Broker,
    /// An endpoint, by its serial number.
    Endpoint(u64),
    /// A session, by its serial number. A keeper drops the group when its VMM hangs up.
    Session(u64),
    /// The counts of a session, by its serial number. They stay when the VMM hangs up, until they are added to the
    /// counts of the endpoint.
    Account(u64),
}

/// A descriptor in a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// State of the broker or of an endpoint.
    State,
    /// The agent's values.
    Store,
    /// The listening socket of an endpoint.
    Listener,
    /// The directory of that socket.
    Directory,
    /// The connection of the VMM.
    Vmm,
    /// The session's record.
    Record,
    /// Pipe with the message of the VMM that is being handled.
    Message,
    /// Pipe with a reply to the VMM that is not sent yet.
    Reply,
    /// Counter page.
    Counters,
    /// Ledger.
    Ledger,
    /// Trace.
    Trace,
    /// A descriptor that the VMM sent, by the number in the record.
    Descriptor(u32),
    /// A stashed file, by the guest's handle.
    File(u64),
    /// A descriptor of an engine, by the engine's serial number.
    Engine(u64, EnginePart),
}

/// A descriptor of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum EnginePart {
    /// Its pidfd.
    Process,
    /// The broker's end of the control channel.
    Control,
    /// The vhost-user connection.
    FrontEnd,
    /// The broker's end of the fd stash channel.
    Stash,
    /// The reading end of its log.
    Log,
}

/// A name that the broker does not use.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct UnknownName;

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Group::Broker => f.write_str("broker"),
            Group::Endpoint(serial) => write!(f, "endpoint-{serial}"),
            Group::Session(serial) => write!(f, "session-{serial}"),
            Group::Account(serial) => write!(f, "account-{serial}"),
        }
    }
}

impl FromStr for Group {
    type Err = UnknownName;

    fn from_str(text: &str) -> Result<Self, UnknownName> {
        match text.split_once('-') {
            None if text == "broker" => Ok(Group::Broker),
            Some(("endpoint", serial)) => Ok(Group::Endpoint(number(serial)?)),
            Some(("session", serial)) => Ok(Group::Session(number(serial)?)),
            Some(("account", serial)) => Ok(Group::Account(number(serial)?)),
            _ => Err(UnknownName),
        }
    }
}

const PLAIN: [(Part, &str); 11] = [
    (Part::State, "state"),
    (Part::Store, "store"),
    (Part::Listener, "listener"),
    (Part::Directory, "directory"),
    (Part::Vmm, "vmm"),
    (Part::Record, "record"),
    (Part::Message, "message"),
    (Part::Reply, "reply"),
    (Part::Counters, "counters"),
    (Part::Ledger, "ledger"),
    (Part::Trace, "trace"),
];

const OF_ENGINES: [(EnginePart, &str); 5] = [
    (EnginePart::Process, "process"),
    (EnginePart::Control, "control"),
    (EnginePart::FrontEnd, "frontend"),
    (EnginePart::Stash, "stash"),
    (EnginePart::Log, "log"),
];

fn word<T: PartialEq>(table: &'static [(T, &'static str)], part: &T) -> &'static str {
    table.iter().find(|(known, _)| known == part).map_or("", |(_, word)| word)
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Descriptor(number) => write!(f, "fd-{number}"),
            Part::File(handle) => write!(f, "file-{handle}"),
            Part::Engine(serial, part) => write!(f, "engine-{serial}-{}", word(&OF_ENGINES, part)),
            plain => f.write_str(word(&PLAIN, plain)),
        }
    }
}

impl FromStr for Part {
    type Err = UnknownName;

    fn from_str(text: &str) -> Result<Self, UnknownName> {
        match text.split_once('-') {
            None => PLAIN.iter().find(|(_, word)| *word == text).map(|(part, _)| *part).ok_or(UnknownName),
            Some(("fd", rest)) => Ok(Part::Descriptor(number(rest)?)),
            Some(("file", rest)) => Ok(Part::File(number(rest)?)),
            Some(("engine", rest)) => {
                let (serial, part) = rest.split_once('-').ok_or(UnknownName)?;
                let part = OF_ENGINES.iter().find(|(_, word)| *word == part).ok_or(UnknownName)?.0;
                Ok(Part::Engine(number(serial)?, part))
            }
            Some(_) => Err(UnknownName),
        }
    }
}

/// Parses a number without sign and leading zeros, so that a descriptor has only one name.
fn number<T: FromStr + fmt::Display>(text: &str) -> Result<T, UnknownName> {
    text.parse::<T>().ok().filter(|number| number.to_string() == text).ok_or(UnknownName)
}

/// The name of a part.
pub(crate) fn name(group: Group, part: Part) -> String {
    format!("{group}.{part}")
}

/// Parses a name.
pub(crate) fn parse(name: &str) -> Result<(Group, Part), UnknownName> {
    let (group, part) = name.split_once('.').ok_or(UnknownName)?;
    Ok((group.parse()?, part.parse()?))
}

#[cfg(test)]
mod tests {
    use testkit::layouts::Layouts;

    use super::*;

    const GROUPS: [Group; 4] = [Group::Broker, Group::Endpoint(3), Group::Session(u64::MAX), Group::Account(3)];

    fn parts() -> Vec<Part> {
        let mut parts: Vec<Part> = PLAIN.iter().map(|(part, _)| *part).collect();
        parts.extend([Part::Descriptor(0), Part::Descriptor(u32::MAX), Part::File(u64::MAX)]);
        parts.extend(OF_ENGINES.map(|(part, _)| Part::Engine(7, part)));
        parts
    }

    #[test]
    fn names_are_those_of_their_version() {
        let names = GROUPS.map(|group| parts().into_iter().map(|part| name(group, part) + "\n").collect::<String>());
        let older = Layouts::of(env!("CARGO_MANIFEST_DIR"), "names").check(1, 1, names.concat().as_bytes());
        assert!(older.is_empty(), "the names of an older version are not tested");
    }

    #[test]
    fn names_are_parsed_back() {
        let parts = parts();
        for group in GROUPS {
            for part in &parts {
                let name = name(group, *part);
                assert_eq!(parse(&name), Ok((group, *part)), "{name}");
                // Valid names in systemd's protocol.
                assert!(name.len() <= 255 && name.bytes().all(|b| b.is_ascii_graphic() && b != b':'), "{name}");
            }
        }
        assert_eq!(name(Group::Session(3), Part::Engine(9, EnginePart::Process)), "session-3.engine-9-process");
    }

    #[test]
    fn other_names_are_unknown() {
        for text in [
            "",
            "stored",
            "session-1",
            "session-1.",
            "session.vmm",
            "session--1.vmm",
            "session-01.vmm",
            "session-1.vm",
            "session-1.fd-",
            "session-1.fd-x",
            "session-1.engine-1",
            "session-1.engine-1-x",
            "vmm.session-1",
        ] {
            assert_eq!(parse(text), Err(UnknownName), "{text:?}");
        }
    }
}
