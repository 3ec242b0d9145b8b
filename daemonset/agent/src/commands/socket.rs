//! `virtiofs-agent socket`: a share, or a directory of it, at a socket of its own, for one VM perhaps.
//!
//! The broker is the one that knows of such sockets: an agent reads them back from it, brings them into line with
//! their share, and takes them away with it.

use anyhow::{Context, Result, ensure};
use virtiofs_contract::control::{Endpoint, EndpointKind, SocketSpec};
use virtiofs_crds::ShareName;

use super::target::endpoints;
use crate::args::SocketArgs;
use crate::output::print;
use crate::runtime_dir::RuntimeDir;

/// Makes the socket, changes it, or takes it away.
pub(crate) fn socket(args: &SocketArgs) -> Result<bool> {
    ensure!(
        ShareName::parse(&args.name).is_ok(),
        "NAME: {:?} is not a name of 1 to 63 of a-z, 0-9 and -, beginning and ending with a letter or digit",
        args.name
    );
    let runtime_dir = RuntimeDir::at(&std::path::absolute(&args.runtime_dir).context("--runtime-dir")?);
    let mut client = super::broker(&args.runtime_dir)?;
    let status = client.status()?;
    let own = &endpoints(&status, &args.share)?[0].endpoint;
    let name = format!("{}.{}", args.share, args.name);
    if args.remove {
        let known = status.endpoints.iter().find(|it| it.endpoint.name == name && it.listening);
        ensure!(known.is_some(), "there is no socket {:?} of share {:?}", args.name, args.share);
        client.remove(&name, false)?;
        print(&format!("{name}: removed; VMs that use it go on\n"))?;
        return Ok(true);
    }
    ensure!(own.name == args.share, "share {:?} is declared no more; no sockets are added to it", args.share);
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
