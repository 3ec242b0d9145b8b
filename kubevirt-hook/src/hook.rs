//! Adds file systems to the domain of one machine: a pure function of what virt-launcher passes.

use crate::domain::{DomainError, with_filesystems};
use crate::filesystems::{AnnotationError, filesystems};

/// Why a machine cannot have the requested file systems.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// Its annotations are invalid.
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    /// Its domain excludes them.
    #[error(transparent)]
    Domain(#[from] DomainError),
    /// Its domain is not text.
    #[error("the domain is not UTF-8")]
    NotText(#[from] std::str::Utf8Error),
}

/// The domain of a machine with the file systems that its annotations request.
///
/// # Errors
/// They are not possible; virt-launcher shows the message in an event of the machine.
pub fn on_define_domain(machine: &[u8], domain: &[u8]) -> Result<String, HookError> {
    let filesystems = filesystems(machine)?;
    let names: Vec<String> = filesystems.iter().map(|it| format!("{} at {}", it.tag, it.socket)).collect();
    let domain = with_filesystems(std::str::from_utf8(domain)?, &filesystems)?;
    tracing::info!(filesystems = names.join(", "), "file systems added to the domain");
    Ok(domain)
}
