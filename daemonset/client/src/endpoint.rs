//! Names of endpoints.
//!
//! | name | endpoint |
//! |---|---|
//! | `SHARE` | the share's own |
//! | `SHARE.NAME` | a socket that a person added (`virtiofsctl socket`) |
//! | `SHARE.volume.KEY` | a pod's volume |
//!
//! Names of shares and of added sockets have no dot, so the name alone determines the [`EndpointKind`].

use std::fmt;

use virtiofs_contract::control::EndpointKind;

/// The part of a volume's name between the share and its key.
const VOLUME: &str = "volume";

/// An endpoint, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointId<'a> {
    /// Name of the share.
    pub share: &'a str,
    /// Which kind of endpoint.
    pub kind: EndpointKind,
    /// Name of the added socket, or key of the volume; empty for the share's own endpoint.
    pub key: &'a str,
}

impl<'a> EndpointId<'a> {
    /// The endpoint of this name.
    pub fn parse(name: &'a str) -> Self {
        let Some((share, rest)) = name.split_once('.') else {
            return EndpointId { share: name, kind: EndpointKind::Share, key: "" };
        };
        match rest.split_once('.') {
            Some((VOLUME, key)) => EndpointId { share, kind: EndpointKind::Volume, key },
            _ => EndpointId { share, kind: EndpointKind::Socket, key: rest },
        }
    }

    /// The endpoint of a volume.
    pub fn volume(share: &'a str, key: &'a str) -> Self {
        EndpointId { share, kind: EndpointKind::Volume, key }
    }

    /// The endpoint of a socket that a person added.
    pub fn socket(share: &'a str, name: &'a str) -> Self {
        EndpointId { share, kind: EndpointKind::Socket, key: name }
    }
}

impl fmt::Display for EndpointId<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let EndpointId { share, kind, key } = self;
        match kind {
            EndpointKind::Share | EndpointKind::Listener => f.write_str(share),
            EndpointKind::Socket => write!(f, "{share}.{key}"),
            EndpointKind::Volume => write!(f, "{share}.{VOLUME}.{key}"),
        }
    }
}

/// The share that an endpoint belongs to.
pub fn share_of(endpoint: &str) -> &str {
    EndpointId::parse(endpoint).share
}

/// True if this is a share's own endpoint.
pub fn is_own(endpoint: &str) -> bool {
    EndpointId::parse(endpoint).kind == EndpointKind::Share
}

/// True if this is the endpoint of a pod's volume.
pub fn is_volume(endpoint: &str) -> bool {
    EndpointId::parse(endpoint).kind == EndpointKind::Volume
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_says_the_share_and_the_kind() {
        use EndpointKind::{Share, Socket, Volume};
        for (name, kind, key) in [
            ("images", Share, ""),
            ("images.vm-7", Socket, "vm-7"),
            ("images.v-0123456789abcdef", Socket, "v-0123456789abcdef"),
            ("images.volume", Socket, "volume"),
            ("images.volume.0123456789abcdef", Volume, "0123456789abcdef"),
            ("images.a.b", Socket, "a.b"),
        ] {
            let id = EndpointId::parse(name);
            assert_eq!((id.share, id.kind, id.key), ("images", kind, key));
            assert_eq!(id.to_string(), name);
        }
    }

    #[test]
    fn a_socket_named_like_a_volume_is_no_volume() {
        for name in ["v-1", "volume", "v-0123456789abcdef"] {
            assert!(!is_volume(&EndpointId::socket("images", name).to_string()));
        }
        assert!(is_volume(&EndpointId::volume("images", "1").to_string()));
    }
}
