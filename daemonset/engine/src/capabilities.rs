//! Capabilities: keeps exactly those that the configuration needs, and reads the result back from the kernel.

use caps::{CapSet, Capability, CapsHashSet};
use nix::unistd::geteuid;
use virtiofs_config::{EngineConfig, InodeFileHandles};
use virtiofs_contract::preflight::{Finding, Reason};

/// A capability and what it is for.
struct Need {
    capability: Capability,
    feature: &'static str,
}

/// The capabilities that the configuration needs, in a fixed order. The reasons are in the table of docs/MANUAL.md.
fn needs(config: &EngineConfig) -> Vec<Need> {
    let mut needs = Vec::new();
    let mut need = |capability, feature| needs.push(Need { capability, feature });
    if !config.writable() || config.inode_file_handles != InodeFileHandles::Never {
        need(Capability::CAP_DAC_READ_SEARCH, "reading files of any owner, and file handles");
    }
    if config.writable() {
        need(Capability::CAP_DAC_OVERRIDE, "writing files of any owner");
        need(Capability::CAP_SETUID, "creating files as the guest's user");
        need(Capability::CAP_SETGID, "creating files as the guest's group");
        need(Capability::CAP_CHOWN, "chown by the guest");
        need(Capability::CAP_FOWNER, "chmod, utimes and ACLs by the guest");
        need(Capability::CAP_FSETID, "keeping set-id bits that the guest sets");
    }
    if config.writable() && config.device_nodes {
        need(Capability::CAP_MKNOD, "spec.engine.deviceNodes");
    }
    if config.writable() && config.file_capabilities {
        need(Capability::CAP_SETFCAP, "spec.engine.fileCapabilities");
    }
    needs
}

/// Drops all other capabilities from all sets. Returns the names (without `CAP_`) of those that the kernel reports.
pub(crate) fn keep_needed(config: &EngineConfig, findings: &mut Vec<Finding>) -> Result<Vec<String>, Finding> {
    let permitted = caps::read(None, CapSet::Permitted).map_err(|e| failed("read", &e))?;
    let (have, missing): (Vec<_>, Vec<_>) =
        needs(config).into_iter().partition(|need| permitted.contains(&need.capability));
    // A user other than root serves with its own rights, as stock virtiofsd does: nothing is missing.
    if geteuid().is_root() {
        findings.extend(missing.iter().map(missing_capability));
    }
    let keep: CapsHashSet = have.iter().map(|need| need.capability).collect();
    drop_all_but(&keep)?;
    verify(&keep)
}

/// True if the engine may act as other users and groups, by the names of the capabilities that it has.
pub(crate) fn may_switch_users(held: &[String]) -> bool {
    ["SETUID", "SETGID"].iter().all(|needed| held.iter().any(|name| name == needed))
}

fn drop_all_but(keep: &CapsHashSet) -> Result<(), Finding> {
    // Emptying the bounding set needs SETPCAP. Without it the set stays, which is harmless: the set matters only to
    // programs that are executed later, with no_new_privs they gain nothing, and the system call filter allows none.
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).unwrap_or(false) {
        for capability in caps::all() {
            if !keep.contains(&capability) {
                // The kernel may know fewer capabilities than the crate; unknown ones can neither be dropped nor held.
                let _ = caps::drop(None, CapSet::Bounding, capability);
            }
        }
    }
    nix::sys::prctl::set_no_new_privs().map_err(|e| failed("no_new_privs", &e))?;
    caps::clear(None, CapSet::Inheritable).map_err(|e| failed("clear inheritable", &e))?;
    caps::clear(None, CapSet::Ambient).map_err(|e| failed("clear ambient", &e))?;
    caps::set(None, CapSet::Effective, keep).map_err(|e| failed("set effective", &e))?;
    caps::set(None, CapSet::Permitted, keep).map_err(|e| failed("set permitted", &e))
}

fn verify(keep: &CapsHashSet) -> Result<Vec<String>, Finding> {
    for set in [CapSet::Effective, CapSet::Permitted] {
        let left = caps::read(None, set).map_err(|e| failed("read back", &e))?;
        if left != *keep {
            return Err(failed("read back", &format!("{set:?} holds {left:?}, not {keep:?}")));
        }
    }
    let mut names: Vec<String> = keep.iter().map(|c| c.to_string().trim_start_matches("CAP_").to_owned()).collect();
    names.sort();
    Ok(names)
}

fn missing_capability(need: &Need) -> Finding {
    Finding {
        reason: Reason::CapabilityMissing,
        message: format!("{} is missing; it is needed for {}", need.capability, need.feature),
        remedy: format!(
            "give it to the broker: capabilities.add in Kubernetes, --cap-add under Podman, \
             AmbientCapabilities={} under systemd",
            need.capability
        ),
    }
}

fn failed(step: &str, error: &impl std::fmt::Display) -> Finding {
    Finding {
        reason: Reason::EngineFailed,
        message: format!("capabilities could not be dropped ({step}): {error}"),
        remedy: "run the broker with a seccomp profile that allows capset and prctl".into(),
    }
}

#[cfg(test)]
mod tests {
    use virtiofs_config::Access;

    use super::*;

    fn names(config: &EngineConfig) -> Vec<String> {
        needs(config).iter().map(|need| need.capability.to_string()).collect()
    }

    #[test]
    fn a_read_only_share_needs_one_capability() {
        assert_eq!(names(&EngineConfig::stock(Access::ReadOnly)), ["CAP_DAC_READ_SEARCH"]);
    }

    #[test]
    fn dangerous_capabilities_are_opt_in() {
        let stock = EngineConfig::stock(Access::ReadWrite);
        assert!(!names(&stock).iter().any(|c| c == "CAP_MKNOD" || c == "CAP_SETFCAP"));
        let asked = EngineConfig { device_nodes: true, file_capabilities: true, ..stock };
        assert!(names(&asked).contains(&"CAP_MKNOD".to_owned()));
        assert!(names(&asked).contains(&"CAP_SETFCAP".to_owned()));
        let read_only = EngineConfig { access: Access::ReadOnly, ..asked };
        assert_eq!(names(&read_only), ["CAP_DAC_READ_SEARCH"]);
    }

    #[test]
    fn a_writable_share_without_handles_needs_no_read_search() {
        let config =
            EngineConfig { inode_file_handles: InodeFileHandles::Never, ..EngineConfig::stock(Access::ReadWrite) };
        assert!(!names(&config).contains(&"CAP_DAC_READ_SEARCH".to_owned()));
    }
}
