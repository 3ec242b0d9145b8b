//! What confines the engine besides its sandbox, and what that leaves open.

use std::path::Path;

use nix::unistd::getpid;
use virtiofs_config::{EngineConfig, InodeFileHandles, Sandbox};
use virtiofs_contract::preflight::{Confinement, Finding, Reason};

use crate::landlock;
use crate::sandbox::Jail;

/// Restricts this process further, and reports what confines it. Files can still be opened for the library.
pub(crate) fn complete(
    config: &EngineConfig,
    jail: &Jail,
    handles: InodeFileHandles,
    findings: &mut Vec<Finding>,
) -> Confinement {
    let in_reach = jail.weakness.is_some();
    let below = (in_reach && handles == InodeFileHandles::Never).then(|| Path::new(&jail.root_dir));
    let enforced = landlock::restrict(config.writable(), below);
    hide_from_siblings(jail);
    if let Some(why) = jail.weakness.as_ref().filter(|_| !enforced.paths) {
        findings.push(weak(jail.mode, why));
    }
    Confinement {
        pid_namespace: getpid().as_raw() == 1,
        source_only: !in_reach || enforced.paths,
        landlock_abi: enforced.abi,
    }
}

/// Makes the entries of this process in `/proc` root's, so that no other process of its user can open its memory or its
/// descriptors. In a user namespace of its own nobody else has its rights, and the broker counts its descriptors.
fn hide_from_siblings(jail: &Jail) {
    if !jail.user_namespace
        && let Err(error) = nix::sys::prctl::set_dumpable(false)
    {
        tracing::warn!("PR_SET_DUMPABLE: {error}");
    }
}

fn weak(mode: Sandbox, why: &str) -> Finding {
    let mode = if mode == Sandbox::None { "None" } else { "Chroot" };
    Finding {
        reason: Reason::SandboxWeak,
        message: format!(
            "sandbox {mode} hides other mounts from guests, not from an engine that a guest has taken over: {why}"
        ),
        remedy: "allow user namespaces and mounts to the broker (seccomp and AppArmor profile of its container, \
                 user.max_user_namespaces), or give it CAP_SYS_ADMIN and set spec.engine.sandbox to Namespace"
            .into(),
    }
}

#[cfg(test)]
mod tests;
