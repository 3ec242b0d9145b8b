//! `virtiofsctl release` and `resume`: sessions close the source so that the host can unmount it, and open it again.
//! Guests wait in between.

use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, Result};
use virtiofs_client::broker::Client;
use virtiofs_client::text::print;

use crate::args::{ReleaseArgs, ResumeArgs};
use crate::target::endpoints;

/// Releases the source at every endpoint of the share, or at none.
pub(crate) fn release(args: &ReleaseArgs) -> Result<bool> {
    let mut client = crate::broker(&args.location.runtime_dir)?;
    let status = client.status()?;
    let endpoints = endpoints(&status, &args.share)?;
    let (mut waiting, mut until) = (0, u64::MAX);
    let mut released: Vec<&str> = Vec::new();
    for endpoint in &endpoints {
        let name = endpoint.endpoint.name.as_str();
        match client.release(name, args.during, args.force) {
            Ok(answer) => {
                // An endpoint that was released before stays so if another one fails.
                released.extend(endpoint.released.is_none().then_some(name));
                waiting += answer.sessions.len();
                until = until.min(answer.until);
            }
            Err(error) => {
                undo(&mut client, &released);
                return Err(error).with_context(|| format!("{} is not released", args.share));
            }
        }
    }
    let source = endpoints[0].endpoint.source.display();
    print(&format!(
        "{}: released until {}; {waiting} VMs wait\n    no file of {source} is open now: unmount it, change it, mount it\n    \
         -> virtiofsctl resume {}\n",
        args.share,
        time(until),
        args.share
    ))?;
    Ok(true)
}

fn undo(client: &mut Client, released: &[&str]) {
    for name in released {
        if let Err(error) = client.resume(name) {
            tracing::warn!(endpoint = name, %error, "not resumed; it resumes by itself after its time");
        }
    }
}

/// Ends the release at every endpoint of the share.
pub(crate) fn resume(args: &ResumeArgs) -> Result<bool> {
    let mut client = crate::broker(&args.location.runtime_dir)?;
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
