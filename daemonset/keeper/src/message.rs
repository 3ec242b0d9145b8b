//! Messages on the store socket: the part of sd_notify(3) that is about file descriptors. Pure.

use thiserror::Error;

/// Maximum length of a descriptor's name (`FDNAME_MAX` of systemd).
const LONGEST_NAME: usize = 255;

/// One datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// `FDSTORE=1`: store the descriptors of the datagram under a name.
    Store {
        /// `FDNAME`.
        name: String,
        /// `FDPOLL`: drop the descriptors, with their group, when they hang up. True unless it is 0.
        poll: bool,
    },
    /// `FDSTOREREMOVE=1`: close the descriptors of this name.
    Remove {
        /// `FDNAME`.
        name: String,
    },
    /// Any other message, such as `READY=1` or `BARRIER=1`. Its descriptors are closed, which completes a barrier.
    Other,
}

/// Why a datagram is invalid.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum InvalidMessage {
    #[error("not text")]
    NotText,
    #[error("FDSTORE and FDSTOREREMOVE need FDNAME")]
    NoName,
    #[error("FDNAME {0:?}: 1 to {LONGEST_NAME} printable ASCII characters without ':' are expected")]
    Name(String),
}

/// Parses lines of `KEY=VALUE`.
pub(crate) fn parse(datagram: &[u8]) -> Result<Message, InvalidMessage> {
    let text = std::str::from_utf8(datagram).map_err(|_| InvalidMessage::NotText)?;
    let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    let name = || match value("FDNAME") {
        None => Err(InvalidMessage::NoName),
        Some(name) if is_name(name) => Ok(name.to_owned()),
        Some(name) => Err(InvalidMessage::Name(name.chars().take(LONGEST_NAME).collect())),
    };
    if value("FDSTOREREMOVE") == Some("1") {
        return Ok(Message::Remove { name: name()? });
    }
    if value("FDSTORE") == Some("1") {
        return Ok(Message::Store { name: name()?, poll: value("FDPOLL") != Some("0") });
    }
    Ok(Message::Other)
}

fn is_name(name: &str) -> bool {
    let valid = |c: char| (' '..='~').contains(&c) && c != ':';
    (1..=LONGEST_NAME).contains(&name.len()) && name.chars().all(valid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_those_of_systemd() {
        let store = |poll| Ok(Message::Store { name: "a.b".into(), poll });
        for (text, expected) in [
            ("FDSTORE=1\nFDNAME=a.b", store(true)),
            ("FDNAME=a.b\nFDSTORE=1\n", store(true)),
            ("FDSTORE=1\nFDNAME=a.b\nFDPOLL=0", store(false)),
            ("FDSTORE=1\nFDNAME=a.b\nFDPOLL=1\nSTATUS=x", store(true)),
            ("FDSTOREREMOVE=1\nFDNAME=a.b", Ok(Message::Remove { name: "a.b".into() })),
            ("READY=1", Ok(Message::Other)),
            ("BARRIER=1", Ok(Message::Other)),
            ("FDSTORE=0\nFDNAME=a", Ok(Message::Other)),
            ("", Ok(Message::Other)),
        ] {
            assert_eq!(parse(text.as_bytes()), expected, "{text:?}");
        }
    }

    #[test]
    fn messages_of_each_version_of_brokers_are_read() {
        let fixture: Vec<String> = serde_json::from_str(include_str!("../layouts/to-keeper/1")).unwrap();
        let [stored, polled, removed] = <[String; 3]>::try_from(fixture).unwrap();
        let name = || "session-1.vmm".to_owned();
        assert_eq!(parse(stored.as_bytes()), Ok(Message::Store { name: name(), poll: false }));
        assert_eq!(parse(polled.as_bytes()), Ok(Message::Store { name: name(), poll: true }));
        assert_eq!(parse(removed.as_bytes()), Ok(Message::Remove { name: name() }));
    }

    #[test]
    fn invalid_name_is_refused() {
        let long = "x".repeat(LONGEST_NAME + 1);
        for name in ["", "a:b", "tab\t", "ü", &long] {
            let text = format!("FDSTORE=1\nFDNAME={name}\n");
            assert!(matches!(parse(text.as_bytes()), Err(InvalidMessage::Name(_))), "{name:?}");
        }
        assert_eq!(parse(b"FDSTORE=1"), Err(InvalidMessage::NoName));
        assert_eq!(parse(b"FDSTOREREMOVE=1"), Err(InvalidMessage::NoName));
        assert_eq!(parse(b"FDSTORE=1\nFDNAME=\xff"), Err(InvalidMessage::NotText));
    }
}
