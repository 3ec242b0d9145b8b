//! The name of a session: in logs, and as the label `share` of metrics.

use std::hash::Hasher;
use std::path::Path;

use siphasher::sip::SipHasher;

/// Most bytes of the directory's name in it.
const LONGEST: usize = 40;

/// From the directory and what distinguishes this VM: the same at each start of the VM.
pub(crate) fn of_session(directory: &Path, distinct: &str) -> String {
    let base = directory.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
    let plain: String = base.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(LONGEST).collect();
    let plain = plain.trim_matches('-');
    let plain = if plain.is_empty() { "root" } else { plain };
    let mut hasher = SipHasher::new();
    hasher.write(distinct.as_bytes());
    format!("{plain}-{:08x}", hasher.finish() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_is_stable_and_valid() {
        let name = |path: &str, socket| of_session(Path::new(path), socket);
        assert_eq!(name("/srv/My Images", "/run/a.sock"), name("/srv/My Images", "/run/a.sock"));
        assert_ne!(name("/srv/images", "/run/a.sock"), name("/srv/images", "/run/b.sock"));
        assert!(name("/srv/My Images", "a").starts_with("my-images-"));
        assert!(name("/", "a").starts_with("root-"));
        assert!(name("/srv/é", "a").starts_with("root-"));
        assert!(name(&format!("/{}", "x".repeat(200)), "a").len() <= LONGEST + 9);
    }
}
