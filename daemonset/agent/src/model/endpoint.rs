//! The endpoints at which a share is to be served: its own, those that a person added, and pods' volumes.

use std::collections::BTreeMap;
use std::path::PathBuf;

use virtiofs_client::endpoint::share_of;
use virtiofs_client::runtime_dir::RuntimeDir;
use virtiofs_contract::control::{Endpoint, EndpointKind, SocketSpec};
use virtiofs_crds::Share;

use super::desired::Desired;
use super::source::Source;

/// A requested endpoint, in addition to the share's own.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Requested {
    /// The endpoint as last seen in the broker; for a volume only the part that does not follow from its share.
    pub(crate) endpoint: Endpoint,
    /// Who requested it.
    pub(crate) by: Requester,
}

/// Who requested an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Requester {
    /// A person, at a broker. A broker that continues the sessions of another one has the same instance.
    Broker {
        /// Identity of the broker's counts.
        instance: u64,
    },
    /// A pod, as a volume.
    Volume,
}

/// An endpoint at which a declared share is to be served.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DesiredEndpoint<'a> {
    /// Name of the endpoint.
    pub(crate) name: &'a str,
    /// The share.
    pub(crate) share: &'a Share,
    /// The request; `None` for the share's own endpoint.
    requested: Option<&'a Requested>,
}

impl DesiredEndpoint<'_> {
    /// The endpoint to apply, given the share's source. The requester chooses the socket and the part of the source; all
    /// else follows from the share.
    pub(crate) fn resolve(&self, runtime_dir: &RuntimeDir, source: &Source) -> Endpoint {
        let own = own_endpoint(runtime_dir, self.share, source);
        let Some(requested) = self.requested else { return own };
        let socket = match requested.by {
            Requester::Broker { .. } => requested.endpoint.socket.clone(),
            // The share says who may connect; the pod only which group is its own.
            Requester::Volume => SocketSpec {
                path: requested.endpoint.socket.path.clone(),
                group: requested.endpoint.socket.group.or(own.socket.group),
                ..own.socket
            },
        };
        Endpoint {
            source: own.source,
            engine: own.engine,
            exclusive: own.exclusive,
            socket,
            ..requested.endpoint.clone()
        }
    }

    /// True for a volume's endpoint.
    pub(crate) fn is_volume(&self) -> bool {
        self.requested.is_some_and(|requested| requested.by == Requester::Volume)
    }
}

/// All desired endpoints, those of one share next to each other and its own first.
pub(crate) fn desired_endpoints<'a>(
    desired: &'a Desired,
    requested: &'a BTreeMap<String, Requested>,
) -> impl Iterator<Item = DesiredEndpoint<'a>> {
    desired.shares.values().flat_map(move |share| endpoints_of(share, requested))
}

/// The desired endpoints of one share, its own first.
pub(crate) fn endpoints_of<'a>(
    share: &'a Share,
    requested: &'a BTreeMap<String, Requested>,
) -> impl Iterator<Item = DesiredEndpoint<'a>> {
    let own = DesiredEndpoint { name: share.name.as_str(), share, requested: None };
    let others = requested.iter().filter(|(name, _)| share_of(name) == share.name.as_str());
    let others = others.map(|(name, requested)| DesiredEndpoint { name, share, requested: Some(requested) });
    std::iter::once(own).chain(others)
}

/// A share's own endpoint, given its source.
pub(crate) fn own_endpoint(runtime_dir: &RuntimeDir, share: &Share, source: &Source) -> Endpoint {
    Endpoint {
        sub_path: None,
        name: share.name.to_string(),
        kind: EndpointKind::Share,
        source: source.path.clone(),
        socket: SocketSpec {
            path: runtime_dir.share_socket(share.name.as_str()),
            owner: share.socket.owner,
            group: share.socket.group,
            mode: share.socket.mode,
        },
        engine: share.engine.clone(),
        exclusive: share.exclusive,
        consumer: None,
    }
}

/// The directory on which a trial of an endpoint runs. A directory below a source may hang where the rest does not.
pub(crate) fn trial_path(endpoint: &Endpoint) -> PathBuf {
    endpoint.sub_path.as_ref().map_or_else(|| endpoint.source.clone(), |below| endpoint.source.join(below))
}
