//! `virtiofs-agent release` and `resume`: the source is let go of, so that the host can unmount it, and taken up
//! again. Guests wait meanwhile.

use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, Result};

use super::target::endpoints;
use crate::args::{ReleaseArgs, ResumeArgs};
use crate::broker::client::Client;
use crate::output::print;

/// Lets go of the source at every endpoint of the share, or of none.
pub(crate) fn release(args: &ReleaseArgs) -> Result<bool> {
    let mut client = super::broker(&args.runtime_dir)?;
    let status = client.status()?;
    let endpoints = endpoints(&status, &args.share)?;
    let (mut waiting, mut until) = (0, u64::MAX);
    let mut released: Vec<&str> = Vec::new();
    for endpoint in &endpoints {
        let name = endpoint.endpoint.name.as_str();
        match client.release(name, args.during, args.force) {
            Ok(answer) => {
                // A source that was released before stays so whatever becomes of the others.
                released.extend(endpoint.released.is_none().then_some(name));
                waiting += answer.sessions.len();
                until = until.min(answer.until);
            }
            Err(error) => {
                take_back(&mut client, &released);
                return Err(error).with_context(|| format!("{} is not released", args.share));
            }
        }
    }
    let source = endpoints[0].endpoint.source.display();
    print(&format!(
        "{}: released until {}; {waiting} VMs wait\n    nothing of {source} is open any more: unmount it, change it, mount it\n    \
         -> virtiofs-agent resume {}\n",
        args.share,
        time(until),
        args.share
    ))?;
    Ok(true)
}

fn take_back(client: &mut Client, released: &[&str]) {
    for name in released {
        if let Err(error) = client.resume(name) {
            tracing::warn!(endpoint = name, %error, "not resumed; it goes on by itself after its time");
        }
    }
}

/// Takes the source up again at every endpoint of the share.
pub(crate) fn resume(args: &ResumeArgs) -> Result<bool> {
    let mut client = super::broker(&args.runtime_dir)?;
    let status = client.status()?;
    for endpoint in endpoints(&status, &args.share)? {
        let stays = || format!("{} stays released", args.share);
        client.resume(&endpoint.endpoint.name).with_context(stays)?;
    }
    print(&format!("{}: resumed\n", args.share))?;
    Ok(true)
}

/// A point in time for a person, to the second.
fn time(seconds: u64) -> impl std::fmt::Display {
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(seconds))
}
