//! What is done for one machine, as a pure function of what virt-launcher hands over.

use crate::domain::{DomainError, with_filesystems};
use crate::filesystems::{AnnotationError, filesystems};

/// Why a machine cannot have the file systems it asks for.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// What it asks for makes no sense.
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    /// Its domain excludes them.
    #[error(transparent)]
    Domain(#[from] DomainError),
    /// Its domain is no text.
    #[error("the domain is not UTF-8")]
    NotText(#[from] std::str::Utf8Error),
}

/// The domain of a machine, with the file systems that its annotations ask for.
///
/// # Errors
/// When they cannot be had; virt-launcher shows the message in an event of the machine.
pub fn on_define_domain(machine: &[u8], domain: &[u8]) -> Result<String, HookError> {
    let filesystems = filesystems(machine)?;
    let names: Vec<String> = filesystems.iter().map(|it| format!("{} at {}", it.tag, it.socket)).collect();
    let domain = with_filesystems(std::str::from_utf8(domain)?, &filesystems)?;
    tracing::info!(filesystems = names.join(", "), "the domain has them");
    Ok(domain)
}
