//! `virtiofsctl socket`: an additional socket for a share, or for a directory of it.
//!
//! Only the broker knows these sockets. The agent reads them from the broker's status, applies changes of their share
//! to them, and removes them with it.

use anyhow::{Context, Result, ensure};
use virtiofs_client::endpoint::EndpointId;
use virtiofs_client::runtime_dir::RuntimeDir;
use virtiofs_client::text::print;
use virtiofs_contract::control::{Endpoint, EndpointKind, SocketSpec};
use virtiofs_crds::ShareName;

use crate::args::SocketArgs;
use crate::target::endpoints;

/// Adds the socket, changes it, or removes it.
pub(crate) fn socket(args: &SocketArgs) -> Result<bool> {
    ensure!(
        ShareName::parse(&args.name).is_ok(),
        "NAME: {:?} not a name of 1 to 63 characters of a-z, 0-9 and - that begins and ends with a letter or digit",
        args.name
    );
    let runtime_dir = RuntimeDir::at(&std::path::absolute(&args.location.runtime_dir).context("--runtime-dir")?);
    let mut client = crate::broker(&args.location.runtime_dir)?;
    let status = client.status()?;
    let own = &endpoints(&status, &args.share)?[0].endpoint;
    let name = EndpointId::socket(&args.share, &args.name).to_string();
    if args.remove {
        let known = status.endpoints.iter().find(|it| it.endpoint.name == name && it.listening);
        ensure!(known.is_some(), "there is no socket {:?} of share {:?}", args.name, args.share);
        client.remove(&name, false)?;
        print(&format!("{name}: removed; VMs that use it continue\n"))?;
        return Ok(true);
    }
    ensure!(own.name == args.share, "share {:?} is not declared any more; no socket can be added to it", args.share);
    let endpoint = Endpoint {
        socket: SocketSpec {
            path: runtime_dir.share_socket(&name),
            owner: args.owner.or(own.socket.owner),
            group: args.group.or(own.socket.group),
            mode: args.mode.unwrap_or(own.socket.mode),
        },
        name,
        kind: EndpointKind::Socket,
        sub_path: args.sub_path.clone(),
        ..own.clone()
    };
    let path = endpoint.socket.path.clone();
    client.apply(endpoint)?;
    print(&format!("{}\n", path.display()))?;
    Ok(true)
}
