//! `virtiofs-agent close`: ends sessions, whatever their guests are doing.

use std::fmt::Write;

use anyhow::{Result, ensure};
use virtiofs_contract::control::EndpointStatus;

use super::target::{endpoints, session};
use crate::args::CloseArgs;
use crate::output::{print, word};

/// Ends them with `--force`; without, says which would end.
pub(crate) fn close(args: &CloseArgs) -> Result<bool> {
    let mut client = super::broker(&args.runtime_dir)?;
    let status = client.status()?;
    let endpoints = endpoints(&status, &args.share)?;
    if let Some(id) = &args.session {
        let (at, _) = session(&status, id)?;
        let own = endpoints.iter().any(|it| it.endpoint.name == at.endpoint.name);
        ensure!(own, "session {id:?} is of share {:?}, not of {:?}", at.endpoint.name, args.share);
    }
    let meant = |id: &str| args.session.as_deref().is_none_or(|only| only == id);
    let sessions: Vec<_> = endpoints.iter().flat_map(|it| &it.sessions).filter(|it| meant(&it.id)).collect();
    if sessions.is_empty() {
        print(&format!("{}: no VM uses it\n", args.share))?;
        return Ok(true);
    }
    if !args.force {
        let mut text =
            format!("{}: with --force these VMs would lose the share until they are restarted:\n", args.share);
        for it in sessions {
            let requests = it.totals.requests();
            _ = writeln!(text, "    {}  {}  VMM {}  {requests} requests", it.id, word(&it.state), it.vmm_pid);
        }
        print(&text)?;
        return Ok(false);
    }
    let has = |it: &&EndpointStatus| it.sessions.iter().any(|session| meant(&session.id));
    for endpoint in endpoints.into_iter().filter(has) {
        for id in client.close(&endpoint.endpoint.name, args.session.clone())? {
            print(&format!("{id}: ended\n"))?;
        }
    }
    Ok(true)
}
