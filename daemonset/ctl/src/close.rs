//! `virtiofsctl close`: ends sessions, whatever their guests are doing.

use std::fmt::Write;

use anyhow::{Result, ensure};
use virtiofs_client::text::{name, print};
use virtiofs_contract::control::EndpointStatus;

use crate::args::CloseArgs;
use crate::target::{endpoints, session};

/// Ends sessions with `--force`; without it, lists those that would end.
pub(crate) fn close(args: &CloseArgs) -> Result<bool> {
    let mut client = crate::broker(&args.location.runtime_dir)?;
    let status = client.status()?;
    let endpoints = endpoints(&status, &args.share)?;
    if let Some(id) = &args.session {
        let (at, _) = session(&status, id)?;
        let own = endpoints.iter().any(|it| it.endpoint.name == at.endpoint.name);
        ensure!(own, "session {id:?} is of share {:?}, not of {:?}", at.endpoint.name, args.share);
    }
    let selected = |id: &str| args.session.as_deref().is_none_or(|only| only == id);
    let sessions: Vec<_> = endpoints.iter().flat_map(|it| &it.sessions).filter(|it| selected(&it.id)).collect();
    if sessions.is_empty() {
        print(&format!("{}: no VM uses it\n", args.share))?;
        return Ok(true);
    }
    if !args.force {
        let mut text =
            format!("{}: with --force these VMs would lose the share until they are restarted:\n", args.share);
        for it in sessions {
            let requests = it.totals.requests();
            _ = writeln!(text, "    {}  {}  VMM {}  {requests} requests", it.id, name(&it.state), it.vmm_pid);
        }
        print(&text)?;
        return Ok(false);
    }
    let has = |it: &&EndpointStatus| it.sessions.iter().any(|session| selected(&session.id));
    for endpoint in endpoints.into_iter().filter(has) {
        for id in client.close(&endpoint.endpoint.name, args.session.clone())? {
            print(&format!("{id}: ended\n"))?;
        }
    }
    Ok(true)
}
