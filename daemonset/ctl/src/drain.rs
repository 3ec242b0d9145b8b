//! `virtiofsctl drain`: ends all sessions of this host.

use std::fmt::Write;

use anyhow::Result;
use virtiofs_client::text::{name, print};

use crate::args::DrainArgs;

/// Ends all sessions with `--force`; without it, lists them.
pub(crate) fn drain(args: &DrainArgs) -> Result<bool> {
    let mut client = crate::broker(&args.location.runtime_dir)?;
    if args.force {
        let sessions = client.drain()?;
        print(&format!("{sessions} sessions ended; the broker serves nothing until it is started again\n"))?;
        return Ok(true);
    }
    let status = client.status()?;
    let sessions: Vec<_> = status.endpoints.iter().flat_map(|endpoint| &endpoint.sessions).collect();
    if sessions.is_empty() {
        print("no VM uses a share\n")?;
        return Ok(true);
    }
    let mut text = String::from("with --force these VMs would lose their shares until they are restarted:\n");
    for it in sessions {
        _ = writeln!(text, "    {}  {}  VMM {}", it.id, name(&it.state), it.vmm_pid);
    }
    print(&text)?;
    Ok(false)
}
