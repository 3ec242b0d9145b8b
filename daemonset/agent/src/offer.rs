//! At which endpoints a share is offered: one of its own name, and those that somebody has asked for.

use std::collections::BTreeMap;

use virtiofs_contract::control::{Endpoint, SocketSpec};
use virtiofs_crds::Share;

use crate::desired::Desired;
use crate::observed::{Asked, Asker};
use crate::plan;
use crate::runtime_dir::RuntimeDir;
use crate::source::Source;

/// An endpoint at which a declared share is to be offered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Offer<'a> {
    /// Name of the endpoint.
    pub(crate) name: &'a str,
    /// The share.
    pub(crate) share: &'a Share,
    /// As it was asked for; none: the share's own.
    asked: Option<&'a Asked>,
}

impl Offer<'_> {
    /// What the broker is to be told, now that the share's source was found. Where it listens, and what part of
    /// the source it offers, is for those to say who asked for it; all else follows from the share.
    pub(crate) fn endpoint(&self, runtime_dir: &RuntimeDir, source: &Source) -> Endpoint {
        let own = plan::endpoint(runtime_dir, self.share, source);
        match self.asked {
            None => own,
            Some(asked) => {
                let socket = match asked.by {
                    Asker::Broker(_) => asked.endpoint.socket.clone(),
                    // Who may connect is for the share to say, and for the pod only which group is its own.
                    Asker::Volume => SocketSpec {
                        path: asked.endpoint.socket.path.clone(),
                        group: asked.endpoint.socket.group.or(own.socket.group),
                        ..own.socket
                    },
                };
                Endpoint {
                    source: own.source,
                    engine: own.engine,
                    exclusive: own.exclusive,
                    socket,
                    ..asked.endpoint.clone()
                }
            }
        }
    }

    /// Is it a volume's?
    pub(crate) fn is_volume(&self) -> bool {
        self.asked.is_some_and(|asked| asked.by == Asker::Volume)
    }
}

/// All offers, those of one share beside each other and its own first.
pub(crate) fn offers<'a>(desired: &'a Desired, asked: &'a BTreeMap<String, Asked>) -> impl Iterator<Item = Offer<'a>> {
    desired.shares.values().flat_map(move |share| offers_of(share, asked))
}

/// The offers of one share, its own first.
pub(crate) fn offers_of<'a>(share: &'a Share, asked: &'a BTreeMap<String, Asked>) -> impl Iterator<Item = Offer<'a>> {
    let own = Offer { name: share.name.as_str(), share, asked: None };
    let others = asked.iter().filter(|(name, _)| share_of(name) == Some(share.name.as_str()));
    let others = others.map(|(name, asked)| Offer { name, share, asked: Some(asked) });
    std::iter::once(own).chain(others)
}

/// The share of which an endpoint was asked for: such endpoints are named `SHARE.WHATEVER`, and the name of a share
/// has no dot. None: the endpoint is a share's own.
pub(crate) fn share_of(endpoint: &str) -> Option<&str> {
    endpoint.split_once('.').map(|(share, _)| share)
}

/// The share that an endpoint belongs to.
pub(crate) fn share_name(endpoint: &str) -> &str {
    share_of(endpoint).unwrap_or(endpoint)
}
