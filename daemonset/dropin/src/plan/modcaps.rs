//! `--modcaps`. The engine has exactly the capabilities that its configuration needs, so only those that belong to a
//! setting can be added or removed.

use std::str::FromStr;

use caps::Capability;

use super::{Refusal, unsupported};
use crate::args::{FileHandles, Options};

/// Capabilities that stock virtiofsd has for files of all users. The engine has them where it needs them.
const DEFAULT: [Capability; 6] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
];

/// Settings that decide about a capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Modcaps {
    /// CAP_MKNOD.
    pub(super) device_nodes: bool,
    /// CAP_SETFCAP.
    pub(super) file_capabilities: bool,
}

/// Both are on by default, as for stock virtiofsd.
pub(super) fn modcaps(text: Option<&str>, options: &Options) -> Result<Modcaps, Refusal> {
    let mut result = Modcaps { device_nodes: true, file_capabilities: true };
    for change in text.map(|text| text.split(':')).into_iter().flatten() {
        let (add, capability) = parse(change)?;
        match capability {
            Capability::CAP_MKNOD => result.device_nodes = add,
            Capability::CAP_SETFCAP => result.file_capabilities = add,
            Capability::CAP_DAC_READ_SEARCH if !add && options.inode_file_handles != FileHandles::Never => {
                return Err(Refusal::Invalid("can't disable DAC_READ_SEARCH when file handles are used".into()));
            }
            Capability::CAP_DAC_READ_SEARCH if add || !options.readonly => {}
            other if add && DEFAULT.contains(&other) => {}
            _ => {
                return unsupported(
                    format!("--modcaps={change}"),
                    "the engine has exactly the capabilities that its other options need",
                );
            }
        }
    }
    Ok(result)
}

fn parse(change: &str) -> Result<(bool, Capability), Refusal> {
    let invalid = |what: String| Err(Refusal::Invalid(format!("--modcaps: {what}")));
    let Some((action, name)) = change.split_at_checked(1) else {
        return invalid("empty entry: expected (+|-)capability:...".into());
    };
    if !matches!(action, "+" | "-") {
        return invalid(format!("{change}: '+' or '-' is expected before the capability"));
    }
    match Capability::from_str(&format!("CAP_{}", name.to_uppercase())) {
        Ok(capability) => Ok((action == "+", capability)),
        Err(_) => invalid(format!("there is no capability {name}")),
    }
}
